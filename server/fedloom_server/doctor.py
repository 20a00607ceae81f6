"""What ``fedloom doctor coordinator`` looks at: everything that the service needs."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from fedloom_common.doctor.credentials import SOON_DAYS, credential
from fedloom_common.doctor.findings import Check, Finding, examine, ok, problem, warning
from fedloom_common.doctor.host import open_files, state_folder
from fedloom_common.doctor.reach import way
from fedloom_common.errors import BadSpec, FederationError, StorageUnavailable, WrongState
from fedloom_common.identity import Peer, Role, TlsFiles, is_loopback
from fedloom_common.revocation import read_revocations
from fedloom_common.settings import Fitting, load_fitting
from fedloom_server.cli import ENV_PREFIX
from fedloom_server.config import OWN_NAME, CoordinatorConfig, CoordinatorTls, own_address
from fedloom_server.database import open_database, shown
from fedloom_server.objects import Objects
from fedloom_server.ownership import owned_folder
from fedloom_server.schema import require_latest


def examination(config: Path | None, flags: list[str]) -> Iterator[Finding]:
    """Everything, whatever part of the config is wrong."""
    return examine(checks(load_fitting(CoordinatorConfig, config, env_prefix=ENV_PREFIX, flags=flags)))


def checks(fitting: Fitting) -> dict[str, Check]:
    """The checks that the valid parts of the config allow."""
    values = fitting.values
    made: dict[str, Check] = {"config": partial(_config, fitting)}
    if "tls" in values:
        made["certificate"] = partial(credential, values["tls"], Role.COORDINATOR)
        if values["tls"] is not None and values["tls"].crl is not None:
            made["revocation list"] = partial(_revocations, values["tls"])
    state = values.get("state_dir")
    if state is not None:
        made["state"] = partial(_state, state, values.get("disk_floor_bytes", 0))
    if state is not None and "database" in values:
        made["database"] = partial(_database, values["database"], state)
    if values.get("model_storage"):
        made["model storage"] = partial(_model_storage, values["model_storage"])
    if state is not None and "listen" in values:
        made["service"] = partial(_service, values["listen"], state, values.get("tls"))
    if values.get("http"):
        made["HTTP port"] = partial(_http, values["http"], state)
    made["limits"] = open_files
    return made


def _config(fitting: Fitting) -> Iterator[Finding]:
    for mistake in fitting.mistakes:
        yield problem(mistake, "correct the config; `fedloom coordinator --help` lists all settings")
    if not fitting.mistakes:
        yield ok("every key and value is right")


def _revocations(tls: CoordinatorTls) -> Iterator[Finding]:
    assert tls.crl is not None, "looked at only where there is one"
    try:
        found = read_revocations(tls.crl, tls.ca.read_bytes())
    except (BadSpec, OSError) as error:
        yield problem(str(error), "put a new list in its place; it is read without a restart")
        return
    told = f"list {found.number} revokes {len(found.revoked)} certificates, ends at {found.expires:%Y-%m-%d}"
    if (found.expires - datetime.now(UTC)).days < SOON_DAYS:
        yield warning(told, "have a new one made in time, with `fedloom provision`")
    else:
        yield ok(told)


def _state(folder: Path, floor_bytes: int) -> Iterator[Finding]:
    files = folder / "files"
    sizes = [path.stat().st_size for path in files.iterdir()] if files.is_dir() else []
    return state_folder(folder, floor_bytes, max(sizes, default=0))


def _database(url: SecretStr | None, folder: Path) -> Iterator[Finding]:
    try:
        database = open_database(None if url is None else url.get_secret_value(), folder)
    except FederationError as error:
        yield problem(str(error), "correct database in the config")
        return
    try:
        if database.is_missing:
            yield ok("SQLite: there is no file yet; the coordinator makes it when it starts")
            return
        require_latest(database)
        yield ok(f"{shown(database.engine.url)} answers, and its tables are this release's")
    except WrongState as error:
        yield warning(str(error), "nothing is lost either way")
    except BadSpec as error:
        yield problem(str(error), "docs/operations/state.md tells how to restore a backup")
    except FederationError as error:
        yield problem(
            f"{shown(database.engine.url)}: {error}", "see that it runs, and that user and password are right"
        )
    finally:
        database.close()


def _model_storage(url: str) -> Iterator[Finding]:
    try:
        objects = Objects(url)
        yield ok(f"it answers, and holds {len(objects.all())} files")
        objects.try_out()
        yield ok("a file can be written, read and removed")
    except BadSpec as error:
        yield problem(str(error), "correct model_storage in the config")
    except StorageUnavailable as error:
        yield problem(
            f"{error}: {error.__cause__ or 'it does not say why'}",
            "see that this host reaches it, that the bucket is there, and that this user's credentials may "
            "list, read, write and remove",
        )


def _service(listen: str, folder: Path, tls: TlsFiles | None) -> Iterator[Finding]:
    """Whether it runs and serves, or could."""
    if _runs(folder):
        yield ok("it runs: its state folder is in use")
        insecure = Peer(Role.COORDINATOR, "doctor") if tls is None else None
        yield from way(own_address(listen), tls, insecure, OWN_NAME)
    else:
        yield warning("it does not run", "start it with `fedloom coordinator`, once there is no problem here")
        yield from _free(listen)


def _http(address: str, folder: Path | None) -> Iterator[Finding]:
    if not is_loopback(address):
        yield warning(
            f"{address} can be reached from other hosts, and asks nobody who they are",
            "let a firewall admit only your probes and Prometheus",
        )
    if folder is None or not _runs(folder):
        yield from _free(address)
    else:
        yield ok(f"{address} is the running coordinator's")


def _runs(folder: Path) -> bool:
    if not (folder / "lock").exists():
        return False
    try:
        with owned_folder(folder):
            return False
    except WrongState:
        return True


def _free(address: str) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
    except (OSError, OverflowError) as error:
        yield problem(f"{address} cannot be listened on: {error}", "end what uses it, or give another")
    else:
        yield ok(f"{address} is free")
