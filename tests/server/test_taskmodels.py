"""Initial models of every task: the class, the head, the tokenizer, tied weights."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import RunSpec
from fedloom_server.initialmodel import write_model
from fedloom_server.models import MODEL_FILE

BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
LABELS = ["neg", "neu", "pos"]
CLASSES = {"kind": "classification", "labels": LABELS, "context_tokens": 32}
MASKED = {"kind": "masked_lm", "context_tokens": 32}


def spec_of(model, task, seed=0):
    return RunSpec.model_validate(
        {
            "name": "run", "model": model, "data": "text", "rounds": 1, "local": {"steps": 1}, "seed": seed,
            "task": task,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "task", "auto", "tied"),
    [
        (
            BERT, MASKED, AutoModelForMaskedLM,
            {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
        ),
        (BERT, CLASSES, AutoModelForSequenceClassification, set()),
        (GPT2, CLASSES, AutoModelForSequenceClassification, set()),
        (
            T5, {"kind": "seq2seq"}, AutoModelForSeq2SeqLM,
            {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
        ),
    ],
    ids=["bert-masked", "bert-classes", "gpt2-classes", "t5"],
)  # fmt: skip
def test_transformers_loads_every_tensor_and_ties_what_has_another_name(tmp_path, config, task, auto, tied):
    assert write_model(spec_of({"config": config}, task), tmp_path / "m") == []
    model, report = auto.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values())
    stored, state = load_file(tmp_path / "m" / MODEL_FILE), model.state_dict()
    assert set(state) - set(stored) == tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())


def test_a_classifier_knows_its_labels_by_name_and_what_fills_batches_up(tmp_path):
    write_model(spec_of({"config": GPT2}, CLASSES), tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "m").pad_token_id == 257


def test_a_padding_token_of_minus_1_is_none(tmp_path):
    write_model(spec_of({"config": GPT2 | {"pad_token_id": -1}}, CLASSES), tmp_path / "m")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").config.pad_token_id == 257


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "m"
    write_model(spec_of({"config": BERT}, MASKED, seed=9), folder)
    return folder


def test_a_classifiers_head_that_is_missing_is_drawn_from_the_seed_and_named(tmp_path, encoder):
    model = {"path": str(encoder)}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    for number, seed in enumerate((1, 1, 2)):
        assert set(write_model(spec_of(model, CLASSES, seed=seed), tmp_path / str(number))) == head
    first, same, other = (load_file(tmp_path / str(number) / MODEL_FILE) for number in range(3))
    pretrained = load_file(encoder / MODEL_FILE)
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        if name in pretrained:
            assert torch.equal(tensor, pretrained[name])
            assert torch.equal(tensor, other[name])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_a_classifier_goes_on_with_its_own_head_if_its_labels_are_those_of_the_task(tmp_path):
    write_model(spec_of({"config": BERT}, CLASSES), tmp_path / "first")
    model = {"path": str(tmp_path / "first")}
    assert write_model(spec_of(model, CLASSES, seed=5), tmp_path / "next") == []
    weights = [load_file(tmp_path / name / MODEL_FILE)["classifier.weight"] for name in ("first", "next")]
    assert all(torch.equal(one, other) for one, other in pairwise(weights))
    with pytest.raises(BadSpec, match="in another order: neg, neu, pos; give them in its order"):
        write_model(spec_of(model, CLASSES | {"labels": LABELS[::-1]}), tmp_path / "turned")


def test_an_adapter_for_a_head_that_would_never_be_trained_is_refused(tmp_path):
    write_model(spec_of({"config": BERT}, CLASSES), tmp_path / "classifier")
    model = {"path": str(tmp_path / "classifier"), "tokenizer": "bytes", "adapter": {"kind": "lora"}}
    with pytest.raises(BadSpec, match=r"lacks cls\.predictions.* of a masked language model"):
        write_model(spec_of(model, MASKED), tmp_path / "m")


def test_an_adapter_over_a_pooler_that_would_never_be_trained_is_refused(tmp_path, encoder):
    model = {"path": str(encoder), "tokenizer": "bytes", "adapter": {"kind": "lora"}}
    with pytest.raises(BadSpec, match=r"lacks bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight of a"):
        write_model(spec_of(model, CLASSES), tmp_path / "m")


def test_a_missing_body_is_not_drawn(tmp_path, encoder):
    broken = tmp_path / "broken"
    write_model(spec_of({"path": str(encoder)}, MASKED), broken)
    from safetensors.torch import save_file

    tensors = load_file(broken / MODEL_FILE)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / MODEL_FILE, metadata={"format": "pt"})
    with pytest.raises(BadSpec, match="lacks 1 tensors of a BertForSequenceClassification"):
        write_model(spec_of({"path": str(broken)}, CLASSES), tmp_path / "m")


def test_instructions_get_a_chat_template_if_the_tokenizer_has_none(tmp_path):
    write_model(spec_of({"config": GPT2}, {"kind": "instruction", "context_tokens": 64}), tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "Hi"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == "### user\nHi\n\n### assistant\n"


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (MASKED, "has no mask_token, which hides others"),
        ({"kind": "seq2seq"}, "has no eos_token, which separates texts"),
    ],
)
def test_a_tokenizer_without_a_token_that_the_task_needs_is_refused(tmp_path, encoder, task, complaint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    lacking = {name: value for name, value in settings.items() if not name.endswith("_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(lacking))
    model = {"config": BERT if task is MASKED else T5, "tokenizer": str(tmp_path)}
    with pytest.raises(BadSpec, match=complaint):
        write_model(spec_of(model, task), tmp_path / "m")


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path):
    task = {"kind": "plugin", "name": "x", "auto_class": "AutoModelForNothing"}
    with pytest.raises(BadSpec, match="AutoModelForNothing, which transformers does not have"):
        write_model(spec_of({"config": BERT}, task), tmp_path / "m")


def test_positions_that_a_model_gives_to_padding_are_not_for_texts(tmp_path):
    roberta = BERT | {"model_type": "roberta", "pad_token_id": 1}
    with pytest.raises(BadSpec, match="reads 63 tokens at once, but the model has 62 positions"):
        write_model(spec_of({"config": roberta}, MASKED | {"context_tokens": 63}), tmp_path / "m")
    assert write_model(spec_of({"config": roberta}, MASKED | {"context_tokens": 62}), tmp_path / "n") == []


BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


ROBERTA = BERT | {"model_type": "roberta"}


@pytest.mark.parametrize(
    ("config", "task"), [(BART, CLASSES), (T5, CLASSES), (ROBERTA, MASKED)], ids=["bart", "t5", "roberta"]
)
def test_a_new_model_that_does_not_take_what_its_tokenizer_gives_is_refused(tmp_path, config, task):
    """The first two tell classes by a token that ends texts, the last counts positions from padding."""
    with pytest.raises(BadSpec, match=r"model.config makes a .* that does not take a text as its tokenizer"):
        write_model(spec_of({"config": config}, task), tmp_path / "m")


def test_a_new_model_takes_a_text_with_the_special_token_that_its_config_names(tmp_path):
    write_model(spec_of({"config": ROBERTA | {"pad_token_id": 1}}, MASKED), tmp_path / "m")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "m").config.pad_token_id == 1


CAUSAL = {"kind": "causal_lm", "context_tokens": 32}


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("kind", ["causal_lm", "instruction"])
def test_a_model_that_sees_the_token_it_is_to_predict_is_refused(tmp_path, kind, more):
    with pytest.raises(BadSpec, match=rf"a bert .* both directions.* {kind} .*is_decoder: true.*masked_lm"):
        write_model(spec_of({"config": BERT | more}, CAUSAL | {"kind": kind}), tmp_path / "m")
    write_model(spec_of({"config": BERT | more | {"is_decoder": True}}, CAUSAL), tmp_path / "decoder")


def test_a_pretrained_encoder_is_refused_for_next_tokens(tmp_path, encoder):
    with pytest.raises(BadSpec, match="a bert of this config reads texts in both directions"):
        write_model(spec_of({"path": str(encoder), "tokenizer": "bytes"}, CAUSAL), tmp_path / "m")


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_that_reads_forward_is_taken(tmp_path, dtype):
    write_model(spec_of({"config": MIXTRAL | {"dtype": dtype}}, CAUSAL), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "mixtral"
