import re
from dataclasses import replace

import pytest
import yaml

from fedloom_common.runspec import RunSpec
from fedloom_server.card import CardFacts, SiteFacts, model_card
from fedloom_server.stopping import RoundResult

SPEC = RunSpec.model_validate(
    {
        "name": "shakespeare", "model": {"config": {"model_type": "gpt2"}}, "data": "plays", "rounds": 5,
        "local": {"steps": 10}, "transport": {"up": ["topk", "int8"]},
        "seed": 17,
    }
)  # fmt: skip
FACTS = CardFacts(
    run_id="20260101-abc",
    spec=SPEC,
    rounds_done=2,
    reason="loss is 2.1 after round 2, at or below the target of 2.2",
    sites=[
        SiteFacts(site="north", rounds=2, examples=12800, tokens=1638400, loss=2.0, perplexity=7.389),
        SiteFacts(site="south", rounds=1, examples=640, tokens=81920),
    ],
    history=[
        RoundResult(number=0, metrics={"loss": 5.5, "perplexity": 244.7}),
        RoundResult(number=1, metrics={"train_loss": 4.0, "loss": 3.0, "perplexity": 20.1}),
        RoundResult(number=2, metrics={"train_loss": 2.5, "loss": 2.1, "perplexity": 8.2}),
    ],
)


def front_matter(card):
    _, metadata, body = card.split("---\n", 2)
    return yaml.safe_load(metadata), body


def cells(line):
    """A table's line as Markdown reads it: cells end at pipes that are not escaped."""
    return [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(card, title):
    lines = card.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    assert set(lines[1]) <= set("|-: ")
    return [cells(line) for line in (lines[0], *lines[2:])]


def test_the_metadata_is_what_the_hub_reads():
    metadata, _ = front_matter(model_card(FACTS))
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["federated-learning", "fedloom"]


@pytest.mark.parametrize(
    ("task", "pipeline", "loader", "what"),
    [
        ({"kind": "masked_lm"}, "fill-mask", "AutoModelForMaskedLM", "A masked language model"),
        (
            {"kind": "classification", "labels": ["a", "b"]}, "text-classification",
            "AutoModelForSequenceClassification", "A text classifier",
        ),
        ({"kind": "seq2seq"}, "text2text-generation", "AutoModelForSeq2SeqLM", "A sequence-to-sequence"),
        (
            {"kind": "plugin", "name": "x", "auto_class": "AutoModelForTokenClassification"}, None,
            "AutoModelForTokenClassification", "A model of class AutoModelForTokenClassification",
        ),
    ],
)  # fmt: skip
def test_the_card_says_what_a_model_is_for_and_with_what_to_load_it(task, pipeline, loader, what):
    spec = RunSpec.model_validate(FACTS.spec.model_dump() | {"task": task})
    card = model_card(replace(FACTS, spec=spec))
    metadata, _ = front_matter(card)
    assert metadata.get("pipeline_tag") == pipeline
    assert f"from transformers import {loader}, AutoTokenizer" in card
    assert re.search(rf"^{what}.* trained by federated learning", card, re.MULTILINE)


@pytest.mark.parametrize(
    "fact",
    [
        "20260101-abc",
        "Rounds done: 2 of at most 5",
        "loss is 2.1 after round 2",
        "FedAvg",
        "Seed: 17",
        "Transport: updates by topk + int8, models as they are",
        "gpt2",
    ],
)
def test_the_card_says_how_the_model_came_about(fact):
    assert fact in front_matter(model_card(FACTS))[1]


def test_each_site_has_a_row():
    assert table(model_card(FACTS), "Sites") == [
        ["Site", "Rounds", "Training examples", "Training tokens", "Held-out loss", "Held-out perplexity"],
        ["north", "2", "12,800", "1,638,400", "2.0000", "7.3890"],
        ["south", "1", "640", "81,920", "–", "–"],
    ]


def test_each_metric_shows_where_it_began_and_ended():
    assert table(model_card(FACTS), "Metrics over all sites") == [
        ["Metric", "First", "Last"],
        ["loss", "5.5000 (initial model)", "2.1000 (round 2)"],
        ["perplexity", "244.7000 (initial model)", "8.2000 (round 2)"],
        ["train_loss", "4.0000 (round 1)", "2.5000 (round 2)"],
    ]


def test_names_and_reasons_cannot_break_out_of_their_place():
    hostile = "a|b\n---\n<script>`*_[x](y)"
    facts = replace(FACTS, reason=hostile, sites=[replace(FACTS.sites[0], site=hostile)])
    card = model_card(facts)
    assert table(card, "Sites")[1][0] == "a|b --- <script>`*_[x](y)"
    assert not re.search(r"(?<!\\)<script", card)
    assert card.splitlines().count("---") == 2


def test_a_model_of_a_run_under_way_says_so():
    assert "the run goes on after this model" in model_card(replace(FACTS, reason=""))


def test_a_run_that_has_done_nothing_yet_has_a_card_without_tables():
    card = model_card(replace(FACTS, rounds_done=0, reason="", sites=[], history=[]))
    assert "| ---" not in card
    assert "Rounds done: 0 of at most 5" in card


def test_a_pretrained_model_is_named_without_the_coordinators_folders():
    pretrained = SPEC.model_dump() | {"model": {"path": "/srv/secret/tiny-llama"}}
    card = model_card(replace(FACTS, spec=RunSpec.model_validate(pretrained)))
    assert "tiny-llama" in card
    assert "secret" not in card


def test_the_loading_example_is_python_of_three_lines():
    code = re.search(r"```python\n(.*?)\n```", model_card(FACTS), re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")


def test_an_aggregation_that_is_no_plain_mean_is_told_whole():
    aggregation = {"rule": "median", "clip": {"factor": 2}, "server_optimizer": "diloco"}
    spec = RunSpec.model_validate(
        SPEC.model_dump() | {"aggregation": aggregation, "cohort": {"min_sites": 3}}
    )
    card = model_card(replace(FACTS, spec=spec))
    assert "median of the sites' models, value by value (arXiv:1803.01498)" in card
    assert "updates clipped to 2 median norms of 10 rounds; server optimizer diloco" in card
