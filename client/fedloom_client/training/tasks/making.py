"""The task of a run spec, with the tokenizer that came with the model."""

from pathlib import Path

from fedloom_client.training.tasks.causal import CausalLM
from fedloom_client.training.tasks.protocol import AnyTask
from fedloom_client.training.tasks.tokenizers import Assets
from fedloom_common import runspec


def new_task(spec: runspec.Task, folder: Path) -> AnyTask:
    """The task, on the files beside the model."""
    assets = Assets(folder)
    return CausalLM(spec, assets)
