"""Every family in shards, on one rank: ties, the loss and its gradient, and what is generated."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import distributed

from fedloom_client.training.group import Group
from fedloom_client.training.sharding import local, shard, without_memory

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view")
"""Of an output that nobody changes in place."""

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = transformers.BertConfig(
    **SMALL, intermediate_size=48, hidden_dropout_prob=0, attention_probs_dropout_prob=0
)
LLAMA = transformers.LlamaConfig(
    **SMALL, intermediate_size=48, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
)
T5 = transformers.T5Config(
    vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Group(0, 1, torch.device("cpu"), store)
    distributed.destroy_process_group()


def sharded(model_class: str, config: Any, group: Group) -> tuple[Any, Any]:
    """A model as transformers makes it, and the same in shards."""
    torch.manual_seed(0)
    whole = getattr(transformers, model_class).from_config(config)
    with without_memory():
        parts = getattr(transformers, model_class).from_config(copy.deepcopy(config))
    shard(parts, group)
    state = parts.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            local(state[name]).copy_(tensor)
    return whole, parts


def ties(model: Any) -> set[frozenset[str]]:
    state = model.state_dict(keep_vars=True)
    return {frozenset(name for name in state if state[name] is tensor) for tensor in state.values()}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        ("AutoModelForCausalLM", LLAMA),
        ("AutoModelForMaskedLM", BERT),
        ("AutoModelForSequenceClassification", BERT),
        ("AutoModelForSeq2SeqLM", T5),
    ],
    ids=["llama", "bert-masked", "bert-classes", "t5"],
)
def test_a_sharded_model_has_the_ties_the_loss_and_the_gradient_of_the_whole_one(
    model_class: str, config: Any, group: Group
) -> None:
    whole, parts = sharded(model_class, config, group)
    assert ties(parts) == ties(whole)
    tokens = torch.randint(3, 50, (2, 8))
    labels = torch.tensor([0, 1]) if "Classification" in model_class else tokens
    losses = [model.train()(input_ids=tokens, labels=labels).loss for model in (whole, parts)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    other = dict(parts.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(local(other[name].grad), parameter.grad, atol=1e-6, rtol=0, msg=name)


def test_a_sharded_encoder_decoder_generates_what_the_whole_one_does(group: Group) -> None:
    whole, parts = sharded("AutoModelForSeq2SeqLM", T5, group)
    tokens = torch.randint(3, 50, (2, 8))
    answers = [model.eval().generate(tokens, max_new_tokens=5, do_sample=False) for model in (whole, parts)]
    assert torch.equal(answers[0], answers[1])
