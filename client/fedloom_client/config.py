"""What one site's own file says: where the coordinator is, what data there is, what is permitted."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fedloom_common.channels import WINDOW_BYTES
from fedloom_common.codecs.spec import StageName
from fedloom_common.digests import DIGEST
from fedloom_common.httpport import http_encryption
from fedloom_common.identity import TlsFiles
from fedloom_common.requirements import MOST_LABELS, Label
from fedloom_common.runspec import TaskKind
from fedloom_common.settings import Address, ConfigGlob, ConfigPath
from fedloom_common.strict import Name, Pattern, Strict

_TIME = r"([01]\d|2[0-3]):[0-5]\d"
Hours = Annotated[str, Pattern(f"^{_TIME}-{_TIME}$", "two times from 00:00 to 23:59, such as 20:00-06:00")]
Digest = Annotated[str, Pattern(r"^blake3:[0-9a-f]{64}$", f"{DIGEST}, which `b3sum FILE` tells of a file")]


class DataSource(Strict):
    """Files of one data set, by the name under which run specs ask for it."""

    format: Literal["text", "jsonl", "parquet", "dataset"] = "text"
    """``text``: one document a file; ``jsonl`` and ``parquet``: one document a record; ``dataset``: a
    directory that the datasets library saved."""
    files: tuple[ConfigGlob, ...] = Field(min_length=1)
    """Paths or globs, relative to the config file's folder."""
    fields: dict[str, str] = Field(default={})
    """What records call the fields that tasks read, where that is something else: ``{text: body}``."""
    held_out: float = Field(default=0.1, gt=0, le=1)
    """Share kept out of training, to measure models on: the tail of each text file, or records at random;
    1 at a site that only measures."""


class Workers(Strict):
    """The group of training processes that torchrun starts, one rank a device."""

    nproc_per_node: int | None = Field(default=None, ge=1)
    """Ranks on this host; every GPU if not given, or one rank on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks train; ``auto`` takes CUDA where there is a device."""
    threads_per_rank: int | None = Field(default=None, ge=1)
    """CPU threads of a rank; the host's cores shared evenly if not given."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks hold the model: ``ddp``, each the whole with its gradient and optimizer state, or
    ``fsdp``, each a share of all three, for models that are too large for one device. The numbers are the
    same to rounding; ``fsdp`` sends about half as much again between the ranks. Adapters are small, and
    each rank holds the whole of one upon its share of the base."""
    max_restarts: int = Field(default=2, ge=0)
    """Times that the launcher restarts the group after a rank has died, for one assignment."""
    collective_timeout_s: float = Field(default=120, gt=0)
    """Seconds after which ranks give up on a rank that is silent within a step."""
    idle_s: float = Field(default=1800, gt=0)
    """Seconds without work after which the warm group is let go."""
    nnodes: int = Field(default=1, ge=1)
    """Hosts of the group; on more than one they share ``state_dir`` and data through a common file system."""
    rdzv_endpoint: str | None = None
    """host:port at which the launchers of several hosts meet; this host's address."""
    rdzv_id: str = "fedloom"
    """Name of the meeting, the same on every host of the site."""


class Privacy(Strict):
    """The least privacy that a run must give to this site's records."""

    max_clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm to which the site's contribution is clipped."""
    min_noise_multiplier: float | None = Field(default=None, gt=0)
    """Smallest standard deviation of the noise, in units of that norm."""


