import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import yaml
from cryptography import x509

from fedloom_client.config import SiteConfig
from fedloom_common.channels import SERVER_OPTIONS, open_channel
from fedloom_common.errors import BadSpec
from fedloom_common.identity import Role, peer_of
from fedloom_common.rotation import LiveCredential
from fedloom_common.settings import load_settings
from fedloom_server.config import CoordinatorTls
from fedloom_server.console.config import OperatorConfig
from fedloom_server.console.kit import Kit, create_kit


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return create_kit(tmp_path / "kit", federation="fed.test", hosts=["127.0.0.1", "fed.example.org"])


def provision(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from fedloom_common.cli import main; main()"
    command = [sys.executable, "-c", code, "provision", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def site_config(folder: Path) -> SiteConfig:
    return load_settings(SiteConfig, folder / "site.yaml", env_prefix="FEDTEST_CLIENT_")


def operator_config(folder: Path) -> OperatorConfig:
    return load_settings(OperatorConfig, folder / "operator.yaml", env_prefix="FEDTEST_OPERATOR_")


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_commands_make_a_kit_with_one_folder_for_each_host(tmp_path: Path) -> None:
    for arguments, said in [
        (("init", "--host", "fed.example.org", "--port", "9443"), "coordinator is at fed.example.org:9443"),
        (("site", "ward-a"), "kit/sites/ward-a/"),
        (("operator", "ann"), "kit/operators/ann/"),
        (("viewer", "bob"), "kit/viewers/bob/"),
    ]:
        done = provision(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        assert "copy to" in done.stdout
    names = {str(path.relative_to(tmp_path / "kit")) for path in snapshot(tmp_path)}
    assert names == {
        "kit.yaml",
        *(f"ca/{name}" for name in ("ca.crt", "ca.key", "issued.jsonl", "revoked.crl")),
        *(
            f"coordinator/{name}"
            for name in ("ca.crt", "coordinator.crt", "coordinator.key", "coordinator.yaml", "revoked.crl")
        ),
        *(f"sites/ward-a/{name}" for name in ("ca.crt", "site.crt", "site.key", "site.yaml")),
        *(f"operators/ann/{name}" for name in ("ca.crt", "operator.crt", "operator.key", "operator.yaml")),
        *(f"viewers/bob/{name}" for name in ("ca.crt", "viewer.crt", "viewer.key", "operator.yaml")),
    }


def test_every_key_is_readable_by_its_owner_only(kit: Kit, tmp_path: Path) -> None:
    kit.add_site("ward-a")
    kit.add_operator("ann")
    keys = list((tmp_path / "kit").rglob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "kit/ca").stat().st_mode) == 0o700


async def test_folders_that_were_copied_elsewhere_meet_over_tls(kit: Kit, tmp_path: Path) -> None:
    folders = {
        "site ward-a": kit.add_site("ward-a"),
        "operator ann": kit.add_operator("ann"),
        "viewer bob": kit.add_operator("bob", may_change=False),
    }
    server_folder = (tmp_path / "kit/coordinator").rename(tmp_path / "server")
    content = yaml.safe_load((server_folder / "coordinator.yaml").read_text())
    assert (content["listen"], content["state_dir"]) == ("0.0.0.0:7443", "state")
    tls = CoordinatorTls.model_validate(content["tls"], context={"base": server_folder})

    async def who(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return str(peer_of(context.auth_context())).encode()

    server = grpc.aio.server(options=SERVER_OPTIONS)
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Who", methods)])
    port = server.add_secure_port("127.0.0.1:0", LiveCredential(tls).for_servers())
    await server.start()
    for identity, folder in folders.items():
        moved = folder.rename(tmp_path / identity.replace(" ", "-"))
        config = site_config(moved) if identity.startswith("site") else operator_config(moved)
        assert config.coordinator == "127.0.0.1:7443"
        async with open_channel(f"127.0.0.1:{port}", config.tls, None) as channel:
            assert (await channel.unary_unary("/test.Who/Who")(b"", timeout=60)).decode() == identity
    await server.stop(None)


def test_a_site_config_is_ready_for_text_files_beside_it(kit: Kit, tmp_path: Path) -> None:
    folder = kit.add_site("ward-a")
    config = site_config(folder)
    assert config.coordinator == "127.0.0.1:7443"
    assert config.data["texts"].format == "text"
    assert config.data["texts"].files == (str(folder / "data/*.txt"),)
    assert config.state_dir == folder / "state"
    commented = (folder / "site.yaml").read_text()
    assert "EDIT: this site's data sets" in commented
    (folder / "site.yaml").write_text(commented.replace("# policy:", "policy:").replace("#   max", "  max"))
    assert site_config(folder).policy.max_steps_per_round == 1000


def test_data_given_on_the_command_line_is_in_the_site_config(kit: Kit, tmp_path: Path) -> None:
    done = provision(
        tmp_path,
        *("site", "ward-a", "--data", "notes=/srv/n[1]/*.jsonl", "--data", "notes=/srv/more.jsonl"),
        *("--data", "papers=papers: all/*.parquet", "--data", "plain=*.txt"),
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "kit/sites/ward-a"
    data = site_config(folder).data
    assert {name: source.format for name, source in data.items()} == {
        "notes": "jsonl",
        "papers": "parquet",
        "plain": "text",
    }
    assert data["notes"].files == ("/srv/n[1]/*.jsonl", "/srv/more.jsonl")
    assert data["papers"].files == (str(folder / "papers: all/*.parquet"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "--host", "x"), "kit exists and is left as it is; move it away"),
        (("site", "ward-a"), "kit/sites/ward-a exists and is left as it is"),
        (("operator", "ann"), "kit/operators/ann exists and is left as it is"),
        (("coordinator",), "kit/coordinator exists and is left as it is"),
        (("site", "../ward-b"), "'../ward-b' is not allowed as site name"),
        (("site", "Ward"), "'Ward' is not allowed as site name"),
        (("operator", "a b"), "'a b' is not allowed as operator name"),
        (("viewer", ""), "'' is not allowed as viewer name"),
        (("site", "b", "--days", "99999"), "a certificate must last from 1 to"),
        (("site", "b", "--data", "texts"), "--data is NAME=GLOB"),
        (("site", "b", "--data", "My Texts=x"), "--data: 'My Texts' cannot name a data set"),
        (("site", "b", "--data", "t=a.txt", "--data", "t=a.jsonl"), "several formats (jsonl, text)"),
        (
            ("site", "b", "--dir", "elsewhere"),
            "elsewhere holds no kit; make one with `fedloom provision init`",
        ),
        (
            ("renew", "site", "ward-b"),
            "`fedloom provision site` makes the folder anew, with the same identity",
        ),
        (("renew", "site"), "which site? give its name"),
        (("renew", "site", "ward-a", "--days", "0"), "a certificate must last from 1 to"),
        (("revoke", "site", "ward-b"), "this kit has made no certificate for site ward-b"),
        (("revoke", "coordinator", "x"), "'coordinator' cannot be revoked; wanted is site"),
        (("revoke", "serial", "abc"), "this kit has made no certificate with serial abc"),
        (("revoke", "serial", "xyz"), "'xyz' is no serial number"),
        (("crl", "--days", "99999"), "a revocation list must last from 1 to"),
        (("init", "--dir", "new", "--host", "fed:7443"), "'fed:7443' is no host"),
        (("init", "--dir", "new", "--host", "fed", "--federation", "a/b"), "'a/b' cannot name a federation"),
        (("init", "--dir", "kit/kit.yaml/new", "--host", "fed"), "cannot be made: File exists"),
    ],
)
def test_wrong_input_is_a_clear_error_and_changes_nothing(
    arguments: tuple[str, ...], message: str, kit: Kit, tmp_path: Path
) -> None:
    kit.add_site("ward-a")
    kit.add_operator("ann")
    before = snapshot(tmp_path)
    done = provision(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"kit"}


def test_an_empty_folder_such_as_a_mount_point_becomes_the_kit(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    inode = folder.stat().st_ino
    create_kit(folder, federation="fed.test", hosts=["fed"])
    assert {path.name for path in folder.iterdir()} == {"ca", "coordinator", "kit.yaml"}
    assert folder.stat().st_ino == inode


def test_a_folder_that_was_moved_away_is_made_anew_for_the_same_hosts(kit: Kit, tmp_path: Path) -> None:
    def names(folder: Path) -> list[str]:
        certificate = x509.load_pem_x509_certificate((folder / "coordinator.crt").read_bytes())
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return [str(name.value) for name in extension.value]

    old = (tmp_path / "kit/coordinator").rename(tmp_path / "old")
    done = provision(tmp_path, "coordinator")
    assert done.returncode == 0, done.stderr
    new = tmp_path / "kit/coordinator"
    assert names(new) == names(old)
    assert names(new) == [
        "spiffe://fed.test/coordinator/coordinator",
        *("127.0.0.1", "fed.example.org", "localhost", "::1"),
    ]
    assert (new / "coordinator.key").read_bytes() != (old / "coordinator.key").read_bytes()


def test_a_kit_whose_ca_was_taken_offline_says_what_is_missing(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "kit/ca").rename(tmp_path / "vault")
    with pytest.raises(BadSpec, match="put the kit's ca folder back"):
        Kit(tmp_path / "kit")


def test_an_ipv6_coordinator_is_dialled_in_brackets(tmp_path: Path) -> None:
    kit = create_kit(tmp_path / "kit", federation="fed.test", hosts=["fd00::7"], port=9443)
    assert operator_config(kit.add_operator("ann")).coordinator == "[fd00::7]:9443"


def revoked(kit: Path) -> tuple[list[int], int]:
    listed = x509.load_pem_x509_crl((kit / "ca/revoked.crl").read_bytes())
    assert (kit / "coordinator/revoked.crl").read_bytes() == (kit / "ca/revoked.crl").read_bytes()
    number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return sorted(entry.serial_number for entry in listed), number


def serial(certificate: Path) -> int:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number


def test_a_renewed_certificate_has_the_same_identity_and_another_key(kit: Kit, tmp_path: Path) -> None:
    folder = kit.add_site("ward-a")
    before = snapshot(folder)
    done = provision(tmp_path, "renew", "site", "ward-a", "--days", "30")
    assert done.returncode == 0, done.stderr
    assert "without a restart" in done.stdout
    after = snapshot(folder)
    assert after[folder / "site.yaml"] == before[folder / "site.yaml"]
    assert after[folder / "site.key"] != before[folder / "site.key"]
    assert after[folder / "previous/site.key"] == before[folder / "site.key"]
    assert after[folder / "previous/site.crt"] == before[folder / "site.crt"]
    assert stat.S_IMODE((folder / "site.key").stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate(after[folder / "site.crt"])
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [name.value for name in extension.value] == ["spiffe://fed.test/site/ward-a"]


def test_every_certificate_that_somebody_was_given_is_revoked_by_name(kit: Kit, tmp_path: Path) -> None:
    first = serial(kit.add_site("ward-a") / "site.crt")
    kit.add_site("ward-b")
    second = serial(kit.renew(Role.SITE, "ward-a") / "site.crt")
    (tmp_path / "kit/sites/ward-a").rename(tmp_path / "moved")  # to its host
    third = serial(kit.add_site("ward-a") / "site.crt")
    done = provision(tmp_path, "revoke", "site", "ward-a")
    assert done.returncode == 0, done.stderr
    assert "3 certificates of site ward-a revoked" in done.stdout
    assert revoked(tmp_path / "kit") == (sorted([first, second, third]), 2)


def test_one_certificate_is_revoked_by_its_serial_and_a_new_list_keeps_it(kit: Kit, tmp_path: Path) -> None:
    number = serial(kit.add_operator("ann") / "operator.crt")
    assert provision(tmp_path, "revoke", "serial", f"{number:X}").returncode == 0
    assert provision(tmp_path, "crl", "--days", "9").returncode == 0
    assert revoked(tmp_path / "kit") == ([number], 3)


def test_a_damaged_list_is_not_begun_anew(kit: Kit, tmp_path: Path) -> None:
    kit.add_site("ward-a")
    (tmp_path / "kit/ca/revoked.crl").write_text("nothing")
    with pytest.raises(BadSpec, match="put back the copy that the coordinator has"):
        kit.revoke(Role.SITE, "ward-a")
