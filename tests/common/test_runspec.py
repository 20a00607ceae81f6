import json
import re
from pathlib import Path

import pytest

from fedloom_common.codecs.spec import AS_IS, Bf16, Int8, TopK, Zstd
from fedloom_common.errors import BadSpec
from fedloom_common.runspec import RunSpec, parse_run_spec, read_run_spec, run_spec_schema

GOOD = """
name: shakespeare
model: {config: {model_type: gpt2, n_layer: 2}}
data: plays
rounds: 3
local: {steps: 10}
"""
MODEL = "model: {config: {model_type: gpt2, n_layer: 2}}"


def with_model(model):
    return GOOD.replace(MODEL, f"model: {model}")


def test_defaults_fill_a_short_spec():
    spec = parse_run_spec(GOOD)
    assert spec.local.optimizer.name == "adamw"
    assert spec.cohort.needed == 1
    assert spec.task.kind == "causal_lm"


def test_an_algorithm_is_told_by_its_name_alone():
    spec = parse_run_spec(GOOD.replace("steps: 10", "steps: 10, algorithm: fedprox"))
    assert (spec.local.algorithm.name, spec.local.algorithm.mu) == ("fedprox", 0.01)


def test_what_needs_no_parameters_is_told_by_its_name_alone():
    spec = parse_run_spec(
        GOOD.replace("steps: 10", "steps: 10, optimizer: sgd, schedule: constant")
        + "task: masked_lm\nmode: sync\naggregation: {server_optimizer: {name: diloco, schedule: cosine}}\n"
    )
    assert spec.aggregation.server_optimizer.schedule.kind == "cosine"
    assert (spec.task.kind, spec.task.masked_share) == ("masked_lm", 0.15)
    assert (spec.local.optimizer.name, spec.local.optimizer.lr) == ("sgd", 0.1)
    assert (spec.local.schedule.kind, spec.mode.kind) == ("constant", "sync")


def test_a_spec_survives_json():
    spec = parse_run_spec(GOOD)
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    assert parse_run_spec(json.dumps(spec.model_dump(mode="json"))) == spec


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_the_example_specs_are_right(path):
    assert parse_run_spec(path.read_text()).rounds > 1


