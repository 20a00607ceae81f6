"""The way down: a new global model is told to the sites as its change against the one that they hold.

A lossy chain tells less than the mean of the updates. So the coordinator decodes what it tells, as
every site does, and that is the round's model: both ends have the same bytes and never drift. What
was left out, mean − model, is the run's residual, and joins the change of the next round.

What lies on disk when, so that a kill anywhere leaves the old round with its old residual, or the
new round with its own:

    1. the residual that round t−1 prepared takes its place: round t−1 is durable, or t had not begun
    2. round t's residual is prepared, then its change encoded, decoded, and both put into the store
    3. the round's transaction names the model; it alone decides that the prepared residual counts

Killed before 3, the round is aggregated again, from 2 on and with the same bytes; killed after it,
1 is done by the next round.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.feedback import Feedback, Residual
from fedloom_common.codecs.values import PIECE_VALUES, Values
from fedloom_common.errors import BadTensor, WrongState
from fedloom_common.floats import decode
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, TensorInfo
from fedloom_server.adapters.parts import Parts
from fedloom_server.files import StoredFile
from fedloom_server.records import Round, Run
from fedloom_server.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A model as its change against another one."""

    file: StoredFile
    """The change, encoded."""
    base_digest: str
    """The model that it is told against."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A round's model in the store, and the smaller way to it."""

    model: StoredFile
    delta: Delta | None = None
    parts: Parts | None = None
    """What makes the model, if that is an adapter and the round changed something of it."""
    optimizer: StoredFile | None = None
    """State of the server optimizer after the round."""

    @property
    def optimizer_digest(self) -> str:
        """The state's digest; empty if there is none."""
        return self.optimizer.digest if self.optimizer else ""


def publish(store: Store, run: Run, record: Round, mean: Path) -> Published:
    """Make a round's mean the global model that sites are told of; ``mean`` is used up.

    Doing it again, after a kill and with the same mean, gives the same bytes.

    Memory: about 4 MiB, whatever the size of the model; with top-k 64 MiB more.

    Raises:
        BadTensor: the codec has no code for the change.
    """
    chain = Chain(run.spec.transport.down)
    if chain.is_as_is:
        return Published(model=store.files.put(mean))
    encoded, decoded = mean.with_suffix(".delta"), mean.with_suffix(".decoded")
    feedback = None if chain.is_exact else _feedback(store, record)
    base_path = store.files.path(record.base_digest)
    try:
        with TensorFile(base_path) as base, TensorFile(mean) as trained:
            digest = record.base_digest
            encode_model(
                chain, trained=trained, base=base, base_digest=digest, out=encoded, feedback=feedback
            )
            decode_model(encoded, chain, base=base, base_digest=digest, out=decoded)
            if feedback is not None:
                _count_own_type(chain, feedback, base=base, mean=trained, told=decoded)
    except BadTensor as error:
        raise BadTensor(f"transport.down cannot tell the model of round {record.number}: {error}") from error
    mean.unlink()
    delta = Delta(file=store.files.put(encoded), base_digest=record.base_digest)
    return Published(model=store.files.put(decoded), delta=delta)


def delta_to(store: Store, run: Run, model_digest: str) -> Delta | None:
    """The smaller way to one of a run's models; None if there is none."""
    for record in reversed(store.rounds(run.id)):  # a model may come back, and only its newest change is kept
        if record.model_digest == model_digest and record.delta_digest:
            file = StoredFile(record.delta_digest, record.delta_bytes)
            return Delta(file=file, base_digest=record.base_digest)
    return None


def _feedback(store: Store, record: Round) -> Feedback:
    """The run's residual, with what the round before has prepared in its place."""
    folder = store.spool.residual_folder(record.run_id)
    if record.number > 1:
        try:
            Feedback(folder, str(record.number - 1)).commit()
        except WrongState:  # an older one was told already: adding it would tell it twice
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning(
                "the residual of the round before is gone; what it left out is lost",
                extra={"run": record.run_id, "round": record.number},
            )
    return Feedback(folder, str(record.number))


def _count_own_type(
    chain: Chain, feedback: Feedback, *, base: TensorFile, mean: TensorFile, told: Path
) -> None:
    """Prepare the residual anew where the model's own type is narrower than fp32.

    The encoder leaves out what the codec rounds; adding its change to a bf16 base rounds once more, and
    of changes below the base's last place nothing would ever arrive.
    """
    coded = [info for info in base.manifest.tensors if chain.is_coded(info)]
    if all(info.dtype == "F32" for info in coded):
        return
    with TensorFile(told) as model, feedback.prepare(coded) as residual:
        left_out = _LeftOut(base=base, mean=mean, model=model, residual=residual)
        for info in coded:
            for piece in range(-(-info.size_bytes // (PIECE_VALUES * ITEM_BYTES[info.dtype]))):
                left_out.keep(info, piece)


class _LeftOut:
    """mean + residual − model, a piece at a time, as differences from the base so that little is rounded."""

    def __init__(self, *, base: TensorFile, mean: TensorFile, model: TensorFile, residual: Residual) -> None:
        self._base, self._mean, self._model, self._residual = base, mean, model, residual
        self._raw = np.empty(PIECE_VALUES * max(ITEM_BYTES.values()), np.uint8)
        self._arrays = [np.empty(PIECE_VALUES, np.float32) for _ in range(4)]

    def keep(self, info: TensorInfo, piece: int) -> None:
        """Replace a piece of the residual."""
        item = ITEM_BYTES[info.dtype]
        count = min(PIECE_VALUES, info.size_bytes // item - piece * PIECE_VALUES)
        base, mean, model, kept = (array[:count] for array in self._arrays)
        for source, values in ((self._base, base), (self._mean, mean), (self._model, model)):
            self._load(source, info, piece, values)
        self._residual.read(info, piece, kept)
        mean -= base
        mean += kept
        mean -= np.subtract(model, base, out=model)
        self._residual.write(info, piece, mean)

    def _load(self, source: TensorFile, info: TensorInfo, piece: int, values: Values) -> None:
        item = ITEM_BYTES[info.dtype]
        raw = self._raw[: len(values) * item]
        source.read(info.name, piece * PIECE_VALUES * item, raw.data)
        decode(raw, info.dtype, values)
