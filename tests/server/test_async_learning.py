"""Whether an asynchronous run learns: logistic regression at four sites of different data and speed."""

import asyncio
import logging
import time

import numpy as np
import pytest

FEATURES, CLASSES, EXAMPLES, STEPS, BATCH, LR = 20, 5, 400, 10, 20, 0.3
SECONDS = {"a": 0.4, "b": 0.4, "c": 0.4, "d": 2.0}
TRAININGS = 100  # in all; rounds of four, or versions of two


class Task:
    """A site's data: the same true model everywhere, but each site sees its own part of the classes more."""

    def __init__(self, number: int) -> None:
        truth = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
        self._rng = np.random.default_rng(number + 1)
        inputs = self._rng.normal(size=(8 * EXAMPLES, FEATURES))
        labels = np.argmax(inputs @ truth + self._rng.gumbel(size=(8 * EXAMPLES, CLASSES)), axis=1)
        kept = self._rng.random(len(labels)) < np.where(labels == number, 0.9, 0.3)
        self._inputs, self._labels = inputs[kept][: 2 * EXAMPLES], labels[kept][: 2 * EXAMPLES]

    def learn(self, tensors, training):
        """Minibatch SGD on the first half."""
        weights = tensors["w"].astype(np.float64)
        for step in range(STEPS):
            rows = np.random.default_rng((training, step)).integers(0, EXAMPLES, BATCH)
            inputs, labels = self._inputs[rows], self._labels[rows]
            error = _softmax(inputs @ weights)
            error[np.arange(BATCH), labels] -= 1
            weights -= LR * inputs.T @ error / BATCH
        return {"w": weights.astype(np.float32)}

    def loss(self, tensors):
        """Mean cross-entropy on the second half."""
        inputs, labels = self._inputs[EXAMPLES:], self._labels[EXAMPLES:]
        chances = _softmax(inputs @ tensors["w"].astype(np.float64))
        return float(-np.log(chances[np.arange(len(labels)), labels]).mean())


def _softmax(scores):
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.slow
async def test_with_one_slow_site_it_learns_as_much_in_less_time(bench, spec):
    for number, (name, seconds) in enumerate(SECONDS.items()):
        site, task = bench.site(name, examples=EXAMPLES // 2), Task(number)
        site.seconds, site.learn, site.measure = seconds, task.learn, task.loss
    start = {"w": np.zeros((FEATURES, CLASSES), np.float32)}
    sync = await _run(bench, spec(rounds=TRAININGS // 4, cohort={"min_sites": 4}, **_quietly(25)), start)
    mode = {"kind": "async", "buffer": 2}
    free = await _run(
        bench, spec(rounds=TRAININGS // 2, mode=mode, cohort={"min_sites": 4}, **_quietly(50)), start
    )
    told = f"rounds: loss {sync[0]:.4f} in {sync[1]:.1f} s, versions: {free[0]:.4f} in {free[1]:.1f} s"
    logging.getLogger(__name__).info(told)
    assert sync[0] < 0.75 * np.log(CLASSES), told
    assert free[0] <= 1.05 * sync[0], told
    assert free[1] < 0.75 * sync[1], told  # 0.3 where the machine has nothing else to do


def _quietly(every):
    """An evaluation at the end alone."""
    return {"evaluation": {"initial": False, "every_rounds": every}}


async def _run(bench, spec, start):
    """Loss of the last model, and the time that it took."""
    began_s = time.monotonic()
    run = await bench.ended(await bench.enqueue(spec, start), seconds=200)
    took_s = time.monotonic() - began_s
    assert run.state == "finished"
    await asyncio.sleep(0.1)
    return bench.running.store.rounds(run.id)[-1].metrics["loss"], took_s
