"""What the C library keeps of freed memory, counted by the kernel in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's options")

STEPS = """
import resource
import sys
import numpy as np
from fedloom_common.memory import give_memory_back, keep_memory_between_steps

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "keep":
    keep_memory_between_steps()
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [np.ones(5_000_000) for _ in range(3)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
held = resident()
give_memory_back()
print(held - resident())
"""


def steps(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True)
    faults, given_back = map(int, done.stdout.split())
    return faults, given_back


def test_steps_that_need_the_same_memory_again_ask_the_kernel_for_none_and_idle_ranks_give_it_back() -> None:
    usual, _ = steps("usual")
    kept, given_back = steps("keep")
    assert usual > 10 * 3 * 40_000_000 / 4096 / 600  # transparent huge pages make fewer, never none
    assert kept < usual / 10
    assert given_back > 100_000_000
