"""Models with parameters that the loss does not use: two gloo ranks against one process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedloom_client.training.orders import Order
from fedloom_common.controls import add_controls

pytestmark = pytest.mark.timeout(900)  # processes that load torch, on a machine that may be busy

MakeOrder = Callable[..., Order]
ADAMW = {"name": "adamw", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
LOCAL = {"steps": 3, "batch_examples": 8, "accumulation_steps": 2, "clip_norm": 0.5, "optimizer": ADAMW}
SCAFFOLD = LOCAL | {"optimizer": {"name": "sgd", "lr": 0.1}, "algorithm": "scaffold"}
FEDPROX = LOCAL | {"algorithm": {"name": "fedprox", "mu": 1.0}}


@pytest.fixture
def bigbird(assets: Path, tmp_path: Path) -> dict[str, str]:
    """A model whose pooler no task asks; the order's paths."""
    import torch
    from transformers import AutoModelForCausalLM, BigBirdConfig

    from fedloom_common.tensors import write_tensors

    folder = Path(shutil.copytree(assets, tmp_path / "bigbird"))
    config = BigBirdConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, attention_type="original_full", is_decoder=True, use_cache=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, sep_token_id=3,
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    write_tensors(tmp_path / "model.safetensors", dict(model.named_parameters()))
    add_controls(tmp_path / "model.safetensors", tmp_path / "controlled.safetensors")
    return {"assets_dir": str(folder), "model_path": str(tmp_path / "model.safetensors")}


def test_two_ranks_train_a_model_with_unused_parameters_as_one_process_does(
    ranks: Any, alone: Any, make_order: MakeOrder, bigbird: dict[str, str], tmp_path: Path
) -> None:
    controlled = bigbird | {"model_path": str(tmp_path / "controlled.safetensors")}
    jobs: dict[str, Any] = {
        "plain": {"local": LOCAL} | bigbird,
        "fedprox": {"local": FEDPROX} | bigbird,
        "scaffold": {"local": SCAFFOLD} | controlled,
        "recomputed": {"local": LOCAL | {"gradient_checkpointing": True}} | bigbird,
    }
    for name, changes in jobs.items():
        ranks.add(name, sharding="ddp", **changes)
    ranks.add("sharded", sharding="fsdp", **jobs["plain"])
    ranks.run(2)
    for name, changes in jobs.items():
        alone.restart()
        alone.perform(make_order(update_path=str(tmp_path / f"alone-{name}.safetensors"), id=name, **changes))
        ranks.same(f"alone-{name}", name, tolerance=1e-5)
    ranks.same("alone-plain", "sharded", tolerance=1e-5)

    began, ended = load_file(bigbird["model_path"]), load_file(tmp_path / "plain.safetensors")
    unused = [name for name in began if "pooler" in name]
    assert unused
    assert all((began[name] == ended[name]).all() for name in unused)  # not even their decay


def test_ranks_look_for_unused_parameters_only_where_there_are_some(
    ranks: Any, bigbird: dict[str, str]
) -> None:
    local = {"steps": 1, "batch_examples": 8}
    ranks.add("none", sharding="ddp", local=local)
    ranks.add("some", sharding="ddp", local=local, **bigbird)
    ranks.add("measured", sharding="ddp", work="evaluate", update_path="")
    for results in ranks.run(2):
        assert {name: result["finds_unused"] for name, result in results.items()} == {
            "none": False, "some": True, "measured": None,
        }  # fmt: skip
