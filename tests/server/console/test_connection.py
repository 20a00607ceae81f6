import asyncio

import grpc
import pytest

from fedloom.v1.runs_pb2 import GetRequest, Run
from fedloom.v1.transfer_pb2 import ReadRequest
from fedloom_common import errors
from fedloom_common.authority import Authority
from fedloom_common.errors import BadSpec, FederationError, NotPermitted, Unreachable, WrongState
from fedloom_common.identity import Role
from fedloom_server.console.connection import Operator


def operator(address, **more):
    return Operator(config=None, flags=("--coordinator", address, "--insecure", "alice"), **more)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


async def get(address, run_id="a1"):
    async with operator(address).connect() as coordinator:
        return (await coordinator.call(coordinator.runs.Get, GetRequest(run_id=run_id))).run


KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FederationError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_error_of_the_coordinator_comes_back_as_itself(fake, kind):
    fake.refusal = kind("runs.yaml: rounds: must be 1 or more\n  second line")
    with pytest.raises(FederationError) as caught:
        await get(fake.address)
    assert type(caught.value) is kind
    assert "rounds: must be 1 or more\n  second line" in str(caught.value)


@pytest.mark.parametrize("status", sorted({kind.status for kind in KINDS} - {"INTERNAL"}))
async def test_a_bare_status_comes_back_as_an_error_of_that_status(fake, status):
    fake.refusal = fake.breaks(grpc.StatusCode[status], "as another implementation says it")
    with pytest.raises(FederationError) as caught:
        await get(fake.address)
    assert caught.value.status == status
    assert "as another implementation says it" in str(caught.value)


async def test_a_coordinator_that_fails_is_not_called_absent(fake):
    fake.refusal = fake.breaks(grpc.StatusCode.INTERNAL, "internal error; its log has the cause")
    with pytest.raises(FederationError) as caught:
        await get(fake.address)
    assert (
        str(caught.value)
        == f"the coordinator at {fake.address} failed: internal error; its log has the cause"
    )


async def test_an_error_text_cannot_steer_the_terminal(fake):
    fake.refusal = WrongState("run \x1b[2J is over")
    with pytest.raises(WrongState) as caught:
        await get(fake.address)
    assert str(caught.value) == "run �[2J is over"


async def test_errors_in_a_stream_are_mapped_too(fake):
    fake.refusal = NotPermitted("viewers only")
    async with operator(fake.address).connect() as coordinator:
        with pytest.raises(NotPermitted), coordinator.errors():
            async for _ in coordinator.transfers.read(ReadRequest(digest="blake3:0")):
                pass


async def test_nobody_there_names_the_address():
    with pytest.raises(Unreachable, match=r"no coordinator answers at 127\.0\.0\.1:1: .*refused"):
        await get("127.0.0.1:1")


async def test_the_name_in_clear_is_for_loopback_only():
    with pytest.raises(NotPermitted, match="loopback"):
        await get("192.0.2.1:7443")


async def test_without_settings_the_error_says_what_to_give(monkeypatch):
    monkeypatch.delenv("FEDLOOM_OPERATOR_COORDINATOR", raising=False)
    with pytest.raises(BadSpec, match=r"--config FILE .*--coordinator host:port.*FEDLOOM_OPERATOR_CONFIG"):
        async with Operator(config=None).connect():
            pass


async def test_the_config_of_this_folder_is_found(fake, tmp_path):
    fake.run = Run(id="found")
    (tmp_path / "operator.yaml").write_text(f"coordinator: {fake.address}\ninsecure: alice\n")
    async with Operator(config=None).connect() as coordinator:
        answer = await coordinator.call(coordinator.runs.Get, GetRequest(run_id="f"))
    assert answer.run.id == "found"


def test_a_flag_wins_over_the_environment_and_that_over_the_file(console, fake, tmp_path):
    (tmp_path / "op.yaml").write_text("coordinator: 127.0.0.1:1\ninsecure: alice\n")
    console.address = ""
    console.environment = {"FEDLOOM_OPERATOR_CONFIG": "op.yaml", "FEDLOOM_OPERATOR_COORDINATOR": fake.address}
    console("run", "list", "--json")
    console.environment["FEDLOOM_OPERATOR_COORDINATOR"] = "127.0.0.1:1"
    console("run", "list", "--json", "--coordinator", fake.address)
    assert len(fake.asked) == 2


def kit(folder, federation):
    """A CA, the coordinator's credentials and an operator's folder with its certificate."""
    authority = Authority.create(folder / "ca", federation)
    server = authority.issue(Role.COORDINATOR, "coordinator")
    credentials = grpc.ssl_server_credentials(
        [(server.key, server.certificate)],
        root_certificates=authority.certificate,
        require_client_auth=True,
    )
    authority.issue(Role.OPERATOR, "alice").save(folder / "operator.crt", folder / "operator.key")
    return credentials


@pytest.fixture
def tls_fake(serve, tmp_path):
    """A fake coordinator behind mTLS, and kit/operator.yaml of an operator that it trusts."""
    credentials = kit(tmp_path / "kit", "plays.example")
    fake, address = serve(credentials)
    (tmp_path / "kit" / "operator.yaml").write_text(
        f"coordinator: {address}\ntls: {{ca: ca/ca.crt, certificate: operator.crt, key: operator.key}}\n"
    )
    return fake


async def test_an_operators_certificate_opens_the_channel(tls_fake, tmp_path):
    async with Operator(config=tmp_path / "kit" / "operator.yaml").connect() as coordinator:
        answer = await coordinator.call(coordinator.runs.Get, GetRequest(run_id="a1"))
    assert answer.run.id == "a1b2c3"


async def test_a_foreign_certificate_gets_no_answer_and_a_hint(tls_fake, tmp_path):
    kit(tmp_path / "foreign", "other.example")
    flags = []
    for flag, file in (("ca", "ca/ca.crt"), ("certificate", "operator.crt"), ("key", "operator.key")):
        flags += [f"--tls.{flag}", str(tmp_path / "foreign" / file)]
    foreign = Operator(config=tmp_path / "kit" / "operator.yaml", flags=tuple(flags))
    with pytest.raises(Unreachable, match="come from the same `fedloom provision` kit"):
        async with foreign.connect() as coordinator:
            await coordinator.call(coordinator.runs.Get, GetRequest(run_id="a1"))


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        (b"", "something takes connections there and ends them: does the coordinator run behind it?"),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "what answers there speaks no TLS: is it the coordinator's port?",
        ),
    ],
)
async def test_a_port_that_is_not_the_coordinators_is_not_blamed_on_the_kit(tls_fake, tmp_path, says, hint):
    async def answer(reader, writer):
        await reader.read(1)
        writer.write(says)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        address = f"localhost:{server.sockets[0].getsockname()[1]}"
        config = tmp_path / "kit" / "operator.yaml"
        with pytest.raises(Unreachable) as caught:
            async with Operator(config=config, flags=("--coordinator", address)).connect() as coordinator:
                await coordinator.call(coordinator.runs.Get, GetRequest(run_id="a1"))
    assert str(caught.value).endswith(f" ({hint})")
    assert "provision" not in str(caught.value)
