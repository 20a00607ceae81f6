import io

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from fedloom.v1.runs_pb2 import GetRequest, ListSitesRequest
from fedloom_server.console.connection import Operator
from fedloom_server.console.export import export
from fedloom_server.console.watch import watch


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
        sites = await coordinator.call(coordinator.runs.ListSites, ListSitesRequest())
        await export(coordinator, run.id, tmp_path / "latest")
        await export(coordinator, run.id, tmp_path / "first", round_number=1)

    lines = out.getvalue().splitlines()
    assert lines[-1] == f"run {run.id} is finished: {ended.reason}"
    assert any("ulm: train refused" in line for line in lines)
    assert [item.number for item in shown.rounds] == [0, 1, 2]
    assert [site.name for site in sites.sites] == ["bremen", "kiel", "ulm"]
    for name, tensor in initial.items():
        for folder, step in (("latest", 2), ("first", 1)):
            exported = load_file(tmp_path / folder / "model.safetensors")[name]
            np.testing.assert_allclose(exported, tensor + step, rtol=1e-6)
    assert "fedloom" in (tmp_path / "latest" / "README.md").read_text()
