"""Updates as values, whatever they were encoded with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder
from fedloom_common.controls import is_control
from fedloom_common.errors import BadTensor
from fedloom_common.floats import decode
from fedloom_common.tensorfiles import TensorFile
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
    """An update's open file, moved to the model that it joins if it began from an older one.

    Raises:
        BadTensor: its examples are not positive, or its tensors are not those that its base model's become.
    """
    if update.examples <= 0:
        raise BadTensor(f"site {update.site} claims {update.examples} examples, wanted 1 or more")
    with ExitStack() as stack:
        base, digest = model, base_digest
        if update.base is not None:
            base, digest = stack.enter_context(TensorFile(update.base.path)), update.base.digest
        try:
            opened = _AsIs(update, base) if chain.is_as_is else _Encoded(update, chain, base, digest)
        except BadTensor as error:
            raise BadTensor(f"the update of site {update.site}: {error}") from error
        stack.enter_context(opened.file)
        is_plain = update.base is None and update.factor == update.clip == 1
        yield opened if is_plain else _Moved(opened, chain, _Values(base), _Values(model), update)


class _Values:
    """A model's tensors as values."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._raw = np.empty(0, np.uint8)

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        item_bytes = ITEM_BYTES[info.dtype]
        if len(self._raw) < len(values) * item_bytes:
            self._raw = np.empty(len(values) * item_bytes, np.uint8)
        raw = self._raw[: len(values) * item_bytes]
        self._file.read(info.name, start * item_bytes, raw.data)
        decode(raw, info.dtype, values)


class _AsIs:
    """An update that is a model of its own."""

    def __init__(self, update: "Update", base: TensorFile) -> None:
        self.examples = update.examples
        self.file = TensorFile(update.path)
        try:
            base.manifest.require_same_tensors(self.file.manifest)
        except BaseException:
            self.file.close()
            raise
        self.read = _Values(self.file).read


class _Encoded:
    """An update that is encoded against its base model."""

    def __init__(self, update: "Update", chain: Chain, base: TensorFile, base_digest: str) -> None:
        self.examples = update.examples
        self.file = Decoder(update.path, chain, base=base, base_digest=base_digest)

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        if self.file.has_change(info.name):
            self.file.read_change(info.name, start, values)
        else:
            self.file.read(info.name, start, values)


class _Moved:
    """An update's change, scaled and told of another model:  θ + s·(θₖ − θ_b),  or  s·(θₖ − θ_b)  alone."""

    def __init__(
        self, source: _AsIs | _Encoded, chain: Chain, base: _Values, model: _Values, update: "Update"
    ) -> None:
        self.examples = source.examples
        self._source, self._chain, self._base, self._model = source, chain, base, model
        self._factor, self._clip = update.factor, update.clip
        self._other = np.empty(0)

    def read(self, info: TensorInfo, start: int, values: NDArray[Any]) -> None:
        self._source.read(info, start, values)
        factor = self._factor if is_control(info.name) else self._factor * self._clip
        if self._chain.tells_changes(info):
            np.multiply(values, factor, out=values)
            return
        if len(self._other) < len(values):
            self._other = np.empty(len(values))
        other = self._other[: len(values)]
        self._base.read(info, start, other)
        np.subtract(values, other, out=values)
        np.multiply(values, factor, out=values)
        self._model.read(info, start, other)
        np.add(values, other, out=values)
