"""Memory of a process that moves tensors, or computes with them."""

import ctypes
import logging
import sys
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h
_KEPT_BYTES = 32 << 20  # the most that glibc accepts for both
_NO_LIMIT_BYTES = (1 << 31) - 1  # mallopt takes an int
_ARENAS = 2  # each keeps the most that its threads ever needed

logger = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Have glibc keep freed chunks for the next ones: giving each back is half of the system time.

    Does nothing where the C library is another.
    """
    _set({_M_TRIM_THRESHOLD: _KEPT_BYTES, _M_MMAP_THRESHOLD: _KEPT_BYTES, _M_ARENA_MAX: _ARENAS})


def keep_memory_between_steps() -> None:
    """Have glibc keep all freed memory until it is given back, however large the pieces.

    Every training step frees and takes the same activations: having the kernel clear their pages anew each
    time takes 5 to 8 % of a small model's step on a CPU. Does nothing where the C library is another.
    """
    _set({_M_TRIM_THRESHOLD: _NO_LIMIT_BYTES, _M_MMAP_MAX: 0})


def give_memory_back() -> None:
    """Return to the system what is kept and not in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _set(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not all(mallopt(option, value) for option, value in options.items()):
        logger.debug("the C library's allocator is not tuned", extra={"options": dict(options)})
