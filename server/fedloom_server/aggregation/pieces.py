"""Tensors in pieces, worked off by a few threads."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from fedloom_common.tensors import ITEM_BYTES, TensorInfo

PIECE_VALUES = 1 << 17  # 1 MiB in float64: past the L2 cache a fold runs at half the speed
TURN_PIECES = 8  # neighbours go to one thread, as encoded tensors are read fastest in order
MOST_THREADS = 4
ALONE_BYTES = 8 << 20  # a second thread would cost more than it saves


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring values of one tensor."""

    info: TensorInfo
    start: int
    """Index of the first value."""
    count: int

    @property
    def start_bytes(self) -> int:
        """Place of the first value within the tensor."""
        return self.start * ITEM_BYTES[self.info.dtype]


Work = Callable[[Piece], None]


def each_piece(
    infos: Sequence[TensorInfo],
    make_work: Callable[[ExitStack], Work],
    *,
    most_threads: int = MOST_THREADS,
) -> None:
    """Do some work on every piece of every tensor, in no order that matters.

    Each thread makes its own, with files that it opens on the stack. The first error ends all.
    """
    turns, lock, failed = _turns(infos), threading.Lock(), threading.Event()

    def run() -> None:
        try:
            with ExitStack() as stack:
                work = make_work(stack)
                while not failed.is_set():
                    with lock:
                        turn = next(turns, None)
                    if turn is None:
                        return
                    for piece in turn:
                        work(piece)
        except BaseException:
            failed.set()
            raise

    total_bytes = sum(info.size_bytes for info in infos)
    threads = 1 if total_bytes < ALONE_BYTES else min(most_threads, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="fold") as pool:
        for done in [pool.submit(run) for _ in range(threads)]:
            done.result()


def in_order(infos: Sequence[TensorInfo]) -> Iterator[Piece]:
    """Every piece of every tensor, first to last."""
    return (piece for turn in _turns(infos) for piece in turn)


def _turns(infos: Sequence[TensorInfo]) -> Iterator[list[Piece]]:
    for info in infos:
        values = info.size_bytes // ITEM_BYTES[info.dtype]
        for begin in range(0, values, TURN_PIECES * PIECE_VALUES):
            end = min(values, begin + TURN_PIECES * PIECE_VALUES)
            starts = range(begin, end, PIECE_VALUES)
            yield [Piece(info, start, min(PIECE_VALUES, end - start)) for start in starts]
