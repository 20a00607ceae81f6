from fedloom_server.records import Assignment, Work
from fedloom_server.results import Result, objection


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
