import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedloom.v1 import audit_pb2, metrics_pb2, runs_pb2, runs_pb2_grpc, session_pb2, sites_pb2, transfer_pb2
from fedloom_common.channels import open_channel
from fedloom_common.identity import Peer, Role
from fedloom_server.rpc.access import TABLE


def test_every_method_of_the_contract_is_in_the_table():
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in (session_pb2, transfer_pb2, runs_pb2, sites_pb2, audit_pb2, metrics_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {method for method in TABLE if method.startswith("/fedloom.")}


ALLOWED = {
    ("Submit", "operator"), ("Stop", "operator"), ("Resume", "operator"),
    *((method, role) for method in ("List", "Get", "Export", "ListSites") for role in ("operator", "viewer")),
}  # fmt: skip


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("method", ["Submit", "Stop", "Resume", "List", "Get", "Export", "ListSites"])
async def test_operators_calls_are_refused_to_other_roles(bench, method, role):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(role, "somebody")) as channel:
        stub = runs_pb2_grpc.RunServiceStub(channel)
        request = getattr(runs_pb2, f"{method}Request")()
        code = grpc.StatusCode.OK
        try:
            await getattr(stub, method)(request)
        except grpc.aio.AioRpcError as error:
            code = error.code()
    assert (code is not grpc.StatusCode.PERMISSION_DENIED) == ((method, role.value) in ALLOWED)


async def test_health_and_reflection_answer(bench):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.VIEWER, "v")) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "fedloom.v1.RunService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"fedloom.v1.FederationService", "fedloom.v1.TransferService", "fedloom.v1.RunService"} <= names


async def test_an_internal_error_keeps_its_text_to_the_log(bench, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(bench.running.store, "runs", broken)
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.VIEWER, "v")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await runs_pb2_grpc.RunServiceStub(channel).List(runs_pb2.ListRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "a secret" in caplog.text


async def test_a_session_without_hello_is_refused(bench):
    site = bench.site("a")
    await bench.until(lambda: bench.running.sites.link("a") is not None)
    await bench.detach("a")
    site.send = lambda **_: None  # it says nothing

    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.SITE, "b")) as channel:
        from fedloom.v1.session_pb2_grpc import FederationServiceStub

        call = FederationServiceStub(channel).Attach(iter([session_pb2.SiteMessage()]))
        with pytest.raises(grpc.aio.AioRpcError, match="a session begins with Hello"):
            await call.read()
        hello = session_pb2.SiteMessage(hello=session_pb2.Hello(protocol_version=99, software="future"))
        call = FederationServiceStub(channel).Attach(iter([hello]))
        with pytest.raises(grpc.aio.AioRpcError, match=r"speaks protocol version 99 .future."):
            await call.read()


async def test_the_newest_session_of_a_site_is_the_one_that_counts(bench, spec):
    first = bench.site("a")
    await bench.until(lambda: bench.running.sites.link("a") is not None)
    link = bench.running.sites.link("a")
    old = bench.tasks["a"]
    bench.site("a", step=2.0)
    await bench.until(lambda: bench.running.sites.link("a") not in (None, link))
    await old
    run = await bench.ended(await bench.enqueue(spec()))
    assert run.state == "finished"
    assert not first.trained


@pytest.mark.parametrize("method", ["FederationService/Attach", "TransferService/Write"])
async def test_bytes_that_are_no_message_are_refused_without_a_traceback(bench, caplog, method):
    async with open_channel(f"127.0.0.1:{bench.running.port}", None, Peer(Role.SITE, "b")) as channel:
        call = channel.stream_stream(f"/fedloom.v1.{method}")(iter([b"\xff\xff\xff"]))
        with pytest.raises(grpc.aio.AioRpcError, match="not of the contract") as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text
