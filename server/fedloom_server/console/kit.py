"""The kit of a federation: a directory with its CA, and one folder to copy to each host.

```
kit/
├── kit.yaml        the coordinator's address
├── ca/             ca.crt, ca.key: whoever has the key can admit anybody
├── coordinator/    ca.crt, coordinator.crt, coordinator.key, coordinator.yaml
├── sites/NAME/     ca.crt, site.crt, site.key, site.yaml
├── operators/NAME/ ca.crt, operator.crt, operator.key, operator.yaml
└── viewers/NAME/   ca.crt, viewer.crt, viewer.key, operator.yaml
```

Every folder appears whole or not at all, and nothing that exists is touched.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import Field

from fedloom_common.authority import LEAF_DAYS, Authority
from fedloom_common.errors import BadSpec
from fedloom_common.files import sync_folder, write_text
from fedloom_common.identity import Role
from fedloom_common.runspec import Strict
from fedloom_common.settings import load_settings

PORT = 7443

_COORDINATOR_YAML = """\
# Config of the coordinator: fedloom coordinator --config coordinator.yaml
# Relative paths start at this file's folder.

listen: 0.0.0.0:{port}
tls:
  ca: ca.crt
  certificate: coordinator.crt
  key: coordinator.key
# Runs, models and updates; needs room for a few models.
state_dir: state
"""

_SITE_YAML = """\
# Config of site {name}: fedloom client --config site.yaml
# Relative paths start at this file's folder.

coordinator: "{coordinator}"
tls:
  ca: ca.crt
  certificate: site.crt
  key: site.key
# Models, packed data and updates that wait for delivery.
state_dir: state

# EDIT: this site's data sets, by the names under which run specs ask for them.
# format is text (one document a file), jsonl or parquet (one document a record, in the field
# text_field), or dataset (a directory that the datasets library saved).
{data}
# What this site permits, and how it trains; remove the # to change a value.
# labels:
#   ward: icu
# policy:
#   max_model_bytes: 4000000000
#   max_steps_per_round: 1000
# workers:
#   nproc_per_node: 2
"""

_OPERATOR_YAML = """\
# Config of {role} {name}: fedloom run list --config operator.yaml
# Relative paths start at this file's folder.

coordinator: "{coordinator}"
tls:
  ca: ca.crt
  certificate: {role}.crt
  key: {role}.key
"""

_SUFFIX_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


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
        config = _COORDINATOR_YAML.format(port=self._file.port)
        return self._add(Role.COORDINATOR, "coordinator", "coordinator", ("coordinator.yaml", config), days)

    def add_site(
        self, name: str, *, data: Mapping[str, Sequence[str]] | None = None, days: int = LEAF_DAYS
    ) -> Path:
        """Make a site's folder; ``data`` gives the files of each data set.

        Raises:
            BadSpec: the name is wrong or taken.
        """
        config = _SITE_YAML.format(name=name, coordinator=self.coordinator, data=_data_section(data))
        return self._add(Role.SITE, name, f"sites/{name}", ("site.yaml", config), days)

    def add_operator(self, name: str, *, may_change: bool = True, days: int = LEAF_DAYS) -> Path:
        """Make the folder of an operator, or of a viewer who may see everything and change nothing.

        Raises:
            BadSpec: the name is wrong or taken.
        """
        role = Role.OPERATOR if may_change else Role.VIEWER
        config = _OPERATOR_YAML.format(role=role, name=name, coordinator=self.coordinator)
        return self._add(role, name, f"{role}s/{name}", ("operator.yaml", config), days)

    def _add(self, role: Role, name: str, place: str, config: tuple[str, str], days: int) -> Path:
        hosts = self._file.hosts if role is Role.COORDINATOR else ()
        credential = self._authority.issue(role, name, hosts=hosts, days=days)
        with _new_folder(self._directory / place) as folder:
            (folder / "ca.crt").write_bytes(self._authority.certificate)
            credential.save(folder / f"{role}.crt", folder / f"{role}.key")
            write_text(folder / config[0], config[1])
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
        Kit(folder).add_coordinator(days=days)
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


def _data_section(data: Mapping[str, Sequence[str]] | None) -> str:
    sets = {}
    for name, files in (data or {"texts": ["data/*.txt"]}).items():
        formats = {_SUFFIX_FORMATS.get(Path(file).suffix, "text") for file in files}
        if len(formats) != 1:
            raise BadSpec(
                f"the files of data set {name} have several formats ({', '.join(sorted(formats))}); "
                "give each its own name"
            )
        sets[name] = {"format": formats.pop(), "files": list(files)}
    return yaml.safe_dump({"data": sets}, sort_keys=False, default_flow_style=False)
