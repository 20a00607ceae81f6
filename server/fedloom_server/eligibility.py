"""Which sites fit a run, and what the others lack. Pure rules over what sites say of themselves."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom_common.requirements import GB, Require


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device on which a rank can train."""

    kind: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a site said of itself when it attached."""

    software: str = ""
    memory_bytes: int = 0
    devices: tuple[Device, ...] = ()
    data_sets: dict[str, int] = field(default_factory=dict)
    """Size in bytes by name."""
    evaluates_only: bool = False
    """Whether it measures models and never trains."""

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Description":
        """A description as ``dataclasses.asdict`` wrote it, and JSON kept it."""
        devices = tuple(Device(**device) for device in facts.get("devices", ()))
        return cls(**facts | {"devices": devices})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run wants of a site."""

    data: str
    """Name of the data set."""
    require: Require
    central: Collection[str] = ()
    """Sites that measure beside the others, and take no part in rounds."""


class Candidate(Protocol):
    """A site as the rules see it."""

    description: Description

    @property
    def labels(self) -> dict[str, str]:
        """The site's labels, as the operator left them."""
        ...

    @property
    def standstill(self) -> str:
        """Why the site gets no new work, such as "draining"; empty if it may."""
        ...


def lacks(site: Candidate, wanted: Wanted) -> Iterator[str]:
    """What a site lacks for a run, in the words of the run spec."""
    require, described = wanted.require, site.description
    if described.evaluates_only:
        yield "training (it only measures)"
    if wanted.data not in described.data_sets:
        yield f"data {wanted.data!r}"
    elif not described.data_sets[wanted.data]:
        yield f"files of data {wanted.data!r}"
    elif described.data_sets[wanted.data] < (require.data_bytes or 0):
        yield f"data_bytes >= {require.data_bytes}"
    if described.memory_bytes < (require.memory_gb or 0) * GB:
        yield f"memory_gb >= {require.memory_gb:g}"
    yield from _lacking_gpus(described.devices, require)
    yield from _lacking_labels(site.labels, require)


def fits(site: Candidate, wanted: Wanted) -> bool:
    """Whether a site may be given a run's work."""
    return not site.standstill and next(lacks(site, wanted), None) is None


def shortfall(connected: Iterable[Candidate], wanted: Wanted, *, needed: int) -> str:
    """How many sites fit of those that are needed, and why the others do not, for people.

    A site that lacks several things counts for each of them.
    """
    standing: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    count = fitting = 0
    for site in connected:
        missing = list(lacks(site, wanted))
        if site.standstill:
            standing[site.standstill] += 1
        else:
            lacking.update(missing)
            fitting += not missing
        count += 1
    causes = [
        f"{number} {'lacks' if number == 1 else 'lack'} {what}" for what, number in sorted(lacking.items())
    ]
    causes += [f"{number} {what}" for what, number in sorted(standing.items())]
    return f"{fitting} of {needed} fit, {count} connected" + (f": {', '.join(causes)}" if causes else "")


def _lacking_gpus(devices: Iterable[Device], require: Require) -> Iterator[str]:
    if require.gpus is None and require.gpu_memory_gb is None:
        return
    least_bytes = (require.gpu_memory_gb or 0) * GB
    gpus = [device for device in devices if device.kind != "cpu"]
    if sum(gpu.memory_bytes >= least_bytes for gpu in gpus) >= (require.gpus or 1):
        return
    if require.gpu_memory_gb is None:
        yield f"gpus >= {require.gpus}"
    else:
        several = f" on {require.gpus} gpus" if (require.gpus or 1) > 1 else ""
        yield f"gpu_memory_gb >= {require.gpu_memory_gb:g}{several}"


def _lacking_labels(labels: dict[str, str], require: Require) -> Iterator[str]:
    for wanted in require.wanted_labels:
        if wanted not in labels and wanted not in labels.values():
            yield f"label {wanted}"
    for name in require.labels:
        if labels.get(name) not in require.values_of(name):
            yield f"label {name}={'|'.join(require.values_of(name))}"
