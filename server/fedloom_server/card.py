"""The model card that travels with an exported model: where its weights come from."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import yaml

from fedloom_common.codecs.spec import AS_IS, AnyStage
from fedloom_common.runspec import Aggregation, FedAvg, RunSpec
from fedloom_server.stopping import RoundResult

_RULES = {
    "weighted_mean": "weighted mean of the sites' models by training data (FedAvg, arXiv:1602.05629)",
    "median": "median of the sites' models, value by value (arXiv:1803.01498)",
    "trimmed_mean": "trimmed mean of the sites' models, value by value (arXiv:1803.01498)",
    "krum": "Krum: the site's model closest to its neighbours (arXiv:1703.02757)",
    "multi_krum": "multi-Krum: the mean of the sites' models closest to their neighbours (arXiv:1703.02757)",
    "geometric_median": "geometric median of the sites' models (arXiv:1912.13445)",
}


@dataclass(frozen=True)
class _TaskFacts:
    name: str
    pipeline_tag: str
    """By which the Hugging Face hub finds models for a use."""


_TASKS = {
    "causal_lm": _TaskFacts("causal language model", "text-generation"),
    "instruction": _TaskFacts("causal language model, tuned on instructions,", "text-generation"),
    "masked_lm": _TaskFacts("masked language model", "fill-mask"),
    "classification": _TaskFacts("text classifier", "text-classification"),
    "seq2seq": _TaskFacts("sequence-to-sequence model", "text2text-generation"),
}


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """One site's part in a run."""

    site: str
    rounds: int
    """Rounds to which its update counted."""
    examples: int
    """Training examples over these rounds."""
    tokens: int
    """Training tokens over these rounds."""
    loss: float | None = None
    """Last loss on its held-out data; None if it never measured."""
    perplexity: float | None = None
    """Last perplexity on its held-out data; None if it never measured."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says of the run that made the model."""

    run_id: str
    spec: RunSpec
    rounds_done: int
    """Rounds whose updates are in this model."""
    reason: str
    """Why the run ended with this model; empty if it did not."""
    sites: Sequence[SiteFacts]
    history: Sequence[RoundResult]
    """Every finished round up to this model, first to last; 0 is the initial model."""
    base_digest: str = ""
    """Of the frozen weights, where an adapter was trained."""
    is_adapter: bool = False
    """Whether the directory holds an adapter for peft, and no whole model."""


def model_card(facts: CardFacts) -> str:
    """A Hugging Face model card: Markdown after YAML metadata."""
    parts = [_metadata(facts), _what(facts), _how_to_load(facts), _sites(facts), _metrics(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: CardFacts) -> str:
    entries = {
        "library_name": "transformers",
        "tags": ["federated-learning", "fedloom"],
        "model_name": facts.spec.name,
    }
    if task := _TASKS.get(facts.spec.task.kind):
        entries |= {"pipeline_tag": task.pipeline_tag}
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def _what(facts: CardFacts) -> str:
    spec, rounds = facts.spec, facts.rounds_done
    lines = [
        f"# {_escaped(spec.name)}",
        "",
        f"{_what_it_is(spec)} trained by federated learning with fedloom:",
        "each site trained on its own text, and only model weights left it.",
        "",
        f"- Run: {_escaped(spec.name)} ({_escaped(facts.run_id)})",
        f"- Rounds done: {rounds} of at most {spec.rounds}",
        f"- Why it stopped: {_escaped(facts.reason) or 'it did not, the run goes on after this model'}",
        f"- Initial weights: {_origin(spec)}",
        *_adapter(facts),
        f"- Data set: {_escaped(spec.data)}",
        f"- Aggregation: {_aggregation(spec.aggregation)}",
        f"- Transport: updates {_chain(spec.transport.up)}, models {_chain(spec.transport.down)}",
        f"- Seed: {spec.seed}",
    ]
    return "\n".join(lines)


def _what_it_is(spec: RunSpec) -> str:
    task = _TASKS.get(spec.task.kind)
    return f"A model of class {_escaped(spec.task.model_class)}" if task is None else f"A {task.name}"


def _aggregation(spec: Aggregation) -> str:
    clip, optimizer = spec.clip, spec.server_optimizer
    parts = [_RULES[spec.rule.name]]
    if clip is not None:
        parts.append(f"updates clipped to {clip.factor:g} median norms of {clip.rounds} rounds")
    if optimizer != FedAvg():
        parts.append(f"server optimizer {optimizer.name}")
    return "; ".join(parts)


def _chain(stages: Sequence[AnyStage]) -> str:
    return "as they are" if tuple(stages) == AS_IS else "by " + " + ".join(stage.name for stage in stages)


def _origin(spec: RunSpec) -> str:
    if spec.model.config is not None:
        return f"random, of a {_escaped(str(spec.model.config['model_type']))} config"
    assert spec.model.path is not None
    name = PurePath(spec.model.path).name  # its folder is nobody's business
    return f"the pretrained model {_escaped(name)}"


def _adapter(facts: CardFacts) -> Iterator[str]:
    adapter = facts.spec.model.adapter
    if adapter is not None:
        targets = adapter.target_modules
        layers = targets if isinstance(targets, str) else ", ".join(_escaped(name) for name in targets)
        size = f"rank {adapter.rank} and α {adapter.alpha:g}"
        yield f"- Trained: LoRA adapters of {size} on {layers} layers, merged by {adapter.merge}"
        yield f"- Frozen weights: {facts.base_digest}"


def _how_to_load(facts: CardFacts) -> str:
    name = facts.spec.task.model_class
    if facts.is_adapter:
        return f"""## How to load it

```python
from peft import PeftModel
from transformers import {name}, AutoTokenizer
base = {name}.from_pretrained("path/to/the/base", dtype="float32")
model = PeftModel.from_pretrained(base, "path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""
    return f"""## How to load it

```python
from transformers import {name}, AutoTokenizer
model = {name}.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""


def _sites(facts: CardFacts) -> str:
    rows = [
        (
            _escaped(site.site), f"{site.rounds}", f"{site.examples:,}", f"{site.tokens:,}",
            _number(site.loss), _number(site.perplexity),
        )
        for site in facts.sites
    ]  # fmt: skip
    head = ("Site", "Rounds", "Training examples", "Training tokens", "Held-out loss", "Held-out perplexity")
    return "## Sites\n\n" + _table(head, rows) if rows else ""


def _metrics(facts: CardFacts) -> str:
    rows = list(_first_and_last(facts.history))
    head = ("Metric", "First", "Last")
    title = "## Metrics over all sites\n\n"
    return title + _table(head, rows) if rows else ""


def _first_and_last(history: Sequence[RoundResult]) -> Iterator[tuple[str, str, str]]:
    for name in sorted({name for result in history for name in result.metrics}):
        reported = [result for result in history if name in result.metrics]
        first, last = (f"{_number(r.metrics[name])} ({_when(r)})" for r in (reported[0], reported[-1]))
        yield _escaped(name), first, last


def _when(result: RoundResult) -> str:
    return f"round {result.number}" if result.number else "initial model"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table too, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>&()#+!|~$])", r"\\\1", " ".join(text.split()))
