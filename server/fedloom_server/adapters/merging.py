"""A round's adapters, merged by the run's rule: the next adapter, and what is folded into the base."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom_common.adapters.folds import Folds, folded_weights, write_arrays
from fedloom_common.adapters.layout import LAYOUT_FILE, Layout
from fedloom_common.runspec import Lora
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest
from fedloom_server.adapters.fresh import write_fresh, write_ranked
from fedloom_server.adapters.parts import FACTORS, WEIGHTS, PartFile, Parts, parts_of, put
from fedloom_server.adapters.residual import write_residual
from fedloom_server.adapters.stacking import write_stack
from fedloom_server.adapters.updates import Given
from fedloom_server.models import MODEL_FILE
from fedloom_server.records import Round, Run
from fedloom_server.store import Store

DIGITS = 16  # of a digest, in which nobody meets a second of the same


class Merge:
    """A round's merge that takes more than an average; done again, after a kill, it gives the same bytes."""

    def __init__(self, store: Store, run: Run, record: Round) -> None:
        adapter = run.spec.model.adapter
        assert adapter is not None, "the whole model is trained"
        self._adapter: Lora = adapter
        self._store, self._run, self._record = store, run, record

    @property
    def replaces_mean(self) -> bool:
        """Whether the next adapter is a new one and no average."""
        return self._adapter.merge == "stack"

    def merge(self, given: Given, base: Path, out: Path) -> Parts:
        """What belongs to the round's model beside its adapter, in the store.

        The adapter is in ``out``: the average of A and B, or a new one that is written here.

        Raises:
            BadTensor: an update cannot be merged; the message names its site.
        """
        return self._stack(given, base, out) if self.replaces_mean else self._fold(given)

    def _fold(self, given: Given) -> Parts:
        before, fold = self._before(), self._work_file("fold")
        if not write_residual(given, self._layout(), fold):
            return before
        return self._with_fold(before, put(self._store, fold, FACTORS))

    def _stack(self, given: Given, base: Path, out: Path) -> Parts:
        layout, fold = self._layout(), self._work_file("fold")
        means = write_stack(given, layout, fold)
        # Of the base, as no two rounds of a run may begin with the same adapter: it names what is folded.
        draw = int(self._record.base_digest.rsplit(":", 1)[-1][:DIGITS], 16)
        write_fresh(base, layout, means, out, seed=self._run.spec.seed, draw=draw)
        parts = self._with_fold(self._before(), put(self._store, fold, FACTORS))
        return replace(parts, ranked=put_ranked(self._store, self._adapter, layout, out))

    def _before(self) -> Parts:
        return parts_of(self._store, self._run, self._record.base_digest)

    def _with_fold(self, before: Parts, fold: PartFile) -> Parts:
        """The parts with one more fold; factors that outgrow the weights they change give way to those."""
        parts = replace(before, folds=(*before.folds, fold))
        factors = [file for file in parts.folds if file.name == FACTORS]
        base, layout = self._store.files.path(parts.base_digest()), self._layout()
        manifest = Manifest.read(base)
        shapes = [(target.weight, manifest[target.weight].shape) for target in layout.targets]
        dense_bytes = sum(4 * rows * columns for _, (rows, columns) in shapes)
        if sum(file.size_bytes for file in factors) <= dense_bytes:
            return parts
        out = self._work_file("weights")
        paths = [self._store.files.path(file.digest) for file in parts.folds]
        with TensorFile(base) as file, Folds(paths) as folds:
            write_arrays(out, shapes, folded_weights(file, folds, [name for name, _ in shapes]))
        return replace(parts, folds=(put(self._store, out, WEIGHTS),))

    def _layout(self) -> Layout:
        return read_layout(self._store, self._run.assets)

    def _work_file(self, kind: str) -> Path:
        return self._store.spool.mean_path(self._run.id, self._record.number).with_suffix(f".{kind}")


def put_ranked(store: Store, adapter: Lora, layout: Layout, model: Path) -> dict[int, PartFile]:
    """The adapter for each rank below the file's own that some site has, in the store."""
    lower = {rank for rank in (adapter.rank, *adapter.ranks.values()) if rank < adapter.largest_rank}
    folder, files = store.spool.new_workshop(), {}
    try:
        for rank in sorted(lower):
            out = folder / f"rank-{rank}"
            write_ranked(model, layout, rank, out)
            files[rank] = put(store, out, MODEL_FILE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return files


def read_layout(store: Store, assets: Sequence[Mapping[str, Any]]) -> Layout:
    """The layout among a run's assets."""
    digest = next(file["digest"] for file in assets if file["name"] == LAYOUT_FILE)
    return Layout.read(store.files.path(digest))
