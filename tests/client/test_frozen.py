"""What lies under an adapter: found in the site's own directories, or fetched once."""

import asyncio
import os
from pathlib import Path

import pytest

from fedloom_client.frozen import Frozen
from fedloom_client.localmodels import LocalModels
from fedloom_client.messages import Assignment, Blob
from fedloom_client.statedir import StateDir
from fedloom_common.digests import digest_of_file, plain_name
from fedloom_common.errors import StorageFull


class Source:
    """Gives files by digest, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def add(self, name: str, content: bytes) -> Blob:
        path = self.folder / "published"
        path.write_bytes(content)
        digest = digest_of_file(path)
        self.contents[digest] = content
        return Blob(name=name, digest=digest, size_bytes=len(content))

    async def fetch(self, blob, path, on_bytes) -> None:
        self.fetched.append(blob.name)
        on_bytes(blob.size_bytes)
        path.write_bytes(self.contents[blob.digest])


class Site:
    def __init__(self, folder: Path, **directories: Path) -> None:
        self.source = Source(folder)
        self.state = StateDir(folder / "state")
        for place in (self.state.frozen, self.state.runs):
            place.mkdir(parents=True, exist_ok=True)
        self.directories = directories
        self.restart()

    def restart(self) -> None:
        self.local = LocalModels(self.directories, self.state.local_models)
        self.frozen = Frozen(self.state, self.source, self.local, kept=1)

    def bring(self, frozen: list[Blob], folds: list[Blob] | None = None, run: str = "run"):
        assignment = Assignment(
            id="a", work="train", run_id=run, round=1, attempt=1,
            model=Blob(name="m", digest="", size_bytes=1),
            assets=(), spec_json="", deadline_s=0, frozen=tuple(frozen), folds=tuple(folds or ()),
        )  # fmt: skip
        return asyncio.run(self.frozen.bring(assignment, lambda done, total: None))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_base_is_downloaded_once_and_checked_after_a_restart(site):
    blob = site.source.add("base.safetensors", b"base")
    path = Path(site.bring([blob]).frozen["base.safetensors"])
    site.restart()
    assert site.bring([blob]).frozen["base.safetensors"] == str(path)
    assert (path.read_bytes(), site.source.fetched) == (b"base", ["base.safetensors"])
    path.write_bytes(b"spoilt")
    site.restart()
    site.bring([blob])
    assert (path.read_bytes(), len(site.source.fetched)) == (b"base", 2)


def test_a_base_in_a_directory_of_the_sites_own_is_used_where_it_lies(tmp_path):
    own = tmp_path / "published-models"
    own.mkdir()
    (own / "weights.safetensors").write_bytes(b"base")
    (own / "other.safetensors").write_bytes(b"ESAB")
    site = Site(tmp_path, smollm2=own, missing=tmp_path / "nowhere")
    blob = site.source.add("base.safetensors", b"base")
    assert site.bring([blob]).frozen["base.safetensors"] == str(own / "weights.safetensors")
    assert site.source.fetched == []


def test_bad_directories_and_files_are_warned_of_once_and_the_base_is_downloaded(
    tmp_path, monkeypatch, caplog
):
    own = tmp_path / "own"
    (own / "empty").mkdir(parents=True)
    (own / "gone.safetensors").symlink_to("nowhere")
    (own / "locked.safetensors").write_bytes(b"base")
    site = Site(tmp_path, own=own, empty=own / "empty", file=own / "locked.safetensors", missing=own / "none")

    def refuse(path):  # as of save_pretrained, which gives a file to its own user alone; root may read all
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fedloom_client.localmodels.digest_of_file", refuse)
    blob = site.source.add("base.safetensors", b"base")
    for _ in range(2):
        assert Path(site.bring([blob]).frozen["base.safetensors"]).read_bytes() == b"base"
    warned = [f"{record.message}: {getattr(record, 'reason', '')}" for record in caplog.records]
    expected = [
        f"a model file cannot be read: {own}/gone.safetensors cannot be read (No such file or directory)",
        f"a model file cannot be read: {own}/locked.safetensors cannot be read (Permission denied): let the",
        f"a directory of models is of no use: {own}/empty has no .safetensors file: name the directory that",
        f"a directory of models is of no use: {own}/locked.safetensors is no directory: name the one that",
        f"a directory of models is of no use: {own}/none cannot be read (No such file or directory): put it",
        "no model of the site's own is the one wanted: ",
    ]
    assert [told[: len(start)] for told, start in zip(warned, expected, strict=True)] == expected


def test_who_cannot_remember_a_digest_uses_the_file_all_the_same(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "model.safetensors").write_bytes(b"base")
    site = Site(tmp_path, own=own)
    site.state.local_models.mkdir()  # no file can be written under this name
    blob = site.source.add("base.safetensors", b"base")
    assert site.bring([blob]).frozen["base.safetensors"] == str(own / "model.safetensors")


def test_what_the_coordinator_has_drawn_is_not_looked_for(tmp_path, caplog):
    own = tmp_path / "own"
    own.mkdir()
    site = Site(tmp_path, own=own)
    site.bring([site.source.add("adapter_a.safetensors", b"drawn")])
    assert not caplog.records


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path, monkeypatch):
    own, hashed = tmp_path / "own", []
    own.mkdir()
    path = own / "model.safetensors"
    path.write_bytes(b"base")
    site = Site(tmp_path, own=own)
    blob = site.source.add("base.safetensors", b"base")
    count = lambda path: (hashed.append(path), digest_of_file(path))[1]  # noqa: E731
    monkeypatch.setattr("fedloom_client.localmodels.digest_of_file", count)
    site.bring([blob])
    site.restart()
    site.bring([blob])
    assert len(hashed) == 1
    path.write_bytes(b"esab")
    os.utime(path, ns=(1, 1))
    assert Path(site.bring([blob]).frozen["base.safetensors"]).parent == site.state.frozen
    assert len(hashed) == 2


def test_folds_come_in_their_order_and_leave_when_the_run_no_longer_names_them(site):
    folds = [site.source.add("factors.safetensors", f"fold {number}".encode()) for number in range(3)]
    came = site.bring([], folds[:2]).folds
    assert [Path(path).read_bytes() for path in came] == [b"fold 0", b"fold 1"]
    later = site.bring([], [folds[2]]).folds
    assert [Path(path).read_bytes() for path in later] == [b"fold 2"]
    assert not Path(came[0]).exists()
    assert len(site.source.fetched) == 3


def test_bases_that_nobody_needs_make_room_for_newer_ones(site):
    first, second = (site.source.add("base.safetensors", content) for content in (b"one", b"two"))
    with site.frozen.keeping([first]):
        kept = Path(site.bring([first]).frozen["base.safetensors"])
        os.utime(kept, ns=(1, 1))
        site.bring([second])
        assert kept.exists()
    os.utime(kept, ns=(1, 1))
    site.bring([second])
    assert not kept.exists()


def test_a_base_that_came_in_part_stays_while_an_assignment_needs_it(site):
    broken_off, other = (site.source.add("base.safetensors", content) for content in (b"one", b"two"))
    partial = site.state.frozen / f".{plain_name(broken_off.digest)}.safetensors.partial"
    partial.write_bytes(b"on")
    with site.frozen.keeping([broken_off]):
        site.bring([other])
        assert partial.exists()
    site.bring([other])
    assert not partial.exists()


def test_a_base_that_came_in_part_is_among_those_that_are_kept(site):
    site.frozen = Frozen(site.state, site.source, site.local, kept=2)
    broken_off, other = (site.source.add("base.safetensors", content) for content in (b"one", b"two"))
    partial = site.state.frozen / f".{plain_name(broken_off.digest)}.safetensors.partial"
    partial.write_bytes(b"on")  # its assignment was called off, and comes again in the next round
    site.bring([other])
    assert partial.exists()


def test_a_base_that_does_not_fit_on_the_disk_leaves_nothing_behind(site):
    blob = Blob(name="base.safetensors", digest="blake3:" + "0" * 64, size_bytes=1 << 60)
    with pytest.raises(StorageFull, match="no space left"):
        site.bring([blob])
    assert list(site.state.frozen.iterdir()) == []