MISTAKES = {
    "not-yaml": ("a: [", "not YAML"),
    "said-twice": (GOOD + "\nname: other\n", "the run spec has the key 'name' twice, in lines"),
    "not-a-mapping": ("[1]", "is a mapping"),
    "unknown-key": (GOOD + "round: 2", "round: no such key"),
    "unknown-nested-key": (GOOD.replace("steps: 10", "steps: 10, lr: 1"), "local.lr: no such key"),
    "missing-key": (GOOD.replace("rounds: 3", ""), "rounds: required"),
    "too-large": (
        GOOD.replace("rounds: 3", "rounds: 5000000000"),
        r"rounds: .*less than or equal to 1000000",
    ),
    "wrong-type": (GOOD.replace("rounds: 3", "rounds: many"), r"rounds: .*valid integer.*came: 'many'"),
    "too-small": (GOOD.replace("rounds: 3", "rounds: 0"), r"rounds: .*greater than or equal to 1.*came: 0"),
    "two-amounts": (GOOD.replace("steps: 10", "steps: 10, epochs: 1"), "local: give either steps or epochs"),
    "no-model": (GOOD.replace("config: {model_type: gpt2, n_layer: 2}", ""), "model: give either path"),
    "no-type": (GOOD.replace("model_type: gpt2, ", ""), "model: config needs a model_type"),
    "odd-optimizer": (
        GOOD.replace("steps: 10", "steps: 10, optimizer: {name: lion}"),
        "local.optimizer.name: .*lion",
    ),
    "odd-algorithm": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: fedfoo"),
        "local.algorithm.name: .*fedfoo",
    ),
    "scaffold-with-adamw": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: scaffold"),
        r"local: algorithm scaffold needs optimizer: \{name: sgd\} without momentum",
    ),
    "scaffold-with-momentum": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: scaffold, optimizer: {name: sgd, momentum: 0.9}"),
        r"local: algorithm scaffold needs optimizer: \{name: sgd\} without momentum",
    ),
    "scaffold-without-rounds": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: scaffold, optimizer: {name: sgd}")
        + "mode: {kind: async, buffer: 2}",
        "local.algorithm scaffold and mode.kind: async contradict each other",
    ),
    "scaffold-with-late-updates": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: scaffold, optimizer: {name: sgd}")
        + "cohort: {late: carry}",
        "local.algorithm scaffold and cohort.late: carry contradict each other",
    ),
    "no-pull": (
        GOOD.replace("steps: 10", "steps: 10, algorithm: {name: fedprox, mu: 0}"),
        "local.algorithm.mu: .*greater than 0",
    ),
    "indivisible": (
        GOOD.replace("steps: 10", "steps: 10, batch_examples: 10, accumulation_steps: 3"),
        "batch_examples is 10, which accumulation_steps .3. does not divide",
    ),
    "quorum": (GOOD + "cohort: {min_sites: 2, quorum: 3}", "quorum is 3 but min_sites is 2"),
    "target-of-no-central-site": (
        GOOD + "stop: {target: {metric: central_loss, value: 1}}",
        "central_loss is measured by evaluation.central, which names no site",
    ),
    "target-of-another-task": (
        GOOD + "stop: {target: {metric: accuracy, value: 1}}",
        r"stop.target.metric: causal_lm has loss, perplexity, bits_per_byte .came: 'accuracy'",
    ),
    "target-that-no-text-task-measures": (
        GOOD + "stop: {target: {metric: shortened_share, value: 1}}",
        "stop.target.metric: causal_lm has loss, perplexity, bits_per_byte",
    ),
    "target-of-targets-that-nobody-writes": (
        GOOD + "task: {kind: seq2seq, generate_examples: 0}\nstop: {target: {metric: rouge_l, value: 1}}",
        "stop.target.metric: seq2seq has loss, perplexity, token_accuracy, shortened_share",
    ),
    "misspelt-best": (
        GOOD + "evaluation: {best: {metric: perplexitty}}",
        "evaluation.best.metric: causal_lm has loss, perplexity, bits_per_byte",
    ),
    "wrong-direction": (
        GOOD + "stop: {patience: {metric: perplexity, evaluations: 2, higher_is_better: true}}",
        "stop.patience.higher_is_better: perplexity is better the lower it is; leave this out",
    ),
    "no-such-kind": (
        GOOD + "task: {kind: causal}",
        r"task.kind: wanted one of 'causal_lm', 'masked_lm'.* .came: 'causal'",
    ),
    "no-kind": (GOOD + "aggregation: {rule: {byzantine: 1}}", "aggregation.rule.name: required"),
    "no-mapping": (
        GOOD + "cohort: all",
        r"cohort: wanted a mapping, such as \{policy: all\} .came: 'all'",
    ),
    "a-number-for-a-part": (
        GOOD + "stop: {patience: 3}",
        r"stop.patience: wanted a mapping, such as \{evaluations: 3\} .came: 3",
    ),
    "a-number-for-a-task": (
        GOOD + "task: 3",
        r"task: wanted a mapping, such as \{kind: causal_lm\} .came: 3",
    ),
    "true-for-a-part": (
        GOOD + "evaluation: true",
        r"evaluation: wanted a mapping with keys such as when, .* .came: True",
    ),
    "misspelt-in-a-task": (
        GOOD + "task: {context_length: 256}",
        r"task.context_length: no such key; did you mean context_tokens\?$",
    ),
    "misspelt-beside-another": (
        GOOD.replace("steps: 10", "steps: 10, step: 4"),
        r"local.step: no such key; did you mean steps\?$",
    ),
    "misspelt-in-a-list": (
        GOOD + "transport: {up: [{name: topk, fractio: 1}]}",
        r"transport.up.0.fractio: no such key; did you mean fraction\?",
    ),
    "like-no-key": (
        with_model("{path: m, adapter: {r: 16}}"),
        r"model.adapter.r: no such key; known are kind, rank, alpha, .*",
    ),
    "a-word-for-a-list": (
        with_model("{path: m, adapter: {target_modules: q_proj}}"),
        r"adapter.target_modules: .*'auto' or 'all-linear', or wanted a list, such as \[q_proj\] .came: 'q_",
    ),
    "a-wrong-value-in-a-kind": (GOOD + "mode: {kind: async, buffer: 0}", "mode.buffer: .*came: 0"),
    "a-kind-that-needs-more": (GOOD + "mode: async", "mode.buffer: required, but not given"),
    "no-such-schedule": (
        GOOD.replace("steps: 10", "steps: 10, schedule: linear"),
        "local.schedule.kind: .*'cosine' or 'constant' .came: 'linear'",
    ),
    "unmeasured-target": (
        GOOD + "evaluation: {every_rounds: 0}\nstop: {target: {value: 1}}",
        "need evaluation.every_rounds",
    ),
    "unknown-codec": (GOOD + "transport: {up: int9}", r"transport.up.*int9"),
    "codecs-in-disorder": (
        GOOD + "transport: {down: [zstd, int8]}",
        r"transport.down: \[zstd, int8\] is no chain of codecs: wanted topk, then one of",
    ),
    "unknown-way": (GOOD + "transport: {upwards: int8}", "transport.upwards: no such key"),
    "bad-name": (GOOD.replace("name: shakespeare", "name: ../x"), "name: wanted a name of"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_by_path_and_wanted_value(case):
    text, message = MISTAKES[case]
    with pytest.raises(BadSpec, match=message):
        parse_run_spec(text)


ASYNC = GOOD + "mode: {kind: async, buffer: 4}\n"


def test_an_asynchronous_run_needs_little_more_than_the_size_of_its_buffer():
    mode = parse_run_spec(ASYNC).mode
    assert (mode.buffer, mode.concurrency, mode.server_lr) == (4, None, 1.0)
    assert (mode.staleness.exponent, mode.staleness.max) == (0.5, 20)
    assert parse_run_spec(GOOD).mode.kind == "sync"
    assert read_run_spec(parse_run_spec(ASYNC).model_dump_json()).mode == mode


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("cohort: {fraction: 0.5}", "cohort.fraction is 0.5, but mode.kind is async: mode.concurrency"),
        ("cohort: {quorum: 1}", "cohort.quorum is 1, but mode.kind is async: mode.buffer says"),
        ("cohort: {deadline_s: 60}", "cohort.deadline_s is 60.0, but mode.kind is async: nobody waits"),
        ("cohort: {attempts: 5}", "cohort.attempts is 5, but mode.kind is async: a site that fails"),
        ("aggregation: {deterministic: true}", "aggregation.deterministic is True, but mode.kind is async"),
        ("transport: {down: int8}", r"transport.down is .*int8.*, but mode.kind is async: it tells"),
    ],
)
def test_what_has_no_meaning_without_rounds_is_refused(more, complaint):
    with pytest.raises(BadSpec, match=complaint):
        parse_run_spec(ASYNC + more)


