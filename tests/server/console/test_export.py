import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fedloom.v1.runs_pb2 import ExportRequest
from fedloom.v1.session_pb2 import Blob
from fedloom.v1.transfer_pb2 import ReadRequest
from fedloom_common import transfer
from fedloom_common.errors import BadChunk, NotFound, ProtocolError, StorageFull, WrongState
from fedloom_server.console import export as export_module
from fedloom_server.console.export import check_names

WEIGHTS = save({"w": np.arange(10_168).astype(np.uint8)})  # 10,240 bytes: eleven chunks of the fake
OTHER_WEIGHTS = save({"w": np.arange(10_168)[::-1].astype(np.uint8)})


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(transfer, "RETRY_S", (0.01, 0.02))


@pytest.fixture
def model(fake):
    fake.put("model.safetensors", WEIGHTS)
    fake.put("config.json", b'{"model_type": "gpt2"}')
    return fake


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


EXPORTED = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"model_type": "gpt2"}',
    "README.md": b"# plays\n",
}


def test_the_files_and_the_card_arrive_under_their_names(console, model, tmp_path):
    out = console("run", "export", "a1", "--to", "model").stdout
    assert files_in(tmp_path / "model") == EXPORTED
    assert "Exported run a1b2c3 to model (10.3 kB)" in out
    assert model.asked_for(ExportRequest) == [ExportRequest(run_id="a1")]
    assert names_in(tmp_path / "model") == sorted([*EXPORTED, ".fedloom-export.json"])


def test_control_variates_stay_behind(console, fake, tmp_path):
    tensors = {"w": np.ones(3, np.float32), "control/w": np.full(3, 7, np.float32)}
    weights = save(tensors, {"format": "pt"})
    fake.put("model.safetensors", weights)
    for _ in range(2):  # a second export begins anew
        console("run", "export", "a1", "--to", "model")
        assert list(load_file(tmp_path / "model" / "model.safetensors")) == ["w"]
        assert names_in(tmp_path / "model") == [".fedloom-export.json", "README.md", "model.safetensors"]


def test_a_round_can_be_chosen(console, model):
    console("run", "export", "a1", "--to", "model", "--round", "0")
    assert model.asked_for(ExportRequest) == [ExportRequest(run_id="a1", round=0)]


@pytest.mark.parametrize(
    ("rounds_done", "told"),
    [(0, "no round has finished: this is the initial model"), (2, ", the initial model")],
)
def test_the_initial_model_is_told_as_such(console, model, rounds_done, told):
    model.run.rounds_done = rounds_done
    out = " ".join(console("run", "export", "a1", "--to", "model").stdout.split())
    assert f"{told}. Load it:" in out


def test_a_broken_read_goes_on_at_the_byte_where_it_ended(console, model, tmp_path):
    model.break_reads_at = [4000, 7000]
    console("run", "export", "a1", "--to", "model")
    assert files_in(tmp_path / "model") == EXPORTED
    weights = [request for request in model.asked_for(ReadRequest) if request.digest == model.files[0].digest]
    assert [request.offset for request in weights] == [0, 4000, 7000]


def test_an_export_that_broke_off_goes_on_when_called_again(console, model, tmp_path, monkeypatch):
    missing = model.content.pop(model.files[1].digest)
    model.content[model.files[1].digest] = b"x" * len(missing)
    with pytest.raises(BadChunk, match="digest"):
        console("run", "export", "a1", "--to", "model")
    assert files_in(tmp_path / "model") == {}
    model.content[model.files[1].digest] = missing
    model.asked.clear()
    console("run", "export", "a1", "--to", "model")
    assert files_in(tmp_path / "model") == EXPORTED
    assert [request.digest for request in model.asked_for(ReadRequest)] == [model.files[1].digest]


