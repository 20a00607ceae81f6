"""``fedloom doctor`` for both sides, against a real coordinator with certificates."""

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import time

import fsspec
import pytest
import yaml

from fedloom_common.authority import Authority
from fedloom_common.doctor.reach import way
from fedloom_common.errors import BadSpec
from fedloom_common.identity import Role, TlsFiles
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig, CoordinatorTls
from fedloom_server.console.kit import create_kit
from fedloom_server.doctor import examination


def tls_of(folder, name):
    return TlsFiles(ca=folder / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")


@pytest.fixture
def kit(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    made = create_kit(tmp_path / "kit", federation="clinic", hosts=["localhost"], port=port)
    made.add_site("oslo")
    config = tmp_path / "kit/coordinator/coordinator.yaml"
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"listen": f"127.0.0.1:{port}", "disk_floor_bytes": 0}))
    return tmp_path / "kit"


@pytest.fixture
def config(kit):
    folder = kit / "coordinator"
    content = yaml.safe_load((folder / "coordinator.yaml").read_text())
    return CoordinatorConfig(
        listen=content["listen"],
        tls=CoordinatorTls(**dict(tls_of(folder, "coordinator"))),
        state_dir=folder / "state",
        drain_s=0.2,
    )


@pytest.fixture
def site(kit):
    return tls_of(kit / "sites/oslo", "site")


async def steps(address, tls):
    """What the way to an address shows: verdict, step and the rest of the line."""
    found = await asyncio.to_thread(lambda: list(way(address, tls, None)))
    return [(str(item.verdict), *item.told.split(": ", 1)) for item in found], found[-1].advice


async def examined(kit, *flags):
    path = kit / "coordinator/coordinator.yaml"
    return await asyncio.to_thread(lambda: list(examination(path, list(flags))))


async def test_every_step_to_a_coordinator_that_serves_is_well(config, site):
    async with coordinator(config):
        found, _ = await steps(config.listen.replace("127.0.0.1", "localhost"), site)

    assert [step[:2] for step in found] == [
        ("ok", "name"), ("ok", "connection"), ("ok", "TLS"), ("ok", "gRPC"), ("ok", "clock"),
    ]  # fmt: skip


async def test_a_clock_that_is_wrong_shows_by_how_much(config, site, monkeypatch):
    async with coordinator(config):
        real = time.time
        monkeypatch.setattr("fedloom_common.doctor.reach.time.time", real)
        monkeypatch.setattr(
            "fedloom_server.rpc.guard.time", type("Clock", (), {"time": staticmethod(lambda: real() + 3600)})
        )
        found, advice = await steps(config.listen, site)

    assert found[-1] == ("problem", "clock", "this host's is 3600.0 s behind the coordinator's")
    assert "NTP" in advice


async def test_a_name_nobody_knows_and_a_port_nobody_has_are_told_apart(kit, config, site):
    unknown, _ = await steps("no-such-host.invalid:7443", site)
    refused, advice = await steps(config.listen, site)

    assert [step[:2] for step in unknown] == [("problem", "name")]
    assert [step[:2] for step in refused] == [("ok", "name"), ("problem", "connection")]
    assert "firewalls" in advice


