"""The coordinator as a process of its own: what systemd, the log and whoever stops it see."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from fedloom.v1 import runs_pb2
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom_common.channels import open_channel
from fedloom_common.identity import TlsFiles
from fedloom_server.console.kit import create_kit

pytestmark = pytest.mark.slow  # seconds, and all else that it claims has tests of its own

FEDLOOM = Path(sys.executable).with_name("fedloom")
START_S = 100


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Service:
    """A coordinator that systemd, played by the test, has started."""

    def __init__(self, folder):
        self.port, self.http = free_port(), free_port()
        made = create_kit(folder / "kit", federation="clinic", hosts=["localhost"], port=self.port)
        made.add_operator("ann")
        self.kit = folder / "kit"
        path = self.kit / "coordinator/coordinator.yaml"
        changes = {
            "listen": f"127.0.0.1:{self.port}", "http": f"127.0.0.1:{self.http}", "disk_floor_bytes": 0,
            "log_format": "json", "drain_s": 30,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
        self._systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._systemd.bind(str(folder / "notify"))
        self._systemd.settimeout(START_S)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [FEDLOOM, "coordinator", "--config", path], stdout=log, stderr=log,
                env=os.environ | {"NOTIFY_SOCKET": str(folder / "notify"), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self.heard() == "READY=1"

    def heard(self):
        return self._systemd.recv(100).decode()

    def page(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=60) as answer:
            return answer.read().decode()

    def lines(self):
        """The log, of which every line must be of its format."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self):
        self.process.kill()
        self.process.wait()
        self._systemd.close()


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    yield service
    service.close()


async def test_its_life_as_systemd_an_intruder_and_a_watching_operator_see_it(service):
    assert json.loads(await asyncio.to_thread(service.page, "/readyz"))["ready"]
    await asyncio.to_thread(knock_without_certificate, service.port)
    metrics = await asyncio.to_thread(service.page, "/metrics")
    folder = service.kit / "operators/ann"
    tls = TlsFiles(ca=folder / "ca.crt", certificate=folder / "operator.crt", key=folder / "operator.key")
    async with open_channel(f"localhost:{service.port}", tls, None) as channel:
        await RunServiceStub(channel).List(runs_pb2.ListRequest(), timeout=60)
        service.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(service.heard) == "STOPPING=1"
        assert await asyncio.to_thread(service.process.wait, 25) == 0, "an idle connection holds nobody up"

    assert "fedloom_tls_handshake_failures_total 1.0" in metrics
    [refused] = [line for line in service.lines() if line["message"] == "TLS handshake failed"]
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in refused["reason"]
    assert service.lines()[-1]["message"] == "coordinator stopped"


def knock_without_certificate(port):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw, context.wrap_socket(raw) as secure:
        assert secure.recv(1) == b"", "it is let go"
