"""What ``fedloom doctor site`` looks at: everything that a site needs before it can train."""

import itertools
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from fedloom_client.cli import ENV_PREFIX
from fedloom_client.config import DataSource, Policy, SiteConfig, Workers
from fedloom_client.consent import read_policy
from fedloom_client.hardware import data_set_bytes, find_devices, main_memory_bytes
from fedloom_client.localmodels import safetensors_in, unreadable
from fedloom_client.statedir import StateDir
from fedloom_client.status import ill_health, is_running
from fedloom_client.training.orders import Source
from fedloom_client.training.records import MAIN_FIELDS, Records
from fedloom_common.doctor.credentials import credential
from fedloom_common.doctor.findings import Check, Finding, examine, ok, problem, warning
from fedloom_common.doctor.host import open_files, size, state_folder
from fedloom_common.doctor.reach import way
from fedloom_common.errors import BadSpec, BadTensor, TrainingFailed
from fedloom_common.identity import Peer, Role
from fedloom_common.settings import Fitting, load_fitting
from fedloom_common.tensors import Manifest

TORCH_S = 120.0
ASK_TORCH = "import torch; print(torch.version.cuda, torch.cuda.device_count())"
RECORDS = 1000  # looked at for a held-out share: a data set may have millions
FEW_CHARACTERS = 10_000


def examination(config: Path | None, flags: list[str]) -> Iterator[Finding]:
    """Everything, whatever part of the config is wrong."""
    return examine(checks(load_fitting(SiteConfig, config, env_prefix=ENV_PREFIX, flags=flags)))


def checks(fitting: Fitting) -> dict[str, Check]:
    """The checks that the valid parts of the config allow."""
    values = fitting.values
    made: dict[str, Check] = {"config": partial(_config, fitting)}
    if "tls" in values:
        made["certificate"] = partial(credential, values["tls"], Role.SITE)
    if "coordinator" in values:
        insecure = values.get("insecure")
        peer = Peer(Role.SITE, insecure) if insecure else None
        made["way to the coordinator"] = partial(way, values["coordinator"], values.get("tls"), peer)
    if "state_dir" in values:
        made["state"] = partial(_state, values["state_dir"], values.get("disk_floor_bytes", 0))
        made["daemon"] = partial(_daemon, values["state_dir"])
    made["devices"] = partial(_devices, values.get("workers") or Workers())
    policy_file, policy = values.get("policy_file"), values.get("policy")
    policy = _policy_in(policy_file) if policy_file else policy
    if policy is not None:
        made["policy"] = partial(_policy, policy, values.get("data"))
    for name, folder in (values.get("models") or {}).items():
        made[f"models {name}"] = partial(_models, folder)
    for name, source in (values.get("data") or {}).items():
        rules = policy if isinstance(policy, Policy) else Policy()
        made[f"data set {name}"] = partial(_data, source, rules, trains=values.get("trains", True))
    made["limits"] = open_files
    return made


def _config(fitting: Fitting) -> Iterator[Finding]:
    for mistake in fitting.mistakes:
        yield problem(mistake, "correct the config; `fedloom client --help` lists all settings")
    if not fitting.mistakes:
        yield ok("every key and value is right")


def _policy_in(path: Path) -> Policy | BadSpec:
    try:
        return read_policy(path)
    except BadSpec as error:
        return error


def _policy(policy: Policy | BadSpec, data_sets: Collection[str] | None) -> Iterator[Finding]:
    if isinstance(policy, BadSpec):
        yield problem(str(policy), "correct the file, which the daemon's user must be able to read")
        return
    named = policy.data_sets or ()
    if data_sets is not None and (unknown := sorted(set(named) - set(data_sets))):
        yield warning(
            f"policy.data_sets names {', '.join(unknown)}, data has {', '.join(sorted(data_sets))}",
            "correct the name, or add the data set under data",
        )
    else:
        yield ok("its rules can be read")


def _models(directory: Path) -> Iterator[Finding]:
    """Whether the frozen weights of adapters can be taken from here; what cannot is downloaded."""
    try:
        paths = safetensors_in(directory)
    except BadSpec as error:
        yield problem(str(error), "until then, what runs need is downloaded")
        return
    for path in paths:
        try:
            size_bytes = Manifest.read(path).size_bytes
        except OSError as error:
            yield problem(unreadable(path, error), "until then, what runs need of it is downloaded")
        except BadTensor as error:
            yield problem(f"{path}: {error}", "copy it here again")
        else:
            yield ok(f"{path} can be read, {size(size_bytes)}")


