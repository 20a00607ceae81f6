"""What a site permits."""

import json
from typing import Any

import pytest

from fedloom_client.config import Policy
from fedloom_client.policy import refusal_of_model, refusal_of_run
from fedloom_common.runspec import RunSpec, parse_run_spec


def spec(**local: Any) -> RunSpec:
    facts = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}},
        "data": "plays",
        "rounds": 1,
        "local": local or {"steps": 10},
    }
    return parse_run_spec(json.dumps(facts))


@pytest.mark.parametrize(
    ("policy", "local", "reason"),
    [
        pytest.param({"tasks": ("seq2seq",)}, {"steps": 1}, "permits seq2seq, the run's task", id="task"),
        pytest.param({"max_model_bytes": 99}, {"steps": 1}, "is 99, the model has 100 bytes", id="size"),
        pytest.param({"max_steps_per_round": 9}, {"steps": 10}, "is 9, the run wants 10 steps", id="steps"),
        pytest.param({"max_epochs_per_round": 0.5}, {"epochs": 2}, "is 0.5, the run wants 2", id="epochs"),
        pytest.param({"max_steps_per_round": 9}, {"epochs": 1}, "give local.steps", id="step-limit"),
        pytest.param({"max_epochs_per_round": 1}, {"steps": 1}, "give local.epochs", id="epoch-limit"),
    ],
)
def test_what_is_beyond_the_policy_is_refused_with_rule_and_value(
    policy: dict[str, Any], local: dict[str, Any], reason: str
) -> None:
    answer = refusal_of_run(spec(**local), policy=Policy(**policy), data_sets=["plays"], model_bytes=100)
    assert reason in str(answer)


@pytest.mark.parametrize(
    ("policy", "local"),
    [
        pytest.param({}, {"steps": 10**6}, id="no-limits"),
        pytest.param({"max_model_bytes": 100, "max_steps_per_round": 10}, {"steps": 10}, id="at-the-limits"),
        pytest.param({"max_epochs_per_round": 1, "max_steps_per_round": 10}, {"epochs": 1}, id="both-limits"),
    ],
)
def test_what_is_within_the_policy_is_not_refused(policy: dict[str, Any], local: dict[str, Any]) -> None:
    assert (
        refusal_of_run(spec(**local), policy=Policy(**policy), data_sets=["plays"], model_bytes=100) is None
    )


def test_a_data_set_that_the_site_does_not_have_is_refused() -> None:
    answer = refusal_of_run(spec(), policy=Policy(), data_sets=["letters", "essays"], model_bytes=1)
    assert answer == "data has essays, letters, the run wants plays"


def test_every_objection_is_named_at_once() -> None:
    policy = Policy(max_model_bytes=1, max_steps_per_round=1)
    answer = refusal_of_run(spec(steps=2), policy=policy, data_sets=[], model_bytes=2)
    assert str(answer).count(";") == 2


def test_only_listed_model_families_are_permitted() -> None:
    policy = Policy(model_types=("llama", "gpt2"))
    assert refusal_of_model("gpt2", policy=policy) is None
    assert (
        refusal_of_model("mamba", policy=policy)
        == "policy.model_types permits gpt2, llama, the model is a mamba"
    )
    assert refusal_of_model("mamba", policy=Policy()) is None
