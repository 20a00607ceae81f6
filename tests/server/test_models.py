import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from fedloom_common.errors import BadSpec, FederationError, StorageFull
from fedloom_common.runspec import RunSpec
from fedloom_server.bytelevel import byte_tokenizer
from fedloom_server.givenfolder import is_of_another_tokenizer
from fedloom_server.initialmodel import write_model
from fedloom_server.models import MODEL_FILE, Remarks, prepare_model

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ASSETS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def spec_of(model, *, seed=0, context_tokens=64):
    return RunSpec.model_validate(
        {
            "name": "run", "model": model, "data": "text", "rounds": 1, "local": {"steps": 1}, "seed": seed,
            "task": {"context_tokens": context_tokens},
        }
    )  # fmt: skip


def written(folder, model, **rest):
    write_model(spec_of(model, **rest), folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gpt2") / "model", {"config": GPT2})


async def test_a_child_process_writes_the_same_files_for_the_same_seed(tmp_path, gpt2):
    assert await prepare_model(spec_of({"config": GPT2}), tmp_path / "by-child") == Remarks()
    assert contents(tmp_path / "by-child") == contents(gpt2)
    assert set(contents(gpt2)) == ASSETS | {MODEL_FILE}


def test_another_seed_gives_other_weights(tmp_path, gpt2):
    other = contents(written(tmp_path / "m", {"config": GPT2}, seed=1))
    assert {name for name, content in contents(gpt2).items() if content != other[name]} == {MODEL_FILE}


def test_the_coordinator_does_not_import_transformers():
    code = "import sys, fedloom_server.models; print({'torch', 'transformers'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        pytest.param(GPT2, {"lm_head.weight"}, id="gpt2-tied"),
        pytest.param(GPT2 | {"tie_word_embeddings": False}, set(), id="gpt2-untied"),
        pytest.param(LLAMA, set(), id="llama-untied"),
        pytest.param(LLAMA | {"tie_word_embeddings": True}, {"lm_head.weight"}, id="llama-tied"),
        pytest.param(GPT2 | {"dtype": "bfloat16"}, {"lm_head.weight"}, id="bfloat16"),
        pytest.param(LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}, set(), id="qwen2"),
    ],
)
def test_transformers_loads_every_tensor_and_ties_what_was_left_out(tmp_path, config, left_out):
    folder = written(tmp_path / "m", {"config": config})
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    stored, state = load_file(folder / MODEL_FILE), model.state_dict()
    assert set(stored) == set(state) - left_out
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    assert all(tensor.dtype == getattr(torch, config.get("dtype", "float32")) for tensor in stored.values())
    with safe_open(folder / MODEL_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_site_finds_every_parameter_of_the_bare_config_by_name_or_tie(tmp_path, config):
    folder = written(tmp_path / "m", {"config": config})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stored = load_file(folder / MODEL_FILE)
    state = model.state_dict()
    covered = {state[name].data_ptr() for name in stored}
    assert covered == {tensor.data_ptr() for tensor in state.values()}


def test_a_config_takes_its_vocabulary_from_the_tokenizer(gpt2):
    config = AutoConfig.from_pretrained(gpt2)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        257,
        256,
        256,
        None,
    )


def test_a_vocabulary_in_the_config_stays(tmp_path):
    folder = written(tmp_path / "m", {"config": LLAMA | {"vocab_size": 320, "pad_token_id": 300}})
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (320, 256, 300)


