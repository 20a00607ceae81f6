"""Claims about sites that send what they should not: each lies in its own way, all in one round."""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.federation import federation_of
from faults.ledger import assert_mean_of_what_counted, counted
from faults.liar import CHUNK_LIES, CONTENT_LIES, COUNT_LIES, Liar

from fedloom.v1.runs_pb2 import GetResponse, SiteRound

HONEST = "honest"
LIES = (*CHUNK_LIES, *CONTENT_LIES, *COUNT_LIES)


@dataclass
class Told:
    """What came of the round."""

    liars: dict[str, Liar]
    answer: GetResponse
    log: str
    """The coordinator's."""

    def end_of(self, site: str) -> SiteRound:
        (found,) = (told for told in self.answer.rounds[0].sites if told.site == site)
        return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A round with one honest site and every liar, which ends well."""
    return asyncio.run(_round(tmp_path_factory.mktemp("lies")))


async def _round(folder: Path) -> Told:
    async with federation_of(folder, HONEST, *LIES) as federation:
        federation.start_coordinator()
        run = await federation.submit(cohort={"min_sites": len(LIES) + 1, "quorum": 1, "stall_s": 60})
        initial = await federation.get(run)
        assert initial is not None
        model = federation.model(initial.run.model.digest)
        federation.start_site(HONEST)
        liars = {name: Liar(federation, name) for name in LIES}
        tasks = [asyncio.create_task(liar.attend()) for liar in liars.values()]
        answer = await federation.finished(run, 120)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert_mean_of_what_counted(model, answer, federation.model(answer.run.model.digest))
        return Told(liars, answer, federation.log("coordinator"))


@pytest.mark.faults(
    injected="chunks of an upload that are corrupt, duplicated, reordered or skipped, or that end too soon",
    must="each is refused, with the reason; the upload then goes on from the last good byte and counts once",
)
@pytest.mark.parametrize("lie", CHUNK_LIES)
def test_wrong_chunks_are_refused_and_the_right_ones_count(told, lie):
    liar = told.liars[lie]
    assert len(liar.refusals) == liar.receipts == 1
    assert re.search(rf"upload interrupted .*site={lie} .*reason=.* byte", told.log)
    assert told.end_of(lie).state == "done"


@pytest.mark.faults(
    injected="updates with NaN, infinity, other shapes, types or names, missing or surplus tensors, too few "
    "bytes, or that are no safetensors file",
    must="rejected by name and reason; the round ends with the others, whose mean it is to the bit",
)
@pytest.mark.parametrize("lie", CONTENT_LIES)
def test_a_wrong_update_is_rejected_and_leaves_no_trace(told, lie):
    assert told.end_of(lie).state == "rejected"
    assert CONTENT_LIES[lie] in told.end_of(lie).reason
    assert told.liars[lie].receipts == 0
    assert lie not in counted(told.answer.rounds[0])


@pytest.mark.faults(
    injected="a site that claims 0, one too many, 2^53 + 1 or 2^64 - 1 examples",
    must="rejected before its update is sent: no weight of a mean is ever absurd",
)
@pytest.mark.parametrize("lie", COUNT_LIES)
def test_an_absurd_weight_is_rejected(told, lie):
    assert told.end_of(lie).state == "rejected"
    assert "examples" in told.end_of(lie).reason
    assert told.liars[lie].receipts == 0
