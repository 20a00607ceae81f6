"""What must hold, held against the results: figures, limits, and how far seeds are apart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from learning.results import Result

EXACT, POOLED_H10, POOLED_H50, QUANTISED, FALL = 1e-6, 1.05, 1.10, 0.005, 0.95


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One claim."""

    claim: str
    figure: str
    limit: str
    holds: bool
    noise: str = ""
    """How much of the figure may be chance."""


def gates_of(
    results: Sequence[Result], exact: tuple[float, float] | None, local_steps: Mapping[str, int]
) -> list[Gate]:
    """The gates that the results tell of."""
    arms = {name: _chosen(results, name) for name in {result.arm for result in results}}
    made = [] if exact is None else [_exact(*exact)]
    for needed, make in (
        (("diloco-h10", "central"), lambda: _ratio("Nesterov, H = 10", arms, "diloco-h10", POOLED_H10)),
        (("diloco-h50", "central"), lambda: _ratio("Nesterov, H = 50", arms, "diloco-h50", POOLED_H50)),
        (("diloco-h10-int8", "diloco-h10"), lambda: _int8(arms)),
        (("diloco-h10", "alone"), lambda: _beats_alone(arms)),
    ):
        if _seeds(arms, needed[0]) & _seeds(arms, needed[1]):
            made.append(make())
    if "fedavg-h1" in arms:
        made += [_bytes(arms, name, steps) for name, steps in local_steps.items() if name in arms]
    return made


def chosen_rates(
    results: Sequence[Result], metric: str = "loss", *, higher_is_better: bool = False
) -> Callable[[Result], bool]:
    """Tells results of an arm's chosen rates, those of the most seeds, from other rates that were tried."""
    sign = -1 if higher_is_better else 1
    counts: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        counts.setdefault((result.arm, str(result.rates)), []).append(result)
    best: dict[str, tuple[int, float, str]] = {}
    for (arm, rates), found in counts.items():
        figures = [sign * result.figure(metric, higher_is_better=higher_is_better) for result in found]
        rank = (-len(found), min(figures), rates)
        best[arm] = min(best.get(arm, rank), rank)
    return lambda result: str(result.rates) == best[result.arm][2]


def _chosen(results: Sequence[Result], arm: str) -> list[Result]:
    mine = [result for result in results if result.arm == arm]
    is_chosen = chosen_rates(mine)
    return sorted((result for result in mine if is_chosen(result)), key=lambda result: result.seed)


Arms = Mapping[str, Sequence[Result]]


def _exact(difference: float, step: float) -> Gate:
    return Gate(
        claim="FedAvg with H = 1 and plain SGD is one DDP step",
        figure=f"weights differ by {difference:.1e} at most, after a step of {step:.1e}",
        limit=f"≤ {EXACT:.0e}",
        holds=difference <= EXACT,
    )


def _ratio(told: str, arms: Arms, arm: str, limit: float) -> Gate:
    ratios = _by_seed(arms, arm, "central")
    return Gate(
        claim=f"{told}: validation loss over pooled training's, at equal tokens",
        figure=f"{mean(ratios):.4f}",
        limit=f"≤ {limit:.2f}",
        holds=mean(ratios) <= limit,
        noise=_spread(ratios),
    )


def _int8(arms: Arms) -> Gate:
    ratios = _by_seed(arms, "diloco-h10-int8", "diloco-h10")
    change = mean(ratios) - 1
    return Gate(
        claim="int8 both ways: validation loss against fp32",
        figure=f"{change:+.2%}",
        limit=f"within {QUANTISED:.1%}",
        holds=abs(change) <= QUANTISED,
        noise=_spread([ratio - 1 for ratio in ratios], percent=True),
    )


def _beats_alone(arms: Arms) -> Gate:
    ratios = _by_seed(arms, "diloco-h10", "alone")
    return Gate(
        claim="sites together beat one that does the same work alone (loss over its loss)",
        figure=f"{mean(ratios):.4f}",
        limit="< 1, with every seed",
        holds=max(ratios) < 1,
        noise=_spread(ratios),
    )


def _bytes(arms: Arms, arm: str, local_steps: int) -> Gate:
    """Bytes of an optimizer step, measured on the wire, of H = 1 over those of H."""
    each, some = (_bytes_a_step(arms[name][0]) for name in ("fedavg-h1", arm))
    return Gate(
        claim=f"bytes fall H-fold ({arm}, H = {local_steps})",
        figure=f"{each / some:.1f}-fold",
        limit=f"≥ {FALL * local_steps:.1f}",
        holds=each / some >= FALL * local_steps,
    )


def _bytes_a_step(result: Result) -> float:
    return result.wire_bytes / result.steps


def _seeds(arms: Arms, arm: str) -> set[int]:
    return {result.seed for result in arms.get(arm, ())}


def _by_seed(arms: Arms, arm: str, other: str) -> list[float]:
    others = {result.seed: result for result in arms[other]}
    pairs = [(result, others[result.seed]) for result in arms[arm] if result.seed in others]
    return [_ratio_of(one.figure("loss"), other.figure("loss")) for one, other in pairs]


def _ratio_of(loss: float, other: float) -> float:
    """Of losses that a trial came to; what has no model to be compared with passes no gate."""
    return loss / other if math.isfinite(other) else math.inf


def _spread(values: Sequence[float], *, percent: bool = False) -> str:
    style = "+.2%" if percent else ".4f"
    if len(values) < 2:
        return "one seed: no telling"
    if not all(map(math.isfinite, values)):
        return "some trial has no model"
    return (
        f"{len(values)} seeds: {min(values):{style}} to {max(values):{style}}, "
        f"standard deviation {stdev(values):{style.lstrip('+')}}"
    )
