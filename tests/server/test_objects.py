"""Models in object storage, with the disk as their cache."""

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import load_file

from fedloom_common.digests import digest_of_file, plain_name
from fedloom_common.errors import BadSpec, NotFound, StorageUnavailable
from fedloom_server import objects, runs
from fedloom_server.app import coordinator
from fedloom_server.config import KeepModels
from fedloom_server.files import YOUNG_S, Files
from fedloom_server.objects import Objects


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{secrets.token_hex(8)}" if request.param == "memory" else f"file://{tmp_path}/bucket/a"


def new_file(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / secrets.token_hex(4)
    path.write_bytes(content)
    return path


def names_in(url: str) -> list[str]:
    return sorted(Objects(url).all())


class Away(fsspec.AbstractFileSystem):
    """A storage that nobody reaches, and that takes this for files that are not there, as many do."""

    protocol = "away"

    def info(self, path, **options):
        raise ConnectionError("no route to host")

    ls = info


def test_a_storage_that_is_away_is_not_taken_for_an_empty_one():
    fsspec.register_implementation("away", Away, clobber=True)
    for ask in (Objects("away://bucket").all, Objects("away://bucket").require_answer):
        with pytest.raises(StorageUnavailable):
            ask()


def test_a_storage_in_which_nothing_lies_yet_answers(url):
    Objects(url).require_answer()
    assert Objects(url).all() == {}


async def test_a_file_is_fetched_back_when_the_disk_has_lost_it(tmp_path, url):
    stored = Files(tmp_path / "one", Objects(url)).put(new_file(tmp_path, b"model" * 1000))
    files = Files(tmp_path / "two", Objects(url))
    assert files.has(stored.digest)
    with pytest.raises(NotFound):
        files.path(stored.digest)
    path = await files.bring(stored.digest)
    assert digest_of_file(path) == stored.digest
    assert [file.digest for file in files.all()] == [stored.digest]
    assert [path.name for path in (tmp_path / "two").iterdir()] == [path.name]


async def test_a_file_that_the_storage_has_spoilt_is_not_taken(tmp_path, url):
    stored = Files(tmp_path / "one", Objects(url)).put(new_file(tmp_path, b"model" * 1000))
    storage, root = fsspec.core.url_to_fs(url)
    storage.pipe_file(f"{root}/{names_in(url)[0]}", b"modem" * 1000)
    files = Files(tmp_path / "two", Objects(url))
    with pytest.raises(StorageUnavailable, match="gives blake3:"):
        await files.bring(stored.digest)
    assert list((tmp_path / "two").iterdir()) == []


async def test_a_fetch_that_is_cancelled_ends_before_the_next_of_the_same_file_begins(tmp_path, monkeypatch):
    storage = Objects(f"file://{tmp_path}/bucket")
    stored = Files(tmp_path / "one", storage).put(new_file(tmp_path, b"model" * 1000))
    files, get = Files(tmp_path / "two", storage), storage.get
    begun, goes_on = [], threading.Event()

    def get_when_told(name: str, place: Path) -> None:
        begun.append(place)
        goes_on.wait(60)
        get(name, place)

    monkeypatch.setattr(storage, "get", get_when_told)
    first = asyncio.create_task(files.bring(stored.digest))
    await asyncio.to_thread(wait_until, lambda: bool(begun))
    first.cancel()
    second = asyncio.create_task(files.bring(stored.digest))
    await asyncio.sleep(0.05)
    goes_on.set()
    assert digest_of_file(await second) == stored.digest
    assert first.cancelled()
    assert len(begun) == 1


def test_a_copy_that_was_cut_short_is_made_whole(tmp_path, url):
    files = Files(tmp_path / "one", Objects(url))
    files.put(new_file(tmp_path, b"model" * 1000))
    storage, root = fsspec.core.url_to_fs(url)
    storage.pipe_file(f"{root}/{names_in(url)[0]}", b"mod")
    files.put(new_file(tmp_path, b"model" * 1000))
    assert storage.cat_file(f"{root}/{names_in(url)[0]}") == b"model" * 1000


def test_what_is_removed_leaves_the_storage_and_what_is_put_again_stays(tmp_path, url):
    files = Files(tmp_path / "one", Objects(url))
    first, second = (files.put(new_file(tmp_path, content)) for content in (b"first", b"second"))
    files.remove([first.digest, second.digest])
    files.put(new_file(tmp_path, b"second"))
    assert not files.has(first.digest)
    wait_until(lambda: len(names_in(url)) == 1)
    files.close()
    assert Files(tmp_path / "two", Objects(url)).has(second.digest)


def test_the_cache_lets_go_of_old_files_that_nobody_uses(tmp_path, url):
    files = Files(tmp_path / "one", Objects(url), cache_bytes=250)
    stored = [files.put(new_file(tmp_path, bytes([number]) * 100)) for number in range(5)]
    for age, file in enumerate(stored):
        written_at_s = time.time() - YOUNG_S - 100 + age
        os.utime(files.path(file.digest), (written_at_s, written_at_s))
    young = files.put(new_file(tmp_path, b"young" * 20))
    files.trim([stored[0].digest])
    held = [file for file in (*stored, young) if (tmp_path / "one" / plain_name(file.digest)).exists()]
    assert held == [stored[0], young]
    assert all(files.has(file.digest) for file in stored)


def wait_until(holds) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("url", ["nothing://bucket", "s4://bucket"])
def test_a_url_of_no_storage_is_a_mistake_of_the_config(url):
    with pytest.raises(BadSpec, match=r"model_storage: .* wanted a URL that fsspec knows"):
        Objects(url)


async def test_a_run_outlives_a_storage_that_is_away_and_a_disk_that_is_lost(
    config, bench_of, spec, initial, url, monkeypatch
):
    monkeypatch.setattr(objects, "PAUSE_S", 0.01)
    monkeypatch.setattr(runs, "BROKEN_S", 0.2)
    keep = KeepModels(last=2, best=0)
    config = config.model_copy(update={"keep_models": keep, "model_storage": url, "model_cache_bytes": 0})
    async with coordinator(config) as running:
        bench = bench_of(running)
        bench.site("a")
        run = await bench.enqueue(spec(rounds=4))
        await bench.until(lambda: running.store.run(run.id).rounds_done >= 2)
        with monkeypatch.context() as patched:
            patched.setattr(type(running.store.files._objects._storage), "put_file", refuse)
            await asyncio.sleep(0.5)
            assert not running.store.run(run.id).state.is_end
        run = await bench.ended(run)
        assert (run.state, run.rounds_done) == ("finished", 4)
        rounds = running.store.rounds(run.id)
    for path in (config.state_dir / "files").iterdir():
        path.unlink()
    async with coordinator(config) as running:
        files = running.store.files
        assert [record.number for record in rounds if files.has(record.model_digest)] == [3, 4]
        tensors = load_file(await files.bring(run.model_digest))
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, initial[name] + 4, rtol=1e-6)


