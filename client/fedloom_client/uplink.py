"""The way up: a trained model becomes an encoded update.

Imported when a run asks for it: it needs numpy, which a daemon should not hold for nothing.
"""

from pathlib import Path

from fedloom_client.messages import Assignment
from fedloom_client.residuals import Residuals
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.runspec import RunSpec
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import ITEM_BYTES, Manifest

RESIDUAL_ITEM_BYTES = ITEM_BYTES["F32"]


def encode_update(
    assignment: Assignment, spec: RunSpec, *, trained: Path, model: Path, out: Path, residuals: Residuals
) -> None:
    """Write what training made of ``model`` to ``out``, by the run's codecs; takes ``trained`` away.

    Memory: about 3 MiB, whatever the size of the model; with top-k 64 MiB more.

    Raises:
        BadTensor: names a tensor that holds a value or change that the codec cannot tell.
        StorageFull: the disk is full.
    """
    chain = Chain(spec.transport.up)
    feedback = None
    if chain.uses_feedback:
        feedback = residuals.feedback(assignment.run_id, assignment.id, assignment.round)
    with TensorFile(trained) as after, TensorFile(model) as before:
        encode_model(
            chain, trained=after, base=before, base_digest=assignment.model.digest, out=out, feedback=feedback
        )
    trained.unlink()


def encoding_bytes(spec: RunSpec, model: Path) -> int:
    """What encoding an update takes on disk at most, beside the trained model and the residual so far."""
    chain, manifest = Chain(spec.transport.up), Manifest.read(model)
    values = sum(chain.layout(info).values for info in manifest.tensors if chain.is_coded(info))
    return chain.limit_bytes(manifest) + (values * RESIDUAL_ITEM_BYTES if chain.uses_feedback else 0)
