"""A run spec's model: what is trained."""

import math
from collections.abc import Iterator
from typing import Any, Self

from pydantic import field_validator, model_validator

from fedloom_common.runspec.adapter import Lora
from fedloom_common.strict import Strict


class ModelSpec(Strict):
    """Which model is trained, and with which tokenizer."""

    path: str | None = None
    """Directory at the coordinator with a pretrained model; give this or ``config``."""
    config: dict[str, Any] | None = None
    """A transformers config with its ``model_type``; the coordinator draws its weights from the seed."""
    tokenizer: str = "auto"
    """``bytes`` (UTF-8 bytes, 256 tokens and one end-of-text token), a directory at the coordinator, or
    ``auto``: the model directory's own, and ``bytes`` for a model from ``config``."""
    adapter: Lora | None = None
    """Train an adapter, and leave the model frozen under it; if not given, the whole model is trained.
    ``{}`` for one with all defaults."""

    @field_validator("config")
    @classmethod
    def _config_is_json(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        for path, number in _numbers("", config):
            if not math.isfinite(number):
                raise ValueError(
                    f"{path} is {number}, which JSON cannot hold: leave it out, or give a number"
                )
        return config

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a model directory) or config (a new model), and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as gpt2 or llama")
        return self


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number with a fraction, by its path."""
    if isinstance(value, float):
        yield path.removeprefix("."), value
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f"{path}.{key}", part)