def _state(folder: Path, floor_bytes: int) -> Iterator[Finding]:
    models = StateDir(folder).models
    sizes = [path.stat().st_size for path in models.glob("*.safetensors")] if models.is_dir() else []
    return state_folder(folder, floor_bytes, max(sizes, default=0))


def _daemon(folder: Path) -> Iterator[Finding]:
    status = StateDir(folder).status
    reason = ill_health(status)
    if reason is None:
        yield ok("it runs and is attached")
    elif is_running(status):
        yield warning(
            reason, "see the way to the coordinator above; the daemon attaches by itself, if it may"
        )
    else:
        yield warning(reason, "start it with `fedloom client`, once there is no problem here")


def _devices(workers: Workers) -> Iterator[Finding]:
    devices = find_devices(workers.device)
    gpus = [device for device in devices if device.kind == "cuda"]
    for device in devices:
        yield ok(f"{device.name}{f', {size(device.memory_bytes)}' if device.memory_bytes else ''}")
    yield ok(f"{size(main_memory_bytes())} of main memory")
    if workers.device == "cuda" and not gpus:
        yield problem(
            "workers.device is cuda, and nvidia-smi lists no device",
            "install the NVIDIA driver, give a container its GPUs, or set workers.device to cpu",
        )
    wanted = workers.nproc_per_node
    if gpus and wanted is not None and wanted > len(gpus):
        yield problem(
            f"workers.nproc_per_node is {wanted}, there are {len(gpus)} GPUs", "lower it, or leave it out"
        )
    if gpus:
        yield from _torch(len(gpus))


def _torch(gpus: int) -> Iterator[Finding]:
    """Whether torch can use what the driver lists; another process asks it, as that takes memory."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, check=False, timeout=TORCH_S
    )
    if done.returncode:
        yield problem(f"torch cannot be loaded: {done.stderr.strip()[-300:]}", "install fedloom again")
        return
    built_for, counted = done.stdout.split()[-2:]
    if built_for == "None":
        yield problem("torch is built for the CPU, but there are GPUs", "install a build of torch for CUDA")
    elif int(counted) < gpus:
        yield problem(
            f"torch (for CUDA {built_for}) can use {counted} of {gpus} GPUs: {done.stderr.strip()[-300:]}",
            "update the NVIDIA driver, or install a torch that is built for an older CUDA",
        )
    else:
        yield ok(f"torch, for CUDA {built_for}, can use {counted} of {gpus} GPUs")


def _data(source: DataSource, policy: Policy, *, trains: bool) -> Iterator[Finding]:
    """Whether files are there and can be read, and leave something to train and to measure on."""
    try:
        records = Records(Source(**source.model_dump()))
        yield ok(f"its files have {size(data_set_bytes(source))}")
        characters, held_out, names = _looked_at(records)
    except TrainingFailed as error:
        yield problem(str(error), "training would fail in the same way")
        return
    except PermissionError as error:
        yield problem(str(error), "let the daemon's user read it")
        return
    yield from _content(source, characters, held_out, trains=trains)
    has_plugins = bool(policy.task_plugins)  # which read fields of their own
    if characters and names.isdisjoint(MAIN_FIELDS) and not has_plugins:
        yield warning(
            f"its records have {', '.join(sorted(names))}, and none of {', '.join(MAIN_FIELDS)}",
            "say in the data set's fields which of them holds what, such as fields: {text: body}",
        )


def _looked_at(records: Records) -> tuple[int, float, set[str]]:
    """Characters in the first texts and records, how many of them are held out, and the fields there are."""
    if records.source.format == "text":
        characters = sum(len(text) for text in itertools.islice(records.texts(), RECORDS))
        return characters, characters * records.source.held_out, {"text"}
    characters = held_out = 0
    names: set[str] = set()
    for row in itertools.islice(records.rows(()), RECORDS):
        names |= set(row.values)
        own = {records.source.fields.get(name, name) for name in row.values}
        size_characters = sum(len(_text(row.values[name])) for name in own)
        characters += size_characters
        held_out += size_characters * row.held_out
    return characters, held_out, names


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _content(source: DataSource, characters: int, held_out: float, *, trains: bool) -> Iterator[Finding]:
    if not characters:
        yield problem("there is no text in it", "see the data set's files")
        return
    yield ok(f"it can be read: {characters} characters in what was looked at")
    if held_out < 1 or (trains and held_out >= characters):
        yield problem(
            f"held_out of {source.held_out:g} takes {held_out:.0f} of the first {characters} characters",
            "give more data, or another held_out: both parts need some",
        )
    elif characters < FEW_CHARACTERS:
        yield warning(f"it has only {characters} characters", "expect few examples, or none")