def test_all_sites_and_some_of_them_contradict_each_other():
    spec = ASYNC.replace("buffer: 4", "buffer: 4, concurrency: 2") + "cohort: {policy: all}"
    with pytest.raises(BadSpec, match=r"policy all asks every site, and mode\.concurrency is 2"):
        parse_run_spec(spec)


def test_models_and_updates_travel_as_they_are_unless_the_spec_says_otherwise():
    assert parse_run_spec(GOOD).transport.up == parse_run_spec(GOOD).transport.down == AS_IS
    spec = parse_run_spec(GOOD + "transport: {up: int8, down: [{name: topk, fraction: 0.1}, bf16, zstd]}")
    assert spec.transport.up == (Int8(),)
    assert spec.transport.down == (TopK(fraction=0.1), Bf16(), Zstd())
    assert read_run_spec(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "more",
    [
        "cohort: {stall_s: .inf}",
        "cohort: {deadline_s: .inf}",
        "evaluation: {deadline_s: .inf}",
        "stop: {target: {value: .nan}}",
        "mode: {kind: async, buffer: 2, server_lr: .inf}",
        "cohort: {require: {gpu_memory_gb: .inf}}",
    ],
)
def test_what_json_cannot_hold_is_refused(more):
    with pytest.raises(BadSpec, match="finite number"):
        parse_run_spec(GOOD + more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("eps: .nan", "eps is nan"),
        ("eps: -.inf", "eps is -inf"),
        ("rope: {factors: [1.5, .inf]}", r"rope\.factors\.1 is inf"),
    ],
)
def test_a_model_config_with_what_json_cannot_hold_is_refused_by_its_path(more, told):
    with pytest.raises(BadSpec, match=rf"model\.config: {told}, which JSON cannot hold: leave it out"):
        parse_run_spec(GOOD.replace("n_layer: 2", more))


@pytest.mark.parametrize("betas", ["[5, 2]", "[0.9, 1.0]", "[-0.1, 0.9]"])
def test_betas_that_do_not_decay_are_refused(betas):
    text = GOOD.replace("steps: 10", f"steps: 10, optimizer: {{betas: {betas}}}")
    with pytest.raises(BadSpec, match=r"optimizer\.betas\.\d: .*(less than 1|equal to 0)"):
        parse_run_spec(text)


