"""The language model that several sites' texts train: the arms, and how much of them a profile tries."""

from dataclasses import replace

from learning.arms import ALONE, POOL, SGD_RATES, Arm, Setting
from learning.trials import Experiment

DILOCO = {"name": "diloco", "lr": 0.7, "momentum": 0.5}  # 0.9 is for runs of several hundred rounds
MOMENTUM_RATES = (0.3, 0.5, 0.7)
ADAPTIVE_RATES = (1e-3, 3e-3, 1e-2)

CENTRAL = Arm(name="central", told="all text on one machine", data=POOL)
ALONE_ARM = Arm(
    name="alone", told="the site with the most text, alone", data=ALONE, has_all_tokens=False
)  # it does what it would do in the federation, without the others
ALONE_LONGER = Arm(name="alone-longer", told="the same with as many tokens as all sites", data=ALONE)
FEDAVG = Arm(name="fedavg-h10", told="FedAvg, H = 10")
DILOCO_H10 = Arm(name="diloco-h10", told="DiLoCo (Nesterov), H = 10", server=DILOCO)
DILOCO_H50 = replace(DILOCO_H10, name="diloco-h50", told="DiLoCo (Nesterov), H = 50", local_steps=50)
INT8 = replace(
    DILOCO_H10, name="diloco-h10-int8", told="DiLoCo, H = 10, int8 both ways", rates_of="diloco-h10",
    transport={"up": "int8", "down": "int8"},
)  # fmt: skip


def byte_gpt(sites: int, steps: int) -> Setting:
    """A GPT-2 of 0.4 million parameters that reads bytes; as many tokens a step for any number of sites."""
    return Setting(
        model={
            "config": {
                "model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 64,
                "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            },
            "tokenizer": "bytes",
        },
        task={"kind": "causal_lm", "context_tokens": 64},
        sites=sites,
        steps=steps,
        batch_examples=32 // sites,
        warmup_steps=max(1, steps // 20),
        evaluations=10,
        curve_examples=256 // sites,
        final_examples=2048 // sites,
    )  # fmt: skip


def gates_experiment(steps: int, seeds: tuple[int, ...]) -> Experiment:
    """The arms that the gates are about."""
    return Experiment(
        name="gates",
        title="4 sites: federated beside pooled training",
        setting=byte_gpt(4, steps),
        arms=(CENTRAL, ALONE_ARM, DILOCO_H10, DILOCO_H50, INT8),
        seeds=seeds,
    )


def rules_experiment(sites: int, steps: int, seeds: tuple[int, ...]) -> Experiment:
    """Every server step and site algorithm at the same token budget, H = 10."""
    sgd = Arm(name="fedavg-sgd-h10", told="FedAvg, SGD at the sites", inner="sgd", rates=SGD_RATES)
    stepping = (
        Arm(name="fedavgm-h10", told="FedAvgM", server={"name": "fedavgm"}, server_rates=(0.1, 0.3, 1.0)),
        replace(DILOCO_H10, server_rates=MOMENTUM_RATES),
        Arm(name="fedadam-h10", told="FedAdam", server={"name": "fedadam"}, server_rates=ADAPTIVE_RATES),
    )
    arms = (
        CENTRAL,
        ALONE_ARM,
        ALONE_LONGER,
        FEDAVG,
        *[replace(arm, rates_of=FEDAVG.name) for arm in stepping],
        Arm(name="fedprox-h10", told="FedProx, μ = 0.01", algorithm={"name": "fedprox", "mu": 0.01}),
        sgd,
        replace(sgd, name="scaffold-h10", told="SCAFFOLD, SGD at the sites", algorithm={"name": "scaffold"}),
    )
    return Experiment(
        name=f"rules-{sites}",
        title=f"{sites} sites: rules at the same token budget, H = 10",
        setting=byte_gpt(sites, steps),
        arms=arms,
        seeds=seeds,
    )


def exchange_experiment(steps: int, seeds: tuple[int, ...]) -> Experiment:
    """How often sites exchange, through which codecs, and with how many of them gone."""
    averaged = [
        Arm(
            name=f"fedavg-h{h}",
            told=f"FedAvg, H = {h}",
            local_steps=h,
            rates_of="central" if h == 1 else "",
        )
        for h in (1, 10, 50, 250)
    ]
    nesterov = [
        replace(DILOCO_H10, name=f"diloco-h{h}", told=f"DiLoCo, H = {h}", local_steps=h)
        for h in (10, 50, 100, 250)
    ]
    codecs = [
        replace(
            INT8,
            name=f"diloco-h10-{'-'.join(up)}",
            told=f"DiLoCo, H = 10, {' + '.join(up)} up, {down} down",
            transport={"up": list(up), "down": down},
        )
        for up, down in ((("bf16",), "bf16"), (("int4",), "int8"), (("topk", "int8", "zstd"), "int8"))
    ]
    seldom_int8 = [
        replace(INT8, name=f"diloco-h{h}-int8", told=f"DiLoCo, H = {h}, int8 both ways", local_steps=h,
                rates_of=f"diloco-h{h}")
        for h in (50, 100)
    ]  # fmt: skip
    dropout = [
        replace(FEDAVG, name=f"fedavg-h10-gone{share}", told=f"FedAvg, H = 10, {share} % of trainings lost",
                rates_of="fedavg-h10", dropout=share / 100)
        for share in (30, 50)
    ]  # fmt: skip
    return Experiment(
        name="exchange",
        title="4 sites: how often, how small, and with trainings lost",
        setting=byte_gpt(4, steps),
        arms=(CENTRAL, *averaged, *nesterov, INT8, *codecs, *seldom_int8, *dropout),
        seeds=seeds,
        topics={
            "how often": [arm.name for arm in (CENTRAL, *averaged, *nesterov)],
            "how small": [arm.name for arm in (CENTRAL, DILOCO_H10, INT8, *codecs, *seldom_int8)],
            "with trainings lost": [arm.name for arm in (CENTRAL, FEDAVG, *dropout)],
        },
    )
