"""What a run spec says of codecs: a chain of stages, in the order in which they are applied."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fedloom_common.strict import Strict

Block = Literal[16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


class Fp32(Strict):
    """Values as they are, in the model's own type."""

    name: Literal["fp32"] = "fp32"


class Bf16(Strict):
    """The change in bfloat16: 8 bits of precision, the range of fp32."""

    name: Literal["bf16"] = "bf16"


class Fp16(Strict):
    """The change in half precision: 11 bits from 6e-5 up, fewer below, an error beyond 65504."""

    name: Literal["fp16"] = "fp16"


class Int8(Strict):
    """The change in 255 steps, scaled to the largest magnitude of each block."""

    name: Literal["int8"] = "int8"
    block: Block = 256
    """Values that share a scale: fewer are more exact and need more bytes."""
    error_feedback: bool = False
    """Whether the site adds what rounding left out to its next update; costs it two fp32 models on disk."""


class Int4(Strict):
    """The change in 15 steps, scaled to the largest magnitude of each block."""

    name: Literal["int4"] = "int4"
    block: Block = 64
    """Values that share a scale: fewer are more exact and need more bytes."""
    error_feedback: bool = False
    """Whether the site adds what rounding left out to its next update; costs it two fp32 models on disk."""


class TopK(Strict):
    """Of each tensor's change only the values of largest magnitude."""

    name: Literal["topk"] = "topk"
    fraction: float = Field(default=0.01, gt=0, le=1)
    """Share of a tensor's values that is kept; at least one value is."""
    error_feedback: bool = True
    """Whether the site adds what was left out to its next update; costs it two fp32 models on disk."""


class Zstd(Strict):
    """Lossless compression of what the other stages leave."""

    name: Literal["zstd"] = "zstd"


AnyStage = Annotated[Fp32 | Bf16 | Fp16 | Int8 | Int4 | TopK | Zstd, Field(discriminator="name")]
StageName = Literal["fp32", "bf16", "fp16", "int8", "int4", "topk", "zstd"]
Shorthand = StageName | AnyStage | list[StageName | AnyStage]

_PLACE = {"topk": 0, "zstd": 2}  # all others turn values into bytes, and stand between


def _listed(data: Any) -> Any:
    """A chain of one may be given as itself, a stage without parameters by its name."""
    stages = data if isinstance(data, list | tuple) else [data]
    return [{"name": stage} if isinstance(stage, str) else stage for stage in stages]


def _ordered(stages: tuple[AnyStage, ...]) -> tuple[AnyStage, ...]:
    places = [_PLACE.get(stage.name, 1) for stage in stages]
    if not places or places != sorted(set(places)):
        came = ", ".join(stage.name for stage in stages)
        raise ValueError(
            f"[{came}] is no chain of codecs: wanted topk, then one of fp32, bf16, fp16, int8 and int4, "
            "then zstd, in this order and at least one of the three"
        )
    return stages


Codecs = Annotated[
    tuple[AnyStage, ...],
    BeforeValidator(_listed, json_schema_input_type=Shorthand),
    AfterValidator(_ordered),
]
"""A field's type for a chain: ``int8``, ``{name: int8, block: 128}`` or ``[topk, int8, zstd]``."""

AS_IS: tuple[AnyStage, ...] = (Fp32(),)
"""The default chain."""


def uses_feedback(stage: AnyStage) -> bool:
    """Whether what a stage leaves out is added to later updates."""
    return getattr(stage, "error_feedback", False)
