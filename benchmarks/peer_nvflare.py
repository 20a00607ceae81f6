"""NVIDIA FLARE, deployed as its users do: a server and a client a site with mTLS, and a submitted job.

Over gRPC, with NumPy arrays, and each site's training script inside its job's process: its fastest.
"""

import subprocess
from pathlib import Path
from typing import ClassVar

import yaml
from environments import Environment
from peer import APPS, OPERATOR
from processes import ENVIRONMENT, Processes, free_port

ADMIN = "admin@nvidia.com"
SERVER = "localhost"


class NvflareDeployment:
    """A server and its clients."""

    system: ClassVar[str] = "NVIDIA FLARE"
    package: ClassVar[str] = "nvflare"
    version: ClassVar[str] = "2.9.0"
    requirements: ClassVar[tuple[str, ...]] = (f"{package}=={version}", "numpy>=2,<3")

    def __init__(self, environment: Environment, folder: Path, sites: int) -> None:
        self.port = free_port()
        self._environment = environment
        self._folder = folder / "nvflare"
        self._sites = [f"site-{number}" for number in range(1, sites + 1)]

    def provision(self) -> None:
        """Startup kits by FLARE's own tool; what it would keep in /tmp stays in the case's folder.

        Raises:
            SystemExit: its tool failed.
        """
        self._folder.mkdir()
        project = self._folder / "project.yml"
        project.write_text(yaml.safe_dump(self._project()))
        done = subprocess.run(
            [self._environment.programs / "nvflare", "provision", "-p", project, "-w", self._folder / "kits",
             "--force"],
            check=False, capture_output=True, text=True, cwd=self._folder,
            env=ENVIRONMENT | self._own({"PYTHONPATH": ""}),
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"`nvflare provision` failed:\n{done.stdout}{done.stderr}")
        for resources in (self._kit(SERVER) / "local").glob("resources.json*"):
            text = resources.read_text()
            resources.write_text(text.replace("/tmp/nvflare", str(self._folder / "storage")))

    def start(self, processes: Processes, environment: dict[str, str]) -> None:
        """What the kits' start.sh starts, in the foreground."""
        for name, kit in [("server", SERVER), *((site, site) for site in self._sites)]:
            processes.start(
                name,
                ["bash", self._kit(kit) / "startup/sub_start.sh", "--once"],
                environment=self._own(environment),
                cwd=self._kit(kit),
            )

    def submit(self, processes: Processes, environment: dict[str, str]) -> None:
        """An operator's program with FLARE's session and job API."""
        processes.start(
            OPERATOR,
            [self._environment.python, APPS / "nvflare/submit.py", self._kit(ADMIN), self._folder / "jobs"],
            environment=self._own(environment),
            cwd=self._folder,
        )  # fmt: skip

    def _project(self) -> dict[str, object]:
        """The sample project of `nvflare provision` with our participants and port."""
        impl = "nvflare.lighter.impl"
        return {
            "api_version": 3,
            "name": "benchmark",
            "description": "null training",
            "participants": [
                {"name": SERVER, "type": "server", "org": "fedloom", "fed_learn_port": self.port},
                *({"name": site, "type": "client", "org": "fedloom"} for site in self._sites),
                {"name": ADMIN, "type": "admin", "org": "fedloom", "role": "project_admin"},
            ],
            "builders": [
                {
                    "path": f"{impl}.workspace.WorkspaceBuilder",
                    "args": {"template_file": ["master_template.yml"]},
                },
                {
                    "path": f"{impl}.static_file.StaticFileBuilder",
                    "args": {"config_folder": "config", "scheme": "grpc"},
                },
                {"path": f"{impl}.cert.CertBuilder"},
                {"path": f"{impl}.signature.SignatureBuilder"},
            ],
        }

    def _kit(self, participant: str) -> Path:
        return self._folder / "kits/benchmark/prod_00" / participant

    def _own(self, environment: dict[str, str]) -> dict[str, str]:
        """Its home, where it keeps what it knows of the user, is the case's folder."""
        return environment | self._environment.variables | {"HOME": str(self._folder)}
