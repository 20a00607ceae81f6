"""Claims about faults that go on for minutes: `make soak MINUTES=60` does the same for longer."""

import pytest
from faults.chaos import soak

MINUTES = 2.0


@pytest.mark.faults(
    injected="kills, pauses (SIGSTOP), cuts, half-open connections and slow lines at random, for minutes",
    must="nothing finished is lost, nothing counts twice (the mean is what sites sent), no process hangs; "
    "memory, open files and disk stay bounded",
)
@pytest.mark.timeout(900)
async def test_minutes_of_random_faults_lose_nothing_and_count_nothing_twice(tmp_path, seen):
    faults, runs = await soak(tmp_path, MINUTES, seed=11, seen=seen)
    assert {"kill coordinator", "kill site", "kill all", "pause", "cut"} <= set(faults)
    assert runs
