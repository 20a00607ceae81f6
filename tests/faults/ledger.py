"""What must be true after any fault: nothing finished is lost, nothing counts twice."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from faults.federation import Federation
from faults.nullsite import Tensors, drifted

from fedloom.v1.runs_pb2 import ROUND_STATE_FINISHED, GetResponse, Round
from fedloom.v1.session_pb2 import WORK_TRAIN


def begun(federation: Federation) -> Counter[str]:
    """How often each training, by its assignment's id, was begun."""
    path = federation.folder / "trainings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return Counter(line["id"] for line in lines if line["what"] == "began")


def finished_at(federation: Federation, site: str) -> set[str]:
    """Ids of the trainings that lie finished in a site's outbox."""
    outbox = federation.site_folder(site) / "state/outbox"
    return {outcome.parent.name for outcome in outbox.glob("*/outcome.json")}


def trained(answer: GetResponse) -> list[Round]:
    """The rounds in which sites trained, all of them finished."""
    rounds = [record for record in answer.rounds if record.number > 0]
    assert [record.number for record in rounds] == list(range(1, len(rounds) + 1))
    assert all(record.state == ROUND_STATE_FINISHED for record in rounds)
    return rounds


def counted(record: Round) -> dict[str, int]:
    """The sites whose update counts in a round, with n_k."""
    return {
        site.site: site.examples
        for site in record.sites
        if site.work == WORK_TRAIN and site.attempt == record.attempt and site.state == "done"
    }


def assert_every_site_counted_once(
    federation: Federation, answer: GetResponse, examples: Mapping[str, int]
) -> None:
    """Every round ended at its first attempt, with every site's update, each trained exactly once."""
    for record in trained(answer):
        assert record.attempt == 1, record.reason
        assert counted(record) == dict(examples)
    ids = {
        f"{answer.run.id}.{record.number}.1.train.{site}" for record in trained(answer) for site in examples
    }
    times = {name: count for name, count in begun(federation).items() if name in ids}
    assert times == dict.fromkeys(ids, 1)


def assert_mean_of_what_counted(initial: Tensors, answer: GetResponse, result: Tensors) -> None:
    """The model is, bit by bit, what the sites' trainings give by Σ nₖ θₖ / Σ nₖ, round after round."""
    model = initial
    for record in trained(answer):
        model = mean(model, record.number, counted(record))
    assert sorted(model) == sorted(result)
    for name, tensor in model.items():
        np.testing.assert_array_equal(result[name], tensor)


def mean(model: Tensors, round_number: int, examples: Mapping[str, int]) -> Tensors:
    """One round of federated averaging by hand, in float64, in the order of the sites' names."""
    assert examples, "no site counted"
    updates = [(examples[site], drifted(model, site, round_number)) for site in sorted(examples)]
    total = sum(examples.values())
    return {
        name: (sum(n * update[name].astype(np.float64) for n, update in updates) / total).astype(np.float32)
        for name in model
    }


async def assert_no_leftovers(federation: Federation) -> None:
    """Nothing of a run that has ended stays in the coordinator's spool or a site's outbox."""
    with suppress(AssertionError):
        await federation.until(lambda: not leftovers(federation), 30)
    assert leftovers(federation) == [], federation.logs()


def leftovers(federation: Federation) -> list[Path]:
    places = [federation.state / "spool", federation.state / "spares", federation.state / "workshop"]
    places += [federation.site_folder(site) / "state/outbox" for site in federation.sites]
    return [path for place in places if place.exists() for path in place.iterdir()]


def folder_bytes(folder: Path) -> int:
    """What a folder takes on disk; files may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
