import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom_common.authority import Authority, Credential
from fedloom_common.certificates import certificate_expiry
from fedloom_common.errors import BadSpec, NotPermitted
from fedloom_common.identity import (
    Peer,
    Role,
    TlsFiles,
    insecure_metadata,
    insecure_peer,
    peer_of,
    require_loopback,
)
from fedloom_common.rotation import LiveCredential

WHO = "/test.Identity/Who"
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
SITE_URI = "spiffe://fed.test/site/ward-a"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ca")


@pytest.fixture(scope="module")
def authority(ca: Path) -> Authority:
    return Authority.create(ca, "fed.test")


def files(folder: Path, authority: Authority, credential: Credential) -> TlsFiles:
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes(authority.certificate)
    credential.save(folder / "own.crt", folder / "own.key")
    return TlsFiles(ca=folder / "ca.crt", certificate=folder / "own.crt", key=folder / "own.key")


def handcrafted(
    ca: Path,
    *uris: str,
    usages: tuple[x509.ObjectIdentifier, ...] = (CLIENT,),
    starts: timedelta = timedelta(days=-2),
    ends: timedelta = timedelta(days=2),
) -> Credential:
    """A certificate that the federation's CA signed, but that ``Authority.issue`` would never make."""
    issuer = x509.load_pem_x509_certificate((ca / "ca.crt").read_bytes())
    issuer_key = load_pem_private_key((ca / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ward-a")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + starts)
        .not_valid_after(now + ends)
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    return Credential(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


async def who(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    try:
        return str(peer_of(context.auth_context())).encode()
    except NotPermitted as error:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))


def who_sync(request: bytes, context: grpc.ServicerContext) -> bytes:
    try:
        return str(peer_of(context.auth_context())).encode()
    except NotPermitted as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))


