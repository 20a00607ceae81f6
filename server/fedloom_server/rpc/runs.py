"""The gRPC edge of operators' calls."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import dropwhile
from typing import Literal, TypeVar

from google.protobuf.message import Message

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.runs_pb2_grpc import RunServiceServicer
from fedloom_server.exports import export
from fedloom_server.models import MODEL_FILE
from fedloom_server.records import Assignment, Round, Run
from fedloom_server.rpc.access import Context
from fedloom_server.rpc.messages import (
    blob,
    change_message,
    failure_message,
    round_message,
    run_message,
    site_message,
)
from fedloom_server.runs import Runs
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.watching import Watching

PAGE_BYTES = 1 << 20  # of one answer; a round with many sites takes it beyond, and a message has 8 MiB
FAILURES_BYTES = 2 << 20
ROUNDS_AT_ONCE = 50

M = TypeVar("M", bound=Message)


class RunEdge(RunServiceServicer):
    """Operators' and viewers' calls about runs and sites."""

    def __init__(self, runs: Runs, sites: Sites, store: Store, watching: Watching) -> None:
        self._runs = runs
        self._sites = sites
        self._store = store
        self._watching = watching

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.Run:  # noqa: N802
        """Check a run spec and queue the run."""
        run = await self._runs.submissions.submit(request.spec, priority=request.priority)
        return self._run(run)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:  # noqa: N802
        """Runs, newest first, in pages."""
        runs = self._store.runs()[::-1]
        if request.after:
            last = self._store.run(request.after)
            runs = list(dropwhile(lambda run: run.id != last.id, runs))[1:]
        kept = list(_fitting((self._run(run) for run in runs), PAGE_BYTES))
        return pb.ListResponse(runs=kept, next_after=kept[-1].id if len(kept) < len(runs) else "")

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:  # noqa: N802
        """One run with its rounds."""
        run = self._store.run(request.run_id)
        answer = pb.GetResponse(run=self._run(run))
        records = [record for record in self._store.rounds(run.id) if record.number >= request.from_round]
        answer.rounds.extend(_fitting(self._told(run, records), PAGE_BYTES))
        if len(answer.rounds) < len(records):
            answer.next_round = records[len(answer.rounds)].number
        return answer

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchEvent]:  # noqa: N802
        """The run and its rounds as they stand, then every change, until the run ends."""
        run = self._store.run(request.run_id)
        # Watched before the first look, so that nothing falls between.
        with self._watching.watcher(run.id) as watcher:
            run = self._store.run(run.id)
            has_ended = run.state.is_end
            yield pb.WatchEvent(run=self._run(run))
            for message in self._told(run, self._store.rounds(run.id)):
                yield pb.WatchEvent(round=message)
            while not has_ended:
                change = await watcher.get()
                has_ended = isinstance(change, Run) and change.state.is_end  # it may change while we yield
                yield change_message(change, self._store, MODEL_FILE)

    async def Clone(self, request: pb.CloneRequest, context: Context) -> pb.Run:  # noqa: N802
        """Queue a new run like another one."""
        if request.HasField("from_round") or request.from_latest:
            number = request.from_round if request.HasField("from_round") else None
            run = await self._runs.submissions.clone_from_model(
                request.run_id, request.spec, number, priority=request.priority
            )
        else:
            run = await self._runs.submissions.clone(request.run_id, request.spec, priority=request.priority)
        return self._run(run)

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.Run:  # noqa: N802
        """Hold a run where it is."""
        return self._run(await self._runs.pause(request.run_id, request.reason))

    async def Stop(self, request: pb.StopRequest, context: Context) -> pb.Run:  # noqa: N802
        """End a run."""
        return self._run(await self._runs.stop(request.run_id, request.reason))

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.Run:  # noqa: N802
        """Queue a run again."""
        return self._run(self._runs.resume(request.run_id))

    async def ListFailures(  # noqa: N802
        self, request: pb.ListFailuresRequest, context: Context
    ) -> pb.ListFailuresResponse:
        """What went wrong in a run, as much of the newest as fits a message."""
        newest = self._store.failures(self._store.run(request.run_id).id)[::-1]
        wanted = newest[: request.limit or None]
        kept = list(_fitting(map(failure_message, wanted), FAILURES_BYTES))
        return pb.ListFailuresResponse(failures=reversed(kept))

    async def Export(self, request: pb.ExportRequest, context: Context) -> pb.ExportResponse:  # noqa: N802
        """Name the files of a run's model."""
        wanted: int | Literal["best"] | None = "best" if request.best else None
        if request.HasField("round") and not request.best:
            wanted = request.round
        found = export(self._store, request.run_id, wanted, as_adapter=request.as_adapter)
        files = [blob(file) for file in found.files]
        return pb.ExportResponse(
            files=files,
            model_card=found.card,
            round=found.round,
            run=self._run(found.run),
            frozen=[blob(asdict(file)) for file in found.parts.frozen],
            folds=[blob(asdict(file)) for file in found.parts.folds],
        )

    async def ListSites(self, request: pb.ListSitesRequest, context: Context) -> pb.ListSitesResponse:  # noqa: N802
        """Sites by name, in pages."""
        open_work = self._store.open_assignments()
        by_site: dict[str, list[str]] = {}
        for assignment in open_work:
            by_site.setdefault(assignment.site, []).append(assignment.id)
        sites = [site for site in self._sites.all() if site.name > request.after]
        kept = list(_fitting((site_message(it, by_site.get(it.name, ())) for it in sites), PAGE_BYTES))
        return pb.ListSitesResponse(sites=kept, next_after=kept[-1].name if len(kept) < len(sites) else "")

    def _run(self, run: Run) -> pb.Run:
        return run_message(run, self._store.history(run.id), MODEL_FILE)

    def _told(self, run: Run, records: Sequence[Round]) -> Iterator[pb.Round]:
        """Rounds with what their sites did, read a few rounds at a time: a long run's rows are many."""
        central = run.spec.evaluation.central
        for first in range(0, len(records), ROUNDS_AT_ONCE):
            part = records[first : first + ROUNDS_AT_ONCE]
            by_round: dict[int, list[Assignment]] = {}
            for assignment in self._store.assignments_between(run.id, part[0].number, part[-1].number):
                by_round.setdefault(assignment.round, []).append(assignment)
            for record in part:
                yield round_message(record, by_round.get(record.number, []), MODEL_FILE, central=central)


def _fitting(messages: Iterable[M], most_bytes: int) -> Iterator[M]:
    """The first messages, up to the one that passes so many bytes."""
    size_bytes = 0
    for message in messages:
        yield message
        size_bytes += message.ByteSize()
        if size_bytes > most_bytes:
            return
