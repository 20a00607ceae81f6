"""The coordinator's pages, as Prometheus and a probe read them."""

import asyncio
import json
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedloom_common.errors import BadSpec, StorageUnavailable
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.meters import OTHER_SITES, Meters
from fedloom_server.objects import Objects


@pytest.fixture
def observed(config):
    return config.model_copy(update={"http": "127.0.0.1:0", "disk_floor_bytes": 0})


async def page(running, path):
    def ask():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{running.http_port}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def samples(running):
    """Every sample by name and labels; the parser refuses what is not Prometheus' format."""
    _, text = await page(running, "/metrics")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_round_shows_in_the_metrics_with_its_bytes_by_site(observed, bench_of, spec):
    async with coordinator(observed) as running:
        bench = bench_of(running)
        bench.site("oslo")
        bench.site("rome")
        run = await bench.ended(await bench.enqueue(spec(cohort={"min_sites": 2})))
        assert run.state == "finished", run.reason
        found = await samples(running)
        sent = {a.site: a.bytes_up for a in running.store.assignments(run.id) if a.work == "train"}

    assert found["fedloom_runs", "finished"] == 1
    assert found["fedloom_runs", "running"] == 0
    assert found["fedloom_rounds_total", "finished"] >= 1
    assert found["fedloom_round_duration_seconds_count",] == found["fedloom_rounds_total", "finished"]
    assert found["fedloom_assignments_total", "done", "train"] == 2
    assert found["fedloom_update_received_bytes_total", "oslo"] == sent["oslo"] > 0
    assert found["fedloom_model_sent_bytes_total", "rome"] > 0
    assert (found["fedloom_sites", "connected"], found["fedloom_sites", "known"]) == (2, 2)
    assert found["fedloom_staged_updates",] == 0
    assert found["fedloom_draining",] == 0
    assert 0 < found["fedloom_state_disk_free_bytes",] <= found["fedloom_state_disk_size_bytes",]
    assert found["process_resident_memory_bytes",] > 1e6


async def test_each_version_of_an_asynchronous_run_counts_once(observed, bench_of, spec):
    mode = {"kind": "async", "buffer": 1, "concurrency": 1}
    async with coordinator(observed) as running:
        bench = bench_of(running)
        bench.site("oslo")
        made = spec(mode=mode, rounds=3, evaluation={"every_rounds": 2})
        run = await bench.ended(await bench.enqueue(made))
        assert run.state == "finished", run.reason
        ended = [record for record in running.store.rounds(run.id) if record.state == "finished"]
        found = await samples(running)

    assert len(ended) >= 3
    assert found["fedloom_rounds_total", "finished"] == len(ended)


@pytest.mark.parametrize("mode", [{"kind": "sync"}, {"kind": "async", "buffer": 2}])
async def test_a_round_that_ends_with_its_run_counts_as_failed(observed, bench_of, spec, fault, mode):
    async with coordinator(observed) as running:
        bench = bench_of(running)
        site = bench.site("a", fault=fault.SILENT)
        run = await bench.enqueue(spec(mode=mode, evaluation={"initial": False}))
        await bench.until(site.assigned.is_set)
        await running.runs.stop(run.id, "")
        found = await samples(running)
    assert (found["fedloom_rounds_total", "failed"], found["fedloom_rounds_total", "finished"]) == (1, 0)


async def test_an_attempt_that_brings_too_few_updates_is_counted(observed, bench_of, spec, fault):
    async with coordinator(observed) as running:
        bench = bench_of(running)
        bench.site("oslo", fault=fault.FAILS)
        await bench.until(lambda: running.sites.link("oslo"))
        run = await bench.enqueue(spec(cohort={"attempts": 1}))
        await bench.until(lambda: running.store.run(run.id).state == "waiting")
        found = await samples(running)

    assert found["fedloom_failed_attempts_total",] == 1
    assert found["fedloom_runs", "waiting"] == 1
    assert found["fedloom_assignments_total", "failed", "train"] == 1


async def test_names_and_units_are_those_that_prometheus_asks_for(observed):
    async with coordinator(observed) as running:
        _, text = await page(running, "/metrics")

    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith(("fedloom_", "process_")), family.name
        assert not family.name.endswith(("_ms", "_kb", "_count", "_s")), family.name
        if family.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in family.samples), family.name


async def test_it_is_ready_until_it_drains_and_serves_its_pages_meanwhile(observed, bench_of):
    async with coordinator(observed) as running:
        assert await page(running, "/readyz") == (200, '{"ready":true,"problems":[]}')
        running.calls.drain()
        status, body = await page(running, "/readyz")
        assert (await page(running, "/healthz"))[0] == 200

    assert status == 503
    assert [item["check"] for item in json.loads(body)["problems"]] == ["draining"]


async def test_a_database_that_is_gone_makes_it_not_ready(observed, monkeypatch):
    async with coordinator(observed) as running:

        def lost(work):
            raise StorageUnavailable("the coordinator's database does not answer now")

        monkeypatch.setattr(running.store.database, "do", lost)
        status, body = await page(running, "/readyz")
        found = await samples(running)
        monkeypatch.undo()

    assert status == 503
    assert found["fedloom_database_up",] == 0
    assert ("fedloom_runs", "running") not in found
    [problem] = json.loads(body)["problems"]
    assert problem["check"] == "database"
    assert "does not answer" in problem["problem"]


async def test_a_model_storage_that_is_away_makes_it_not_ready_and_is_asked_seldom(
    observed, tmp_path, monkeypatch
):
    asked = 0

    def lost(storage):
        nonlocal asked
        asked += 1
        raise StorageUnavailable("the storage of models cannot answer now")

    config = observed.model_copy(update={"model_storage": f"file://{tmp_path}/bucket"})
    async with coordinator(config) as running:
        monkeypatch.setattr(Objects, "require_answer", lost)
        told = [await page(running, "/readyz") for _ in range(3)]
        monkeypatch.undo()

    wanted = [{"check": "model_storage", "problem": "the storage of models cannot answer now"}]
    assert [(status, json.loads(body)["problems"]) for status, body in told] == [(503, wanted)] * 3
    assert asked == 1


def test_a_thousand_sites_have_series_of_their_own_and_all_others_one():
    meters = Meters()
    for number in range(1200):
        meters.sent(f"site-{number}", 1)

    values = {
        sample.labels["site"]: sample.value
        for family in meters.registry.collect()
        if family.name == "fedloom_model_sent_bytes"
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert len(values) == 1001
    assert values[OTHER_SITES] == 200


def test_a_port_beyond_this_host_needs_a_certificate_or_a_clear_word(tmp_path):
    facts = {"state_dir": tmp_path, "insecure": True, "listen": "127.0.0.1:0"}
    with pytest.raises(ValueError, match="http_tls: false"):
        CoordinatorConfig(**facts, http="0.0.0.0:9443")
    CoordinatorConfig(**facts, http="0.0.0.0:9443", http_tls=False)
    CoordinatorConfig(**facts, http="[::1]:9443")


async def test_a_taken_http_port_ends_the_start_with_a_clear_error(observed):
    async with coordinator(observed) as running:
        second = observed.model_copy(
            update={"http": f"127.0.0.1:{running.http_port}", "state_dir": observed.state_dir / "other"}
        )
        with pytest.raises(BadSpec, match="http: cannot listen"):
            async with coordinator(second):
                pass
