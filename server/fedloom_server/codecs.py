"""What a run's codecs mean for its model: whether they can encode it, and how large an update can be."""

from collections.abc import Sequence
from pathlib import Path

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AnyStage
from fedloom_common.errors import BadSpec, BadTensor
from fedloom_common.runspec import Transport
from fedloom_common.tensors import HEADER_LIMIT_BYTES, Manifest


def require_codable(transport: Transport, model: Path) -> None:
    """Check that a run's codecs can encode its model, before the run begins.

    Raises:
        BadSpec: tells which way, and why not.
    """
    manifest = Manifest.read(model)
    for way, stages in (("up", transport.up), ("down", transport.down)):
        try:
            Chain(stages).entries(manifest)
        except BadTensor as error:
            raise BadSpec(f"transport.{way} cannot encode this model: {error}") from error


def most_update_bytes(up: Sequence[AnyStage], model: Path) -> int:
    """Size of the largest file that an update of a model can be."""
    chain = Chain(up)
    if chain.is_as_is:
        return model.stat().st_size + HEADER_LIMIT_BYTES
    return chain.limit_bytes(Manifest.read(model))