def handler(method: Callable[..., object]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(
        "test.Identity", {"Who": grpc.unary_unary_rpc_method_handler(method)}
    )


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials) -> AsyncIterator[str]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([handler(who)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> TlsFiles:
    folder = tmp_path_factory.mktemp("coordinator") / "kit"
    return files(folder, authority, authority.issue(Role.COORDINATOR, "coordinator"))


@pytest.fixture
async def address(coordinator: TlsFiles) -> AsyncIterator[str]:
    async with serving(LiveCredential(coordinator).for_servers()) as address:
        yield address


async def ask(address: str, credentials: grpc.ChannelCredentials) -> str:
    async with grpc.aio.secure_channel(address, credentials) as channel:
        return (await channel.unary_unary(WHO)(b"", timeout=60)).decode()


async def refusal(address: str, credentials: grpc.ChannelCredentials) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(address, credentials)
    return caught.value.code(), caught.value.details() or ""


def unchecked(authority: Authority, credential: Credential) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.certificate, credential.key, credential.certificate)


@pytest.mark.parametrize("role", list(Role))
async def test_the_server_knows_each_role_and_name_from_the_certificate(
    role: Role, address: str, authority: Authority, tmp_path: Path
) -> None:
    tls = files(tmp_path / "own", authority, authority.issue(role, "ward-a.2"))
    assert await ask(address, LiveCredential(tls).for_channels()) == f"{role} ward-a.2"


async def test_a_sync_server_knows_it_as_well(
    coordinator: TlsFiles, ca: Path, authority: Authority, tmp_path: Path
) -> None:
    tls = files(tmp_path / "own", authority, authority.issue(Role.SITE, "ward-a"))
    with sync_server(LiveCredential(coordinator).for_servers()) as address:
        assert await ask(address, LiveCredential(tls).for_channels()) == "site ward-a"
        two = unchecked(authority, handcrafted(ca, SITE_URI, "spiffe://fed.test/site/ward-b"))
        assert (await refusal(address, two))[0] is grpc.StatusCode.PERMISSION_DENIED


@contextmanager
def sync_server(credentials: grpc.ServerCredentials) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([handler(who_sync)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fed.example.org", "10.1.2.3"])
async def test_the_coordinator_is_trusted_under_its_hosts_and_locally(
    host: str, authority: Authority, tmp_path: Path
) -> None:
    hosts = ["fed.example.org", "10.1.2.3"]
    tls = files(tmp_path / "own", authority, authority.issue(Role.COORDINATOR, "coordinator", hosts=hosts))
    async with serving(LiveCredential(tls).for_servers()) as address:
        options = [("grpc.ssl_target_name_override", host)]
        async with grpc.aio.secure_channel(
            address, LiveCredential(tls).for_channels(), options=options
        ) as channel:
            assert await channel.unary_unary(WHO)(b"", timeout=60) == b"coordinator coordinator"


async def test_a_client_without_a_certificate_is_refused(address: str, authority: Authority) -> None:
    code, _ = await refusal(address, grpc.ssl_channel_credentials(authority.certificate))
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_of_the_same_name_is_refused(
    address: str, authority: Authority, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "ca", "fed.test").issue(Role.SITE, "ward-a")
    code, _ = await refusal(address, unchecked(authority, foreign))
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "credential",
    [
        pytest.param({"uris": [SITE_URI], "ends": timedelta(days=-1)}, id="expired"),
        pytest.param({"uris": [SITE_URI], "starts": timedelta(days=1)}, id="not-yet-valid"),
        pytest.param({"uris": [SITE_URI], "usages": (SERVER,)}, id="server-only"),
        pytest.param({"uris": ["spiffe://other.test/site/ward-a"]}, id="another-federation"),
        pytest.param({"uris": []}, id="common-name-only"),
    ],
)
async def test_the_handshake_refuses(credential: dict, address: str, ca: Path, authority: Authority) -> None:
    uris = credential.pop("uris")
    code, _ = await refusal(address, unchecked(authority, handcrafted(ca, *uris, **credential)))
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("uris", "usages", "reason"),
    [
        pytest.param([SITE_URI], (), "not made for clients", id="no-usage"),
        pytest.param([SITE_URI, "spiffe://fed.test/site/b"], (CLIENT,), "names 2 identities", id="two-uris"),
        pytest.param(["spiffe://fed.test/admin/ward-a"], (CLIENT,), "the role 'admin'", id="unknown-role"),
        pytest.param(["spiffe://fed.test/site"], (CLIENT,), "not spiffe://<federation>", id="no-name"),
        pytest.param(["spiffe://fed.test/site/a/b"], (CLIENT,), "not spiffe://<federation>", id="too-long"),
        pytest.param(["spiffe://fed.test/site/Ward"], (CLIENT,), "the name 'Ward'", id="bad-name"),
        pytest.param(["https://fed.test/site/ward-a"], (CLIENT,), "exactly one spiffe://", id="not-spiffe"),
    ],
)
async def test_a_certificate_without_one_clear_identity_is_refused(
    uris: list[str],
    usages: tuple[x509.ObjectIdentifier, ...],
    reason: str,
    address: str,
    ca: Path,
    authority: Authority,
) -> None:
    code, text = await refusal(address, unchecked(authority, handcrafted(ca, *uris, usages=usages)))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert reason in text


def test_the_common_name_is_never_an_identity(ca: Path, authority: Authority) -> None:
    with pytest.raises(NotPermitted, match="names 0 identities"):
        peer_of({"x509_pem_cert": [handcrafted(ca).certificate], "x509_common_name": [b"ward-a"]})


def test_gRPC_and_the_certificate_must_agree_on_the_identity(ca: Path, authority: Authority) -> None:
    with pytest.raises(NotPermitted, match="exactly one"):
        peer_of(
            {
                "x509_pem_cert": [handcrafted(ca, SITE_URI).certificate],
                "peer_spiffe_id": [b"spiffe://x/site/b"],
            }
        )


def test_a_certificate_that_expires_on_a_live_connection_is_refused(ca: Path, authority: Authority) -> None:
    expired = handcrafted(ca, SITE_URI, ends=timedelta(seconds=-1)).certificate
    with pytest.raises(NotPermitted, match="ward-a expired at"):
        peer_of({"x509_pem_cert": [expired], "peer_spiffe_id": [SITE_URI.encode()]})


@pytest.mark.parametrize("context", [{}, {"x509_pem_cert": [b"-"], "peer_spiffe_id": [SITE_URI.encode()]}])
def test_a_call_without_a_readable_certificate_has_no_identity(context: dict[str, list[bytes]]) -> None:
    with pytest.raises(NotPermitted, match="certificate"):
        peer_of(context)


async def test_a_site_cannot_pose_as_the_coordinator(authority: Authority, tmp_path: Path) -> None:
    site = authority.issue(Role.SITE, "ward-a", hosts=["127.0.0.1"])
    tls = files(tmp_path / "own", authority, site)
    async with serving(LiveCredential(tls).for_servers()) as address:
        code, _ = await refusal(address, LiveCredential(tls).for_channels())
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_coordinator_of_another_ca_is_not_trusted(address: str, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "ca", "fed.test")
    tls = files(tmp_path / "own", other, other.issue(Role.SITE, "ward-a"))
    code, _ = await refusal(address, LiveCredential(tls).for_channels())
    assert code is grpc.StatusCode.UNAVAILABLE


def test_files_that_do_not_fit_are_named_before_any_handshake(
    ca: Path, authority: Authority, tmp_path: Path
) -> None:
    own = files(tmp_path / "own", authority, authority.issue(Role.SITE, "ward-a"))
    other = files(tmp_path / "other", authority, authority.issue(Role.SITE, "ward-b"))
    foreign = Authority.create(tmp_path / "ca", "fed.test")
    (tmp_path / "foreign.crt").write_bytes(foreign.certificate)
    (tmp_path / "no.pem").write_text("nothing")
    expired = files(tmp_path / "old", authority, handcrafted(ca, SITE_URI, ends=timedelta(days=-1)))
    for wrong, message in [
        (own.model_copy(update={"key": other.key}), f"{other.key} is not the key of {own.certificate}"),
        (own.model_copy(update={"ca": tmp_path / "foreign.crt"}), "was not issued by the CA in"),
        (own.model_copy(update={"ca": tmp_path / "none"}), f"the CA file {tmp_path / 'none'} cannot be read"),
        (own.model_copy(update={"key": tmp_path}), f"the key file {tmp_path} cannot be read: Is a directory"),
        (own.model_copy(update={"certificate": tmp_path / "no.pem"}), "no.pem holds no certificate"),
        (own.model_copy(update={"key": tmp_path / "no.pem"}), "no.pem holds no private key"),
        (expired, f"{expired.certificate} expired at"),
    ]:
        with pytest.raises(BadSpec) as caught:
            LiveCredential(wrong)
        assert message in str(caught.value)


def test_a_key_with_a_passphrase_is_refused_with_the_reason(authority: Authority, tmp_path: Path) -> None:
    credential = authority.issue(Role.SITE, "ward-a")
    tls = files(tmp_path / "own", authority, credential)
    key = load_pem_private_key(credential.key, None)
    tls.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(BadSpec, match="protected by a passphrase"):
        LiveCredential(tls)


def test_keys_are_private_and_never_overwritten(authority: Authority, tmp_path: Path) -> None:
    tls = files(tmp_path / "own", authority, authority.issue(Role.SITE, "ward-a"))
    before = tls.key.read_bytes(), tls.certificate.read_bytes()
    assert stat.S_IMODE(tls.key.stat().st_mode) == 0o600
    with pytest.raises(BadSpec, match="never overwritten"):
        authority.issue(Role.SITE, "ward-a").save(tls.certificate, tls.key)
    Authority.create(tmp_path / "ca", "f")
    with pytest.raises(BadSpec, match="never overwritten"):
        Authority.create(tmp_path / "ca", "f")
    assert (tls.key.read_bytes(), tls.certificate.read_bytes()) == before


def test_the_expiry_is_the_days_asked_for(authority: Authority, tmp_path: Path) -> None:
    tls = files(tmp_path / "own", authority, authority.issue(Role.SITE, "ward-a", days=30))
    left = certificate_expiry(tls.certificate) - datetime.now(UTC)
    assert timedelta(days=30) - timedelta(minutes=1) < left <= timedelta(days=30)
    assert timedelta(days=3650) < certificate_expiry(tls.ca) - datetime.now(UTC) < timedelta(days=3660)


@pytest.mark.parametrize("days", [0, -1, 36500, 10**12])
def test_a_certificate_must_end_before_its_ca(days: int, authority: Authority) -> None:
    with pytest.raises(BadSpec, match="must last from 1 to"):
        authority.issue(Role.SITE, "ward-a", days=days)


@pytest.mark.parametrize(
    "host", ["fed:7443", "*.example.org", "https://fed", "1.2.3.456", "a b", "", "UPPER"]
)
def test_a_wrong_host_is_refused(host: str, authority: Authority) -> None:
    with pytest.raises(BadSpec, match="is no host"):
        authority.issue(Role.COORDINATOR, "coordinator", hosts=[host])


@pytest.mark.parametrize("name", ["a/b", "..", "", "A", "a" * 65, "a\n"])
def test_a_wrong_name_is_refused(name: str, authority: Authority) -> None:
    with pytest.raises(BadSpec, match="is not allowed as site name"):
        authority.issue(Role.SITE, name)


def test_a_loaded_ca_issues_for_the_same_federation(tmp_path: Path) -> None:
    made = Authority.create(tmp_path, "fed.example.org")
    loaded = Authority.load(tmp_path)
    assert loaded.federation == "fed.example.org"
    assert loaded.certificate == made.certificate
    issued = x509.load_pem_x509_certificate(loaded.issue(Role.VIEWER, "ann").certificate)
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(made.certificate))
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://fed.example.org/viewer/ann"]


