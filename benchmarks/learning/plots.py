"""Plots of the results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learning.results import Result
from learning.tables import arms_of
from learning.trials import Experiment

MB = 1e6
LOG_FROM = 4
"""Times the best loss that is to be shown, from which a logarithm shows more."""
COLOURS = ("#111111", "#8a8f98", "#1f5fa8", "#d1495b", "#2e8b57", "#e6a117", "#7b4fa6", "#00868b", "#a0522d")


def save_curves(experiment: Experiment, results: Sequence[Result], path: Path) -> bool:
    """Loss over tokens and over bytes, the mean of the seeds and their range; says whether there was any."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    by_arm = {name: found for name, found in arms_of(experiment, results).items() if _has_curve(found)}
    if not by_arm:
        return False
    topics = experiment.topics or {"": [arm.name for arm in experiment.arms]}
    figure, rows = plt.subplots(
        len(topics), 2, figsize=(13, 4.8 * len(topics)), layout="constrained", sharey=True, squeeze=False
    )
    for panels, (topic, names) in zip(rows, topics.items(), strict=True):
        for name, colour in zip(names, COLOURS * 3, strict=False):
            arm, found = experiment.arm(name), by_arm.get(name)
            if found is None:
                continue
            style = {"color": colour, "linewidth": 1.6, "linestyle": "-" if arm.is_federated else "--"}
            _draw(panels[0], [[p.tokens / MB for p in r.curve] for r in found], found, arm.told, style)
            if arm.is_federated:
                _draw(panels[1], [[p.wire_bytes / MB for p in r.curve] for r in found], found, "", style)
        panels[0].set(
            xlabel=f"million {experiment.unit}s, all sites together",
            ylabel=f"validation loss, nats a {experiment.unit}",
        )
        panels[0].set_title(topic, loc="left", fontsize=11)
        panels[1].set(xlabel="MB on the wire, all sites, both ways", xscale="log")
        # below the panel, where no curve is
        panels[0].legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.13))
        for panel in panels:
            panel.spines[["top", "right"]].set_visible(False)
    low, high = _range(by_arm.values())
    rows[0][0].set_ylim(low, high)
    if high > LOG_FROM * low:
        rows[0][0].set_yscale("log")
        for panel in rows[:, 0]:
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(experiment.title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _draw(
    panel: Any, xs: Sequence[Sequence[float]], found: Sequence[Result], told: str, style: Mapping[str, Any]
) -> None:
    losses = np.array([[point.metrics["loss"] for point in result.curve] for result in found])
    x = np.mean(np.array(xs), axis=0)
    panel.plot(x, losses.mean(axis=0), label=told or None, **style)
    if len(found) > 1:
        panel.fill_between(
            x, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
        )


def _range(arms: Iterable[Sequence[Result]]) -> tuple[float, float]:
    """Losses to be shown: from the best one up to the worst end of an arm, and not the falls before."""
    curves = [[point.metrics["loss"] for point in r.curve] for found in arms for r in found]
    low, worst = min(curve[-1] for curve in curves), max(curve[-1] for curve in curves)
    return low * 0.97, min(max(low * 1.6, worst * 1.15), max(map(max, curves)) * 1.02)


def _has_curve(found: Sequence[Result]) -> bool:
    return bool(found) and len(found[0].curve) > 2
