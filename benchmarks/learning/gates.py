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


def gates_of(results: Sequence[Result], exact: tuple[float, float] | None) -> list[Gate]:
    """All gates; one for which there is no figure does not hold."""
    arms = {name: _chosen(results, name) for name in {result.arm for result in results}}
    return [
        _exact(exact),
        _ratio(_Compared("diloco-h10", "central", arms), "Nesterov, H = 10", POOLED_H10),
        _ratio(_Compared("diloco-h50", "central", arms), "Nesterov, H = 50", POOLED_H50),
        _int8(_Compared("diloco-h10-int8", "diloco-h10", arms)),
        _beats_alone(_Compared("diloco-h10", "alone", arms)),
        *(_bytes(arms.get(f"diloco-h{steps}", ()), steps) for steps in (10, 50)),
    ]


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
NOTHING = "not measured"


class _Compared:
    """An arm's losses over another's, seed by seed; none if one of both was not done."""

    def __init__(self, arm: str, other: str, arms: Arms) -> None:
        others = {result.seed: result for result in arms.get(other, ())}
        pairs = [(result, others[result.seed]) for result in arms.get(arm, ()) if result.seed in others]
        self.ratios = [_ratio_of(one.figure("loss"), against.figure("loss")) for one, against in pairs]

    @property
    def mean(self) -> float:
        """Over the seeds; infinite without any."""
        return mean(self.ratios) if self.ratios else math.inf


def _exact(found: tuple[float, float] | None) -> Gate:
    claim, limit = "FedAvg with H = 1 and plain SGD is one DDP step", f"≤ {EXACT:.0e}"
    if found is None:
        return Gate(claim=claim, figure=NOTHING, limit=limit, holds=False)
    difference, step = found
    return Gate(
        claim=claim,
        figure=f"weights differ by {difference:.1e} at most, after a step of {step:.1e}",
        limit=limit,
        holds=difference <= EXACT and step > EXACT,
    )


def _ratio(compared: _Compared, told: str, limit: float) -> Gate:
    return Gate(
        claim=f"{told}: validation loss over pooled training's, at equal tokens",
        figure=f"{compared.mean:.4f}" if compared.ratios else NOTHING,
        limit=f"≤ {limit:.2f}",
        holds=compared.mean <= limit,
        noise=_spread(compared.ratios),
    )


def _int8(compared: _Compared) -> Gate:
    change = compared.mean - 1
    return Gate(
        claim="int8 both ways: validation loss against fp32",
        figure=f"{change:+.2%}" if compared.ratios else NOTHING,
        limit=f"within {QUANTISED:.1%}",
        holds=abs(change) <= QUANTISED,
        noise=_spread([ratio - 1 for ratio in compared.ratios], percent=True),
    )


def _beats_alone(compared: _Compared) -> Gate:
    return Gate(
        claim="sites together beat one that does the same work alone (loss over its loss)",
        figure=f"{compared.mean:.4f}" if compared.ratios else NOTHING,
        limit="< 1, with every seed",
        holds=max(compared.ratios, default=math.inf) < 1,
        noise=_spread(compared.ratios),
    )


def _bytes(found: Sequence[Result], local_steps: int) -> Gate:
    """Of an optimizer step: those of a parameter server in fp32 over those that were measured on the wire."""
    falls = [parameter_server_bytes(one) * one.steps / one.wire_bytes for one in found if one.wire_bytes]
    return Gate(
        claim=f"bytes fall H-fold against a per-step parameter server (H = {local_steps})",
        figure=f"{min(falls):.2f}-fold" if falls else NOTHING,
        limit=f"≥ {FALL * local_steps:.1f}",
        holds=min(falls, default=0) >= FALL * local_steps,
    )


def parameter_server_bytes(result: Result) -> int:
    """What an optimizer step takes there: of each site a gradient up and the mean down, in fp32."""
    return 2 * len(result.sites) * result.model_bytes


def ring_bytes(result: Result) -> int:
    """What it takes by the ring all-reduce of DDP, over all sites.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 3.
    """
    return 2 * (len(result.sites) - 1) * result.model_bytes


def _ratio_of(loss: float, other: float) -> float:
    """Of losses that a trial came to; what has no model to be compared with passes no gate."""
    return loss / other if math.isfinite(other) else math.inf


def _spread(values: Sequence[float], *, percent: bool = False) -> str:
    style = "+.2%" if percent else ".4f"
    if len(values) < 2:
        return "one seed: no telling" if values else ""
    if not all(map(math.isfinite, values)):
        return "some trial has no model"
    return (
        f"{len(values)} seeds: {min(values):{style}} to {max(values):{style}}, "
        f"standard deviation {stdev(values):{style.lstrip('+')}}"
    )
