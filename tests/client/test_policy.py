"""What a site permits."""

import json
from dataclasses import replace
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom_client.cli import app
from fedloom_client.config import Policy, Privacy, SiteConfig
from fedloom_client.consent import Consent, foretell, read_spec
from fedloom_client.messages import Assignment, Blob
from fedloom_client.policy import (
    Circumstances,
    is_within,
    refusal_of_model,
    refusal_of_run,
    refusal_of_training,
)
from fedloom_client.statedir import StateDir
from fedloom_common.errors import BadSpec
from fedloom_common.runspec import Evaluation, Lora, RunSpec, parse_run_spec


def spec(**local: Any) -> RunSpec:
    facts = {
        "name": "tiny",
        "model": {"config": {"model_type": "gpt2"}},
        "data": "plays",
        "rounds": 1,
        "local": local or {"steps": 10},
    }
    return parse_run_spec(json.dumps(facts))


NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
WEIGHTS, CONFIG, OTHER = (f"blake3:{digit * 64}" for digit in "123")


def here(**changes: Any) -> Circumstances:
    facts = {"data_sets": ["plays"], "model_bytes": 100, "now": NOON}
    facts |= {"config_digest": CONFIG, "weights_digests": [WEIGHTS]}
    return Circumstances(**facts | changes)


@pytest.mark.parametrize(
    ("policy", "local", "reason"),
    [
        pytest.param({"tasks": ()}, {"steps": 1}, "permits nothing, the run's task is causal_lm", id="task"),
        pytest.param({"max_model_bytes": 99}, {"steps": 1}, "is 99, the model has 100 bytes", id="size"),
        pytest.param({"max_steps_per_round": 9}, {"steps": 10}, "is 9, the run wants 10 steps", id="steps"),
        pytest.param({"max_epochs_per_round": 0.5}, {"epochs": 2}, "is 0.5, the run wants 2", id="epochs"),
        pytest.param({"max_steps_per_round": 9}, {"epochs": 1}, "give local.steps", id="step-limit"),
        pytest.param({"max_epochs_per_round": 1}, {"steps": 1}, "give local.epochs", id="epoch-limit"),
        pytest.param({"data_sets": ("notes",)}, {"steps": 1}, "data_sets permits notes, the run", id="data"),
        pytest.param(
            {"models": (OTHER,)},
            {"steps": 1},
            "policy.models permits blake3:333333333333…; "
            f"this run's config.json is {CONFIG}, its weights {WEIGHTS}",
            id="digest",
        ),
        pytest.param({"codecs": ("int8",)}, {"steps": 1}, "would leave as fp32", id="codec"),
        pytest.param(
            {"privacy": Privacy(max_clip_norm=1, min_noise_multiplier=0.5)},
            {"steps": 1},
            "policy.privacy demands clipping to a norm of at most 1 and noise of at least 0.5 times the "
            "clipping norm, the run gives no privacy",
            id="privacy",
        ),
    ],
)
def test_what_is_beyond_the_policy_is_refused_with_rule_and_value(
    policy: dict[str, Any], local: dict[str, Any], reason: str
) -> None:
    answer = refusal_of_run(spec(**local), Policy(**policy), here())
    assert reason in str(answer)


WORDTAGS = {"kind": "plugin", "name": "wordtags", "auto_class": "AutoModelForTokenClassification"}


@pytest.mark.parametrize(
    ("policy", "task", "reason"),
    [
        pytest.param({}, {"kind": "masked_lm"}, None, id="all-of-fedlooms-own"),
        pytest.param(
            {"tasks": ("causal_lm",)}, {"kind": "masked_lm"}, "the run's task is masked_lm", id="own"
        ),
        pytest.param(
            {}, WORDTAGS, "permits nothing, the run's task is the plug-in wordtags", id="no-plug-in"
        ),
        pytest.param({"task_plugins": ("other",)}, WORDTAGS, "task_plugins permits other", id="another"),
        pytest.param({"tasks": (), "task_plugins": ("wordtags",)}, WORDTAGS, None, id="the-plug-in"),
    ],
)
def test_a_site_runs_fedlooms_tasks_and_those_plug_ins_that_it_names(
    policy: dict[str, Any], task: dict[str, Any], reason: str | None
) -> None:
    run = RunSpec.model_validate(spec().model_dump() | {"task": task})
    refusal = refusal_of_run(run, Policy(**policy), here())
    assert refusal is None if reason is None else reason in str(refusal)


