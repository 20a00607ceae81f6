"""Memory of a process that moves tensors."""

import ctypes
import logging
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT_BYTES = 32 << 20  # the most that glibc accepts for both
_ARENAS = 2  # each keeps the most that its threads ever needed

logger = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Have glibc keep freed chunks for the next ones: giving each back is half of the system time.

    Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    options = {_M_TRIM_THRESHOLD: _KEPT_BYTES, _M_MMAP_THRESHOLD: _KEPT_BYTES, _M_ARENA_MAX: _ARENAS}
    if mallopt is None or not all(mallopt(option, value) for option, value in options.items()):
        logger.debug("the C library's allocator is not tuned for transfers")
