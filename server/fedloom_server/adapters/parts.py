"""The files that belong to a model whose adapter alone travels."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom_common.adapters.layout import BASE_FILE, FROZEN_A_FILE
from fedloom_server.records import Round, Run

if TYPE_CHECKING:
    from fedloom_server.store import Store

FROZEN_FILES = (BASE_FILE, FROZEN_A_FILE)
FACTORS, WEIGHTS = "factors.safetensors", "weights.safetensors"
"""Names of folds: factors that are added to weights, or weights that take their place."""


@dataclass(frozen=True)
class PartFile:
    """A file in the store, as records and messages tell it."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What makes an adapter's file a model."""

    frozen: tuple[PartFile, ...] = ()
    """The base, and A if it is not trained: the same all through a run."""
    folds: tuple[PartFile, ...] = ()
    """What is folded into the base, first to last."""
    ranked: Mapping[int, PartFile] = field(default_factory=dict)
    """The adapter for sites of a lower rank than the file's own."""

    def to_json(self) -> dict[str, Any]:
        """As a record's column."""
        return {
            "frozen": [asdict(file) for file in self.frozen],
            "folds": [asdict(file) for file in self.folds],
            "ranked": {str(rank): asdict(file) for rank, file in self.ranked.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Parts":
        """What ``to_json`` wrote; of nothing, no parts."""
        return cls(
            frozen=tuple(PartFile(**file) for file in content.get("frozen", ())),
            folds=tuple(PartFile(**file) for file in content.get("folds", ())),
            ranked={int(rank): PartFile(**file) for rank, file in content.get("ranked", {}).items()},
        )

    @property
    def files(self) -> Iterator[PartFile]:
        """All of them."""
        yield from self.frozen
        yield from self.folds
        yield from self.ranked.values()

    def base_digest(self) -> str:
        """The base's digest."""
        return next(file.digest for file in self.frozen if file.name == BASE_FILE)


def parts_of(store: "Store", run: Run, model_digest: str) -> Parts:
    """What belongs to one of a run's models; nothing for a run that trains the whole model."""
    if run.spec.model.adapter is None:
        return Parts()
    for record in reversed(store.rounds(run.id)):
        if record.adapter and model_digest in (record.model_digest, *_ranked_digests(record)):
            return Parts.from_json(record.adapter)
    return Parts.from_json(run.adapter)


def part_digests(record: Run | Round) -> set[str]:
    """Digests of the files that a record's adapter names."""
    return {file.digest for file in Parts.from_json(record.adapter).files}


def models_for(store: "Store", run: Run, model_digest: str, sites: Iterable[str]) -> dict[str, PartFile]:
    """The model's file that each site gets: one of its own rank, where ranks differ."""
    whole = PartFile("model", model_digest, store.files.path(model_digest).stat().st_size)
    adapter, ranked = run.spec.model.adapter, parts_of(store, run, model_digest).ranked
    if adapter is None:
        return dict.fromkeys(sites, whole)
    return {site: ranked.get(adapter.rank_of(site), whole) for site in sites}


def take_frozen(files: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Parts]:
    """The files of a new model without the frozen ones, and those."""
    frozen = tuple(PartFile(**file) for file in files if file["name"] in FROZEN_FILES)
    return [file for file in files if file["name"] not in FROZEN_FILES], Parts(frozen=frozen)


def put(store: "Store", path: Path, name: str) -> PartFile:
    """Take a file into the store, durable."""
    stored = store.files.put(path)
    return PartFile(name=name, digest=stored.digest, size_bytes=stored.size_bytes)


def _ranked_digests(record: Round) -> list[str]:
    return [file.digest for file in Parts.from_json(record.adapter).ranked.values()]