@pytest.mark.parametrize(
    ("policy", "local"),
    [
        pytest.param({}, {"steps": 10**6}, id="no-limits"),
        pytest.param({"max_model_bytes": 100, "max_steps_per_round": 10}, {"steps": 10}, id="at-the-limits"),
        pytest.param({"max_epochs_per_round": 1, "max_steps_per_round": 10}, {"epochs": 1}, id="both-limits"),
        pytest.param({"models": (OTHER, CONFIG), "codecs": ("fp32",)}, {"steps": 1}, id="named"),
        pytest.param({"data_sets": ("plays", "notes")}, {"steps": 1}, id="data"),
    ],
)
def test_what_is_within_the_policy_is_not_refused(policy: dict[str, Any], local: dict[str, Any]) -> None:
    assert refusal_of_run(spec(**local), Policy(**policy), here()) is None


def test_a_data_set_that_the_site_does_not_have_is_refused() -> None:
    answer = refusal_of_run(spec(), Policy(), here(data_sets=["letters", "essays"]))
    assert answer == "data has essays, letters, the run wants plays"


def test_every_objection_is_named_at_once() -> None:
    policy = Policy(max_model_bytes=1, max_steps_per_round=1)
    answer = refusal_of_run(spec(steps=2), policy, here(data_sets=[], model_bytes=2))
    assert str(answer).count(";") == 2


def test_only_listed_model_families_are_permitted() -> None:
    policy = Policy(model_types=("llama", "gpt2"))
    assert refusal_of_model("gpt2", policy=policy) is None
    assert (
        refusal_of_model("mamba", policy=policy)
        == "policy.model_types permits gpt2, llama, the model is a mamba"
    )
    assert refusal_of_model("mamba", policy=Policy()) is None


def test_a_run_whose_model_was_permitted_when_it_was_joined_stays_permitted() -> None:
    policy = Policy(models=(WEIGHTS,))
    later = {"weights_digests": [OTHER]}
    assert "policy.models permits" in str(refusal_of_run(spec(), policy, here(**later)))
    assert refusal_of_run(spec(), policy, here(**later, joined_permitted=True)) is None


def test_the_run_s_digests_are_among_the_characters_that_the_operator_is_shown() -> None:
    permitted = tuple(f"blake3:{number:064x}" for number in range(100))
    answer = str(refusal_of_run(spec(), Policy(models=permitted), here()))
    assert "blake3:000000000000…, 97 more; this run" in answer
    assert CONFIG in answer[:300]
    assert WEIGHTS in answer[:300]


def test_no_digest_is_judged_before_one_is_known() -> None:
    unknown = here(config_digest="", weights_digests=[])
    assert refusal_of_run(spec(), Policy(models=(OTHER,)), unknown) is None


def test_trainings_beyond_the_day_or_the_hours_are_refused() -> None:
    policy = Policy(max_rounds_per_day=2, hours_utc="20:00-06:00")
    assert "is 2, 2 have begun" in str(refusal_of_training(policy, here(trainings_today=2)))
    assert "is 20:00-06:00, it is 12:00 UTC" in str(refusal_of_training(policy, here(trainings_today=1)))
    night = NOON.replace(hour=23)
    assert refusal_of_training(policy, here(trainings_today=1, now=night)) is None
    assert refusal_of_training(Policy(), here(trainings_today=10**6)) is None


@pytest.mark.parametrize(
    ("hours", "moment", "within"),
    [
        ("09:00-17:00", time(9, 0), True),
        ("09:00-17:00", time(16, 59), True),
        ("09:00-17:00", time(17, 0), False),
        ("20:00-06:00", time(5, 59), True),
        ("20:00-06:00", time(6, 0), False),
        ("20:00-06:00", time(20, 0), True),
    ],
)
def test_hours_may_reach_over_midnight(hours: str, moment: time, within: bool) -> None:
    assert is_within(hours, moment) is within


def assignment(
    name: str = "r1.1.1.train.a", *, weights: str = WEIGHTS, config: str = CONFIG, work: Any = "train"
) -> Assignment:
    return Assignment(
        id=name, work=work, run_id=name.partition(".")[0], round=1, attempt=1,
        model=Blob(name="model.safetensors", digest=weights, size_bytes=100),
        assets=(Blob(name="config.json", digest=config, size_bytes=10),),
        spec_json=spec().model_dump_json(), deadline_s=0,
    )  # fmt: skip


def site(tmp_path: Path, **rules: Any) -> SiteConfig:
    content = {"coordinator": "localhost:1", "insecure": "a", "state_dir": str(tmp_path / "state")}
    return SiteConfig.model_validate(content | {"data": {"plays": {"files": ["*.txt"]}}} | rules)


def consent(config: SiteConfig) -> Consent:
    return Consent(config, StateDir(config.state_dir))


