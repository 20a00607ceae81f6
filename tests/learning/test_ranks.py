"""Several ranks of a site do what one does, whatever the lengths of its examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom_client.config import DataSource, Workers
from fedloom_client.workers import WorkerGroup

LOCAL = {
    "steps": 2, "batch_examples": 8, "accumulation_steps": 2, "optimizer": {"name": "sgd", "lr": 0.3},
    "schedule": {"kind": "constant"},
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "t5": {"kind": "seq2seq", "source_tokens": 24, "target_tokens": 12, "generate_examples": 5},
    "bert": {"kind": "masked_lm", "context_tokens": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TASKS)
async def test_two_ranks_train_and_measure_as_one_does(new_run: Callable[..., Any], family: str) -> None:
    run = new_run(family, TASKS[family], local=LOCAL)
    words = ["sun", "moon", "sea", "wind", "rises", "falls", "over", "under", "green", "hill", "sleeps"]
    texts = [" ".join(words[place % 11 : place % 11 + 1 + place % 3]) for place in range(60)]
    site = run.site("a", [{"text": text, "source": text, "target": text[: len(text) // 2]} for text in texts])
    alone = (site.train(), site.evaluate())
    source = DataSource(format="jsonl", files=site.source.files, held_out=site.source.held_out)
    workers = Workers(nproc_per_node=2, device="cpu", threads_per_rank=1)
    pair = WorkerGroup(workers=workers, source=source, directory=site.folder / "pair")
    try:
        update = str(site.folder / "of-two.safetensors")
        together = [
            await pair.perform(site.order(work, update_path=update), lambda _: None)
            for work in ("train", "evaluate")
        ]
    finally:
        await pair.stop()
    for one, two in zip(alone, together, strict=True):
        assert (one.tokens, one.examples) == (two.tokens, two.examples)
        assert two.metrics == pytest.approx(one.metrics, rel=1e-5)
    first, second = load_file(Path(alone[0].update_path)), load_file(update)
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=1e-6, err_msg=name)
