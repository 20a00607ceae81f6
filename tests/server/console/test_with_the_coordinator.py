import contextlib
import io

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from fedloom.v1.runs_pb2 import GetRequest
from fedloom_common.channels import MESSAGE_BYTES
from fedloom_server.console.connection import Operator
from fedloom_server.console.export import export
from fedloom_server.console.watch import watch
from fedloom_server.eligibility import Description
from fedloom_server.rpc import runs


async def test_a_run_is_watched_to_its_end_and_its_model_exported(bench, spec, initial, tmp_path, fault):
    bench.site("bremen", step=1.0)
    bench.site("kiel", step=1.0)
    bench.site("ulm", fault=fault.REFUSES)
    run = await bench.enqueue(spec(rounds=2, cohort={"min_sites": 3, "quorum": 2}))
    out = io.StringIO()
    flags = ("--coordinator", f"127.0.0.1:{bench.running.port}", "--insecure", "alice")
    async with Operator(config=None, flags=flags).connect() as coordinator:
        ended = await watch(coordinator, run.id[:10], Console(file=out), give_up_s=5)
        shown = await coordinator.call(coordinator.runs.Get, GetRequest(run_id=run.id))
        sites = await coordinator.all_sites()
        await export(coordinator, run.id, tmp_path / "latest")
        await export(coordinator, run.id, tmp_path / "first", round_number=1)

    lines = out.getvalue().splitlines()
    assert lines[-1] == f"run {run.id} is finished: {ended.reason}"
    assert any("ulm: train refused" in line for line in lines)
    assert [item.number for item in shown.rounds] == [0, 1, 2]
    assert [site.name for site in sites] == ["bremen", "kiel", "ulm"]
    for name, tensor in initial.items():
        for folder, step in (("latest", 2), ("first", 1)):
            exported = load_file(tmp_path / folder / "model.safetensors")[name]
            np.testing.assert_allclose(exported, tensor + step, rtol=1e-6)
    assert "fedloom" in (tmp_path / "latest" / "README.md").read_text()


class Mute:
    """A link that nothing is sent over."""

    def close(self, reason: str) -> None: ...


async def test_sites_whose_descriptions_pass_a_message_are_all_listed(bench):
    about = Description(data_sets={f"a-data-set-with-a-long-name-{number}": 1 for number in range(500)})
    names = [f"site-{number:03}" for number in range(600)]
    flags = ("--coordinator", f"127.0.0.1:{bench.running.port}", "--insecure", "alice")
    with contextlib.ExitStack() as sessions:
        for name in names:
            sessions.enter_context(bench.running.sites.attached(name, about, Mute()))
        async with Operator(config=None, flags=flags).connect() as coordinator:
            listed = await coordinator.all_sites()
    assert sum(site.ByteSize() for site in listed) > MESSAGE_BYTES
    assert [site.name for site in listed] == names


async def test_runs_that_pass_a_page_are_all_listed_newest_first(bench, spec, monkeypatch):
    monkeypatch.setattr(runs, "PAGE_BYTES", 0)
    submitted = [(await bench.enqueue(spec())).id for _ in range(3)]
    flags = ("--coordinator", f"127.0.0.1:{bench.running.port}", "--insecure", "alice")
    async with Operator(config=None, flags=flags).connect() as coordinator:
        listed = await coordinator.all_runs()
    assert [run.id for run in listed] == submitted[::-1]
