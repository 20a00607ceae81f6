"""Flower, deployed as its users do: one SuperLink with TLS, a SuperNode a site, and a submitted app.

The message API over the SuperLink's default transport, apps in subprocesses, as both commands start them.
"""

from pathlib import Path
from typing import ClassVar

from environments import Environment
from peer import APPS, OPERATOR
from processes import Processes, free_port

from fedloom_server.console.kit import create_kit

SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # the one wait that can be set; others are fixed at up to 3 s
}
CONNECTION = "benchmark"


class FlowerDeployment:
    """A SuperLink and its SuperNodes."""

    system: ClassVar[str] = "Flower"
    package: ClassVar[str] = "flwr"
    version: ClassVar[str] = "1.41.0"
    requirements: ClassVar[tuple[str, ...]] = (f"{package}=={version}", "numpy>=2,<3")

    def __init__(self, environment: Environment, folder: Path, sites: int) -> None:
        self.port = free_port()
        self._environment = environment
        self._home = folder / "flower"
        self._certificates = folder / "flower-kit/coordinator"
        self._sites = sites

    def provision(self) -> None:
        """A CA and a server certificate; Flower's TLS knows no client certificates."""
        create_kit(self._certificates.parent, federation="benchmark", hosts=["127.0.0.1", "localhost"])
        self._home.mkdir()
        (self._home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self._ca}"\n'
        )

    def start(self, processes: Processes, environment: dict[str, str]) -> None:
        """The SuperLink keeps its state in memory, its fastest; apps find Flower in their environment."""
        own = self._own(environment)
        processes.start(
            "server",
            [self._environment.programs / "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port),
             "--ssl-ca-certfile", self._ca,
             "--ssl-certfile", self._certificates / "coordinator.crt",
             "--ssl-keyfile", self._certificates / "coordinator.key",
             "--disable-runtime-dependency-installation"],
            environment=own,
        )  # fmt: skip
        for number in range(1, self._sites + 1):
            processes.start(
                f"site-{number}",
                [self._environment.programs / "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
                 "--root-certificates", self._ca, "--port", str(free_port())],
                environment=own,
            )  # fmt: skip

    def submit(self, processes: Processes, environment: dict[str, str]) -> None:
        """`flwr run`, which shows the run's log until it ends."""
        processes.start(
            OPERATOR,
            [self._environment.programs / "flwr", "run", APPS / "flower", CONNECTION, "--stream"],
            environment=self._own(environment),
        )

    @property
    def _ca(self) -> Path:
        return self._certificates / "ca.crt"

    def _own(self, environment: dict[str, str]) -> dict[str, str]:
        home = {"FLWR_HOME": str(self._home), "HOME": str(self._home)}
        return environment | SETTINGS | self._environment.variables | home
