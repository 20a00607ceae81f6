import pytest

from fedloom_server.evaluation import SiteMetrics
from fedloom_server.records import Assignment, Work
from fedloom_server.results import Result, objection, update_weight


def test_tokens_beyond_what_a_database_counts_are_refused_however_many_examples_are_claimed(spec):
    """2^53 examples of 1,024 tokens each would be 2^63, one more than a row holds."""
    assignment = Assignment(
        id="a1.1.1.train.a", run_id="a1", round=1, attempt=1, work=Work.TRAIN, site="a",
        model_digest="blake3:00", model_bytes=10,
    )  # fmt: skip
    claim = Result(examples=1 << 53, tokens=1 << 63, metrics={}, phase_seconds={})
    unbounded = spec(
        local={"epochs": 1, "batch_examples": 1}, task={"kind": "causal_lm", "context_tokens": 1024}
    )
    wrong = objection(claim, assignment, unbounded, most_update_bytes=100, data_bytes=100)
    assert wrong is not None
    assert f"it claims {1 << 63} tokens" in wrong


def training_of(site="a", **counted):
    return Assignment(
        id=f"a1.1.1.train.{site}", run_id="a1", round=1, attempt=1, work=Work.TRAIN, site=site,
        model_digest="blake3:00", model_bytes=10, **counted,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("causal_lm", 8), ("masked_lm", 31), ("instruction", 31), ("seq2seq", 31)],
)
def test_an_update_counts_by_targets_where_examples_have_different_numbers_of_them(spec, kind, weight):
    run = spec(task={"kind": kind})
    assert update_weight(run.task, training_of(examples=8, tokens=31)) == weight


@pytest.mark.parametrize(("kind", "told"), [("causal_lm", None), ("instruction", "it claims 31 tokens")])
def test_the_largest_weight_bounds_what_an_update_counts_by(spec, kind, told):
    run = spec(task={"kind": kind}, aggregation={"max_examples": 20}, local={"steps": 1})
    digest = "blake3:" + "0" * 64
    claim = Result(examples=8, tokens=31, metrics={}, phase_seconds={}, update_digest=digest, update_bytes=10)
    wrong = objection(claim, training_of(), run, most_update_bytes=100, data_bytes=100)
    assert wrong is None if told is None else told in wrong


@pytest.mark.parametrize(
    ("claim", "wrong"),
    [
        (
            {"weights": {"accuracy": 6401}},
            "its metric accuracy is the mean of 6401 things, it has measured 20",
        ),
        ({"counts": {"hits": [15, 6]}}, "its hits are counts of 21 things, it has measured 20 targets"),
        ({"counts": {"hits": [0] * 4097}}, "its hits are counts of 4097 labels, wanted at most 4096"),
        ({"weights": {"accuracy": 20}, "counts": {"hits": [15, 5]}}, None),
    ],
)
def test_a_site_cannot_claim_to_have_measured_more_than_there_is(spec, claim, wrong):
    measured = Assignment(
        id="a1.1.1.evaluate.a", run_id="a1", round=1, attempt=1, work=Work.EVALUATE, site="a",
        model_digest="blake3:00", model_bytes=10,
    )  # fmt: skip
    result = Result(examples=10, tokens=20, metrics={}, phase_seconds={}, **claim)
    told = objection(result, measured, spec(), most_update_bytes=100, data_bytes=100)
    assert told is None if wrong is None else wrong in told


def test_an_update_that_would_count_by_no_targets_is_refused(spec):
    claim = Result(examples=8, tokens=0, metrics={}, phase_seconds={})
    run = spec(task={"kind": "masked_lm"})
    assert "no tokens" in objection(claim, training_of(), run, most_update_bytes=100, data_bytes=100)


@pytest.mark.parametrize("name", ["central_loss", "train_loss"])
@pytest.mark.parametrize("work", [Work.TRAIN, Work.EVALUATE])
def test_a_site_cannot_report_a_metric_that_the_coordinator_makes(spec, name, work):
    """It alone would set its value: a metric is the mean over those who report it."""
    assignment = training_of(measures=work is Work.TRAIN)
    assignment.work = work
    measured = {"examples": 10, "tokens": 20, "metrics": {"loss": 2.0, name: 0.01}}
    lied = Result(**measured, phase_seconds={})
    before = Result(
        examples=10, tokens=20, metrics={"loss": 2.0}, phase_seconds={}, before=SiteMetrics(**measured),
        update_digest="blake3:" + "0" * 64, update_bytes=10,
    )  # fmt: skip
    for told in [lied] if work is Work.EVALUATE else [lied, before]:
        wrong = objection(told, assignment, spec(), most_update_bytes=100, data_bytes=100)
        assert wrong is not None
        assert f"its metric is called {name}" in wrong