async def test_a_certificate_for_another_name_is_told_with_the_names_it_has(config, site, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    async with coordinator(config):
        found, advice = await steps(config.listen.replace("127.0.0.1", "other.example.org"), site)

    assert found[-1][:2] == ("problem", "TLS")
    assert "it is made for localhost" in advice


async def test_a_site_of_another_federation_is_told_so_at_both_ends(config, kit, site, tmp_path):
    other = create_kit(tmp_path / "other", federation="other", hosts=["localhost"])
    other.add_site("oslo")
    foreign = tls_of(tmp_path / "other/sites/oslo", "site")
    async with coordinator(config):
        theirs, advice = await steps(config.listen, foreign)
        refused, log = await steps(config.listen, foreign.model_copy(update={"ca": site.ca}))

    assert theirs[-1][:2] == ("problem", "TLS")
    assert "of the coordinator's federation" in advice
    assert refused[-1][:2] == ("problem", "TLS")
    assert "its log" in log or "look at its log" in log


async def test_what_answers_without_grpc_is_told_so(kit, site):
    folder = kit / "coordinator"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "coordinator.crt", folder / "coordinator.key")

    async def greet(reader, writer):
        writer.write(b"220 mail\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
    async with server:
        found, _ = await steps(f"localhost:{server.sockets[0].getsockname()[1]}", site)

    assert found[-1] == ("problem", "TLS", "what answers does not speak gRPC")


async def test_a_coordinator_that_could_start_has_no_problem(kit):
    found = await examined(kit)

    assert [item.told for item in found if item.verdict == "problem"] == []
    assert any(item.part == "service" and "is free" in item.told for item in found)


async def test_a_coordinator_that_runs_is_called_as_its_health_check_does(kit, config):
    async with coordinator(config):
        found = await examined(kit)

    service = [item for item in found if item.part == "service"]
    assert {item.verdict for item in service} == {"ok"}
    assert service[-2].told == "gRPC: the coordinator serves"
    database = [item for item in found if item.part == "database"]
    assert "its tables are this release's" in database[0].told


async def test_a_coordinator_of_one_address_is_called_there(kit, config):
    path = kit / "coordinator/coordinator.yaml"
    listen = config.listen.replace("127.0.0.1", "127.0.0.2")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"listen": listen}))
    async with coordinator(config.model_copy(update={"listen": listen})):
        found = await examined(kit)
        health = ["-c", "from fedloom_common.cli import main; main()", "coordinator", "health"]
        command = [sys.executable, *health, "--config", str(path)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True)

    assert {item.verdict for item in found if item.part == "service"} == {"ok"}
    assert done.stdout == b"serving\n"


async def test_behind_a_proxy_the_way_is_the_proxys(site, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("fedloom_common.doctor.reach.ANSWER_S", 5.0)
    found, _ = await steps("coordinator.example.org:7443", site)

    assert [step[:2] for step in found] == [("warning", "proxy"), ("problem", "gRPC")]


async def test_a_config_with_mistakes_still_gives_the_other_checks(kit):
    path = kit / "coordinator/coordinator.yaml"
    content = yaml.safe_load(path.read_text()) | {"drain_s": -1, "colour": "red"}
    path.write_text(yaml.safe_dump(content))

    found = await examined(kit)

    mistakes = [item.told for item in found if item.part == "config"]
    assert len(mistakes) == 2
    assert "drain_s" in " ".join(mistakes)
    assert "colour" in " ".join(mistakes)
    assert {"certificate", "state", "database", "service", "limits"} <= {item.part for item in found}


async def test_a_key_of_another_certificate_and_one_that_everybody_reads_are_found(kit):
    key = kit / "coordinator/coordinator.key"
    key.chmod(0o644)
    loose = [item for item in await examined(kit) if item.part == "certificate"]
    key.unlink()
    key.write_bytes((kit / "sites/oslo/site.key").read_bytes())
    wrong = [item for item in await examined(kit) if item.part == "certificate"]

    assert [item.advice for item in loose if item.verdict == "warning"] == [f"chmod 600 {key}"]
    assert wrong[0].verdict == "problem"
    assert "is not the key of" in wrong[0].told


async def test_a_site_s_certificate_is_no_coordinator_s(kit):
    folder = kit / "sites/oslo"
    found = await examined(
        kit, "--tls.certificate", str(folder / "site.crt"), "--tls.key", str(folder / "site.key")
    )

    assert "it names site oslo, not a coordinator" in [
        item.told for item in found if item.verdict == "problem"
    ]


async def test_a_certificate_that_ends_soon_is_a_warning_before_it_is_a_problem(kit):
    authority = Authority.load(kit / "ca")
    folder = kit / "coordinator"
    (folder / "coordinator.key").unlink()
    authority.issue(Role.COORDINATOR, "coordinator", hosts=["localhost"], days=10).save(
        folder / "coordinator.crt", folder / "coordinator.key"
    )

    found = await examined(kit)

    [soon] = [item for item in found if item.told.startswith("coordinator.crt ends at")]
    assert soon.verdict == "warning"
    assert "fedloom provision" in soon.advice


async def test_a_taken_port_and_a_database_that_is_away_are_problems(kit, config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(config.listen.rpartition(":")[2])))
        taken.listen()
        found = await examined(kit, "--database", "postgresql://u:secret@127.0.0.1:1/x")

    problems = {item.part: item.told for item in found if item.verdict == "problem"}
    assert "cannot be listened on" in problems["service"]
    assert "127.0.0.1:1" in problems["database"]
    assert "secret" not in problems["database"]


