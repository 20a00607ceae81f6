"""Heavy work off the event loop."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def until_done(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do work in a thread; a caller that is cancelled goes on only when the work has ended.

    A thread cannot be stopped: whoever went on without it could meet it at the same files later.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):  # one more
                await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # the cancellation is what the caller hears of
        raise
