"""Models and assets at the site."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from fedloom_client.assets import model_type
from fedloom_client.cache import Cache
from fedloom_client.messages import Blob
from fedloom_client.statedir import StateDir, safe_name
from fedloom_common.errors import ProtocolError, Unreachable


class Source:
    """Gives files whose content is their name."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.broken = ""

    async def fetch(self, blob: Blob, path: Path, on_bytes: Callable[[int], None]) -> None:
        if blob.name == self.broken:
            raise Unreachable("gone")
        self.fetched.append(blob.name)
        path.write_text(blob.name)
        on_bytes(len(blob.name))


def blob(name: str, number: int = 0, size_bytes: int = 5) -> Blob:
    return Blob(name=name, digest=f"blake3:{number:064x}", size_bytes=size_bytes)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(tmp_path: Path, source: Source) -> Cache:
    state = StateDir(tmp_path)
    with state.locked():
        return Cache(state, source, models_kept=2)


def ignore(done: int, total: int) -> None:
    pass


async def test_only_the_newest_models_are_kept(cache: Cache) -> None:
    for number in (1, 2, 3):
        path = await cache.model(blob("model", number), ignore)
        os.utime(path, ns=(number, number))
    assert cache.held_digests() == [blob("model", number).digest for number in (3, 2)]


async def test_a_model_that_is_used_again_counts_as_new(cache: Cache) -> None:
    for number in (1, 2):
        path = await cache.model(blob("model", number), ignore)
        os.utime(path, ns=(number, number))
    await cache.model(blob("model", 1), ignore)
    await cache.model(blob("model", 3), ignore)
    assert set(cache.held_digests()) == {blob("model", number).digest for number in (1, 3)}


async def test_a_model_that_a_power_cut_has_spoilt_is_fetched_again(source: Source, tmp_path: Path) -> None:
    good, spoilt = (
        Blob(name=name, digest=f"blake3:{blake3(name.encode()).hexdigest()}", size_bytes=4)
        for name in ("good", "evil")
    )
    state = StateDir(tmp_path)
    with state.locked():
        for model in (good, spoilt):
            path = await Cache(state, source, models_kept=2).model(model, ignore)
        path.write_bytes(bytes(4))
        later = Cache(state, source, models_kept=2)
        assert [(await later.model(model, ignore)).read_text() for model in (good, spoilt)] == [
            "good",
            "evil",
        ]
    assert source.fetched == ["good", "evil", "evil"]


async def test_assets_are_fetched_once_and_lie_in_a_folder_by_their_names(
    cache: Cache, source: Source
) -> None:
    files = [blob("config.json", 1), blob("tokenizer.json", 2), blob("merges.txt", 3)]
    folder = await cache.assets(files)
    assert await cache.assets(list(reversed(files))) == folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: name for name in ("config.json", "tokenizer.json", "merges.txt")
    }
    assert len(source.fetched) == 3
    assert await cache.assets([blob("config.json", 9)]) != folder


async def test_assets_that_a_power_cut_has_spoilt_are_fetched_again(source: Source, tmp_path: Path) -> None:
    files = [
        Blob(name=name, digest=f"blake3:{blake3(name.encode()).hexdigest()}", size_bytes=len(name))
        for name in ("config.json", "tokenizer.json")
    ]
    state = StateDir(tmp_path)
    with state.locked():
        folder = await Cache(state, source, models_kept=2).assets(files)
        assert await Cache(state, source, models_kept=2).assets(files) == folder
        assert len(source.fetched) == 2
        (folder / "tokenizer.json").write_bytes(b"")
        assert await Cache(state, source, models_kept=2).assets(files) == folder
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"


async def test_assets_appear_whole_or_not_at_all(cache: Cache, source: Source, tmp_path: Path) -> None:
    source.broken = "tokenizer.json"
    with pytest.raises(Unreachable):
        await cache.assets([blob("config.json"), blob("tokenizer.json")])
    assert list((tmp_path / "assets").iterdir()) == []


async def test_assets_beyond_the_limit_are_refused(cache: Cache, source: Source) -> None:
    with pytest.raises(ProtocolError, match="the limit is 268435456"):
        await cache.assets([blob("config.json", size_bytes=(256 << 20) + 1)])
    assert source.fetched == []


async def test_of_models_that_came_in_part_only_the_one_that_is_wanted_is_kept(
    cache: Cache, source: Source, tmp_path: Path
) -> None:
    wanted, other = (tmp_path / "models" / f".blake3-{n:064x}.safetensors.partial" for n in (1, 2))
    for partial in (wanted, other):
        partial.write_bytes(b"half")
    (tmp_path / "assets" / ".def").mkdir()
    cache.tidy()
    source.broken = "model"
    with pytest.raises(Unreachable):
        await cache.model(blob("model", 1), ignore)
    assert list((tmp_path / "models").iterdir()) == [wanted]
    assert list((tmp_path / "assets").iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_a_config_without_a_model_type_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ProtocolError, match="names no model_type"):
        model_type(tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        pytest.param("run-1.r2", "run-1.r2", id="plain"),
        pytest.param("../../etc", "etc-", id="path"),
        pytest.param("run/1:train", "run_1_train-", id="separators"),
        pytest.param("x" * 300, "x" * 80 + "-", id="long"),
        pytest.param("..", "", id="parent"),
    ],
)
def test_an_id_from_the_network_never_becomes_a_path(name: str, wanted: str) -> None:
    safe = safe_name(name)
    assert safe.startswith(wanted)
    assert safe == Path(safe).name
    assert len(safe) <= 100
    assert safe not in (".", "..", "")


def test_different_ids_have_different_names() -> None:
    names = ["a/b", "a:b", "a_b", "a//b", "..", "..."]
    assert len({safe_name(name) for name in names}) == len(names)


async def test_assets_that_have_just_come_stay_whatever_the_clock_says(cache: Cache) -> None:
    """A clock that was ahead has left folders that look newer."""
    ahead_s = time.time() + 86_400
    for number in range(8):
        folder = await cache.assets([blob("config.json", number)])
        os.utime(folder, (ahead_s + number, ahead_s + number))
    folder = await cache.assets([blob("config.json", 100)])
    assert (folder / "config.json").exists()