def test_every_mistake_is_told_at_once():
    with pytest.raises(BadSpec) as caught:
        parse_run_spec(GOOD.replace("rounds: 3", "rounds: 0") + "sed: 1")
    assert "rounds:" in str(caught.value)
    assert "sed:" in str(caught.value)


def test_a_spec_of_another_release_is_told_with_what_to_do_in_the_first_line():
    of_tomorrow = json.loads(parse_run_spec(ASYNC).model_dump_json()) | {"teleport": True}
    with pytest.raises(BadSpec) as caught:
        read_run_spec(json.dumps(of_tomorrow))
    first, cause = str(caught.value).splitlines()
    assert "install matching releases of fedloom" in first
    assert cause.startswith("  teleport: no such key; known are name, model, ")


def test_an_optimizer_without_a_name_is_adamw():
    spec = parse_run_spec(GOOD.replace("steps: 10", "steps: 10, optimizer: {lr: 0.25}"))
    assert (spec.local.optimizer.name, spec.local.optimizer.lr) == ("adamw", 0.25)


def test_numbers_in_exponent_form_are_numbers_in_yaml_and_json():
    yaml_spec = parse_run_spec(GOOD.replace("n_layer: 2", "layer_norm_epsilon: 1e-05"))
    assert yaml_spec.model.config["layer_norm_epsilon"] == 1e-5
    json_text = json.dumps(yaml_spec.model_dump(mode="json"))
    assert "1e-05" in json_text
    assert parse_run_spec(json_text) == read_run_spec(json_text) == yaml_spec


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            with_model("\n  path: m\n  adapter:\n"),
            "model.adapter: nothing is given: write {} for its defaults, or",
        ),
        (GOOD + "aggregation: {clip: }", "aggregation.clip: nothing is given: write {} for its defaults, or"),
        (
            GOOD + "stop: {patience: }",
            "stop.patience: nothing is given: write a mapping with keys such as evalu",
        ),
    ],
)
def test_a_part_that_is_named_and_left_empty_is_refused(text, advice):
    with pytest.raises(BadSpec, match=re.escape(advice)):
        parse_run_spec(text)


@pytest.mark.parametrize("given", ["null", "~"])
def test_a_written_null_turns_a_part_off(given):
    spec = parse_run_spec(with_model(f"{{path: m, adapter: {given}}}"))
    assert spec.model.adapter is None
    assert read_run_spec(spec.model_dump_json()) == parse_run_spec(spec.model_dump_json()) == spec


def test_an_adapter_may_be_all_defaults():
    assert parse_run_spec(with_model("{path: m, adapter: {}}")).model.adapter.rank == 16


def test_the_schema_describes_every_field():
    schema = json.loads(run_spec_schema())
    parts = [schema, *schema["$defs"].values()]
    fields = [(part["title"], name, field) for part in parts for name, field in part["properties"].items()]
    undescribed = [
        (title, name) for title, name, field in fields if "description" not in field and "$ref" not in field
    ]
    assert [pair for pair in undescribed if pair[1] not in ("name", "kind")] == []


def test_the_schema_allows_a_bare_name_wherever_the_parser_takes_one():
    spec = parse_run_spec(
        GOOD.replace("steps: 10", "steps: 10, algorithm: fedprox")
        + "aggregation: {rule: median, server_optimizer: fedadam}\ncohort: {min_sites: 3}\n"
    )
    assert spec.local.algorithm.name == "fedprox"
    whole = json.loads(run_spec_schema())
    parts = whole["$defs"]
    for part, field, name in (
        ("Local", "algorithm", "fedprox"),
        ("Aggregation", "rule", "median"),
        ("Aggregation", "server_optimizer", "fedadam"),
        ("Local", "optimizer", "sgd"),
        ("Local", "schedule", "constant"),
        (None, "task", "masked_lm"),
        (None, "mode", "sync"),
    ):
        fields = parts[part]["properties"] if part else whole["properties"]
        names = [choice.get("enum", []) for choice in fields[field]["anyOf"]]
        assert any(name in found for found in names), (part, field)


@pytest.mark.parametrize("cohort", ["over_select: 0.25", "policy: all, over_select: 0.25"])
def test_extra_sites_are_refused_where_all_are_asked_anyway(cohort):
    with pytest.raises(BadSpec, match=r"over_select is 0.25, but .* is asked already; .*a fraction below 1"):
        parse_run_spec(f"{GOOD}cohort: {{{cohort}}}")
    assert parse_run_spec(GOOD + "cohort: {over_select: 0.25, fraction: 0.8}").cohort.over_select == 0.25


