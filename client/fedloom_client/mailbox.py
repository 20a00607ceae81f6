"""What waits to be sent over the session: answers in order, and of progress only the latest."""

import asyncio
from collections import deque

from fedloom_client.messages import Answer, Progress

PROGRESS_INTERVAL_S = 0.2


class Mailbox:
    """Outgoing messages of the session.

    While no session is open, answers are dropped: the coordinator sends each open assignment
    again after a reconnect, and is answered again.
    Memory: one progress message an assignment, and the answers of one burst.
    """

    def __init__(self) -> None:
        self._answers: deque[Answer] = deque()
        self._progress: dict[str, Progress] = {}
        self._progress_due_s = 0.0
        self._filled = asyncio.Event()
        self._is_open = False

    def open(self) -> None:
        """A session can take messages now."""
        self._is_open = True

    def close(self) -> None:
        """No session: forget what was not sent."""
        self._is_open = False
        self._answers.clear()

    def post(self, answer: Answer) -> None:
        """Send an answer, at once."""
        self._progress.pop(answer.assignment_id, None)
        if self._is_open:
            self._answers.append(answer)
            self._filled.set()

    def note(self, progress: Progress) -> None:
        """Send progress within a fraction of a second, unless newer progress replaces it."""
        self._progress[progress.assignment_id] = progress
        self._filled.set()

    def forget(self, assignment_id: str) -> None:
        """Send no more about an assignment."""
        self._progress.pop(assignment_id, None)
        self._answers = deque(a for a in self._answers if a.assignment_id != assignment_id)

    async def take(self) -> list[Answer | Progress]:
        """Wait for messages to send, and take them."""
        clock = asyncio.get_running_loop().time
        while True:
            if self._answers:
                answers = list(self._answers)
                self._answers.clear()
                return list(answers)
            if self._progress and clock() >= self._progress_due_s:
                self._progress_due_s = clock() + PROGRESS_INTERVAL_S
                progress = list(self._progress.values())
                self._progress.clear()
                return list(progress)
            self._filled.clear()
            try:
                async with asyncio.timeout(self._progress_due_s - clock() if self._progress else None):
                    await self._filled.wait()
            except TimeoutError:
                continue
