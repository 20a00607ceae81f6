"""The ranks' common look at how a phase goes: every half second or so, at the same step on each."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from fedloom_client.training.group import Group
from fedloom_client.training.orders import Cancelled, WorkerProgress
from fedloom_common.errors import TrainingFailed

INTERVAL_S = 0.5  # a cancel takes effect within this and a step
MAX_STEPS = 64  # between two looks, however short the steps
PROGRESS_S = 1.0


class Pulse:
    """Sums the steps' values over the ranks, and agrees on whether to go on.

    How many steps lie between two looks follows from rank 0's clock, so that long steps are watched
    one by one and short ones are not slowed down by the all-reduce (nor by waiting for a GPU).
    """

    def __init__(
        self,
        group: Group,
        values: torch.Tensor,
        stop_wanted: Callable[[], bool],
        what: str,
        earlier: Sequence[float] = (),
    ) -> None:
        """``earlier`` are the sums of the first steps, if those were taken before."""
        self._group, self._values, self._stop_wanted, self._what = group, values, stop_wanted, what
        self._seen, self._interval = len(earlier), 1
        self._step_s = 0.0
        self._looked = time.monotonic()
        self.sums = list(earlier)
        """Over the ranks, of the steps seen so far."""

    def after(self, step: int, *, is_due: bool = False) -> bool:
        """Call after every step, from 0; whether a look was due, and ``sums`` has grown.

        ``is_due`` asks for a look now, on every rank alike.

        Raises:
            Cancelled: the daemon no longer wants the work.
            TrainingFailed: a value is not finite.
        """
        done = step + 1
        if not is_due and done < self._seen + self._interval and done < len(self._values):
            return False
        mine = [float(self._stop_wanted()), self._step_s] if self._group.rank == 0 else [0.0, 0.0]
        agreed = torch.cat([self._values[self._seen : done], self._values.new_tensor(mine)])
        *sums, stop, step_s = self._group.sum(agreed).tolist()
        now = time.monotonic()
        self._step_s, self._looked = (now - self._looked) / (done - self._seen), now
        self._check(sums)
        if stop:
            raise Cancelled
        self.sums += sums
        self._seen = done
        if step_s > 0:
            self._interval = max(1, min(MAX_STEPS, int(INTERVAL_S / step_s)))
        return True

    def _check(self, sums: list[float]) -> None:
        for step, value in enumerate(sums, start=self._seen + 1):
            if not math.isfinite(value):
                raise TrainingFailed(
                    f"the loss is {value} at step {step} of {len(self._values)} of {self._what}: lower the "
                    "learning rate, or set clip_norm"
                )


class TrainProgress:
    """Reports of a training about once a second: the loss since the last one, and the throughput."""

    def __init__(
        self, report: Callable[[WorkerProgress], None], steps: int, *, done: int = 0, targets: int = 0
    ) -> None:
        self._report, self._steps = report, steps
        self._reported, self._targets, self._time = done, targets, time.monotonic()
        report(WorkerProgress(phase="train", done=done, total=steps))

    def after(self, losses: list[float], targets: int) -> None:
        """Tell of the losses and targets of all steps so far, if it is time or the last step is done."""
        done, now = len(losses), time.monotonic()
        if now - self._time < PROGRESS_S and done < self._steps:
            return
        new = losses[self._reported :]
        self._report(
            WorkerProgress(
                phase="train",
                done=done,
                total=self._steps,
                loss=sum(new) / len(new),
                tokens_per_s=(targets - self._targets) / (now - self._time),
            )
        )
        self._reported, self._targets, self._time = done, targets, now
