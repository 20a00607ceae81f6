"""Certificates and revocation lists that change while the coordinator runs, over real mTLS."""

import asyncio
import contextlib
import logging
import shutil
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import yaml
from cryptography import x509

from fedloom.v1 import runs_pb2, session_pb2
from fedloom.v1.runs_pb2_grpc import RunServiceStub
from fedloom.v1.session_pb2_grpc import FederationServiceStub
from fedloom_common.authority import Authority
from fedloom_common.channels import open_channel
from fedloom_common.errors import BadSpec
from fedloom_common.identity import Role, TlsFiles
from fedloom_common.rotation import ExpiryWarnings
from fedloom_server.app import Coordinator, coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.console.kit import Kit, create_kit

HELLO = session_pb2.SiteMessage(hello=session_pb2.Hello(protocol_version=1))


class Place:
    """A kit, and the coordinator that runs in its folder."""

    def __init__(self, kit: Kit, folder: Path) -> None:
        self.kit = kit
        self.folder = folder
        self.running: Coordinator

    def config(self, state: Path) -> CoordinatorConfig:
        content = yaml.safe_load((self.folder / "coordinator/coordinator.yaml").read_text())
        content |= {"listen": "127.0.0.1:0", "state_dir": str(state), "drain_s": 0.2}
        return CoordinatorConfig.model_validate(content, context={"base": self.folder / "coordinator"})

    def channel(self, folder: str, role: str) -> grpc.aio.Channel:
        place = self.folder / folder
        tls = TlsFiles(ca=place / "ca.crt", certificate=place / f"{role}.crt", key=place / f"{role}.key")
        return open_channel(f"localhost:{self.running.port}", tls, None)

    async def list_runs(self) -> None:
        async with self.channel("operators/ann", "operator") as channel:
            await RunServiceStub(channel).List(runs_pb2.ListRequest(), timeout=60)

    async def shown_serial(self) -> int:
        address = ("localhost", self.running.port)
        pem = await asyncio.to_thread(ssl.get_server_certificate, address)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    def actions(self) -> list[str]:
        return [entry.action for entry in self.running.store.audit_log.entries() if "." in entry.action]

    async def until_told(self, action: str, times: int = 1) -> None:
        async with asyncio.timeout(60):
            while self.actions().count(action) < times:  # noqa: ASYNC110 (any condition at all)
                await asyncio.sleep(0.01)


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr("fedloom_server.rpc.gate.LOOK_S", 0.05)
    monkeypatch.setattr("fedloom_server.rpc.gate.SWEEP_S", 0.2)
    kit = create_kit(tmp_path / "kit", federation="fed.test", hosts=["localhost"])
    kit.add_site("ward-a")
    kit.add_operator("ann")
    place = Place(kit, tmp_path / "kit")
    async with coordinator(place.config(tmp_path / "state")) as place.running:
        yield place


def serial_of(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@contextlib.asynccontextmanager
async def session(place: Place) -> AsyncIterator[grpc.aio.StreamStreamCall]:
    async def messages() -> AsyncIterator[session_pb2.SiteMessage]:
        yield HELLO
        await asyncio.sleep(600)

    async with place.channel("sites/ward-a", "site") as channel:
        call = FederationServiceStub(channel).Attach(messages())
        assert (await asyncio.wait_for(call.read(), 60)).WhichOneof("kind") == "welcome"
        yield call
        call.cancel()


async def revoked(place: Place) -> None:
    """Fails unless the site is refused before it says a word: gRPC loses the reason if one is on its way."""

    async def nothing() -> AsyncIterator[session_pb2.SiteMessage]:
        await asyncio.Event().wait()
        yield HELLO

    async with place.channel("sites/ward-a", "site") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="has been revoked"):
            await asyncio.wait_for(FederationServiceStub(channel).Attach(nothing()).read(), 60)


async def test_a_renewed_certificate_of_the_coordinator_is_shown_and_open_sessions_stay(place: Place) -> None:
    own = place.folder / "coordinator/coordinator.crt"
    before = serial_of(own)
    async with session(place) as call:
        assert await place.shown_serial() == before
        place.kit.renew(Role.COORDINATOR, "coordinator")
        await place.until_told("certificate.loaded")
        assert await place.shown_serial() == serial_of(own) != before
        await place.list_runs()
        assert not call.done()
    assert serial_of(own.parent / "previous/coordinator.crt") == before


async def test_a_wrong_new_certificate_is_told_and_the_old_one_stays(place: Place) -> None:
    own = place.folder / "coordinator/coordinator.crt"
    before = serial_of(own)
    shutil.copy(place.folder / "sites/ward-a/site.crt", own)  # without its key
    await place.until_told("certificate.refused")
    assert await place.shown_serial() == before
    await place.list_runs()
    assert place.running.gate.trust is not None
    assert place.running.gate.trust.failures == 1


