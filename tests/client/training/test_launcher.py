"""Which failure is told of, when several ranks fail."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fedloom_client.training.launcher import describe_failure, own_address


def raised(folder: Path, rank: int, message: str, *, second: int, order: int = 0) -> ProcessFailure:
    file = folder / f"{rank}.json"
    traceback = "Traceback:\n" + "".join(f"  line {number}\n" for number in range(30)) + message
    facts = {"message": message, "extraInfo": {"py_callstack": traceback, "timestamp": str(second)}}
    file.write_text(json.dumps({"message": facts}))
    os.utime(file, ns=(0, second * 10**9 + order))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(file))


def killed(rank: int, sign: int, *, second: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=-sign, error_file="")
    failure.timestamp = second
    return failure


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        pytest.param(
            lambda folder: {0: raised(folder, 0, "Lost: reset", second=50), 1: killed(1, 9, second=51)},
            "rank 1 was killed (SIGKILL)",
            id="killed-before-its-peers-noticed",
        ),
        pytest.param(
            lambda folder: {0: raised(folder, 0, "Lost: timed out", second=50), 1: killed(1, 9, second=80)},
            "Lost: timed out",
            id="ended-by-torchrun-later",
        ),
        pytest.param(
            lambda folder: {
                0: raised(folder, 0, "Lost: reset", second=50, order=7),
                1: raised(folder, 1, "ValueError: the cause", second=50, order=3),
            },
            "ValueError: the cause",
            id="raised-first-in-the-same-second",
        ),
        pytest.param(
            lambda _: {1: killed(1, 11, second=50)}, "rank 1 died of SIGSEGV", id="crashed"
        ),
    ],
)  # fmt: skip
def test_the_first_cause_is_told(tmp_path: Path, failures: Any, expected: str) -> None:
    text = describe_failure(ChildFailedError("worker", failures(tmp_path)))
    assert expected in text
    assert len(text.splitlines()) <= 16


def test_this_hosts_address_is_the_one_on_the_way_to_the_meeting_point() -> None:
    assert own_address("127.0.0.1:29400") == "127.0.0.1"
    assert own_address("[::1]:29400") == "::1"