class Policy(Strict):
    """What this site permits; an assignment beyond it is refused with the rule that refuses it."""

    tasks: tuple[TaskKind, ...] = get_args(TaskKind)
    """Kinds of task; all that fedloom brings if not given."""
    task_plugins: tuple[Name, ...] = ()
    """Tasks that this site has installed itself, by the names of their entry points; none if not given."""
    data_sets: tuple[Name, ...] | None = None
    """Data sets that runs may use; all of ``data`` if not given."""
    model_types: tuple[str, ...] | None = None
    """Model families by transformers' ``model_type``; any if not given."""
    models: tuple[Digest, ...] | None = None
    """Models by digest, as `fedloom run show` tells it: of config.json, which is one all through a run, of
    the frozen base under an adapter, or of the first model.safetensors, whose run this site must then join at
    its beginning; any if not given."""
    max_model_bytes: int | None = Field(default=None, ge=1)
    """Largest model file, in bytes."""
    max_steps_per_round: int | None = Field(default=None, ge=1)
    """Most optimizer steps in one round."""
    max_epochs_per_round: float | None = Field(default=None, gt=0)
    """Most passes over the data in one round."""
    max_rounds_per_day: int | None = Field(default=None, ge=0)
    """Most trainings that begin on one day, from midnight to midnight UTC, whatever is restarted."""
    alone: bool = True
    """Whether the site also trains by itself at the end of a run with ``evaluation.alone``, for as many steps
    as the run gave it; that counts as one training of the day."""
    hours_utc: Hours | None = None
    """When trainings may begin, such as ``20:00-06:00``, in UTC; always if not given."""
    failure_details: bool = False
    """Whether the coordinator is told all of why work failed, such as the end of a traceback. What other
    programs say may quote records, so that else only the first line leaves, which is fedloom's own."""
    codecs: tuple[StageName, ...] | None = None
    """Codecs in which updates may leave, by the names of ``transport.up``; any if not given."""
    privacy: Privacy | None = None
    """The least privacy that a run must give; none if not given."""


class SiteConfig(Strict):
    """The config of a client daemon, site.yaml."""

    coordinator: Address
    """host:port of the coordinator."""
    tls: TlsFiles | None = None
    """This site's certificate, its key and the federation's CA."""
    insecure: Name | None = None
    """Instead of ``tls``, for tests on one machine: a site name sent in clear; loopback addresses only."""
    state_dir: ConfigPath
    """Folder for models, packed data and updates that wait for delivery; made if missing."""
    http: Address | None = None
    """host:port of /healthz, /readyz and /metrics; no such port if not given."""
    http_tls: bool | None = None
    """Whether that port shows the site's certificate; wherever it is not on loopback, if not given."""
    disk_floor_bytes: int = Field(default=1 << 30, ge=0)
    """Free space in state_dir below which /readyz says that the site is not ready."""
    concurrent_assignments: int = Field(default=1, ge=1, le=64)
    """Assignments of different runs that may be done at the same time, each by a worker group of its own on
    the same devices; further ones wait their turn."""
    cache_models: int = Field(default=3, ge=1)
    """Global models kept in ``state_dir``, and files of frozen weights besides; the newest ones."""
    upload_bytes_per_s: float | None = Field(default=None, ge=1000)
    """Most bytes that updates take of the line to the coordinator; as many as it has if not given."""
    download_bytes_per_s: float | None = Field(default=None, ge=10_000)
    """Most bytes that models take of the line from the coordinator, which sends 1 MiB at a time and takes a
    site for dead that reads none for minutes; as many as it has if not given."""
    window_bytes: int = Field(default=WINDOW_BYTES, ge=1 << 16, le=1 << 26)
    """Bytes of a model that may be on their way: a break loses them, a long fast line needs its
    rate times the round trip, such as 4194304."""
    models: dict[Name, ConfigPath] = Field(default={})
    """Directories of models that this site has anyway, by a name for people: the frozen weights under an
    adapter are taken from a ``.safetensors`` file there that has their digest, and else downloaded."""
    trains: bool = True
    """Whether the site trains, or only measures models in runs that name it in ``evaluation.central``."""
    labels: dict[Label, Label] = Field(default={}, max_length=MOST_LABELS)
    """What runs may choose this site by, such as ``{ward: icu}``; operators may set others over them."""
    data: dict[Name, DataSource] = Field(min_length=1)
    """Data sets of this site."""
    workers: Workers = Workers()
    """The training processes."""
    policy: Policy = Policy()
    """What this site permits."""
    policy_file: ConfigPath | None = None
    """Instead of ``policy``, a file of its own with the same keys, which the owner of the data keeps. It is
    read for every assignment; while it is missing or wrong, everything is refused."""
    log_format: Literal["human", "json"] = "human"
    """How log lines look on standard error."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe lines that are logged."""

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.policy_file is not None and "policy" in self.model_fields_set:
            raise ValueError("policy and policy_file are both given; keep one of them")
        return self

    @model_validator(mode="after")
    def _security_fits(self) -> Self:
        if (self.tls is None) == (self.insecure is None):
            raise ValueError(
                "give tls: the folder that `fedloom provision site` made has its three files "
                "(or, for tests on one machine only, insecure: the site's name); exactly one of both"
            )
        if self.http is not None:
            http_encryption(self.http, self.http_tls, self.tls)
        return self