def test_trainings_of_a_day_are_counted_once_each_and_over_restarts(tmp_path: Path) -> None:
    config = site(tmp_path, policy={"max_rounds_per_day": 2})
    first, second, third = (assignment(f"r1.{number}.1.train.a") for number in (1, 2, 3))
    assert consent(config).refusal(first, spec()) is None
    assert consent(config).refusal(first, spec()) is None  # the daemon was killed, and does it again
    assert consent(config).refusal(assignment("r1.1.1.evaluate.a", work="evaluate"), spec()) is None
    assert consent(config).refusal(second, spec()) is None
    assert "policy.max_rounds_per_day is 2, 2 have begun" in str(consent(config).refusal(third, spec()))
    assert consent(config).refusal(second, spec()) is None


def test_a_site_may_refuse_to_train_alone_and_else_it_counts_as_a_training(tmp_path: Path) -> None:
    asked = assignment("r1.3.1.alone.a", work="alone")
    refusing = site(tmp_path / "refusing", policy={"alone": False})
    assert str(consent(refusing).refusal(asked, spec())).startswith("policy.alone is false")
    assert consent(refusing).refusal(assignment(), spec()) is None
    config = site(tmp_path, policy={"max_rounds_per_day": 1})
    assert consent(config).refusal(asked, spec()) is None
    assert "1 have begun" in str(consent(config).refusal(assignment(), spec()))


def test_a_site_that_only_measures_never_trains(tmp_path: Path) -> None:
    config = site(tmp_path, trains=False)
    assert "trains is false" in str(consent(config).refusal(assignment(), spec()))
    evaluation = assignment("r1.1.1.evaluate.a", work="evaluate")
    assert consent(config).refusal(evaluation, spec()) is None


def test_the_next_day_begins_at_midnight_utc_and_a_clock_set_back_does_not_begin_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, zone: Any = None) -> datetime:
            return datetime(2026, 3, cls.day, 23, 59, tzinfo=UTC)

    monkeypatch.setattr("fedloom_client.consent.datetime", Clock)
    config = site(tmp_path, policy={"max_rounds_per_day": 1})
    for day, number, refused in [(1, 1, False), (1, 2, True), (2, 2, False), (1, 3, True), (2, 3, True)]:
        Clock.day = day
        answer = consent(config).refusal(assignment(f"r1.{number}.1.train.a"), spec())
        assert (answer is not None) is refused, (day, number)


def test_a_damaged_record_of_trainings_permits_nothing(tmp_path: Path) -> None:
    config = site(tmp_path, policy={"max_rounds_per_day": 2})
    assert consent(config).refusal(assignment(), spec()) is None
    (config.state_dir / "trainings.json").write_text('{"days": 7}')
    assert "is damaged" in str(consent(config).refusal(assignment(), spec()))


def test_a_record_of_trainings_with_nothing_but_names_of_joined_runs_still_counts(tmp_path: Path) -> None:
    config = site(tmp_path, policy={"max_rounds_per_day": 1})
    assert consent(config).refusal(assignment("r1.1.1.train.a"), spec()) is None
    record = config.state_dir / "trainings.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"joined": ["r1"]}))
    assert "max_rounds_per_day" in str(consent(config).refusal(assignment("r1.2.1.train.a"), spec()))


def test_a_run_that_was_joined_with_a_permitted_model_cannot_go_on_with_one_of_another_config(
    tmp_path: Path,
) -> None:
    config = site(tmp_path, policy={"models": [WEIGHTS]})
    assert consent(config).refusal(assignment("r1.1.1.train.a"), spec()) is None
    assert consent(config).refusal(assignment("r1.2.1.train.a", weights=OTHER), spec()) is None
    swapped = assignment("r1.3.1.train.a", weights=OTHER, config=OTHER)
    assert "policy.models permits" in str(consent(config).refusal(swapped, spec()))


def test_a_model_named_by_its_first_weights_is_permitted_all_through_the_run(tmp_path: Path) -> None:
    config = site(tmp_path, policy={"models": [WEIGHTS]})
    late = assignment("r2.5.1.train.a", weights=OTHER)
    assert "policy.models permits" in str(consent(config).refusal(late, spec()))
    assert consent(config).refusal(assignment("r1.1.1.train.a"), spec()) is None
    assert consent(config).refusal(assignment("r1.2.1.train.a", weights=OTHER), spec()) is None


BASE, TOKENIZER = (f"blake3:{digit * 64}" for digit in "45")


@pytest.mark.parametrize(
    ("digest", "is_permitted"), [(CONFIG, True), (WEIGHTS, True), (BASE, True), (TOKENIZER, False)]
)
def test_a_model_is_told_by_its_config_its_weights_or_its_base_and_not_by_its_tokenizer(
    tmp_path: Path, digest: str, is_permitted: bool
) -> None:
    asked = assignment()
    base = Blob(name="base.safetensors", digest=BASE, size_bytes=100)
    tokenizer = Blob(name="tokenizer.json", digest=TOKENIZER, size_bytes=10)
    asked = replace(asked, frozen=(base,), assets=(tokenizer, *asked.assets))
    answer = consent(site(tmp_path, policy={"models": [digest]})).refusal(asked, with_adapter(spec()))
    told = f"this run's config.json is {CONFIG}, its weights {BASE}, {WEIGHTS}"
    assert answer is None if is_permitted else told in str(answer)


