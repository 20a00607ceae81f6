import asyncio
import threading

import pytest

from fedloom_common.threads import until_done


async def test_a_caller_that_is_cancelled_again_and_again_goes_on_only_when_the_work_has_ended():
    begun, gate = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait(60)

    working = asyncio.create_task(until_done(work))
    while not begun.is_set():  # noqa: ASYNC110 (work of a thread)
        await asyncio.sleep(0.01)
    for _ in range(3):
        working.cancel()
        await asyncio.sleep(0.01)
        assert not working.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await working
