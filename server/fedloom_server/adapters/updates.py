"""Updates of adapters as whole tensors, whatever they were encoded with."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom_common.adapters.layout import read_values
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AnyStage
from fedloom_common.errors import BadTensor
from fedloom_common.tensorfiles import TensorFile
from fedloom_server.aggregation import BaseModel, Update
from fedloom_server.aggregation.pieces import PIECE_VALUES
from fedloom_server.aggregation.sources import Source, source_of


class WholeUpdate:
    """One site's update, a tensor at a time."""

    def __init__(self, update: Update, model: TensorFile, source: Source, chain: Chain) -> None:
        self.site, self.examples = update.site, update.examples
        self._model, self._source, self._chain = model, source, chain

    @property
    def names(self) -> list[str]:
        """Names of the tensors that are averaged, in the model's order."""
        return [info.name for info in self._model.manifest.tensors if info.is_float]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor.

        Raises:
            BadTensor: there is none of that name.
        """
        try:
            return self._model.manifest[name].shape
        except KeyError as error:
            raise BadTensor(f"the adapter has no tensor {name}") from error

    def read(self, name: str) -> NDArray[np.float64]:
        """One tensor in its shape.

        Raises:
            BadTensor: a value is not finite.
        """
        info = self._model.manifest[name]
        values = np.empty(int(np.prod(info.shape)))
        for start in range(0, values.size, PIECE_VALUES):
            self._source.read(info, start, values[start : start + PIECE_VALUES])
        values = values.reshape(info.shape)
        if self._chain.tells_changes(info):
            values += read_values(self._model, name, np.float64)
        if not np.isfinite(values).all():
            raise BadTensor(f"tensor {name} of site {self.site} is not finite")
        return values


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is merged: updates, the model that each began from, and how they are encoded."""

    updates: Sequence[Update]
    models: Sequence[BaseModel]
    stages: Sequence[AnyStage]

    @contextmanager
    def open(self) -> Iterator[list[WholeUpdate]]:
        """All updates, in their order.

        Raises:
            BadTensor: the tensors of one are not those of its model; the message names its site.
        """
        chain = Chain(self.stages)
        with ExitStack() as stack:
            opened = []
            for update, base in zip(self.updates, self.models, strict=True):
                model = stack.enter_context(TensorFile(base.path))
                source = stack.enter_context(source_of(update, chain, model, base.digest))
                opened.append(WholeUpdate(update, model, source, chain))
            yield opened


def shares(updates: Sequence[WholeUpdate]) -> list[float]:
    """nₖ/n of each."""
    total = sum(update.examples for update in updates)
    return [update.examples / total for update in updates]
