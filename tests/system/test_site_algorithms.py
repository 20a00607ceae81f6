"""FedProx and SCAFFOLD over rounds and sites, through files and the real aggregation, against numpy by hand.

The sites fit lines to data of their own, which differ. The papers' recursions are written out below in
float64; nothing in them is shared with the code under test but the data and the cohorts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedloom_client.training.algorithms import begin_round
from fedloom_client.training.controls import SiteControls
from fedloom_client.training.group import Group
from fedloom_client.training.orders import Order
from fedloom_client.training.roundalgorithm import RoundStart
from fedloom_common.controls import add_controls
from fedloom_common.runspec import FedProx, Plain, Scaffold
from fedloom_common.tensors import write_tensors
from fedloom_server.aggregation import Update
from fedloom_server.aggregation.controls import Census, settle_controls
from fedloom_server.aggregation.mean import WeightedMean

RATES = [0.1, 0.08, 0.05, 0.02]
"""Of the steps of a round: a schedule changes them within it."""
COHORTS = [[0, 1, 2], [0, 2], [1], [1, 2], [0, 1, 2], [0]]
SITES, FEATURES, CLIP = 3, 4, 3.0


@pytest.fixture(scope="module")
def data() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    truths = generator.normal(size=(SITES, FEATURES)) * 2
    inputs = [generator.normal(size=(20, FEATURES)) for _ in range(SITES)]
    return [(x, x @ truth + 0.1 * generator.normal(size=20)) for x, truth in zip(inputs, truths, strict=True)]


def gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 2 * x.T @ (x @ w - y) / len(y)


def clipped(g: np.ndarray) -> np.ndarray:
    return g * min(1, CLIP / (np.linalg.norm(g) + 1e-6))


def by_hand(algorithm: Any, data: Any) -> list[np.ndarray]:
    """The global model after each round, equally weighted."""
    w, c, own = np.zeros(FEATURES), np.zeros(FEATURES), np.zeros((SITES, FEATURES))
    models = []
    for cohort in COHORTS:
        ends, changes = [], []
        for site in cohort:
            y = w.copy()
            for rate in RATES:
                g = gradient(y, *data[site])
                if algorithm.name == "fedprox":
                    g = g + algorithm.mu * (y - w)
                g = clipped(g)
                if algorithm.name == "scaffold":
                    g = g - own[site] + c
                y = y - rate * g
            ends.append(y)
            if algorithm.name == "scaffold":
                new = own[site] - c + (w - y) / sum(RATES)
                changes.append(new - own[site])
                own[site] = new
        w = np.mean(ends, axis=0)
        if algorithm.name == "scaffold":
            c = c + len(cohort) / SITES * np.mean(changes, axis=0)
        models.append(w)
    return models


def train(
    algorithm: Any,
    data: Any,
    model: Path,
    round_: int,
    counted_round: int,
    folder: Path,
    clip: float = CLIP,
) -> Path:
    """One site's round as the loop takes it; its update, which is delivered."""
    x, y = (torch.from_numpy(values).float() for values in data)
    module = nn.Linear(FEATURES, 1, bias=False)
    module.load_state_dict({"weight": load_file(model)["weight"]})
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    controls = SiteControls(folder)
    controls.leavings.settle(round_, counted_round)
    start = RoundStart(
        trained=dict(module.named_parameters()), global_model=model, rate_sum=sum(RATES),
        controls=controls,
    )  # fmt: skip
    steps = begin_round(algorithm, start)
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        ((module(x)[:, 0] - y) ** 2).mean().backward()
        steps.add_to_objective()
        nn.utils.clip_grad_norm_(module.parameters(), clip)
        steps.correct()
        optimizer.step()
    left = steps.end()
    if left.at_site:
        order = Order(
            id=f"update-{round_}",
            work="train",
            run_id="run",
            round=round_,
            model_path="",
            assets_dir="",
            spec={},
        )
        controls.prepare(left.at_site, order, Group(0, 1, torch.device("cpu"), None))
        controls.leavings.deliver(order.id)
    write_tensors(folder / "update.safetensors", {**module.state_dict(), **left.in_update})
    return folder / "update.safetensors"


