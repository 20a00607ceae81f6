"""What is logged of a run that is taken, and that its operator may not have meant."""

import json

from fedloom_server.models import MODEL_FILE, Remarks

ADAPTER = {"rank": 2, "merge": "stack", "ranks": {"nrth": 4, "south": 1}}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128}


async def test_ranks_of_sites_that_have_never_been_here_are_logged(bench, spec, caplog):
    bench.site("south")
    await bench.until(lambda: [site.name for site in bench.running.store.sites()] == ["south"])
    text = spec(model={"config": GPT2, "adapter": ADAPTER}).model_dump_json()
    await bench.running.runs.submissions.submit(text)
    told = [record for record in caplog.records if "have never been here" in record.message]
    assert [record.sites for record in told] == ["nrth"]


async def test_a_model_with_another_tokenizer_of_its_own_is_logged(bench, spec, caplog, monkeypatch):
    async def prepare(_, into):
        (into / "config.json").write_text(json.dumps(GPT2))
        (into / MODEL_FILE).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        return Remarks(is_of_another_tokenizer=True)

    monkeypatch.setattr("fedloom_server.submissions.prepare_model", prepare)
    text = spec(model={"path": "/m", "tokenizer": "bytes"}).model_dump_json()
    await bench.running.runs.submissions.submit(text)
    told = [record for record in caplog.records if "another tokenizer of its own" in record.message]
    assert [(record.path, record.tokenizer) for record in told] == [("/m", "bytes")]
