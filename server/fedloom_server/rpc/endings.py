"""Ends of calls that come from elsewhere than their handlers, with a reason that the caller is told.

A handler that is merely cancelled tells its caller nothing, and the caller waits for ever.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fedloom_common.errors import FederationError, NotPermitted
from fedloom_server.rpc.access import Access, Context


class Endings:
    """Calls that may be ended; each runs in a task of its own."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._contexts: dict[asyncio.Task[object], Context] = {}
        self._reasons: dict[asyncio.Task[object], FederationError] = {}

    @contextmanager
    def possible(self, context: Context) -> Iterator[None]:
        """The present task's call, inside the block.

        Raises:
            FederationError: the reason that ``end`` was given.
        """
        task = current_call()
        self._contexts[task] = context
        try:
            yield
        except asyncio.CancelledError:
            if (reason := self._reasons.get(task)) is None:
                raise
            task.uncancel()
            raise reason from None
        finally:
            del self._contexts[task]
            self._reasons.pop(task, None)

    def end(self, call: asyncio.Task[object], reason: FederationError) -> bool:
        """End a call; False if it has ended or is ending."""
        if call not in self._contexts or call in self._reasons:
            return False
        self._reasons[call] = reason
        return call.cancel()

    def sweep(self) -> int:
        """End every call whose certificate has expired or been revoked meanwhile; tells how many."""
        ended = 0
        for call, context in list(self._contexts.items()):
            try:
                self._access.certificate(context)
            except NotPermitted as error:
                ended += self.end(call, error)
        return ended


def current_call() -> asyncio.Task[object]:
    """The task of the call that is being handled."""
    task = asyncio.current_task()
    assert task is not None, "a handler runs in a task"
    return task
