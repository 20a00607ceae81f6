"""A federation of real processes learns something else than next tokens."""

import json
import random
from itertools import compress

import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedloom_client.training.records import held_out_records

LABELS = ["calm", "storm", "night"]
WORDS = {"calm": "still flat mild", "storm": "wind hail gale", "night": "moon star dark"}
CONFIG = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def records(seed: int, number: int, shares: list[int]) -> list[dict[str, str]]:
    """Two of three words tell the label."""
    generator = random.Random(seed)
    made = []
    for label in generator.choices(LABELS, weights=shares, k=number):
        words = [*generator.choices(WORDS[label].split(), k=2), generator.choice(["still", "gale", "dark"])]
        made.append({"body": " ".join(generator.sample(words, 3)), "label": label})
    return made


SITES = {
    "red": records(1, 150, [8, 1, 1]),
    "green": records(2, 90, [1, 8, 1]),
    "blue": records(3, 60, [1, 1, 8]),
}


@pytest.mark.slow
def test_macro_f1_of_a_run_is_that_of_the_exported_model_on_all_sites_held_out_records(processes, tmp_path):
    processes.coordinator()
    for name, data in SITES.items():
        files = [str(processes.kit / "sites" / name / "data/*.jsonl")]
        source = {"format": "jsonl", "files": files, "fields": {"text": "body"}, "held_out": 0.2}
        lines = "".join(json.dumps(record) + "\n" for record in data)
        processes.site(name, {"a.jsonl": lines}, "--data", json.dumps({"weather": source}))
    processes.attached(3)
    run = processes.submit(
        {
            "name": "weather",
            "model": {"config": CONFIG},
            "task": {"kind": "classification", "labels": LABELS, "context_tokens": 32},
            "data": "weather",
            "rounds": 12,
            "cohort": {"min_sites": 3},
            "local": {"steps": 10, "batch_examples": 16, "optimizer": {"name": "adamw", "lr": 0.005}},
            "stop": {"target": {"metric": "macro_f1", "value": 0.85, "higher_is_better": True}},
        }
    )
    processes("run", "watch", run)
    shown = processes.show(run)
    assert "macro_f1 is" in shown["run"]["reason"]
    last = shown["rounds"][-1]["metrics"]
    processes("run", "export", run, "--to", str(tmp_path / "model"))

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    held_out = [record for data in SITES.values() for record in compress(data, held_out_records(0.2))]
    inputs = [tokenizer(record["body"], return_tensors="pt")["input_ids"] for record in held_out]
    with torch.no_grad():
        predicted = torch.cat([model(input_ids=tokens).logits.argmax(-1) for tokens in inputs])
    actual = torch.tensor([model.config.label2id[record["label"]] for record in held_out])
    expected = multiclass_f1_score(predicted, actual, num_classes=3, average="macro")
    assert last["macro_f1"] == pytest.approx(expected.item(), rel=1e-6)
    assert last["accuracy"] == pytest.approx((predicted == actual).double().mean().item())
