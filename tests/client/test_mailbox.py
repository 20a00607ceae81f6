"""What waits to be sent, and how long one waits before the next try."""

import asyncio

import pytest

from fedloom_client.backoff import Backoff
from fedloom_client.mailbox import PROGRESS_INTERVAL_S, Mailbox
from fedloom_client.messages import Progress, Refusal


def progress(name: str, done: int) -> Progress:
    return Progress(assignment_id=name, phase="train", done=done)


async def test_answers_go_first_and_end_the_progress_of_their_assignment() -> None:
    mailbox = Mailbox()
    mailbox.open()
    mailbox.note(progress("a", 1))
    mailbox.note(progress("b", 1))
    mailbox.post(Refusal(assignment_id="a", reason="no"))
    assert await mailbox.take() == [Refusal(assignment_id="a", reason="no")]
    assert await mailbox.take() == [progress("b", 1)]


async def test_only_the_latest_progress_of_each_assignment_is_sent() -> None:
    mailbox = Mailbox()
    for done in range(100):
        mailbox.note(progress("a", done))
        mailbox.note(progress("b", done))
    assert await mailbox.take() == [progress("a", 99), progress("b", 99)]


async def test_progress_waits_for_its_turn() -> None:
    clock = asyncio.get_running_loop().time
    mailbox = Mailbox()
    began_s = clock()
    mailbox.note(progress("a", 1))
    await mailbox.take()
    mailbox.note(progress("a", 2))
    assert await mailbox.take() == [progress("a", 2)]
    assert clock() - began_s >= PROGRESS_INTERVAL_S


async def test_answers_do_not_wait_for_the_turn_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom_client.mailbox.PROGRESS_INTERVAL_S", 1000.0)
    mailbox = Mailbox()
    mailbox.open()
    mailbox.note(progress("a", 1))
    await mailbox.take()
    mailbox.note(progress("a", 2))
    asyncio.get_running_loop().call_later(0.02, mailbox.post, Refusal(assignment_id="b", reason="no"))
    assert await asyncio.wait_for(mailbox.take(), 60) == [Refusal(assignment_id="b", reason="no")]


async def test_what_could_not_be_sent_is_forgotten_with_the_session() -> None:
    mailbox = Mailbox()
    mailbox.post(Refusal(assignment_id="a", reason="before"))
    mailbox.open()
    mailbox.post(Refusal(assignment_id="b", reason="during"))
    mailbox.close()
    mailbox.open()
    mailbox.note(progress("c", 1))
    assert await mailbox.take() == [progress("c", 1)]


async def test_nothing_more_is_said_of_an_assignment_that_is_no_longer_wanted() -> None:
    mailbox = Mailbox()
    mailbox.open()
    mailbox.note(progress("a", 1))
    mailbox.post(Refusal(assignment_id="b", reason="no"))
    mailbox.forget("a")
    mailbox.forget("b")
    mailbox.note(progress("c", 1))
    assert await mailbox.take() == [progress("c", 1)]


def test_pauses_grow_to_a_bound_and_begin_again_after_a_success() -> None:
    backoff = Backoff(first_s=1, longest_s=8)
    pauses = [backoff.next_s() for _ in range(200)]
    assert all(0 <= pause <= bound for pause, bound in zip(pauses, [1, 2, 4, 8] + [8] * 196, strict=True))
    assert max(pauses) > 4
    backoff.reset()
    assert backoff.next_s() <= 1


def test_what_only_a_person_can_mend_is_tried_seldom() -> None:
    backoff = Backoff(first_s=1, longest_s=8)
    assert all(4 <= backoff.slowest_s() <= 8 for _ in range(100))