async def storage_of(kit, url):
    return [item for item in await examined(kit, "--model_storage", url) if item.part == "model storage"]


async def test_a_model_storage_that_serves_is_tried_and_left_as_it_was(kit, tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "model").write_bytes(b"model")

    found = await storage_of(kit, f"file://{bucket}")

    assert [(item.verdict, item.told) for item in found] == [
        ("ok", "it answers, and holds 1 files"),
        ("ok", "a file can be written, read and removed"),
    ]
    assert [path.name for path in bucket.iterdir()] == ["model"]


async def test_a_model_storage_that_cannot_be_used_is_told_with_its_own_words(kit, tmp_path, monkeypatch):
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "somebody"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_MAX_ATTEMPTS", "1"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it keeps the endpoint of another test
    (tmp_path / "file").touch()
    away = await storage_of(kit, "s3://bucket/models")
    no_folder = await storage_of(kit, f"file://{tmp_path}/file/models")
    unknown = await storage_of(kit, "s4://bucket")

    assert [item.verdict for item in (away[-1], no_folder[-1], unknown[-1])] == ["problem"] * 3
    assert 'cannot list now: try again later: Could not connect to the endpoint URL: "http' in away[-1].told
    assert "credentials" in away[-1].advice
    assert "Not a directory" in no_folder[-1].told
    assert "wanted a URL that fsspec knows" in unknown[-1].told


def test_what_a_check_logs_does_not_stand_in_the_report(kit, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["coordinator", "--config", str(kit / "coordinator/coordinator.yaml"), "--json"]
    program = "from fedloom_common.doctor.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--model_storage", f"file://{tmp_path}/file/models"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "problem" in [
        item["verdict"] for item in json.loads(done.stdout) if item["part"] == "model storage"
    ]
    assert done.stderr == ""


async def test_a_damaged_database_is_told_and_a_coordinator_does_not_start_with_it(kit, config):
    config.state_dir.mkdir(parents=True, exist_ok=True)
    (config.state_dir / "coordinator.db").write_bytes(b"no database at all" * 100)

    found = await examined(kit)
    problems = {item.part: item for item in found if item.verdict == "problem"}
    assert "damaged, or no database" in problems["database"].told
    assert "backup" in problems["database"].advice
    with pytest.raises(BadSpec, match="put a backup in its place"):
        async with coordinator(config):
            pass


@pytest.mark.parametrize("kind", ["tmpfs", "nfs4"])
async def test_state_in_memory_or_on_a_network_is_told(kit, kind, monkeypatch):
    import psutil

    part = replace_fields(psutil.disk_partitions(all=True)[0], mountpoint="/", fstype=kind)
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [part])  # noqa: A006

    [told] = [item for item in await examined(kit) if item.part == "state" and f"({kind})" in item.told]
    assert told.verdict == {"tmpfs": "problem", "nfs4": "warning"}[kind]


def replace_fields(record, **changes):
    return record._replace(**changes)