def test_an_earlier_export_of_the_same_run_is_replaced(console, model, tmp_path):
    model.put("merges.txt", b"#version: 0.2\n")
    console("run", "export", "a1", "--to", "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    model.files.clear()
    model.put("model.safetensors", OTHER_WEIGHTS)
    console("run", "export", "a1", "--to", "model")
    assert files_in(tmp_path / "model") == {
        "model.safetensors": OTHER_WEIGHTS,
        "README.md": b"# plays\n",
        "notes.txt": b"mine",
    }


def test_a_failed_export_leaves_the_earlier_one_as_it_was(console, model, tmp_path):
    console("run", "export", "a1", "--to", "model")
    model.files.clear()
    model.put("model.safetensors", OTHER_WEIGHTS)
    model.content[model.files[0].digest] = WEIGHTS
    with pytest.raises(BadChunk):
        console("run", "export", "a1", "--to", "model")
    assert files_in(tmp_path / "model") == EXPORTED


def test_files_of_equal_content_are_all_there(console, fake, tmp_path):
    fake.put("model.safetensors", WEIGHTS)
    fake.put("added_tokens.json", b"{}")
    fake.put("special_tokens_map.json", b"{}")
    console("run", "export", "a1", "--to", "model")
    found = files_in(tmp_path / "model")
    assert found["added_tokens.json"] == found["special_tokens_map.json"] == b"{}"


def test_a_directory_with_other_things_is_refused_and_untouched(console, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WrongState, match="is not empty and no export of run a1b2c3; give a new or empty"):
        console("run", "export", "a1", "--to", str(tmp_path))
    assert names_in(tmp_path) == ["notes.txt"]


def test_a_directory_with_another_runs_model_is_refused(console, model, tmp_path):
    console("run", "export", "a1", "--to", "model")
    model.run.id = "d4e5f6"
    with pytest.raises(WrongState, match="holds the model of run a1b2c3, not of d4e5f6"):
        console("run", "export", "d4", "--to", "model")
    assert files_in(tmp_path / "model") == EXPORTED


def test_a_damaged_marker_is_refused(console, model, tmp_path):
    (tmp_path / ".fedloom-export.json").write_text("[1")
    with pytest.raises(WrongState, match="damaged"):
        console("run", "export", "a1", "--to", ".")


def test_a_marker_cannot_name_files_elsewhere(console, model, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    console("run", "export", "a1", "--to", "model")
    marker = tmp_path / "model" / ".fedloom-export.json"
    marker.write_text(json.dumps({"run": "a1b2c3", "files": ["../keep.txt", "config.json"]}))
    console("run", "export", "a1", "--to", "model")
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_place_that_cannot_be_a_directory_is_refused(console, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WrongState, match="file is a file; give a new or empty directory"):
        console("run", "export", "a1", "--to", "file")
    with pytest.raises(WrongState, match=r"cannot write to file/below: Not a directory; give another"):
        console("run", "export", "a1", "--to", "file/below")


def test_a_model_that_does_not_fit_is_refused_before_it_travels(console, model, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageFull, match=r"model has 1\.0 kB free and the model needs 10\.3 kB more"):
        console("run", "export", "a1", "--to", "model")
    assert model.asked_for(ReadRequest) == []


def test_a_run_without_a_model_says_so(console, fake):
    fake.refusal = NotFound("run a1 has no model yet")
    with pytest.raises(NotFound, match="has no model yet"):
        console("run", "export", "a1", "--to", "model")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../model",
        "a/b",
        "/etc/passwd",
        "a\\b",
        ".bashrc",
        "a\nb",
        "a\x00b",
        "ü.json",
        "x" * 129,
    ],
)
def test_a_file_name_that_is_not_plain_is_refused(console, fake, tmp_path, name):
    fake.put("model.safetensors", WEIGHTS)
    fake.put(name, b"{}")
    with pytest.raises(ProtocolError, match="not a plain file name; nothing was written"):
        console("run", "export", "a1", "--to", "model")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        ({"name": "../factors.safetensors"}, "not a plain file name; nothing was written"),
        ({"digest": "blake3:../../factors"}, "64 hexadecimal digits"),
    ],
)
def test_a_fold_whose_place_would_be_elsewhere_is_refused(console, fake, tmp_path, fold, message):
    fake.put("model.safetensors", WEIGHTS)
    plain = {"name": "factors.safetensors", "digest": fake.files[0].digest, "size_bytes": len(WEIGHTS)}
    fake.folds = [Blob(**plain), Blob(**plain | fold)]
    with pytest.raises(ProtocolError, match=message):
        console("run", "export", "a1", "--to", "model")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "digest", "message"),
    [
        (["config.json", "config.json"], "blake3:" + "0" * 64, "sends config.json twice"),
        (["README.md"], "blake3:" + "0" * 64, "sends README.md twice"),
        (["config.json"], "../../etc", "64 hexadecimal digits"),
    ],
)
def test_names_that_hide_each_other_and_digests_that_are_none_are_refused(names, digest, message):
    with pytest.raises(ProtocolError, match=message):
        check_names([Blob(name=name, digest=digest, size_bytes=1) for name in names])


def test_transformers_loads_what_was_exported(console, fake, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=257, n_positions=16)
    torch.manual_seed(5)
    trained = transformers.GPT2LMHeadModel(config)
    trained.save_pretrained(tmp_path / "coordinator")
    for path in sorted((tmp_path / "coordinator").iterdir()):
        fake.put(path.name, path.read_bytes())
    console("run", "export", "a1", "--to", "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    ids = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(loaded(ids).logits, trained.eval()(ids).logits, rtol=0, atol=0)
