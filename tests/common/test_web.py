"""The HTTP port as a probe, a scraper and an intruder find it."""

import asyncio
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom_common import web
from fedloom_common.authority import Authority
from fedloom_common.errors import BadSpec
from fedloom_common.identity import Role, TlsFiles
from fedloom_common.vitals import LoopLag, disk_above, seldom, troubles
from fedloom_common.web import Vitals, http_port


async def none() -> str | None:
    return None


async def metrics() -> bytes:
    return b"up 1\n"


def vitals(**checks: Callable[[], object]) -> Vitals:
    return Vitals(lag=LoopLag(), checks={"always": none, **checks}, metrics=metrics)


async def get(url: str, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Status and body, asked from outside the event loop as a probe does."""

    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, context=context, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    authority = Authority.create(tmp_path / "ca", "test")
    authority.issue(Role.COORDINATOR, "coordinator", hosts=["localhost"], days=2).save(
        tmp_path / "a.crt", tmp_path / "a.key"
    )
    return TlsFiles(ca=tmp_path / "ca" / "ca.crt", certificate=tmp_path / "a.crt", key=tmp_path / "a.key")


async def test_what_is_asked_seldom_is_asked_once_whoever_wants_to_know():
    problems, asked = [None, "it is away", None], 0

    async def ask() -> str | None:
        nonlocal asked
        asked += 1
        return problems[asked - 1]

    check = seldom(ask, 0.5)
    assert [await check() for _ in range(5)] == [None] * 5
    await asyncio.sleep(0.6)
    assert [await check() for _ in range(5)] == ["it is away"] * 5
    assert asked == 2


async def test_what_is_asked_seldom_and_hangs_is_asked_once_and_told_each_time(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("fedloom_common.vitals.CHECK_S", 0.05)
    answered, asked = asyncio.Event(), 0

    async def hang() -> None:
        nonlocal asked
        asked += 1
        await answered.wait()

    checks = {"storage": seldom(hang, 0.01)}
    assert [await troubles(checks) for _ in range(3)] == [{"storage": "no answer in 0.05 s"}] * 3
    assert asked == 1
    answered.set()
    await asyncio.sleep(0.02)
    assert await troubles(checks) == {}


async def test_a_process_that_answers_is_healthy_and_says_how_late_its_loop_is():
    async with http_port("127.0.0.1:0", None, vitals()) as port:
        status, body = await get(f"http://127.0.0.1:{port}/healthz")

    assert status == 200
    assert 0 <= json.loads(body)["event_loop_lag_seconds"] < 30


async def test_what_is_wrong_is_listed_and_makes_it_not_ready():
    async def database() -> str | None:
        return "the database does not answer"

    async with http_port("127.0.0.1:0", None, vitals(database=database)) as port:
        status, body = await get(f"http://127.0.0.1:{port}/readyz")

    assert status == 503
    assert json.loads(body) == {
        "ready": False,
        "problems": [{"check": "database", "problem": "the database does not answer"}],
    }


async def test_a_check_that_hangs_is_a_problem_and_not_a_hanging_page(monkeypatch):
    monkeypatch.setattr("fedloom_common.vitals.CHECK_S", 0.2)

    async def hangs() -> str | None:
        await asyncio.Event().wait()

    async with http_port("127.0.0.1:0", None, vitals(database=hangs)) as port:
        status, body = await get(f"http://127.0.0.1:{port}/readyz")

    assert status == 503
    assert json.loads(body)["problems"] == [{"check": "database", "problem": "no answer in 0.2 s"}]


async def test_a_disk_below_the_floor_is_told_with_what_to_do(tmp_path):
    assert await disk_above(tmp_path, 0)() is None
    assert "free some, or move it" in (await disk_above(tmp_path, 1 << 62)() or "")


async def test_a_loop_that_was_blocked_shows_as_lag():
    lag = LoopLag()
    watching = asyncio.create_task(lag.watch())
    await asyncio.sleep(0)
    time.sleep(1.0)  # noqa: ASYNC251 - blocks the loop, as the fault to be found would
    async with asyncio.timeout(60):
        while not lag.latest_s:  # noqa: ASYNC110 (any condition at all)
            await asyncio.sleep(0.01)
    watching.cancel()

    assert lag.worst_s == lag.latest_s >= 0.5


async def test_a_port_in_use_is_an_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BadSpec, match=f"cannot listen on {address}.*give another"):
            async with http_port(address, None, vitals()):
                pass


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_can_be_changed_through_it(method):
    async with http_port("127.0.0.1:0", None, vitals()) as port:
        url = urllib.request.Request(f"http://127.0.0.1:{port}/readyz", method=method, data=b"")

        assert (await get(url))[0] == 405


async def test_with_a_certificate_it_speaks_only_tls_and_takes_a_renewed_one(tls, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "RENEWAL_S", 0.1)
    context = ssl.create_default_context(cafile=str(tls.ca))

    def serial(port: int) -> str:
        with (
            socket.create_connection(("localhost", port), timeout=60) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as secure,
        ):
            return secure.getpeercert()["serialNumber"]

    async with http_port("127.0.0.1:0", tls, vitals()) as port:
        assert (await get(f"https://localhost:{port}/metrics", context)) == (200, "up 1\n")
        with pytest.raises((OSError, urllib.error.URLError)):
            await get(f"http://localhost:{port}/metrics")
        before = await asyncio.to_thread(serial, port)
        authority = Authority.load(tmp_path / "ca")
        tls.key.unlink()
        authority.issue(Role.COORDINATOR, "coordinator", hosts=["localhost"], days=3).save(
            tls.certificate, tls.key
        )
        async with asyncio.timeout(60):
            while await asyncio.to_thread(serial, port) == before:  # noqa: ASYNC110 (the port tells nobody)
                await asyncio.sleep(0.1)


async def test_connections_that_say_nothing_are_bounded_in_number_and_time(monkeypatch):
    monkeypatch.setattr(web, "CONNECTIONS", 4)
    async with http_port("127.0.0.1:0", None, vitals()) as port:
        with monkeypatch.context() as short:
            short.setattr(web, "LIFE_S", 0.5)
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
            async with asyncio.timeout(60):
                ends = await asyncio.gather(*(reader.read() for reader, _ in silent), return_exceptions=True)
        for _, writer in silent:
            writer.close()

        assert all(end == b"" or isinstance(end, ConnectionError) for end in ends)
        assert (await get(f"http://127.0.0.1:{port}/healthz"))[0] == 200


async def test_a_probe_is_answered_however_many_connections_say_nothing(monkeypatch):
    monkeypatch.setattr(web, "CONNECTIONS", 4)
    async with http_port("127.0.0.1:0", None, vitals()) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        assert (await get(f"http://127.0.0.1:{port}/healthz"))[0] == 200
        for _, writer in silent:
            writer.close()


async def test_a_flood_of_what_is_no_http_is_answered_and_told_now_and_then(caplog, monkeypatch):
    monkeypatch.setattr(web, "REPEAT_S", 1.0)
    async with http_port("127.0.0.1:0", None, vitals()) as port:

        async def knock() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16\x03\x01\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

        began_s = time.monotonic()
        answers = [await knock() for _ in range(50)]
        most = 1 + (time.monotonic() - began_s) / web.REPEAT_S
        await asyncio.sleep(web.REPEAT_S)
        await knock()

    assert all(answer.startswith(b"HTTP/1.1 400 ") for answer in answers)
    told = [record for record in caplog.records if record.message == "Invalid HTTP request received."]
    assert 2 <= len(told) <= 1 + most
    assert sum(int(getattr(record, "untold_before", 0)) for record in told) + len(told) == 51
