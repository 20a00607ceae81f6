"""Claims about transfers that are cut, between real processes with certificates."""

import random

import numpy as np
import pytest
from faults.federation import Federation, federation_through
from faults.proxy import Fault, Plan, Way
from safetensors.numpy import load_file

CUTS = 50
GPT2_200MB = {
    "model_type": "gpt2",
    "n_layer": 8,
    "n_embd": 640,
    "n_head": 10,
    "n_positions": 128,
    "vocab_size": 16500,
}
GPT2_40MB = GPT2_200MB | {"n_layer": 5, "n_embd": 320, "n_head": 5, "vocab_size": 12000}


def cuts(way: Way, size_bytes: int, count: int, *, seed: int) -> list[Plan]:
    """Cuts at random places of a transfer, half of them by RST and half by FIN."""
    chance = random.Random(seed)
    places = sorted(chance.sample(range(size_bytes // 100, size_bytes), count))
    return [Plan(way=way, at_bytes=place, fault=chance.choice((Fault.RESET, Fault.END))) for place in places]


def assert_negated(federation: Federation, digest: str) -> int:
    """Check the result to the bit; gives the model's size in bytes."""
    (held,) = (federation.kit / "sites/oslo/state/models").glob("*.safetensors")
    before, after = load_file(held), federation.model(digest)
    assert list(before) == list(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], -tensor)
    return held.stat().st_size


@pytest.mark.faults(
    injected="50 cuts by RST and FIN at random places of a 200 MB transfer, each way",
    must="the transfer goes on where it broke off: the same bits, under 5% sent twice",
)
@pytest.mark.parametrize("way", Way)
async def test_fifty_cuts_change_nothing_and_cost_under_a_twentieth(tmp_path, way, seen):
    async with federation_through(tmp_path) as (federation, proxy):
        proxy.plan(*cuts(way, 200_000_000, CUTS, seed=3))
        run = await federation.submit(GPT2_200MB)
        answer = await federation.finished(run, 280)
    size_bytes = assert_negated(federation, answer.run.model.digest)
    assert size_bytes > 190_000_000
    assert len(proxy.done) == CUTS
    surplus = proxy.forwarded_bytes[way] / size_bytes - 1
    assert surplus < 0.05
    seen(f"{way.name.lower()}: {surplus:.1%} sent twice")


@pytest.mark.faults(
    injected="kill -9 of the coordinator, or of a site, in the middle of a 40 MB transfer, each way",
    must="after the restart the transfer goes on from the last durable byte",
)
@pytest.mark.parametrize("victim", ["oslo", "coordinator"])
@pytest.mark.parametrize("way", Way)
async def test_a_kill_in_the_middle_of_a_transfer_costs_only_what_was_on_its_way(tmp_path, way, victim, seen):
    async with federation_through(tmp_path) as (federation, proxy):
        run = await federation.submit(GPT2_40MB)
        await federation.until(lambda: proxy.forwarded_bytes[way] > 20_000_000)
        federation.kill(victim)
        if victim == "oslo":
            federation.start_site()
        else:
            federation.start_coordinator()
        answer = await federation.finished(run, 120)
    size_bytes = assert_negated(federation, answer.run.model.digest)
    surplus = proxy.forwarded_bytes[way] / size_bytes - 1
    assert surplus < 0.4  # from the start it would be at least a half
    seen(f"{way.name.lower()}, {victim} killed: {surplus:.1%} sent twice")