def with_adapter(whole: RunSpec) -> RunSpec:
    return whole.model_copy(update={"model": whole.model.model_copy(update={"adapter": Lora()})})


@pytest.mark.parametrize(
    ("frozen", "is_adapter"),
    [
        pytest.param([("base.safetensors", BASE)], False, id="a-base-without-an-adapter"),
        pytest.param(
            [("base.safetensors", OTHER), ("adapter_a.safetensors", BASE)], True, id="another-frozen-file"
        ),
        pytest.param(
            [("base.safetensors", BASE), ("base.safetensors", OTHER)], True, id="another-base-takes-its-place"
        ),
    ],
)
def test_a_permitted_base_that_is_not_trained_upon_permits_nothing(
    tmp_path: Path, frozen: list[tuple[str, str]], is_adapter: bool
) -> None:
    files = tuple(Blob(name=name, digest=digest, size_bytes=100) for name, digest in frozen)
    run = with_adapter(spec()) if is_adapter else spec()
    judge = consent(site(tmp_path, policy={"models": [BASE]}))
    assert "policy.models permits" in str(judge.refusal(replace(assignment(), frozen=files), run))


def test_a_policy_file_is_read_as_it_stands_and_permits_nothing_while_it_is_wrong(tmp_path: Path) -> None:
    rules = tmp_path / "policy.yaml"
    config = site(tmp_path, policy_file=str(rules))
    judge = consent(config)
    assert "cannot be read, so everything is refused" in str(judge.refusal(assignment(), spec()))
    assert "cannot be read" in str(judge.refusal_of_family("gpt2"))
    rules.write_text("max_steps_per_round: 5\nmodel_types: [llama]\n")
    assert "max_steps_per_round is 5" in str(judge.refusal(assignment(), spec()))
    assert "permits llama" in str(judge.refusal_of_family("gpt2"))
    rules.write_text("max_steps_per_round: 10\n")
    assert judge.refusal(assignment(), spec()) is None
    for wrong in ("max_step: 5", "just words", "{", "max_steps_per_round: many", "codecs: []\ncodecs: null"):
        rules.write_text(wrong)
        assert "everything is refused" in str(judge.refusal(assignment(), spec()))


def test_a_task_that_nobody_knows_is_a_mistake_in_the_policy() -> None:
    with pytest.raises(ValueError, match=r"tasks\.0\n  Input should be 'causal_lm'"):
        Policy(tasks=("causal",))


def test_a_policy_in_two_places_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy and policy_file are both given"):
        site(tmp_path, policy={}, policy_file="p.yaml")


def test_what_would_be_refused_is_told_beforehand(tmp_path: Path) -> None:
    run = spec(steps=10)
    rules = {"max_steps_per_round": 5, "model_types": ["llama"], "max_rounds_per_day": 0}
    assert foretell(site(tmp_path, policy=rules), run) == [
        "policy.max_steps_per_round is 5, the run wants 10 steps",
        "policy.model_types permits llama, the model is a gpt2",
        "policy.max_rounds_per_day is 0, 0 have begun today (UTC)",
    ]
    assert foretell(site(tmp_path), run) == []
    assert foretell(site(tmp_path, trains=False), run) == [
        "trains is false in site.yaml: this site only measures models"
    ]
    # a site does not know here by which name it is called
    measured = run.model_copy(update={"evaluation": Evaluation(central=("lab",))})
    assert foretell(site(tmp_path, trains=False), measured) == []


@pytest.mark.parametrize(
    ("model", "later"),
    [
        ({"config": {"model_type": "gpt2"}}, "the model's size and digests are judged later"),
        ({"path": "/srv/models/x"}, "the model's family, size and digests are judged later"),
    ],
)
def test_what_a_spec_does_not_tell_of_the_model_is_said_to_be_judged_later(
    tmp_path: Path, model: dict[str, Any], later: str
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(spec().model_dump(mode="json") | {"model": model}))
    config = {"coordinator": "localhost:1", "insecure": "a", "state_dir": "state"}
    config |= {"data": {"plays": {"files": ["*.txt"]}}, "policy": {"model_types": ["llama", "gpt2"]}}
    (tmp_path / "site.yaml").write_text(json.dumps(config))
    flags = ["policy", "--config", str(tmp_path / "site.yaml"), "--spec", str(tmp_path / "run.yaml")]
    done = CliRunner().invoke(app, flags)
    assert (done.exit_code, done.output) == (0, f"permitted, as far as the run spec tells; {later}\n")


def test_a_spec_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"none\.yaml cannot be read"):
        read_spec(tmp_path / "none.yaml")
