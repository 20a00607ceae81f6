"""The task of a run spec, with the tokenizer that came with the model."""

from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from fedloom_client.training.tasks.causal import CausalLM
from fedloom_client.training.tasks.classification import Classification
from fedloom_client.training.tasks.instruction import Instruction
from fedloom_client.training.tasks.masked import MaskedLM
from fedloom_client.training.tasks.protocol import AnyTask, PluginSetting, RecordTask
from fedloom_client.training.tasks.seq2seq import Seq2Seq
from fedloom_client.training.tasks.tokenizers import Assets
from fedloom_common import runspec
from fedloom_common.errors import TrainingFailed

PLUGINS = "fedloom.tasks"
"""Group of entry points of tasks that sites have installed."""


def new_task(spec: runspec.Task, folder: Path) -> AnyTask:
    """The task, on the files beside the model.

    Raises:
        TrainingFailed: the files are unfit for it, or the plug-in is not here.
    """
    assets = Assets(folder)
    match spec:
        case runspec.CausalLM():
            return CausalLM(spec, assets)
        case runspec.MaskedLM():
            return MaskedLM(spec, assets)
        case runspec.Classification():
            return Classification(spec, assets)
        case runspec.Seq2Seq():
            return Seq2Seq(spec, assets)
        case runspec.Instruction():
            return Instruction(spec, assets)
        case runspec.Plugin():
            return _plugin(spec, assets)


def packing_key(spec: runspec.Task, folder: Path) -> str:
    """Changes whenever the task's examples of the same records do, as they may with a release."""
    key = f"{version('fedloom')} {Assets(folder).digest()} {spec.model_dump_json()}"
    if isinstance(spec, runspec.Plugin):
        package = _entry_point(spec.name).dist
        key += f" {package.name} {package.version}" if package else ""
    return key


def _plugin(spec: runspec.Plugin, assets: Assets) -> RecordTask:
    entry_point = _entry_point(spec.name)
    try:
        make = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise TrainingFailed(f"the task plug-in {spec.name} does not load: {error}") from error
    setting = PluginSetting(
        options=spec.options,
        context_tokens=spec.context_tokens,
        tokenizer=assets.tokenizer,
        config=assets.config,
        padding=assets.padding,
    )
    task = make(setting)
    if not isinstance(task, RecordTask):
        raise TrainingFailed(
            f"the task plug-in {spec.name} makes a {type(task).__name__}, which lacks a part of RecordTask"
        )
    return task


def _entry_point(name: str) -> EntryPoint:
    there = {entry_point.name: entry_point for entry_point in entry_points(group=PLUGINS)}
    if name not in there:
        raise TrainingFailed(
            f"the site has no task plug-in {name}; it has {', '.join(sorted(there)) or 'none'}: install the "
            f"package with entry point {name} in the group {PLUGINS} beside fedloom, and restart the daemon"
        )
    return there[name]
