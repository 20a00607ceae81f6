"""What each site has, and how far its labels are from all sites' together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from fedloom_client.splitting.census import Census
from fedloom_client.splitting.rules import Split

LABELS_TOLD = 4  # in the table; the manifest has all


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """One site's part."""

    name: str
    examples: int
    share: float
    """Of all records."""
    size_bytes: int
    labels: Mapping[str, int]
    """Records of each label, those of the most first; empty without a label column."""
    distance: float | None
    """Total variation between its labels and those of all records: 0 if they are alike, 1 if it has none of
    the others'; None without a label column."""


def shares_of(census: Census, split: Split, label: str | None) -> list[SiteShare]:
    """Every site's part."""
    number = len(split.names)
    counts = np.bincount(split.sites, minlength=number)
    sizes = np.bincount(split.sites, weights=census.sizes, minlength=number)
    labels = _labels(census, split, label) if label is not None else None
    return [
        SiteShare(
            name=name,
            examples=int(counts[site]),
            share=counts[site] / len(census),
            size_bytes=int(sizes[site]),
            labels={} if labels is None else labels[site],
            distance=None if labels is None else distance(labels[site], _total(labels)),
        )
        for site, name in enumerate(split.names)
    ]


def distance(some: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Total variation of two distributions given as counts:  ½ Σ |p − q|;  1 if there is nothing of one."""
    n, m = sum(some.values()), sum(others.values())
    if not n or not m:
        return 1.0
    names = {*some, *others}
    return sum(abs(some.get(name, 0) / n - others.get(name, 0) / m) for name in names) / 2


def mean_distance(shares: Sequence[SiteShare]) -> float | None:
    """The sites' distances, weighted by their records: how far the split is from IID."""
    if any(share.distance is None for share in shares):
        return None
    return sum(share.share * (share.distance or 0.0) for share in shares)


def skew_table(shares: Sequence[SiteShare], label: str | None) -> Table:
    """One line a site."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("site", "examples", "share", "bytes", *([label, "distance"] if label else [])):
        table.add_column(name, justify="left" if name in ("site", label) else "right")
    for share in shares:
        row = [share.name, f"{share.examples:,}", f"{share.share:.1%}", f"{share.size_bytes:,}"]
        if label:
            row += [_told(share), f"{share.distance:.3f}"]
        table.add_row(*map(Text, row))
    return table


def _labels(census: Census, split: Split, label: str) -> list[dict[str, int]]:
    column = census.columns[label]
    values = len(column.values)
    pairs = np.bincount(
        split.sites.astype(np.int64) * values + column.codes, minlength=len(split.names) * values
    )
    made = []
    for row in pairs.reshape(len(split.names), values):
        order = np.argsort(-row, kind="stable")
        made.append({column.values[number]: int(row[number]) for number in order if row[number]})
    return made


def _total(labels: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in labels:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def _told(share: SiteShare) -> str:
    parts = [
        f"{name[:24]} {count / share.examples:.0%}"
        for name, count in list(share.labels.items())[:LABELS_TOLD]
    ]
    more = len(share.labels) - LABELS_TOLD
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
