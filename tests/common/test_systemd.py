import asyncio
import socket

import pytest

from fedloom_common.systemd import feed_watchdog, notify


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_the_state_reaches_systemd(systemd):
    notify("READY=1")

    assert systemd.recv(100) == b"READY=1"


def test_the_watchdog_is_fed_twice_in_its_time(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "100000")

    pauses = []

    async def noted(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", noted)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(feed_watchdog())

    assert pauses == [0.05] * 3
    assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3


def test_a_systemd_that_reads_nothing_holds_nobody_up(systemd, caplog):
    for _ in range(2000):
        notify("WATCHDOG=1")
        if caplog.records:
            break

    assert "systemd cannot be told" in caplog.text


def test_without_systemd_nothing_is_sent_or_waited_for(monkeypatch, caplog):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    feeding = feed_watchdog()

    with monkeypatch.context() as patched:
        opened = []
        patched.setattr(socket, "socket", lambda *kind: opened.append(kind))
        notify("READY=1")
        with pytest.raises(StopIteration):  # it returns before it waits for anything
            feeding.send(None)

    assert (opened, caplog.records) == ([], [])


def test_a_systemd_that_has_gone_ends_no_service(systemd, caplog):
    systemd.close()

    notify("READY=1")

    assert "systemd cannot be told" in caplog.text
