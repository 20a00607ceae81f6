"""How far an update moves its model, and how much of that may count."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedloom_common.codecs.spec import AnyStage
from fedloom_server.aggregation.aligned import Joined
from fedloom_server.aggregation.gram import gram_matrix

if TYPE_CHECKING:
    from fedloom_server.aggregation import Update


def change_norm(update: "Update", base: Path, stages: Sequence[AnyStage], base_digest: str) -> float:
    """‖θₖ − θ_bₖ‖₂  over all float tensors but control variates, as the site sent it: not scaled.

    Memory: about 3 MiB for each of a few threads, whatever the size of the model.

    Raises:
        BadTensor: the update is not finite, or does not belong to the model; names the site.
    """
    raw = replace(update, factor=1.0, clip=1.0)
    joined = Joined(base=base, base_digest=base_digest, stages=stages, updates=[raw])
    return float(np.sqrt(gram_matrix(joined)[0, 0]))


def longest_change(norms: Iterable[float], factor: float) -> float:
    """``factor`` times the median of the norms that are not 0; infinity if there is none.

    Source: Sun et al. 2019, arXiv:1911.07963, section 4, for clipping by norm; Andrew et al. 2021,
    arXiv:1905.03871, for the median of clients' norms as the bound, taken here as it is, of past rounds.
    """
    moved = [norm for norm in norms if norm > 0]
    return factor * statistics.median(moved) if moved else np.inf


def clip_factor(norm: float, longest: float) -> float:
    """What a change is multiplied by so that its norm is ``longest`` at most."""
    return 1.0 if norm <= longest else longest / norm
