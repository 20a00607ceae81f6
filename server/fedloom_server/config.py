"""What the coordinator's own file says: where it listens, what it keeps, its limits."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from fedloom_common.channels import WINDOW_BYTES
from fedloom_common.httpport import http_encryption
from fedloom_common.identity import TlsFiles
from fedloom_common.settings import Address, ConfigPath
from fedloom_common.strict import Strict

OWN_NAME = "localhost"
"""A name that every coordinator's certificate of a kit has, whatever others."""


class CoordinatorTls(TlsFiles):
    """The coordinator's TLS files."""

    crl: ConfigPath | None = None
    """Revocation list of the federation (PEM): certificates in it no longer count."""


class Limits(Strict):
    """What one peer, by its certificate, may ask for; generous for honest ones."""

    calls_at_once: int = Field(default=64, ge=4)
    """Calls under way: a session, transfers, watchers; each may hold a file and a chunk in memory."""
    calls_per_s: float = Field(default=50, gt=0)
    """Calls a second, in the long run."""
    calls_burst: int = Field(default=500, ge=1)
    """Calls at once after a quiet time."""
    sessions_per_minute: int = Field(default=60, ge=1)
    """Sessions that a site may open in a minute: two daemons with one certificate displace each other."""
    messages_per_s: float = Field(default=100, gt=0)
    """Messages a second of one session; a site that says more is read more slowly."""


class KeepModels(Strict):
    """Which global models of a run are kept; a model that is still needed always is."""

    last: int = Field(default=5, ge=1)
    """The newest so many."""
    best: int = Field(default=1, ge=0)
    """The best so many, by ``evaluation.best``, else by the metric that stops the run, else by the loss."""
    every: int = Field(default=0, ge=0)
    """Those of every so many rounds; 0 for none."""


def own_address(listen: str) -> str:
    """The address at which this host reaches what listens there."""
    host, _, port = listen.rpartition(":")
    return f"localhost:{port}" if host.strip("[]") in ("", "0.0.0.0", "::") else listen  # noqa: S104


def _policy(value: Any) -> Any:
    """A plain number is short for ``last`` alone."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return {"last": value, "best": 0} if is_number else value


class CoordinatorConfig(Strict):
    """The config of a coordinator, coordinator.yaml."""

    listen: Address = "0.0.0.0:7443"
    """host:port to serve sites and operators on; port 0 takes a free one."""
    tls: CoordinatorTls | None = None
    """The coordinator's certificate, its key and the federation's CA."""
    insecure: bool = False
    """Instead of ``tls``, for tests on one machine: no encryption, identities believed; loopback only."""
    http: Address | None = None
    """host:port of /healthz, /readyz and /metrics; no such port if not given."""
    http_tls: bool | None = None
    """Whether that port shows the coordinator's certificate; wherever it is not on loopback, if not given."""
    disk_floor_bytes: int = Field(default=1 << 30, ge=0)
    """Free space in state_dir below which /readyz says that the coordinator is not ready."""
    state_dir: ConfigPath
    """Folder for models, updates and, without ``database``, SQLite's file; made if missing."""
    database: SecretStr | None = None
    """postgresql://USER:PASSWORD@HOST:PORT/NAME, a database of its own, instead of SQLite's file."""
    heartbeat_s: float = Field(default=10, gt=0)
    """Seconds between a site's signs of life, up to 60 where there are many sites; three missed ones end
    its session."""
    concurrent_runs: int = Field(default=4, ge=1)
    """Runs that may be under way at the same time; further ones wait for their turn, by priority."""
    concurrent_uploads: int = Field(default=8, ge=1)
    """Updates that may arrive at the same time; further sites wait their turn."""
    concurrent_downloads: int = Field(default=32, ge=1)
    """Models that may be sent at the same time; further sites wait their turn."""
    window_bytes: int = Field(default=WINDOW_BYTES, ge=1 << 16, le=1 << 26)
    """Bytes of an update that may be on their way: a break loses them, a long fast line needs its
    rate times the round trip, such as 4194304."""
    staged_updates: int = Field(default=8, ge=1)
    """Updates that may lie on disk, arriving or not yet folded; further sites wait their turn.

    Four are folded at a time, or half as many as may lie here. Beside them lie their sum in float64, a new
    one while it is written, and up to four old files to overwrite; a deterministic round may need a few more.
    Updates of a rule that looks at all of a round at once all lie here, and do not count.
    """
    keep_models: Annotated[KeepModels, BeforeValidator(_policy)] = KeepModels()
    """Global models kept of each run; a number is short for ``last`` alone."""
    model_storage: str | None = None
    """A URL of object storage that fsspec knows, such as s3://bucket/prefix, for models; the disk is then
    their cache. Secrets come from the storage's own variables or files."""
    model_cache_bytes: int | None = Field(default=None, ge=0)
    """Bytes of models that stay on the disk beside those in use; all if not given."""
    limits: Limits = Limits()
    """What one peer may ask for."""
    drain_s: float = Field(default=10, gt=0)
    """Seconds that calls under way get to end at shutdown."""
    log_format: Literal["human", "json"] = "human"
    """How log lines look on standard error."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe lines that are logged."""

    @property
    def database_url(self) -> str | None:
        """Where the database is; it may hold a password."""
        return None if self.database is None else self.database.get_secret_value()

    @model_validator(mode="after")
    def _a_cache_of_something(self) -> Self:
        if self.model_cache_bytes is not None and self.model_storage is None:
            raise ValueError("model_cache_bytes needs model_storage: without it the disk is the only place")
        return self

    @model_validator(mode="after")
    def _security_fits(self) -> Self:
        if (self.tls is None) == (not self.insecure):
            raise ValueError(
                "give tls (made by `fedloom provision init`), or insecure: true for tests on one machine"
            )
        if self.http is not None:
            http_encryption(self.http, self.http_tls, self.tls)
        return self
