"""Tables of the results, in Markdown, and the page that they stand in."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from learning.gates import Gate, chosen_rates, parameter_server_bytes, ring_bytes
from learning.results import Result
from learning.trials import Experiment

MB = 1e6
TARGET_RATIO = 1.1
"""Of pooled training's final loss: the loss to which bytes are counted."""


def comparison(experiment: Experiment, results: Sequence[Result]) -> str:
    """One line an arm: final loss over the seeds, bytes in all and to the target, the chosen rates."""
    by_arm = arms_of(experiment, results)
    target = target_of(experiment, by_arm)
    metric = experiment.setting.metric
    rows = []
    for arm in experiment.arms:
        found = by_arm.get(arm.name, [])
        if not found:
            continue
        rows.append(
            [
                arm.told,
                _mean_text([result.figure(metric) for result in found]),
                f"{mean(result.tokens for result in found) / MB:.3g}",
                f"{mean(result.wire_bytes for result in found) / MB:,.0f}" if arm.is_federated else "–",
                _target_text(arm.is_federated, found, target),
                found[0].rates.told,
                str(len(found)),
            ]
        )
    rows += _each_step(by_arm.get("central", ()), target)
    head = ["arm", metric, f"million {experiment.unit}s", "MB on the wire", "MB to the target"]
    head += ["learning rate", "seeds"]
    told = "" if target is None else (
        f"\nTarget: {TARGET_RATIO} x the {metric} at the end of the pooled training's curve, {target:.4f}; "
        "curves are measured on a part of all sites' held-out examples, final models on more.\n"
    )  # fmt: skip
    return markdown(head, rows) + told


def by_site(experiment: Experiment, results: Sequence[Result], metrics: Sequence[str]) -> str:
    """One line an arm: the metrics of its final model at each site, over the seeds."""
    rows, head = [], list[str]()
    for arm in experiment.arms:
        found = arms_of(experiment, results)[arm.name]
        if not found:
            continue
        sites = sorted(found[0].sites)
        head = ["arm", *(f"{site}: {', '.join(metrics)}" for site in sites)]
        cells = [
            " / ".join(f"{mean(r.sites[site][metric] for r in found):.3f}" for metric in metrics)
            for site in sites
        ]
        rows.append([arm.told, *cells])
    return markdown(head, rows) if rows else ""


def gates_table(gates: Iterable[Gate]) -> str:
    """One line a gate."""
    rows = [
        [gate.claim, gate.figure, gate.limit, "pass" if gate.holds else "**FAIL**", gate.noise]
        for gate in gates
    ]
    return markdown(["gate", "figure", "limit", "", "seeds"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def replace_section(page: Path, name: str, text: str) -> None:
    """Put a text between a page's marks of that name.

    Raises:
        SystemExit: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    content = page.read_text()
    if begin not in content or end not in content:
        raise SystemExit(f"{page} has no marks {begin.strip()} and {end.strip()}")
    before, rest = content.split(begin)
    page.write_text(before + begin + "\n" + text + "\n" + end + rest.split(end)[1])


def arms_of(experiment: Experiment, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of the chosen rates that have a model, by arm."""
    by_arm: dict[str, list[Result]] = {}
    for arm in experiment.arms:
        mine = [r for r in results if r.experiment == experiment.name and r.arm == arm.name]
        setting = experiment.setting
        is_chosen = chosen_rates(mine, setting.metric, higher_is_better=setting.higher_is_better)
        by_arm[arm.name] = sorted((r for r in mine if is_chosen(r) and not r.failed), key=lambda r: r.seed)
    return by_arm


def target_of(experiment: Experiment, by_arm: Mapping[str, Sequence[Result]]) -> float | None:
    """The loss to which bytes are counted."""
    central = by_arm.get("central")
    if not central or experiment.setting.metric != "loss":
        return None
    return TARGET_RATIO * mean(result.curve[-1].metrics["loss"] for result in central)


def bytes_to(result: Result, target: float) -> float | None:
    """Bytes on the wire when the curve first was at the target or below; it is straight between points."""
    return _cross([(point.wire_bytes, point.metrics["loss"]) for point in result.curve], target)


def each_step_bytes_to(result: Result, target: float, a_step: int) -> float | None:
    """What an exchange of so many bytes in each step would have sent by then."""
    return _cross([(point.steps * a_step, point.metrics["loss"]) for point in result.curve], target)


def _cross(points: Sequence[tuple[float, float]], target: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= target:
            return x1 if y0 <= target else x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def _each_step(central: Sequence[Result], target: float | None) -> list[list[str]]:
    """Exchanges in each step: pooled training's curve, with the bytes that its gradients would take."""
    if not central or target is None:
        return []
    rows, ways = [], {"a parameter server": parameter_server_bytes, "DDP's ring all-reduce": ring_bytes}
    for told, bytes_of in ways.items():
        reached = [each_step_bytes_to(result, target, bytes_of(result)) for result in central]
        text = "–" if None in reached else f"{mean(x for x in reached if x is not None) / MB:,.0f}"
        total = bytes_of(central[0]) * central[0].steps
        row = [f"each step by {told}, fp32, computed", "as pooled", "", f"{total / MB:,.0f}", text, "", ""]
        rows.append(row)
    return rows


def _target_text(is_federated: bool, found: Sequence[Result], target: float | None) -> str:
    if target is None or not is_federated:
        return "–"
    reached = [bytes_to(result, target) for result in found]
    known = [x for x in reached if x is not None]
    if len(known) < len(reached):
        return "not reached" if not known else f"reached by {len(known)} of {len(reached)}"
    return f"{mean(known) / MB:,.0f}"


def _mean_text(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
