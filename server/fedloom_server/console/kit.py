"""The kit of a federation: a directory with its CA, and one folder to copy to each host.

```
kit/
├── kit.yaml        the coordinator's address
├── ca/             ca.crt, ca.key: whoever has the key can admit anybody; issued.jsonl, revoked.crl
├── coordinator/    ca.crt, coordinator.crt, coordinator.key, coordinator.yaml, revoked.crl
├── sites/NAME/     ca.crt, site.crt, site.key, site.yaml
├── operators/NAME/ ca.crt, operator.crt, operator.key, operator.yaml
└── viewers/NAME/   ca.crt, viewer.crt, viewer.key, operator.yaml
```

Every folder appears whole or not at all, and nothing that exists is touched, but for what is renewed:
then the certificate and key before lie in the folder's ``previous``.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field

from fedloom_common.authority import LEAF_DAYS, Authority, Credential
from fedloom_common.errors import BadSpec
from fedloom_common.files import sync_folder, write_text
from fedloom_common.identity import Role
from fedloom_common.settings import load_settings
from fedloom_common.strict import Strict
from fedloom_server.console.kitconfigs import COORDINATOR_YAML, OPERATOR_YAML, SITE_YAML, data_section
from fedloom_server.console.kitledger import CRL, CRL_DAYS, Ledger

PORT = 7443


class KitFile(Strict):
    """What a kit remembers beside its certificates, kit.yaml."""

    hosts: tuple[str, ...] = Field(min_length=1)
    """Names and addresses at which the coordinator is reached; configs are made with the first."""
    port: int = Field(ge=1, le=65535)
    """Port at which the coordinator is reached."""


class Kit:
    """An open kit, to which folders can be added."""

    def __init__(self, directory: Path) -> None:
        """Open a kit.

        Raises:
            BadSpec: the directory holds no kit, or a part of it is missing.
        """
        if not (directory / "kit.yaml").is_file():
            raise BadSpec(
                f"{directory} holds no kit; make one with `fedloom provision init`, or name it with --dir"
            )
        self._directory = directory
        self._file = load_settings(KitFile, directory / "kit.yaml", env_prefix="FEDLOOM_KIT_")
        self._authority = Authority.load(directory / "ca")
        self._ledger = Ledger(directory / "ca", self._authority)

    @property
    def coordinator(self) -> str:
        """host:port that sites and operators dial."""
        host = self._file.hosts[0]
        return f"[{host}]:{self._file.port}" if ":" in host else f"{host}:{self._file.port}"

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self._authority.federation

    def add_coordinator(self, *, days: int = LEAF_DAYS) -> Path:
        """Make the coordinator's folder, again if the old one was moved away."""
        config = COORDINATOR_YAML.format(port=self._file.port)
        return self._add(Role.COORDINATOR, "coordinator", "coordinator", ("coordinator.yaml", config), days)

    def add_site(
        self, name: str, *, data: Mapping[str, Sequence[str]] | None = None, days: int = LEAF_DAYS
    ) -> Path:
        """Make a site's folder; ``data`` gives the files of each data set.

        Raises:
            BadSpec: the name is wrong or taken.
        """
        config = SITE_YAML.format(name=name, coordinator=self.coordinator, data=data_section(data))
        return self._add(Role.SITE, name, f"sites/{name}", ("site.yaml", config), days)

    def add_operator(self, name: str, *, may_change: bool = True, days: int = LEAF_DAYS) -> Path:
        """Make the folder of an operator, or of a viewer who may see everything and change nothing.

        Raises:
            BadSpec: the name is wrong or taken.
        """
        role = Role.OPERATOR if may_change else Role.VIEWER
        config = OPERATOR_YAML.format(role=role, name=name, coordinator=self.coordinator)
        return self._add(role, name, f"{role}s/{name}", ("operator.yaml", config), days)

    def renew(self, role: Role, name: str, *, days: int = LEAF_DAYS) -> Path:
        """Make a new certificate and key for somebody who has a folder; those before move into ``previous``.

        Raises:
            BadSpec: there is no such folder, or the days are wrong.
        """
        folder = self._folder(role, name)
        if not folder.is_dir():
            raise BadSpec(
                f"{folder} is not there any more; `fedloom provision {role}` makes the folder anew, with the "
                "same identity"
            )
        credential = self._issue(role, name, days)
        certificate, key = folder / f"{role}.crt", folder / f"{role}.key"
        (folder / "previous").mkdir(mode=0o700, exist_ok=True)
        for file in (certificate, key):
            if file.exists():
                file.replace(folder / "previous" / file.name)
        credential.save(certificate, key)
        return folder

    def revoke(self, role: Role, name: str) -> int:
        """Revoke every certificate that somebody was ever given; tells how many.

        Raises:
            BadSpec: none is known.
        """
        serials = self._ledger.of(role, name)
        if not serials:
            raise BadSpec(f"this kit has made no certificate for {role} {name}; names are case-sensitive")
        self.sign_revocations(serials)
        return len(serials)

    def revoke_serial(self, serial: str) -> None:
        """Revoke one certificate, by its serial number in hexadecimal digits.

        Raises:
            BadSpec: it is no such number, or this kit has not made it.
        """
        try:
            number = int(serial.replace(":", ""), 16)
        except ValueError as error:
            raise BadSpec(f"{serial!r} is no serial number; wanted are hexadecimal digits") from error
        if not self._ledger.knows(number):
            raise BadSpec(f"this kit has made no certificate with serial {serial}")
        self.sign_revocations([number])

    def sign_revocations(self, serials: Iterable[int] = (), *, days: int = CRL_DAYS) -> Path:
        """Sign the revocation list anew, with further serials; the coordinator's folder gets a copy."""
        self._ledger.revoke(serials, days=days)
        copy = self._directory / "coordinator" / CRL
        if copy.parent.is_dir():
            write_text(copy, self._ledger.crl.read_text())
        return self._ledger.crl

    def _folder(self, role: Role, name: str) -> Path:
        return self._directory / ("coordinator" if role is Role.COORDINATOR else f"{role}s/{name}")

    def _hosts(self, role: Role) -> tuple[str, ...]:
        return self._file.hosts if role is Role.COORDINATOR else ()

    def _issue(self, role: Role, name: str, days: int) -> Credential:
        credential = self._authority.issue(role, name, hosts=self._hosts(role), days=days)
        self._ledger.issued(role, name, credential.certificate)
        return credential

    def _add(self, role: Role, name: str, place: str, config: tuple[str, str], days: int) -> Path:
        credential = self._authority.issue(role, name, hosts=self._hosts(role), days=days)
        with _new_folder(self._directory / place) as folder:
            (folder / "ca.crt").write_bytes(self._authority.certificate)
            credential.save(folder / f"{role}.crt", folder / f"{role}.key")
            write_text(folder / config[0], config[1])
            if role is Role.COORDINATOR:
                write_text(folder / CRL, self._ledger.crl.read_text())
            self._ledger.issued(role, name, credential.certificate)
        return self._directory / place


