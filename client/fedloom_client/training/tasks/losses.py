"""What tasks share: means over targets, and metrics of tokens and of labels."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from fedloom_client.training.tasks.protocol import IGNORED, Measured
from fedloom_common.scores import macro_f1


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are targets, in nats; 0 if none is. logits [..., classes], labels [...]."""
    flat = labels.flatten()
    total = functional.cross_entropy(
        logits.flatten(0, -2).float(), flat, ignore_index=IGNORED, reduction="sum"
    )
    return total / (flat != IGNORED).sum().clamp(min=1)


def perplexity(loss: float) -> float:
    """The exponential of a mean loss."""
    return math.exp(min(loss, 700.0))  # a double holds no more


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the targets: their loss, and how many the model gets right."""
    is_target = labels != IGNORED
    return {
        "loss": mean_cross_entropy(logits, labels).double() * is_target.sum(),
        "right": ((logits.argmax(-1) == labels) & is_target).sum(),
    }


def token_metrics(sums: Mapping[str, Sequence[float]], targets: int) -> dict[str, float]:
    """Loss, perplexity and accuracy over the targets."""
    loss = sums["loss"][0] / targets
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": sums["right"][0] / targets}


def label_sums(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the targets: their loss; by label, how many are predicted, actual, and both.

    logits [..., classes], labels [...]
    """
    is_target, classes = labels != IGNORED, logits.shape[-1]
    predicted, actual = logits.argmax(-1)[is_target], labels[is_target]
    return {
        "loss": mean_cross_entropy(logits, labels).double() * is_target.sum(),
        "hits": torch.bincount(actual[predicted == actual], minlength=classes),
        "predicted": torch.bincount(predicted, minlength=classes),
        "actual": torch.bincount(actual, minlength=classes),
    }


def label_metrics(sums: Mapping[str, Sequence[float]], targets: int) -> Measured:
    """Loss, accuracy and macro F1 over the targets."""
    counts = {name: [int(count) for count in sums[name]] for name in ("hits", "predicted", "actual")}
    return Measured(
        metrics={
            "loss": sums["loss"][0] / targets,
            "accuracy": sum(counts["hits"]) / targets,
            "macro_f1": macro_f1(**counts),
        },
        weights={"accuracy": targets},
        counts=counts,
    )
