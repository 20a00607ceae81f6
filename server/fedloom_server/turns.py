"""Whose update may arrive now: a queue before a limited number of uploads, and of updates on disk."""

from collections.abc import Callable


class UploadTurns:
    """Lets waiting uploads go ahead, first come, first served."""

    def __init__(
        self,
        *,
        concurrent_uploads: int,
        staged_updates: int,
        on_turn: Callable[[str], bool],
        is_next: Callable[[str], bool],
        on_stuck: Callable[[], None],
    ) -> None:
        """``on_turn`` hears whose turn has come, and says whether it can be taken.

        ``is_next`` tells of an update that all staged ones wait for: it may arrive beyond their number.
        ``on_stuck`` is called when nobody can go on before a staged update is released.
        """
        self._concurrent_uploads = concurrent_uploads
        self._staged_updates = staged_updates
        self._on_turn = on_turn
        self._is_next = is_next
        self._on_stuck = on_stuck
        self._was_stuck = False
        self._waiting: list[str] = []
        self._under_way: set[str] = set()
        self._staged: set[str] = set()

    def ask(self, name: str) -> None:
        """Join the queue; whoever has its turn already is told again."""
        if name in self._under_way:
            self._on_turn(name)
        elif name not in self._waiting:
            self._waiting.append(name)
            self._go_on()

    def stage(self, name: str) -> None:
        """An update has come and lies on disk."""
        self._staged.add(name)
        self.leave(name)

    def release(self, name: str) -> None:
        """A staged update is no longer needed."""
        self._staged.discard(name)
        self._go_on()

    def release_all(self, begin: str) -> None:
        """Those staged updates are no longer needed whose names begin so."""
        for name in [name for name in self._staged if name.startswith(begin)]:
            self.release(name)

    def leave(self, name: str) -> None:
        """Give up one's place or turn; another may have it."""
        self._under_way.discard(name)
        if name in self._waiting:
            self._waiting.remove(name)
        self._go_on()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @property
    def staged(self) -> int:
        """How many updates lie on disk."""
        return len(self._staged)

    def is_waiting(self, name: str) -> bool:
        """Whether one's turn has yet to come."""
        return name in self._waiting

    @property
    def is_stuck(self) -> bool:
        """Whether somebody waits, for nothing but room on disk."""
        return bool(self._waiting) and not self._under_way

    def _go_on(self) -> None:
        while (name := self._first()) is not None:
            self._waiting.remove(name)
            if self._on_turn(name):
                self._under_way.add(name)
        was_stuck, self._was_stuck = self._was_stuck, self.is_stuck
        if self._was_stuck and not was_stuck:
            self._on_stuck()

    def _first(self) -> str | None:
        if len(self._under_way) >= self._concurrent_uploads:
            return None
        if len(self._under_way) + len(self._staged) < self._staged_updates:
            return next(iter(self._waiting), None)
        return next((name for name in self._waiting if self._is_next(name)), None)