def test_a_ca_whose_files_are_gone_or_mixed_up_is_not_loaded(tmp_path: Path) -> None:
    Authority.create(tmp_path / "a", "fed.test")
    Authority.create(tmp_path / "b", "fed.test")
    (tmp_path / "a/ca.key").write_bytes((tmp_path / "b/ca.key").read_bytes())
    with pytest.raises(BadSpec, match="is not the key of"):
        Authority.load(tmp_path / "a")
    with pytest.raises(BadSpec, match="put the kit's ca folder back"):
        Authority.load(tmp_path / "c")
    (tmp_path / "b/ca.crt").write_text("no")
    with pytest.raises(BadSpec, match="holds no CA"):
        Authority.load(tmp_path / "b")


def test_an_identity_in_clear_survives_the_way_through_metadata() -> None:
    peer = Peer(Role.OPERATOR, "ann")
    assert insecure_peer([("user-agent", "grpc"), *insecure_metadata(peer)]) == peer


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("fedloom-role", "site")],
        [("fedloom-role", "site"), ("fedloom-name", "a"), ("fedloom-name", "b")],
        [("fedloom-role", "site"), ("fedloom-role", "site")],
        [("fedloom-role", "root"), ("fedloom-name", "a")],
        [("fedloom-role", "site"), ("fedloom-name", "A")],
        [("fedloom-role", "site"), ("fedloom-name", b"\xff")],
    ],
)
def test_metadata_without_one_clear_identity_is_refused(metadata: list[tuple[str, str | bytes]]) -> None:
    with pytest.raises(NotPermitted):
        insecure_peer(metadata)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:7443", "[::1]:7443", "unix:/tmp/s", "127.0.0.1:0"]
)
def test_loopback_is_allowed(address: str) -> None:
    refused = ""
    try:
        require_loopback(address, "a test")
    except NotPermitted as error:
        refused = str(error)
    assert not refused


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "[::]:1",
        "10.0.0.1:1",
        "example.org:1",
        "localhost.example.org:1",
        "127.0.0.1.example.org:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "dns:///localhost:1",
        "127.0.0.1",
        "localhost",
        ":1",
        "",
        "127.1:1",
        "[::ffff:10.0.0.1]:1",
        "localhost:1\n",
    ],
)
def test_anything_that_may_not_be_loopback_is_refused(address: str) -> None:
    with pytest.raises(NotPermitted, match="loopback"):
        require_loopback(address, "a test")
