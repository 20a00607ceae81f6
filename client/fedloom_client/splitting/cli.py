"""``fedloom data``: what is done to data before sites train on it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedloom_client.splitting import rules
from fedloom_client.splitting.census import Census
from fedloom_client.splitting.formats import find_inputs, format_of, open_records
from fedloom_client.splitting.skew import mean_distance, shares_of, skew_table
from fedloom_client.splitting.writing import Made, write_sites
from fedloom_common.errors import BadSpec

PIPE_COLUMNS = 160

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Split one data set into those of sites.")


@app.callback()
def data() -> None:
    """Split one data set into those of sites."""


@app.command()
def split(
    files: Annotated[list[str], typer.Argument(help="Files, globs, or the directory of a saved dataset.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to make: one folder a site, and manifest.json.")],
    by_column: Annotated[
        str | None, typer.Option(help="A site for each value of a column, such as hospital or author.")
    ] = None,
    by_file: Annotated[bool, typer.Option("--by-file", help="A site for each file.")] = False,
    dirichlet: Annotated[
        float | None,
        typer.Option(help="Skew of the labels: 0.1 is strong, 1 is moderate, 100 is nearly none."),
    ] = None,
    iid: Annotated[bool, typer.Option("--iid", help="Records at random.")] = False,
    sites: Annotated[
        int | None,
        typer.Option(
            help="Number of sites; with --by-column and --by-file groups are joined to so many.",
            min=1,
            max=rules.MOST_SITES,
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="With --iid, the sites' shares, such as 0.5,0.3,0.2.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column of labels, which --dirichlet splits by and the table tells."),
    ] = None,
    at_least: Annotated[
        int | None, typer.Option(help="With --dirichlet, records of the smallest site, else 1.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Source of all randomness.", min=0)] = 0,
    format: Annotated[  # noqa: A002
        str | None, typer.Option(help="text, jsonl, parquet or dataset; by the names if not given.")
    ] = None,
) -> None:
    """Make folders of sites from one data set, and tell how different they are."""
    chosen = {"by_column": by_column, "by_file": by_file or None, "dirichlet": dirichlet, "iid": iid or None}
    rule: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if len(rule) != 1:
        raise BadSpec("give one of --by-column, --by-file, --dirichlet and --iid")
    rule |= {"sites": sites, "sizes": sizes, "label": label, "at_least": at_least, "seed": seed}
    paths = find_inputs(files)
    kind = format_of(paths, format)
    records = open_records(paths, kind)
    census = records.count(list(dict.fromkeys(column for column in (by_column, label) if column)))
    made_split = _split(census, rule)
    shares = shares_of(census, made_split, label)
    made = Made(rule=rule, format=kind, inputs=paths, shares=shares)
    _tell(made, label, found_by=write_sites(records, made_split, made, to))


def _tell(made: Made, label: str | None, found_by: str) -> None:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(skew_table(made.shares, label))
    if (distance := mean_distance(made.shares)) is not None:
        console.print(f"distance of sites' labels from all, on average: {distance:.3f} (0 alike, 1 apart)")
    console.print(f"In each site's config: data: {{NAME: {{format: {made.format}, files: [{found_by}]}}}}")


def _split(census: Census, rule: dict[str, Any]) -> rules.Split:
    sites, label, seed = rule["sites"], rule["label"], rule["seed"]
    if rule["sizes"] is not None and "iid" not in rule:
        raise BadSpec("--sizes goes with --iid alone")
    if rule["at_least"] is not None and "dirichlet" not in rule:
        raise BadSpec("--at-least goes with --dirichlet alone")
    if "by_column" in rule:
        return rules.grouped(census.columns[rule["by_column"]], census.sizes, sites)
    if "by_file" in rule:
        return rules.grouped(rules.by_file(census), census.sizes, sites)
    if "dirichlet" in rule:
        if label is None or sites is None:
            raise BadSpec("--dirichlet needs --label, the column to split by, and --sites")
        return rules.dirichlet(
            census.columns[label], sites, alpha=rule["dirichlet"], seed=seed, at_least=rule["at_least"] or 1
        )
    return rules.iid(census, _shares(rule["sizes"], sites), seed)


def _shares(sizes: str | None, sites: int | None) -> list[float]:
    """The share of each site.

    Raises:
        BadSpec: they are no shares, or do not go with the number of sites.
    """
    if sizes is None:
        if sites is None:
            raise BadSpec("--iid needs --sites, their number, or --sizes, their shares")
        return [1 / sites] * sites
    try:
        shares = [float(part) for part in sizes.split(",")]
    except ValueError as error:
        raise BadSpec(f"--sizes is {sizes}, wanted shares such as 0.5,0.3,0.2") from error
    if not min(shares) > 0 or not abs(sum(shares) - 1) < 1e-6:
        raise BadSpec(f"--sizes is {sizes}: wanted positive shares that add up to 1")
    if sites is not None and sites != len(shares):
        raise BadSpec(f"--sites is {sites}, but --sizes has {len(shares)} shares: drop one of both")
    return shares
