"""Updates as values, whatever they were encoded with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder
from fedloom_common.codecs.storage import TensorFile
from fedloom_common.errors import BadTensor
from fedloom_common.floats import decode
from fedloom_common.tensors import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update


class Source(Protocol):
    """One update."""

    examples: int

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        """Fill ``values`` from a place within a tensor: its values, or their change."""


@contextmanager
def source_of(update: "Update", chain: Chain, model: TensorFile, base_digest: str) -> Iterator[Source]:
    """An update's open file.

    Raises:
        BadTensor: its examples are not positive, or its tensors are not those that the base model's become.
    """
    if update.examples <= 0:
        raise BadTensor(f"site {update.site} claims {update.examples} examples, wanted 1 or more")
    try:
        if chain.is_as_is:
            opened: _AsIs | _Encoded = _AsIs(update, model)
        else:
            opened = _Encoded(update, chain, model, base_digest)
    except BadTensor as error:
        raise BadTensor(f"the update of site {update.site}: {error}") from error
    with opened.file:
        yield opened


class _AsIs:
    """An update that is a model of its own."""

    def __init__(self, update: "Update", model: TensorFile) -> None:
        self.examples = update.examples
        self.file = TensorFile(update.path)
        try:
            model.manifest.require_same_tensors(self.file.manifest)
        except BaseException:
            self.file.close()
            raise
        self._raw = np.empty(0, np.uint8)

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        item_bytes = ITEM_BYTES[info.dtype]
        if len(self._raw) < len(values) * item_bytes:
            self._raw = np.empty(len(values) * item_bytes, np.uint8)
        raw = self._raw[: len(values) * item_bytes]
        self.file.read(info.name, start * item_bytes, raw.data)
        decode(raw, info.dtype, values)


class _Encoded:
    """An update that is encoded against the base model."""

    def __init__(self, update: "Update", chain: Chain, model: TensorFile, base_digest: str) -> None:
        self.examples = update.examples
        self.file = Decoder(update.path, chain, base=model, base_digest=base_digest)

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        if self.file.has_change(info.name):
            self.file.read_change(info.name, start, values)
        else:
            self.file.read(info.name, start, values)