@pytest.mark.parametrize(("config", "dtype"), [(GPT2, "float32"), (LLAMA, "bfloat16")])
def test_a_pretrained_directory_keeps_weights_types_and_tokenizer(tmp_path, config, dtype):
    source = written(tmp_path / "source", {"config": config | {"dtype": dtype}}, seed=5)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(source)
    folder = written(tmp_path / "m", {"path": str(source)}, seed=6)
    wanted, came = load_file(source / MODEL_FILE), load_file(folder / MODEL_FILE)
    assert wanted.keys() == came.keys()
    assert all(
        torch.equal(came[name], tensor) and came[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 77
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == [97, 98]
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_a_tokenizer_may_come_from_a_directory_of_its_own(tmp_path, gpt2):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2 / name, tmp_path)
    folder = written(tmp_path / "m", {"config": GPT2, "tokenizer": str(tmp_path)})
    assert contents(folder) == contents(gpt2)


def test_the_byte_tokenizers_tokens_are_the_bytes_of_utf8(gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert len(tokenizer) == 257
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 256
    assert tokenizer.pad_token is None


BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_makes_the_round_trip_through_bytes(text):
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    if "<|endoftext|>" not in text:
        assert ids == list(text.encode())


def test_a_long_document_is_one_text_to_the_byte_tokenizer():
    document = "Wherefore art thou? " * 50_000
    assert len(BYTES.encode(document)) == 1_000_000


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        pytest.param({"model_type": "gpt3"}, "model_type is 'gpt3'.*did you mean .*gpt2", id="type"),
        pytest.param({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]", id="type-of-type"),
        pytest.param(
            GPT2 | {"n_layers": 3}, "config.n_layers: gpt2 has no such key; did you mean n_layer", id="key"
        ),
        pytest.param(GPT2 | {"n_layer": "two"}, "'n_layer' expected int, got str", id="value"),
        pytest.param(GPT2 | {"n_head": 5}, "divisible by num_heads", id="impossible"),
        pytest.param(GPT2 | {"dtype": "bf17"}, "bf17", id="dtype"),
        pytest.param(
            {"model_type": "t5"},
            "does not make a t5 causal language model: transformers has none",
            id="not-causal",
        ),
        pytest.param(
            GPT2 | {"vocab_size": 100}, "has 257 tokens, but .* embeddings for 100", id="vocabulary"
        ),
        pytest.param(GPT2 | {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: gpt2 has no such key", id="code"),
        pytest.param(GPT2 | {"initializer_range": 1e39}, "NaN or infinity", id="not-finite"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_with_what_is_wrong(tmp_path, config, complaint):
    with pytest.raises(BadSpec, match=complaint):
        write_model(spec_of({"config": config}), tmp_path / "m")


@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_a_directory_that_does_not_exist_is_named_with_what_to_do(tmp_path, key):
    model = {"path": "/no/such/place"} if key == "path" else {"config": GPT2, "tokenizer": "/no/such/place"}
    with pytest.raises(
        BadSpec, match=f"model.{key} is '/no/such/place', but .* give the path of a directory on the coord"
    ):
        write_model(spec_of(model), tmp_path / "m")


def test_a_context_longer_than_the_models_positions_is_refused(tmp_path, gpt2):
    for model in ({"config": GPT2}, {"path": str(gpt2)}):
        with pytest.raises(
            BadSpec, match=r"the task reads 65 tokens at once, but the model has 64 positions \(n_positions\)"
        ):
            write_model(spec_of(model, context_tokens=65), tmp_path / "m")


@pytest.fixture
def pretrained(tmp_path, gpt2):
    return shutil.copytree(gpt2, tmp_path / "pretrained")


def refusal_of(pretrained):
    """Why no run may begin with a directory's model."""
    with pytest.raises(BadSpec) as refusal:
        write_model(spec_of({"path": str(pretrained)}), pretrained.with_name("m"))
    return str(refusal.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_directory_that_brings_its_own_code_is_refused(pretrained, name):
    settings = json.loads((pretrained / name).read_text())
    (pretrained / name).write_text(
        json.dumps(settings | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    (pretrained / "evil.py").write_text("raise SystemExit('ran')")
    assert f"{name} has auto_map: models that bring their own code are refused" in refusal_of(pretrained)


def test_a_directory_without_config_is_refused(pretrained):
    (pretrained / "config.json").unlink()
    assert "has no config.json; wanted a directory that save_pretrained wrote" in refusal_of(pretrained)


def test_a_config_that_is_not_json_is_refused(pretrained):
    (pretrained / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal_of(pretrained)


def test_pickled_weights_are_not_read(pretrained):
    torch.save(load_file(pretrained / MODEL_FILE), pretrained / "pytorch_model.bin")
    (pretrained / MODEL_FILE).unlink()
    assert "no causal language model in safetensors files" in refusal_of(pretrained)


def test_an_empty_folder_is_told_to_have_no_config(pretrained):
    for file in pretrained.iterdir():
        file.unlink()
    assert "has no config.json; wanted a directory that save_pretrained wrote" in refusal_of(pretrained)


def test_corrupt_weights_are_to_be_fetched_again(pretrained):
    (pretrained / MODEL_FILE).write_bytes(b"corrupt " * 100)
    assert "no safetensors file; fetch model.safetensors again" in refusal_of(pretrained)


def test_weights_that_broke_off_are_to_be_fetched_again(pretrained):
    whole = (pretrained / MODEL_FILE).read_bytes()
    (pretrained / MODEL_FILE).write_bytes(whole[: len(whole) // 2])
    assert "is broken off, or no safetensors file; fetch model.safetensors again" in refusal_of(pretrained)


@pytest.mark.parametrize("name", [MODEL_FILE, "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_told_as_one(pretrained, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"
    (pretrained / name).write_text(pointer)
    refusal = refusal_of(pretrained)
    assert f"{name} is a git-lfs pointer and not the file itself" in refusal
    assert f"or fetch {name} again" in refusal


def test_a_model_that_lacks_tensors_is_not_filled_up_at_random(pretrained):
    config = GPT2Config(**GPT2, vocab_size=257, tie_word_embeddings=False)
    GPT2Model(config).save_pretrained(pretrained)  # no head
    assert "lacks 1 tensors of a GPT2LMHeadModel, lm_head.weight among them" in refusal_of(pretrained)


def test_a_model_that_is_not_finite_is_refused(pretrained):
    model = GPT2LMHeadModel.from_pretrained(pretrained)
    model.transformer.ln_f.bias.data[3] = torch.nan
    model.save_pretrained(pretrained)
    assert "tensor transformer.ln_f.bias holds NaN or infinity" in refusal_of(pretrained)


def test_a_tokenizer_for_a_newer_library_is_refused(pretrained):
    file = pretrained / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"model": content["model"] | {"type": "Newer"}}))
    assert "has no tokenizer that transformers loads: data did not match" in refusal_of(pretrained)


def test_a_directory_without_tokenizer_is_refused(pretrained):
    (pretrained / "tokenizer.json").unlink()
    (pretrained / "tokenizer_config.json").unlink()
    refusal = refusal_of(pretrained)
    assert "has no tokenizer files, such as tokenizer.json; save or fetch them there, or set" in refusal


@pytest.mark.parametrize("left", [None, "{}", '{"tokenizer_class": "PreTrainedTokenizerFast"}'])
def test_a_llama_without_its_tokenizer_file_is_told_so(tmp_path, left):
    source = written(tmp_path / "source", {"config": LLAMA})
    for file in source.glob("tokenizer*"):
        file.unlink()
    if left:
        (source / "tokenizer_config.json").write_text(left)
    with pytest.raises(BadSpec, match=r"has no tokenizer files, such as tokenizer\.json; save or fetch"):
        written(tmp_path / "m", {"path": str(source)})


async def test_another_tokenizer_than_the_models_own_is_remarked(tmp_path, gpt2):
    other = byte_tokenizer()
    ids = json.loads(other.backend_tokenizer.to_str())
    vocabulary = ids["model"]["vocab"]
    ids["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    source = shutil.copytree(gpt2, tmp_path / "source")
    (source / "tokenizer.json").write_text(json.dumps(ids))
    spec = spec_of({"path": str(source), "tokenizer": "bytes"})
    assert (await prepare_model(spec, tmp_path / "m")).is_of_another_tokenizer
    for same in ({"path": str(source)}, {"path": str(gpt2), "tokenizer": "bytes"}):
        assert not is_of_another_tokenizer(spec_of(same))


def test_a_tokenizer_without_end_of_text_is_refused(pretrained):
    (pretrained / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "has no eos_token, which separates texts" in refusal_of(pretrained)


async def test_a_mistake_comes_back_from_the_child_as_bad_spec(tmp_path):
    with pytest.raises(BadSpec, match="n_layers: gpt2 has no such key"):
        await prepare_model(spec_of({"config": GPT2 | {"n_layers": 2}}), tmp_path / "m")


async def test_any_other_failure_of_the_child_comes_back_with_its_last_lines(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FederationError, match=r"(?s)ended with status 1.*NotADirectoryError") as caught:
        await prepare_model(spec_of({"config": GPT2}), tmp_path / "file" / "m")
    assert not isinstance(caught.value, BadSpec)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_full_disk_is_told_as_such(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        with pytest.raises(StorageFull, match="no space left"):
            write_model(spec_of({"config": GPT2}), tmp_path / "m")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


async def test_a_cancelled_preparation_leaves_no_process(tmp_path):
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text()
    task = asyncio.create_task(prepare_model(spec_of({"config": GPT2}), tmp_path / "m"))
    while children.read_text() == before:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children.read_text() == before


def test_weights_that_cannot_be_opened_are_told_as_such(pretrained):
    """As in a cache of links whose files were removed."""
    (pretrained / MODEL_FILE).unlink()
    (pretrained / MODEL_FILE).symlink_to("gone")
    assert f"model.path: {pretrained / MODEL_FILE} cannot be read: " in refusal_of(pretrained)


def test_files_that_transformers_does_not_load_may_be_broken_off(pretrained, tmp_path):
    """As copies of the weights in another layout, which nobody has fetched."""
    (pretrained / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    write_model(spec_of({"path": str(pretrained)}), tmp_path / "out")
    assert (tmp_path / "out" / MODEL_FILE).is_file()
