"""A folder of text files as the data of sites: by speaking role, by file, or in pieces at random."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fedloom_client.config import DataSource
from fedloom_client.splitting.census import Census, Coded
from fedloom_client.splitting.rules import Split, grouped, iid
from learning.arms import ALONE, OWN, POOL

EXAMPLE = Path(__file__).parents[2] / "examples/shakespeare/texts"
ROLE_CHARACTERS = 2000  # of the smallest role: less makes no held-out example
PIECE_CHARACTERS = 10_000
POOL_SITE = "pool"

_SPEAKER = re.compile(r"([A-Z][A-Za-z .'&]{0,30})\.\n(?=\S)")
"""A speech begins with its speaker's name and a full stop, alone on a line after an empty one."""


def split_corpus(corpus: Path, rule: str, sites: int, into: Path) -> dict[str, dict[str, DataSource]]:
    """Write each site's texts below a folder; the data sets of every site, and of one that has all parts.

    That one also has the part of the site with the most text, to train on it alone.

    Raises:
        SystemExit: the corpus has too few parts for so many sites.
    """
    parts = dict(_PARTS[rule](corpus))
    names = list(parts)
    sizes = np.array([len(parts[name].encode()) for name in names], np.uint32)
    if len(names) < sites:
        raise SystemExit(
            f"{corpus} has {len(names)} parts by {rule}, too few for {sites} sites: choose another --split"
        )
    split = _share_out(sizes, rule, sites)
    for site in split.names:
        (into / site).mkdir(parents=True)
    for number, name in enumerate(names):
        (into / split.names[split.sites[number]] / f"{number:05}.txt").write_text(parts[name])
    largest = int(np.argmax(np.bincount(split.sites, weights=sizes)))
    own = {site: DataSource(format="text", files=(str(into / site / "*.txt"),)) for site in split.names}
    pooled = DataSource(format="text", files=tuple(str(into / site / "*.txt") for site in split.names))
    return data_sets(own, {POOL: pooled, ALONE: own[split.names[largest]]})


def digest_of_corpus(corpus: Path) -> str:
    """Changes whenever a text of the corpus does."""
    digest = hashlib.sha256()
    for path in _files(corpus):
        digest.update(f"{path.relative_to(corpus)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


def data_sets(
    own: Mapping[str, DataSource], single: Mapping[str, DataSource]
) -> dict[str, dict[str, DataSource]]:
    """What each site has, under the names by which arms ask for it; ``single`` is what one machine trains on.

    Under those names, too, a site has its own part, on which it measures what comes of that.
    """
    sets = {site: dict.fromkeys((OWN, *single), source) for site, source in own.items()}
    return sets | {POOL_SITE: dict(single)}


def roles(corpus: Path) -> Iterator[tuple[str, str]]:
    """Every role with enough to say: its play and name, and all its speeches."""
    for path in _files(corpus):
        speeches: dict[str, list[str]] = defaultdict(list)
        for block in re.split(r"\n\s*\n", path.read_text(errors="replace")):
            if said := _SPEAKER.match(block.lstrip()):
                speeches[said[1]].append(block.lstrip()[said.end() :].strip() + "\n")
        for speaker, texts in speeches.items():
            text = "\n".join(texts)
            if len(text) >= ROLE_CHARACTERS:
                yield f"{path.stem}/{speaker}", text


def whole_files(corpus: Path) -> Iterator[tuple[str, str]]:
    """Every file as it is."""
    for path in _files(corpus):
        yield str(path.relative_to(corpus)), path.read_text(errors="replace")


def pieces(corpus: Path) -> Iterator[tuple[str, str]]:
    """All files, cut into pieces that are shared out at random."""
    for name, text in whole_files(corpus):
        for number, start in enumerate(range(0, len(text), PIECE_CHARACTERS)):
            yield f"{name}/{number}", text[start : start + PIECE_CHARACTERS]


_PARTS = {"role": roles, "file": whole_files, "piece": pieces}
SPLITS = tuple(_PARTS)


def _files(corpus: Path) -> list[Path]:
    found = sorted(corpus.rglob("*.txt"))
    if not found:
        raise SystemExit(f"there are no .txt files in {corpus}: give --corpus a folder that has some")
    return found


def _share_out(sizes: np.ndarray, rule: str, sites: int) -> Split:
    """Parts by the rules of `fedloom data split`."""
    if rule != "piece":
        codes = np.arange(len(sizes), dtype=np.int32)
        return grouped(Coded(codes=codes, values=tuple(map(str, codes))), sizes, sites)
    census = Census(names=("pieces",), files=np.zeros(len(sizes), np.int32), sizes=sizes, columns={})
    return iid(census, [1 / sites] * sites, seed=0)
