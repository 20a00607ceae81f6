"""LoRA adapters of a real language model, merged by each rule."""

from pathlib import Path

from learning.arms import ALONE, POOL, Arm, Setting
from learning.trials import Experiment

RATES = (5e-4, 1e-3)  # a trial takes minutes of both cores
MERGES = {
    "fedex": "FedEx: exact, by a residual in the frozen weights",
    "ffa": "FFA: A frozen, exact",
    "fedit": "FedIT: averages of A and B, not exact",
    "stack": "stacking: exact, new adapters each round",
}


def experiment(model: Path, steps: int, seeds: tuple[int, ...]) -> Experiment:
    """Pooled, alone, and federated with four merges."""
    adapter = {"kind": "lora", "rank": 8, "alpha": 16}
    merges = [
        Arm(name=f"{merge}-h10", told=told, rates=RATES, model={"adapter": adapter | {"merge": merge}})
        for merge, told in MERGES.items()
    ]
    arms = (
        Arm(name="central", told="all text on one machine", data=POOL, rates=RATES),
        Arm(
            name="alone",
            told="the site with the most text, alone",
            data=ALONE,
            has_all_tokens=False,
            rates_of="central",
        ),
        *merges,
    )
    return Experiment(
        name="adapters",
        title="SmolLM2-135M: LoRA of rank 8 at four sites, H = 10",
        setting=Setting(
            model={"path": str(model), "adapter": adapter},
            task={"kind": "causal_lm", "context_tokens": 64},
            sites=4,
            steps=steps,
            batch_examples=2,
            warmup_steps=max(1, steps // 10),
            evaluations=2,
            curve_examples=16,
            final_examples=48,
        ),
        arms=arms,
        seeds=seeds,
    )
