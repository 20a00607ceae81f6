"""The client daemon as a whole: its parts put together, started and stopped."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc

from fedloom.v1 import session_pb2 as pb
from fedloom_client import wire
from fedloom_client.assignments import Assignments
from fedloom_client.cache import Cache
from fedloom_client.config import SiteConfig
from fedloom_client.consent import Consent
from fedloom_client.credential import keep_credential
from fedloom_client.deliveries import Deliveries
from fedloom_client.downloads import Downloads
from fedloom_client.frozen import Frozen
from fedloom_client.groups import Group, WarmGroups
from fedloom_client.hardware import Device, find_devices, main_memory_bytes
from fedloom_client.holdings import Holdings
from fedloom_client.launches import clear_after_kill
from fedloom_client.localmodels import LocalModels
from fedloom_client.mailbox import Mailbox
from fedloom_client.outbox import Outbox
from fedloom_client.residuals import Residuals
from fedloom_client.session import Session
from fedloom_client.statedir import LEAVE_SIGNAL, StateDir
from fedloom_client.status import Status
from fedloom_client.work import Performer
from fedloom_client.workers import WorkerGroup
from fedloom_common.channels import open_channel
from fedloom_common.files import clear_partials
from fedloom_common.identity import Peer, Role
from fedloom_common.memory import keep_freed_memory
from fedloom_common.pace import Pace
from fedloom_common.rotation import LiveCredential
from fedloom_common.signals import asked_to_end
from fedloom_common.systemd import feed_watchdog, notify

LEFT_S = 0.5  # how often a draining daemon looks whether anything is open
STOP_S = 8.0  # container engines kill after 10

logger = logging.getLogger(__name__)


class Daemon:
    """One site's daemon."""

    def __init__(self, config: SiteConfig, *, make_group: Callable[[str, Path], Group] | None = None) -> None:
        """``make_group`` gives the worker group for a data set and a folder; torchrun's if not given."""
        self._config = config
        self._credential: LiveCredential | None = None
        self._state = StateDir(config.state_dir)
        self._status = Status(self._state.status)
        self._drain_asked = asyncio.Event()
        self._devices: tuple[Device, ...] = ()
        self._holdings = Holdings(config.data)
        self._mailbox = Mailbox()
        at_once = config.concurrent_assignments
        residuals = Residuals(self._state)
        self._outbox = Outbox(self._state.outbox, residuals)
        downloads = Downloads(self._connect, Pace(config.download_bytes_per_s))
        self._cache = Cache(self._state, downloads, models_kept=config.cache_models, users=at_once)
        local = LocalModels(config.models, self._state.local_models)
        frozen = Frozen(self._state, downloads, local, kept=config.cache_models)
        self._groups = WarmGroups(
            self._state, make_group or self._worker_group, idle_s=config.workers.idle_s, most=at_once
        )
        self._deliveries = Deliveries(
            self._connect,
            outbox=self._outbox,
            report=self._mailbox.note,
            on_failure=self._fail,
            pace=Pace(config.upload_bytes_per_s),
        )
        self._assignments = Assignments(
            Performer(
                config,
                Consent(config, self._state),
                cache=self._cache,
                outbox=self._outbox,
                residuals=residuals,
                groups=self._groups,
                frozen=frozen,
            ),
            mailbox=self._mailbox,
            outbox=self._outbox,
            deliveries=self._deliveries,
            groups=self._groups,
            at_once=at_once,
        )

    async def run(self) -> None:
        """Serve the coordinator until SIGTERM or SIGINT; what is finished is kept for the next start.

        Raises:
            BadSpec: the certificates or the state folder cannot be used.
            NotPermitted: no TLS, and the coordinator is not on this host.
            WrongState: another daemon uses the state folder.
        """
        keep_freed_memory()
        with self._state.locked(), self._hearing_of_drain():
            if self._config.tls is not None:
                self._credential = LiveCredential(self._config.tls)
            await self._connect().close()  # mistakes in the config end the start, not the first session
            self._outbox.load()
            self._cache.tidy()
            for folder in self._state.runs.iterdir():
                clear_after_kill(folder)
                clear_partials(self._state.residual_folder(folder.name))
            async with self._http_port():
                notify("READY=1")
                await self._until_stopped(asyncio.create_task(self._serve()))

    @asynccontextmanager
    async def _http_port(self) -> AsyncIterator[None]:
        if self._config.http is None:
            yield
            return
        from fedloom_client.web import Observed, site_port  # here: most sites have no such port

        observed = Observed(
            config=self._config, status=self._status, assignments=self._assignments, outbox=self._outbox
        )
        async with site_port(self._config.http, observed):
            yield

    async def _until_stopped(self, serving: asyncio.Task[None]) -> None:
        """Serve until a signal; a step under way may end, and what is finished is kept."""
        with asked_to_end() as asked:
            stopping = asyncio.create_task(asked.wait())
            leaving = asyncio.create_task(self._until_left())
            watchdog = asyncio.create_task(feed_watchdog())
            try:
                await asyncio.wait({serving, stopping, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                notify("STOPPING=1")
                stopping.cancel()
                leaving.cancel()
                watchdog.cancel()
                serving.cancel()
                await asyncio.wait({serving}, timeout=STOP_S)
        if not serving.done():
            # a group that loads a model, or is in a long step, hears of nothing: it ends with this process
            logger.info("the work under way outlasts the stop and is cut off", extra={"waited_s": STOP_S})
            os._exit(0)
        if not serving.cancelled():
            serving.result()
        logger.info("stopped")

    async def _until_left(self) -> None:
        """Wait for the signal of `fedloom client drain`, then until nothing is under way or undelivered."""
        await self._drain_asked.wait()
        self._assignments.leave()
        while self._assignments.open_ids():  # noqa: ASYNC110 (what empties it lies in several places)
            await asyncio.sleep(LEFT_S)
        await asyncio.sleep(LEFT_S)  # the last answer is on its way
        logger.info("drained")

    @contextmanager
    def _hearing_of_drain(self) -> Iterator[None]:
        """Take the signal from the start to the end: without a handler it would kill the process."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(LEAVE_SIGNAL, self._drain_asked.set)
        try:
            yield
        finally:
            loop.remove_signal_handler(LEAVE_SIGNAL)

    async def _serve(self) -> None:
        session = Session(
            self._connect,
            coordinator=f"the coordinator at {self._config.coordinator}",
            introduce=self._introduce,
            listener=self._assignments,
            mailbox=self._mailbox,
            status=self._status,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(session.run())
                tasks.create_task(self._assignments.run())
                tasks.create_task(self._holdings.keep_told(session.renew))
                if self._credential is not None:
                    tasks.create_task(keep_credential(self._credential, session.renew))
        finally:
            self._status.detached("it was stopped")
            await self._deliveries.stop()
            await self._groups.stop()

    async def _introduce(self) -> pb.SiteMessage:
        if not self._devices:
            self._devices = await asyncio.to_thread(find_devices, self._config.workers.device)
        return wire.hello(
            devices=self._devices,
            memory_bytes=main_memory_bytes(),
            data_sets=await self._holdings.tell(),
            labels=self._config.labels,
            held_digests=self._cache.held_digests(),
            open_assignments=self._assignments.kept_ids(),
            kept_runs=self._assignments.kept_runs(),
            evaluates_only=not self._config.trains,
        )

    def _connect(self) -> grpc.aio.Channel:
        config = self._config
        peer = None if config.insecure is None else Peer(Role.SITE, config.insecure)
        tls = self._credential or config.tls
        return open_channel(config.coordinator, tls, peer, window_bytes=config.window_bytes)

    def _worker_group(self, data_set: str, directory: Path) -> Group:
        return WorkerGroup(
            workers=self._config.workers,
            source=self._config.data[data_set],
            directory=directory,
            packed=self._state.packed / data_set,
        )

    def _fail(self, assignment_id: str, reason: str) -> None:
        self._assignments.fail(assignment_id, reason)
