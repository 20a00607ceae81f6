"""Virtual environments for the peers, each of its own: made once, kept, and made anew for another version."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOLD_LINES = 5
READY = "fedloom-benchmark.txt"


@dataclass(frozen=True)
class Environment:
    """An environment that is ready."""

    folder: Path

    @property
    def programs(self) -> Path:
        """Where its commands lie."""
        return self.folder / "bin"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.programs / "python"

    @property
    def variables(self) -> dict[str, str]:
        """What makes its commands the ones that are found by name."""
        return {
            "VIRTUAL_ENV": str(self.folder),
            "PATH": f"{self.programs}:{os.environ.get('PATH', os.defpath)}",
        }


def default_folder() -> Path:
    """The user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fedloom-bench"


def make_environment(folder: Path, requirements: Sequence[str]) -> Environment:
    """Make an environment with these packages, unless it is there already.

    Raises:
        SystemExit: it cannot be made; says what was tried and the end of what was answered.
    """
    wanted = "\n".join([sys.version, *requirements, ""])
    ready = folder / READY
    if not ready.is_file() or ready.read_text() != wanted:
        ready.unlink(missing_ok=True)  # a half-made environment must not look like a whole one
        _run([sys.executable, "-m", "venv", "--clear", folder], f"an environment in {folder}")
        _run(
            [folder / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", *requirements],
            f"{' and '.join(requirements)} in {folder}",
        )
        ready.write_text(wanted)
    return Environment(folder)


def make_packages(folder: Path, requirements: Sequence[str]) -> Path:
    """Have packages, without what they need, in a folder for PYTHONPATH: beside this program's own ones.

    Raises:
        SystemExit: as for :func:`make_environment`.
    """
    wanted = "\n".join([sys.version, *requirements, ""])
    ready = folder / READY
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
        _run([*install, "--target", folder, *requirements], f"{' and '.join(requirements)} in {folder}")
        ready.write_text(wanted)
    return folder


def _run(command: Sequence[str | Path], wanted: str) -> None:
    # The environment this program runs in must not leak its packages into the new one.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=inherited)
    if done.returncode:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-TOLD_LINES:])
        raise SystemExit(
            f"could not install {wanted}; see that a package index is in reach (`pip config list`), or "
            f"choose other systems with --systems. It said:\n{told}"
        )
