"""The table and the plot of benchmarks/transport.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import GB, MB, Spread
from nulltraining import Figures, size_text
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from bare import Bare
    from transport import Comparison

COLUMNS = (
    "", "seconds\na round", "way\ndown s", "way\nup s", "of bare gRPC:\nround / down / up",
    "s to end of\nround 1", "peak MB:\ncoord. / site", "CPU s/GiB:\ncoord. / sites", "wire MB\na round",
)  # fmt: skip
WIDTH = 150
INK, FLOOR = "#1f5fa8", "#b9c2cc"


def table(comparisons: Sequence["Comparison"], machine: dict[str, Any]) -> Table:
    """One table: for each case fedloom, bare gRPC and raw TCP below each other."""
    made = Table(
        title="Null-training rounds: medians (smallest-largest)",
        caption=caption(machine),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for number, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for comparison in comparisons:
        first = comparison.figures[0]
        made.add_row(f"[bold]{size_text(first.model_bytes)} x {first.sites} sites[/bold]")
        for figures in comparison.figures:
            made.add_row(*_ours(figures, comparison.ratios(figures)))
        for row in _floors(comparison.bare):
            made.add_row(*row, style="dim")
        made.add_section()
    return made


def caption(machine: dict[str, Any]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['at']}: {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_bytes'] / GB:.0f} GB of memory, Linux {machine['kernel']}, "
        f"Python {machine['python']}, {versions}; "
        f"a file becomes durable at {machine['scratch_bytes_per_s'] / MB:.0f} MB/s; "
        f"load {machine['load']:.1f} before, {machine['load_after']:.1f} after"
    )


def spread_text(spread: Spread | None) -> str:
    """The median, and the range where there is one."""
    if spread is None or spread.count == 1:
        return _median(spread)
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _ours(figures: Figures, ratios: dict[str, float]) -> list[str]:
    extra = figures.extra
    return [
        f"fedloom, {'mTLS' if figures.tls else 'no TLS'}",
        spread_text(figures.round_s),
        _median(extra.get("broadcast_s")),
        _median(extra.get("upload_fold_s")),
        " / ".join(f"{ratio:.2f}" for ratio in ratios.values()),
        f"{figures.first_round_s:.1f}",
        f"{figures.server_peak_bytes / MB:.0f} / {figures.client_peak_bytes / MB:.0f}",
        _cpu(figures.server_cpu_s / figures.moved_gib, figures.client_cpu_s / figures.moved_gib),
        "" if figures.wire_bytes is None else f"{figures.wire_bytes / MB:.0f}",
    ]


def _floors(bare: Sequence["Bare"]) -> Iterator[list[str]]:
    by_kind = {(one.kind, one.tls): one for one in bare}
    for name, down, up, tls in (
        ("bare gRPC, mTLS", "grpc broadcast", "grpc upload", True),
        ("bare gRPC, no TLS", "grpc broadcast", "grpc upload", False),
        ("raw TCP: sink, accumulate", "tcp sink", "tcp accumulate", False),
    ):
        ways = by_kind[down, tls], by_kind[up, tls]  # type: ignore[index]
        moved_gib = sum(way.moved_gib for way in ways)
        server_cpu_s, client_cpu_s = sum(w.server_cpu_s for w in ways), sum(w.client_cpu_s for w in ways)
        yield [
            name,
            f"{sum(way.seconds.median for way in ways):.2f}",
            *(_median(way.seconds) for way in ways),
            "", "", "",
            _cpu(server_cpu_s / moved_gib, client_cpu_s / moved_gib),
        ]  # fmt: skip


def _median(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}"


def _cpu(server_s: float, client_s: float) -> str:
    return f"{server_s:.2f} / {client_s:.2f}"


def save_plot(comparisons: Sequence["Comparison"], path: Path) -> None:
    """Rounds, both ways of a round, and the coordinator's memory, each case beside its floor or limit."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = [f"{size_text(c.figures[0].model_bytes)}\n{c.figures[0].sites} sites" for c in comparisons]
    firsts = [comparison.figures[0] for comparison in comparisons]
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _bars(
        panels[0],
        names,
        [f.round_s.median if f.round_s else f.first_round_s for f in firsts],
        [c.floor_s("grpc broadcast", tls=True) + c.floor_s("grpc upload", tls=True) for c in comparisons],
    )
    panels[0].set(title="Seconds a round, mTLS", yscale="log", ylabel="s")
    panels[0].legend(["fedloom", "bare gRPC, down and up"], frameon=False)
    moved_gb = [f.sites * f.model_bytes / GB for f in firsts]
    if all("upload_fold_s" in f.extra for f in firsts):
        ours = [gb / f.extra["upload_fold_s"].median for gb, f in zip(moved_gb, firsts, strict=True)]
        floor = [gb / c.floor_s("grpc upload", tls=True) for gb, c in zip(moved_gb, comparisons, strict=True)]
        _bars(panels[1], names, ours, floor)
        panels[1].legend(["fedloom: upload, verify, fold, publish", "bare gRPC: upload, add"], frameon=False)
    panels[1].set(title="Way up, GB/s of all sites, mTLS", ylabel="GB/s")
    limits = [1.5 * f.model_bytes / MB + 300 for f in firsts]
    _bars(panels[2], names, [f.server_peak_bytes / MB for f in firsts], limits)
    panels[2].set(title="Coordinator's peak memory", ylabel="MB")
    panels[2].legend(["fedloom", "limit: 1.5 models + 300 MB"], frameon=False)
    figure.savefig(path, dpi=110)


def _bars(panel: Any, names: Sequence[str], ours: Sequence[float], floor: Sequence[float]) -> None:
    places = range(len(names))
    panel.bar([place - 0.2 for place in places], ours, 0.4, color=INK)
    panel.bar([place + 0.2 for place in places], floor, 0.4, color=FLOOR)
    panel.set_xticks(list(places), names)
    panel.spines[["top", "right"]].set_visible(False)
