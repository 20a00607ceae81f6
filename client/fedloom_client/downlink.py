"""The way down: a model made from the one that is here and its change.

Imported when a change has come: it needs numpy, which a daemon should not hold for nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from fedloom_client.messages import Blob
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import decode_model
from fedloom_common.codecs.spec import AnyStage
from fedloom_common.digests import digest_of_file
from fedloom_common.errors import BadTensor
from fedloom_common.tensorfiles import TensorFile


def rebuild(
    model: Blob, out: Path, *, delta: Path, stages: Sequence[AnyStage], base: Path, base_digest: str
) -> None:
    """Write the model to ``out``, where it appears only if it has the digest that it must have.

    Memory: about 3 MiB, whatever the size of the model.

    Raises:
        BadTensor: the change is not what the codecs make, or the model that it gives is another one.
    """
    made = out.with_name(f".{out.name}.made.partial")
    try:
        with TensorFile(base) as held:
            decode_model(delta, Chain(stages), base=held, base_digest=base_digest, out=made)
        if (digest := digest_of_file(made)) != model.digest:
            raise BadTensor(f"the change gives a model of digest {digest}, wanted {model.digest}")
        made.replace(out)
    finally:
        made.unlink(missing_ok=True)
