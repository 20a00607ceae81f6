"""What a null-training measurement is, for any system: the case, the figures, and how they are read.

Sites send back what they got plus a constant, so nothing is measured but the system itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import typer
from measure import GIB, MB, Sampler, Spread

SIZES = {"10MB": 10 * MB, "200MB": 200 * MB, "1GB": 1000 * MB}
VOCABULARY_SHARE = 0.25  # of a small language model's parameters, as in GPT-2
TOKENS = 257  # of the byte tokenizer: the least that a vocabulary must have
POSITIONS = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    model_bytes: int
    """About; a whole number of layers comes within 1%."""
    sites: int
    rounds: int
    """Rounds one after the other; the first is not counted, as caches and files are still cold."""
    rounds_in_step: int = 0
    """Further rounds in which sites wait for each other before and after training, so that the way down
    and the way up can be told apart."""
    tls: bool = True

    @property
    def name(self) -> str:
        """For people."""
        return f"{size_text(self.model_bytes)} x {self.sites}{'' if self.tls else ', no TLS'}"

    @property
    def disk_bytes(self) -> int:
        """Room for models and updates: a model, its successor, and two files in each place of each site."""
        return (3 * self.sites + 4) * self.model_bytes

    @property
    def memory_bytes(self) -> int:
        """Room for the processes; making the initial model takes four times its size for a moment."""
        return 4 * self.model_bytes + self.sites * 150 * MB + 500 * MB


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What came of a case, for one system."""

    system: str
    model_bytes: int
    sites: int
    tls: bool
    round_s: Spread | None
    """Seconds a round, without the first; none if there was only one."""
    first_round_s: float
    """From the start of the first process to the end of the first round."""
    server_peak_bytes: int
    client_peak_bytes: int
    """The site with the largest."""
    server_cpu_s: float
    """A round."""
    client_cpu_s: float
    """A round, all sites together, null training included."""
    wire_bytes: int | None
    """A round, over the loopback device; none where others use that too."""
    others_cores: float
    """How many cores everything else on the machine kept busy meanwhile."""
    extra: dict[str, Any]
    """What only this system tells."""

    @property
    def moved_gib(self) -> float:
        """Payload of a round in both directions."""
        return 2 * self.sites * self.model_bytes / GIB

    @property
    def cpu_s(self) -> float:
        """A round, server and sites."""
        return self.server_cpu_s + self.client_cpu_s


def figures(
    system: str,
    case: Case,
    sampler: Sampler,
    *,
    model_bytes: int,
    started_at_s: float,
    rounds_began_at_s: float,
    round_ends_s: Sequence[float],
    own_loopback: bool,
    extra: dict[str, Any],
) -> Figures:
    """Read the figures of a case from what was sampled; groups are named ``server`` and ``site-…``."""
    counted = list(pairwise(round_ends_s))
    begin_s, end_s = (round_ends_s[0], round_ends_s[-1]) if counted else (rounds_began_at_s, round_ends_s[0])
    rounds = max(1, len(counted))
    return Figures(
        system=system,
        model_bytes=model_bytes,
        sites=case.sites,
        tls=case.tls,
        round_s=Spread.of([end - begin for begin, end in counted]) if counted else None,
        first_round_s=round_ends_s[0] - started_at_s,
        server_peak_bytes=sampler.peak_bytes("server", rounds_began_at_s, end_s),
        client_peak_bytes=sampler.peak_bytes("site-", rounds_began_at_s, end_s),
        server_cpu_s=sampler.cpu_s("server", begin_s, end_s) / rounds,
        client_cpu_s=sampler.cpu_s("site-", begin_s, end_s) / rounds,
        wire_bytes=round(sampler.wire_bytes(begin_s, end_s) / rounds) if own_loopback else None,
        others_cores=sampler.others_cores(begin_s, end_s),
        extra=extra,
    )


def gpt2_config(model_bytes: int) -> dict[str, Any]:
    """A GPT-2 of about this size in fp32, with the shapes and number of tensors that such a model has."""
    parameters = model_bytes / 4
    width = max(64, round(1.5 * parameters ** (1 / 3) / 64) * 64)
    layer = 12 * width**2 + 13 * width
    layers = max(1, round((1 - VOCABULARY_SHARE) * parameters / layer))
    rest = parameters - layers * layer - (POSITIONS + 2) * width
    return {
        "model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": width // 64,
        "n_positions": POSITIONS, "vocab_size": max(TOKENS, round(rest / width)),
    }  # fmt: skip


def gpt2_shapes(model_bytes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of that model's parameters, in order, for systems that do not read the config."""
    config = gpt2_config(model_bytes)
    width = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    layers = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
              "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}  # fmt: skip
    for layer in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= _with_bias(f"transformer.h.{layer}.{norm}", (width,))
        for name, shape in layers.items():
            shapes |= _with_bias(f"transformer.h.{layer}.{name}", shape)
    return shapes | _with_bias("transformer.ln_f", (width,))


def _with_bias(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}


def matrix(sizes: str, sites: str) -> list[tuple[int, int]]:
    """Model sizes and numbers of sites, each with each, from what options such as "10MB,1GB" and "2,8" say.

    Raises:
        typer.BadParameter: they say something else.
    """
    try:
        return [(size_bytes(size), int(count)) for size in sizes.split(",") for count in sites.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{error}; wanted lists such as --sizes 10MB,1GB --sites 2,8") from error


def size_bytes(text: str) -> int:
    """The size that "200MB" or "1.5GB" names.

    Raises:
        ValueError: it names none.
    """
    for unit, factor in (("MB", MB), ("GB", 1000 * MB)):
        number = text.upper().removesuffix(unit)
        if number != text.upper():
            return round(float(number) * factor)
    raise ValueError(f"{text!r} is not a size such as 200MB or 1GB")


def size_text(size: int) -> str:
    """A size as people write it."""
    return f"{size / 1000 / MB:.3g} GB" if size >= 1000 * MB * 0.99 else f"{size / MB:.3g} MB"