async def test_a_revoked_site_is_out_within_seconds_and_a_renewed_one_is_in_again(place: Place) -> None:
    async with session(place) as call:
        place.kit.revoke(Role.SITE, "ward-a")
        with pytest.raises(grpc.aio.AioRpcError, match="of site ward-a has been revoked") as caught:
            await asyncio.wait_for(call.read(), 60)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    await revoked(place)
    await place.list_runs()
    assert place.actions().count("call.refused") == 2
    place.kit.renew(Role.SITE, "ward-a")
    async with session(place):
        pass


async def test_one_certificate_can_be_revoked_by_its_serial(place: Place) -> None:
    old = serial_of(place.folder / "sites/ward-a/site.crt")
    place.kit.renew(Role.SITE, "ward-a")
    place.kit.revoke_serial(f"{old:X}")
    await place.until_told("crl.loaded", 2)
    async with session(place):
        pass
    assert place.running.gate.trust is not None
    assert list(place.running.gate.trust.revocations.revoked) == [old]


async def test_a_list_that_is_expired_or_foreign_or_older_or_damaged_leaves_the_one_in_use(
    place: Place, tmp_path: Path
) -> None:
    place.kit.revoke(Role.SITE, "ward-a")
    await place.until_told("crl.loaded", 2)
    path = place.folder / "coordinator/revoked.crl"
    foreign = Authority.create(tmp_path / "foreign", "fed.test")
    own = Authority.load(place.folder / "ca")
    wrong = {
        "is not signed by": foreign.list_revoked({}, number=9, days=9),
        "expired at": _expired(own),
        "has number 1, older than 2": own.list_revoked({}, number=1, days=9),
        "holds no revocation list": b"nothing",
    }
    for count, (reason, content) in enumerate(wrong.items(), start=1):
        path.write_bytes(content)
        await place.until_told("crl.refused", count)
        assert reason in place.running.store.audit_log.entries()[-1].details
        await revoked(place)
    path.unlink()
    await place.until_told("crl.refused", len(wrong) + 1)
    assert place.actions().count("crl.loaded") == 2


def _expired(authority: Authority) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom_common.authority.datetime", _YearsAgo)
        return authority.list_revoked({}, number=9, days=1)


class _YearsAgo(datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.now(zone) - timedelta(days=700)


@pytest.mark.parametrize("content", [None, b"nothing"])
async def test_a_coordinator_does_not_start_without_the_list_that_it_is_told_of(
    tmp_path: Path, content: bytes | None
) -> None:
    kit = create_kit(tmp_path / "kit", federation="fed.test", hosts=["localhost"])
    path = tmp_path / "kit/coordinator/revoked.crl"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadSpec, match="revocation list"):
        async with coordinator(Place(kit, tmp_path / "kit").config(tmp_path / "state")):
            pass


async def test_a_session_ends_when_its_certificate_does(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(place) as call:
        monkeypatch.setattr("fedloom_common.identity.datetime", _InTwoYears)
        with pytest.raises(grpc.aio.AioRpcError, match="site/ward-a expired at") as caught:
            await asyncio.wait_for(call.read(), 60)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


class _InTwoYears(datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.now(zone) + timedelta(days=730)


async def test_operators_see_when_a_sites_certificate_ends(place: Place) -> None:
    async with session(place), place.channel("operators/ann", "operator") as channel:
        answer = await RunServiceStub(channel).ListSites(runs_pb2.ListSitesRequest(), timeout=60)
    ends = x509.load_pem_x509_certificate((place.folder / "sites/ward-a/site.crt").read_bytes())
    assert answer.sites[0].certificate_expires_at_s == ends.not_valid_after_utc.timestamp()


def test_warnings_come_at_30_and_7_and_1_days_and_after_the_end_once_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warnings = ExpiryWarnings()
    end = datetime.now(UTC) + timedelta(days=100)
    heard = []
    for days_left in (99, 31, 29.9, 29, 8, 6.9, 2, 0.9, 0.5, -1, -2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedloom_common.rotation.datetime", _Then)
            _Then.shift = timedelta(days=100 - days_left)
            warnings.look("site ward-a", end, "renew it")
        if caplog.records:
            heard.append((days_left, caplog.records[-1].levelno))
        caplog.clear()
    assert heard == [
        (29.9, logging.WARNING), (6.9, logging.WARNING), (0.9, logging.ERROR), (-1, logging.ERROR)
    ]  # fmt: skip


class _Then(datetime):
    shift = timedelta()

    @classmethod
    def now(cls, zone=None):
        return datetime.now(zone) + cls.shift
