"""A site's pages, as its operator's probe and Prometheus read them."""

import asyncio
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture
def address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


async def page(address, path):
    def ask():
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def samples(address):
    _, text = await page(address, "/metrics")
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


async def test_a_site_is_ready_while_it_is_attached(world, address):
    world.daemon(http=address, disk_floor_bytes=0)
    await world.attached()
    await world.coordinator.until_heard("heartbeat")

    assert (await page(address, "/readyz"))[0] == 200
    assert (await samples(address))["fedloom_site_attached"] == 1

    world.coordinator.attach_error = None
    await world.coordinator.stop()
    async with asyncio.timeout(60):
        while (answer := await page(address, "/readyz"))[0] == 200:  # noqa: ASYNC110 (seen from outside)
            await asyncio.sleep(0.05)
    [problem] = json.loads(answer[1])["problems"]
    assert problem["check"] == "session"
    assert "not attached" in problem["problem"]
    assert (await page(address, "/healthz"))[0] == 200, "a coordinator that is away is no reason to restart"


async def test_work_and_what_waits_for_delivery_are_counted(world, address):
    world.coordinator.grants = False
    world.group.gate.clear()
    world.daemon(http=address, disk_floor_bytes=0)
    await world.attached()
    world.coordinator.assign(world.assignment())
    await asyncio.wait_for(world.group.started.wait(), 60)
    training = await samples(address)
    world.group.gate.set()
    await world.coordinator.until_heard("outcome")
    finished = await samples(address)

    assert (training["fedloom_site_assignments"], training["fedloom_site_undelivered_updates"]) == (1, 0)
    assert (finished["fedloom_site_assignments"], finished["fedloom_site_undelivered_updates"]) == (0, 1)
    assert finished["process_resident_memory_bytes"] > 1e6
    assert finished["fedloom_state_disk_free_bytes"] > 0


def test_a_daemon_without_the_port_imports_nothing_of_the_web():
    names = "('uvicorn', 'starlette', 'prometheus_client')"
    program = f"import sys, fedloom_client.daemon; print([n for n in {names} if n in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
