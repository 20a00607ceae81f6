"""Claims about what surrounds the processes: clocks, databases, crowds, and the workers that sites start."""

import asyncio
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import postgresql
import psutil
import pytest
from faults.crowd import Crowd
from faults.federation import federation_of
from faults.ledger import assert_every_site_counted_once, assert_mean_of_what_counted
from faults.test_certificates import reissue

EXAMPLES = {"bergen": 3, "oslo": 5}
HOURS_S = 6 * 3600
CROWD = 1000

# The time that every library of a process is told, Python's and gRPC's too.
SHIFTED_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset_s;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    offset_s = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    real = dlsym(RTLD_NEXT, "clock_gettime");
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && offset_s && clock == CLOCK_REALTIME) now->tv_sec += *offset_s;
    return failed;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


class Clock:
    """A clock for some processes that can be set while they run."""

    def __init__(self, folder: Path) -> None:
        source, self._library = folder / "clock.c", folder / "clock.so"
        source.write_text(SHIFTED_CLOCK)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", self._library, source, "-ldl"], check=True)
        self._offset = folder / "offset"
        self.step(0)

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CLOCK_OFFSET": str(self._offset)}

    def step(self, seconds: int) -> None:
        """Set it to the true time and so much more; processes see it at once."""
        descriptor = os.open(self._offset, os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, struct.pack("<q", seconds), 0)
        os.close(descriptor)


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler to make a clock that can be set")
@pytest.mark.faults(
    injected="clock steps of 6 hours either way, at the coordinator or at the sites, in each round",
    must="nothing is lost for it: no wait ends early or late, every training counts once",
)
@pytest.mark.parametrize("who", ["coordinator", "sites"])
async def test_a_clock_that_jumps_by_hours_changes_nothing(tmp_path, who, seen):
    clock = Clock(tmp_path)
    async with federation_of(tmp_path, *EXAMPLES) as federation:
        for name in ("coordinator", *EXAMPLES):
            reissue(federation, name, begins_in_s=-2 * HOURS_S, ends_in_s=10 * HOURS_S)
        federation.configure("coordinator", heartbeat_s=1)
        with federation.environment_of(clock.environment() if who == "coordinator" else {}):
            federation.start_coordinator()
        run = await federation.submit(rounds=6, cohort={"min_sites": 2, "stall_s": 30})
        answer = await federation.get(run)
        assert answer is not None
        initial = federation.model(answer.run.model.digest)
        with federation.environment_of(clock.environment() if who == "sites" else {}):
            for site, examples in EXAMPLES.items():
                federation.train(site, examples=examples, seconds=1.5)
                federation.start_site(site)
        began_s = time.monotonic()
        for offset in (HOURS_S, 0, -HOURS_S, HOURS_S, 0):
            await asyncio.sleep(1.5)
            clock.step(offset)
        answer = await federation.finished(run, 60)
        assert_every_site_counted_once(federation, answer, EXAMPLES)
        assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
    seen(f"{who}: 6 rounds in {time.monotonic() - began_s:.0f} s over 5 steps")


@pytest.mark.faults(
    injected="a crash of the PostgreSQL server in the middle of a run, three times, for 3 s each",
    must="calls fail meanwhile and are tried again; the run goes on by itself; every training counts once",
)
async def test_a_restarted_database_only_delays_the_run(tmp_path, seen):
    with postgresql.server() as database:
        async with federation_of(tmp_path, *EXAMPLES) as federation:
            federation.configure("coordinator", database=database.new_database(), heartbeat_s=1)
            federation.start_coordinator()
            run = await federation.submit(rounds=6, cohort={"min_sites": 2, "stall_s": 60})
            answer = await federation.get(run)
            assert answer is not None
            initial = federation.model(answer.run.model.digest)
            for site, examples in EXAMPLES.items():
                federation.train(site, examples=examples, seconds=1.0)
                federation.start_site(site)
            for _ in range(3):
                await asyncio.sleep(2.5)
                database.stop()
                await asyncio.sleep(3)
                database.start()
            answer = await federation.finished(run, 120)
            assert_every_site_counted_once(federation, answer, EXAMPLES)
            assert_mean_of_what_counted(initial, answer, federation.model(answer.run.model.digest))
            federation.stop()
    seen("6 rounds over 3 crashes, each update trained and counted once")


@pytest.mark.faults(
    injected="1,000 sites that attach at once, each with a certificate of its own, and again after a kill -9",
    must="all are attached within two minutes, operators are answered meanwhile, memory stays under 1 GB",
)
@pytest.mark.timeout(400)
async def test_a_thousand_sites_attach_at_once(tmp_path, seen):
    async with federation_of(tmp_path) as federation:
        federation.start_coordinator()
        await federation.answered()
        async with Crowd(federation, CROWD) as crowd:
            times = []
            for _ in range(2):
                began_s, slowest_s = time.monotonic(), 0.0
                crowd.attach()
                while await federation.connected() < CROWD:
                    asked_s = time.monotonic()
                    await federation.answered()
                    slowest_s = max(slowest_s, time.monotonic() - asked_s)
                    assert time.monotonic() - began_s < 120
                times.append(time.monotonic() - began_s)
                memory_bytes = psutil.Process(federation.running["coordinator"].pid).memory_info().rss
                assert memory_bytes < 1e9
                federation.kill("coordinator")
                federation.start_coordinator()
                await crowd.gone()
    seen(
        f"attached after {times[0]:.0f} s, again after {times[1]:.0f} s; slowest answer {slowest_s:.1f} s; "
        f"{memory_bytes / 1e6:.0f} MB"
    )