def test_a_run_that_asks_for_extra_sites_in_vain_is_still_read():
    stored = json.loads(parse_run_spec(GOOD).model_dump_json())
    stored["cohort"]["over_select"] = 0.25
    assert read_run_spec(json.dumps(stored)).cohort.over_select == 0.25


ROBUST = {
    "median": ("median", 3),
    "trimmed": ("{name: trimmed_mean, byzantine: 2}", 5),
    "trimmed-by-share": ("{name: trimmed_mean, trim: 0.15}", 7),
    "krum": ("{name: krum, byzantine: 2}", 7),
    "multi-krum": ("{name: multi_krum, byzantine: 1}", 5),
    "multi-krum-of-four": ("{name: multi_krum, byzantine: 1, selected: 4}", 7),
    "geometric": ("geometric_median", 3),
}


def with_rule(rule, cohort, more=""):
    return f"{GOOD}aggregation: {{rule: {rule}}}\ncohort: {cohort}\n{more}"


@pytest.mark.parametrize(("rule", "needed"), ROBUST.values(), ids=ROBUST)
def test_a_robust_rule_needs_a_round_with_enough_updates(rule, needed):
    assert parse_run_spec(with_rule(rule, f"{{min_sites: {needed}}}")).aggregation.rule.is_robust
    for cohort in (f"{{min_sites: {needed - 1}}}", f"{{min_sites: {needed}, quorum: {needed - 1}}}"):
        with pytest.raises(
            BadSpec, match=f"needs {needed} updates as it is set, .* counts with {needed - 1}"
        ):
            parse_run_spec(with_rule(rule, cohort))


def test_a_robust_rule_is_refused_where_a_site_may_count_more_than_once():
    with pytest.raises(BadSpec, match=r"rule median and mode.kind: async contradict each other: a fast site"):
        parse_run_spec(with_rule("median", "{min_sites: 5}", "mode: {kind: async, buffer: 5}"))
    with pytest.raises(BadSpec, match=r"rule median and cohort.late: carry contradict"):
        parse_run_spec(with_rule("median", "{min_sites: 5, late: carry}"))


def test_a_robust_rule_is_refused_where_control_variates_are_means():
    text = with_rule("median", "{min_sites: 5}").replace(
        "steps: 10", "steps: 10, algorithm: scaffold, optimizer: {name: sgd}"
    )
    with pytest.raises(BadSpec, match=r"rule median and local.algorithm scaffold contradict"):
        parse_run_spec(text)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("krum", "rule.byzantine: required"),
        ("trimmed_mean", "give either byzantine .* or trim"),
        ("{name: trimmed_mean, byzantine: 1, trim: 0.1}", "give either byzantine .* or trim"),
        ("{name: trimmed_mean, trim: 0.5}", "less than 0.5"),
        ("mode", "'median'"),
    ],
)
def test_a_rule_that_is_not_told_enough_is_a_mistake(rule, complaint):
    with pytest.raises(BadSpec, match=complaint):
        parse_run_spec(with_rule(rule, "{min_sites: 50}"))


def test_a_share_of_the_updates_is_cut_exactly():
    rule = parse_run_spec(with_rule("{name: trimmed_mean, trim: 0.29}", "{min_sites: 100}")).aggregation.rule
    assert rule.cut(100) == 29  # 0.29 * 100 is 28.999999999999996 in floats


PLUGIN = "task: {kind: plugin, name: mine, auto_class: AutoModel}\n"
LABELS = "task: {kind: classification, labels: [a, b]}\n"


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("", ("loss", False)),
        (f"{PLUGIN}stop: {{target: {{metric: f1, value: 1, higher_is_better: true}}}}", ("f1", True)),
        (f"{PLUGIN}stop: {{target: {{metric: macro_f1, value: 1}}}}", ("macro_f1", True)),
        ("stop: {patience: {metric: bits_per_byte, evaluations: 2}}", ("bits_per_byte", False)),
        (f"{LABELS}stop: {{patience: {{metric: accuracy, evaluations: 2}}}}", ("accuracy", True)),
        (f"{LABELS}evaluation: {{best: {{metric: macro_f1}}}}\nstop: {{wall_s: 9}}", ("macro_f1", True)),
    ],
)
def test_models_are_judged_by_what_is_asked_for_or_by_what_stops_the_run(text, goal):
    found = parse_run_spec(GOOD + text).goal
    assert (found.metric, found.higher_is_better) == goal