@pytest.mark.parametrize("first_tries", ["that-count", "that-fail"])
@pytest.mark.parametrize(
    "algorithm", [Plain(), FedProx(name="fedprox", mu=0.7), Scaffold(name="scaffold")], ids=lambda a: a.name
)
def test_rounds_with_partial_cohorts_are_the_papers(
    algorithm: Any, first_tries: str, data: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model-0.safetensors"
    write_tensors(model, {"weight": torch.zeros(1, FEATURES)})
    if algorithm.name == "scaffold":
        add_controls(model, model)
    folders = [tmp_path / f"site-{site}" for site in range(SITES)]
    for folder in folders:
        folder.mkdir()
    counted = [0] * SITES
    for round_, (cohort, expected) in enumerate(zip(COHORTS, by_hand(algorithm, data), strict=True), start=1):
        for site in range(SITES) if first_tries == "that-fail" else ():
            train(algorithm, data[site], model, round_, counted[site], folders[site])
        updates = []
        for site in cohort:
            path = train(algorithm, data[site], model, round_, counted[site], folders[site])
            updates.append(Update(site=str(site), path=path, examples=20))
            counted[site] = round_
        base, model = model, tmp_path / f"model-{round_}.safetensors"
        WeightedMean().aggregate(base, updates, model)
        if algorithm.name == "scaffold":
            settle_controls(model, base, kept=1.0, share=len(cohort) / SITES)
        np.testing.assert_allclose(load_file(model)["weight"][0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("first", "population"),
    [
        pytest.param([[0, 1], [0], [0], [0]], [2, 2, 2, 2], id="one-is-away"),
        pytest.param([[0], [0], [0]], [1, 1, 1], id="one-joins-late"),
        pytest.param([[1], [0], [1]], [2, 2, 2], id="one-at-a-time"),
    ],
)
def test_whoever_was_there_first_scaffold_ends_where_all_sites_together_would(
    first: Any, population: Any, data: Any, tmp_path: Path
) -> None:
    """The optimum of the weighted loss, by the normal equations; a site's nine times the other's."""
    examples, model = [20, 180], tmp_path / "model-0.safetensors"
    write_tensors(model, {"weight": torch.zeros(1, FEATURES)})
    add_controls(model, model)
    folders = [tmp_path / f"site-{site}" for site in range(2)]
    for folder in folders:
        folder.mkdir()
    counted, before = [0, 0], Census(sites=0, weights={})
    rounds = [*zip(first, population, strict=True), *[([0, 1], 2)] * 60]
    for round_, (cohort, sites) in enumerate(rounds, start=1):
        updates = []
        for site in cohort:
            path = train(
                Scaffold(name="scaffold"), data[site], model, round_, counted[site], folders[site], clip=1e9
            )
            updates.append(Update(site=str(site), path=path, examples=examples[site]))
            counted[site] = round_
        base, model = model, tmp_path / f"model-{round_}.safetensors"
        WeightedMean().aggregate(base, updates, model)
        weights = {update.site: update.examples for update in updates}
        after = Census(sites=sites, weights=before.weights | weights)
        share = sum(weights.values()) / after.total
        settle_controls(model, base, kept=before.total / after.total, share=share)
        before = after
    hessian = sum(n * x.T @ x for n, (x, _) in zip(examples, data, strict=False))
    slope = sum(n * x.T @ y for n, (x, y) in zip(examples, data, strict=False))
    np.testing.assert_allclose(
        load_file(model)["weight"][0].numpy(), np.linalg.solve(hessian, slope), atol=1e-4
    )


def test_by_hand_the_algorithms_differ(data: Any) -> None:
    specs = (Plain(), FedProx(name="fedprox", mu=0.7), Scaffold(name="scaffold"))
    plain, fedprox, scaffold = (np.array(by_hand(spec, data)) for spec in specs)
    for one, other in ((plain, fedprox), (plain, scaffold), (fedprox, scaffold)):
        assert np.abs(one - other).max() > 0.01
