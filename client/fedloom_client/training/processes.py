"""Process lifetimes: no rank outlives its launcher, no launcher outlives the daemon, none dies of its end."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens.

    The kernel watches the parent's *thread* that started this process, so parents start
    children from their main thread. Elsewhere than on Linux this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it ended before the call above
        sys.exit(f"the parent process {parent_pid} has gone")


def leave_at_once() -> None:
    """End this process with success, without taking the interpreter down.

    Threads of torch's process groups drop tensors late, for which they need the interpreter; one that
    asks for it while it is taken down aborts the process (torch issues 38228 and 190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