def create_kit(
    directory: Path, *, federation: str, hosts: Sequence[str], port: int = PORT, days: int = LEAF_DAYS
) -> Kit:
    """Make a kit with a new CA and the coordinator's folder.

    Raises:
        BadSpec: the directory exists and is not empty, or a name is wrong.
    """
    with _new_folder(directory) as folder:
        Authority.create(folder / "ca", federation)
        (folder / "ca").chmod(0o700)
        write_text(folder / "kit.yaml", yaml.safe_dump({"hosts": list(hosts), "port": port}, sort_keys=False))
        kit = Kit(folder)
        kit.sign_revocations()
        kit.add_coordinator(days=days)
    return Kit(directory)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, whose content appears under ``path`` at the end; an empty folder there is kept."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise _taken(path)
    try:
        # Beside the others, so that a rename is enough; inside where the folder may be a mount point.
        parent = path if path.exists() else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise BadSpec(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield partial
        _put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, path: Path) -> None:
    try:
        if partial.parent == path:
            # kit.yaml is what makes a kit of a folder: it comes last.
            for child in sorted(partial.iterdir(), key=lambda child: child.name == "kit.yaml"):
                child.rename(path / child.name)
        else:
            partial.chmod(0o755)
            partial.rename(path)
    except OSError as error:
        raise _taken(path) from error
    sync_folder(path.parent)


def _taken(path: Path) -> BadSpec:
    return BadSpec(
        f"{path} exists and is left as it is; move it away to have it made anew, or choose another name"
    )
