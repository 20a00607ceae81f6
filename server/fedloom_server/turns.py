"""Whose update may arrive now: a queue before a limited number of uploads."""

from collections.abc import Callable


class UploadTurns:
    """Lets waiting uploads go ahead, first come, first served."""

    def __init__(self, concurrent_uploads: int, on_turn: Callable[[str], bool]) -> None:
        """``on_turn`` hears whose turn has come, and says whether it can be taken."""
        self._concurrent_uploads = concurrent_uploads
        self._on_turn = on_turn
        self._waiting: list[str] = []
        self._under_way: set[str] = set()

    def ask(self, name: str) -> None:
        """Join the queue; whoever has its turn already is told again."""
        if name in self._under_way:
            self._on_turn(name)
        elif name not in self._waiting:
            self._waiting.append(name)
            self._go_on()

    def leave(self, name: str) -> None:
        """Give up one's place or turn; another may have it."""
        self._under_way.discard(name)
        if name in self._waiting:
            self._waiting.remove(name)
        self._go_on()

    def is_waiting(self, name: str) -> bool:
        """Whether one's turn has yet to come."""
        return name in self._waiting

    def _go_on(self) -> None:
        while self._waiting and len(self._under_way) < self._concurrent_uploads:
            name = self._waiting.pop(0)
            if self._on_turn(name):
                self._under_way.add(name)
