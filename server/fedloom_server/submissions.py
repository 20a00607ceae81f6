"""How runs come to be: from a spec, with a model of their own, or as clones of others."""

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom_common.controls import add_controls, drop_controls, has_controls
from fedloom_common.errors import BadSpec
from fedloom_common.runspec import Classification, RunSpec, Scaffold, Task, parse_run_spec
from fedloom_common.threads import until_done
from fedloom_server.adapters.merging import put_ranked, read_layout
from fedloom_server.adapters.parts import PartFile, parts_of, take_frozen
from fedloom_server.codecs import require_codable
from fedloom_server.exports import kept_model, rounds_up_to
from fedloom_server.models import MODEL_FILE, Remarks, prepare_model
from fedloom_server.records import Round, Run, RunState
from fedloom_server.selection import find_policy
from fedloom_server.store import Store, new_run_id

logger = logging.getLogger(__name__)


class Submissions:
    """Makes runs and queues them: a run is in the store, with its model, or nothing of it is."""

    def __init__(self, store: Store, *, on_queued: Callable[[], None]) -> None:
        self._store = store
        self._on_queued = on_queued

    async def submit(self, spec_text: str, *, priority: int = 0, cloned_from: str = "") -> Run:
        """Check a run spec, make its initial model and queue the run.

        Raises:
            BadSpec: the spec or the model it names is wrong; nothing is queued.
        """
        spec = parse_run_spec(spec_text)
        find_policy(spec.cohort.policy)  # before a model is made in vain
        folder = self._store.spool.new_workshop()
        try:
            _tell(await prepare_model(spec, folder), spec)
            return await self.enqueue(spec, folder, priority=priority, cloned_from=cloned_from)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def enqueue(self, spec: RunSpec, folder: Path, *, priority: int = 0, cloned_from: str = "") -> Run:
        """Queue a run whose initial model, a folder of files, is made; the files move into the store.

        Raises:
            BadSpec: the run's codecs cannot encode the model, or there is no such selection policy.
        """
        find_policy(spec.cohort.policy)
        if isinstance(spec.local.algorithm, Scaffold):
            await asyncio.to_thread(add_controls, folder / MODEL_FILE, folder / MODEL_FILE)
        require_codable(spec.transport, folder / MODEL_FILE)
        with self._store.files.keeping():
            files = await asyncio.to_thread(self._take_in, folder)
            model = next(file for file in files if file["name"] == MODEL_FILE)
            files, parts = take_frozen(files)
            parts = replace(parts, ranked=await asyncio.to_thread(self._rank, spec, model["digest"], files))
            run = Run(
                id=new_run_id(), name=spec.name, spec_json=spec.model_dump_json(), state=RunState.QUEUED,
                submitted_at_s=time.time(), assets=[file for file in files if file is not model],
                model_digest=model["digest"], model_bytes=model["size_bytes"], priority=priority,
                cloned_from=cloned_from, adapter=parts.to_json() if spec.model.adapter else {},
            )  # fmt: skip
            self._queue(run)
        return run

    async def clone(self, run_id: str, spec_text: str, *, priority: int = 0) -> Run:
        """Queue a new run like another, with an initial model of its own.

        Raises:
            NotFound, WrongState: there is no such run.
            BadSpec: as for :meth:`submit`.
        """
        origin = self._store.run(run_id)
        return await self.submit(spec_text, priority=priority, cloned_from=origin.id)

    async def clone_from_model(
        self, run_id: str, spec_text: str, round_number: int | None, *, priority: int = 0
    ) -> Run:
        """Queue a new run that goes on from a model of another: after a round, or the latest.

        Raises:
            NotFound, WrongState: there is no such run, or its model of that round is not kept.
            BadSpec: the spec is wrong, or is of another model.
        """
        origin, spec = self._store.run(run_id), parse_run_spec(spec_text)
        if spec.model != origin.spec.model:
            raise BadSpec(
                f"model differs from that of run {origin.id}: a clone that goes on from a model keeps its "
                "model; leave it as it was, or clone without a round"
            )
        if _kind_of_model(spec.task) != _kind_of_model(origin.spec.task):
            raise BadSpec(
                f"task needs another kind of model than that of run {origin.id}: a clone that goes on from a "
                "model keeps its class and labels; export the model, and give it as model.path"
            )
        find_policy(spec.cohort.policy)
        rounds = rounds_up_to(self._store, origin, round_number)
        digest = kept_model(self._store, origin, rounds)
        parts = parts_of(self._store, origin, digest)
        state = _optimizer_state(origin, rounds[-1] if rounds else None, spec)
        with self._store.files.keeping() as kept:
            kept.update({digest, state, *(file.digest for file in parts.files)})
            model = await self._store.files.bring(digest)
            if state:
                await self._store.files.bring(state)
            digest, model = await until_done(self._fitted, spec, digest, model)
            require_codable(spec.transport, model)
            run = Run(
                id=new_run_id(), name=spec.name, spec_json=spec.model_dump_json(), state=RunState.QUEUED,
                submitted_at_s=time.time(), assets=origin.assets, model_digest=digest,
                model_bytes=model.stat().st_size, optimizer_digest=state, priority=priority,
                cloned_from=origin.id,
                cloned_round=rounds[-1].number if rounds else 0,
                adapter=parts.to_json() if spec.model.adapter else {},
            )  # fmt: skip
            self._queue(run)
        return run

    def _fitted(self, spec: RunSpec, digest: str, model: Path) -> tuple[str, Path]:
        """A kept model as a run can begin with it: with control variates of zero if its algorithm needs them.

        Those of the origin are of what its sites keep for it, and no site has any for the new run.
        """
        wanted = isinstance(spec.local.algorithm, Scaffold)
        if not (wanted or has_controls(model)):
            return digest, model
        folder = self._store.spool.new_workshop()
        try:
            fitted = folder / MODEL_FILE
            (add_controls if wanted else drop_controls)(model, fitted)
            stored = self._store.files.put(fitted)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return stored.digest, self._store.files.path(stored.digest)

    def _queue(self, run: Run) -> None:
        self._store.save(run)
        self._on_queued()
        logger.info(
            "run submitted", extra={"run": run.id, "name_of_run": run.name, "model_bytes": run.model_bytes}
        )
        adapter = run.spec.model.adapter
        if adapter is None or not adapter.ranks:
            return
        if strangers := sorted(adapter.ranks.keys() - {site.name for site in self._store.sites()}):
            logger.warning(
                "model.adapter.ranks names sites that have never been here: they may be misspelt, and all "
                "others train with model.adapter.rank",
                extra={"run": run.id, "sites": ", ".join(strangers)},
            )

    def _rank(self, spec: RunSpec, digest: str, assets: list[dict[str, Any]]) -> dict[int, PartFile]:
        """A new adapter for the sites of lower ranks."""
        adapter = spec.model.adapter
        if adapter is None or not adapter.ranks:
            return {}
        return put_ranked(
            self._store, adapter, read_layout(self._store, assets), self._store.files.path(digest)
        )

    def _take_in(self, folder: Path) -> list[dict[str, Any]]:
        files = []
        for path in sorted(folder.iterdir()):
            stored = self._store.files.put(path)
            files.append({"name": path.name, "digest": stored.digest, "size_bytes": stored.size_bytes})
        return files


def _tell(remarks: Remarks, spec: RunSpec) -> None:
    """Log what an operator may not have meant."""
    facts = {"name_of_run": spec.name}
    if remarks.drawn:
        logger.warning(
            "the pretrained model has no head for the task: it begins anew, drawn from the seed",
            extra=facts | {"tensors": ", ".join(remarks.drawn)},
        )
    if remarks.is_of_another_tokenizer:
        logger.warning(
            "the pretrained model has another tokenizer of its own, whose ids mean something else: leave "
            "model.tokenizer out to take that",
            extra=facts | {"path": spec.model.path, "tokenizer": spec.model.tokenizer},
        )


def _kind_of_model(task: Task) -> tuple[str, tuple[str, ...]]:
    """What of a task its model is made for: the class, and the labels."""
    return task.model_class, task.labels if isinstance(task, Classification) else ()


def _optimizer_state(origin: Run, record: Round | None, spec: RunSpec) -> str:
    """The server optimizer's state that goes with a round's model; empty for a spec with another one."""
    name, before = (one.aggregation.server_optimizer.name for one in (spec, origin.spec))
    if name != before:
        return ""
    return record.optimizer_digest if record and record.number else origin.optimizer_digest