def refuse(*arguments: object, **options: object) -> None:
    raise ConnectionError("the storage is away")


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "somebody"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_EC2_METADATA_DISABLED", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it keeps the endpoint of another test
    bucket = f"models-{secrets.token_hex(4)}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/federation"
    server.stop()


async def test_models_go_to_s3_and_come_back(tmp_path, s3_url):
    content = os.urandom(12 << 20)  # more than one part
    files = Files(tmp_path / "one", Objects(s3_url))
    stored = files.put(new_file(tmp_path, content))
    assert (await Files(tmp_path / "two", Objects(s3_url)).bring(stored.digest)).read_bytes() == content
    files.remove([stored.digest])
    await asyncio.to_thread(wait_until, lambda: names_in(s3_url) == [])


async def test_s3_is_tried_out_and_left_empty(s3_url):
    Objects(s3_url).try_out()
    assert names_in(s3_url) == []


def test_a_fetch_that_ends_while_the_cache_is_trimmed_disturbs_nobody(tmp_path, url, monkeypatch):
    files = Files(tmp_path / "one", Objects(url), cache_bytes=250)
    files.put(new_file(tmp_path, b"a"))
    arriving = tmp_path / "one" / "x.fetched"
    arriving.write_bytes(b"b")
    stat = Path.stat

    def gone(path, **options):
        if path == arriving:
            arriving.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", gone)
    files.trim([])
    assert not arriving.exists()
