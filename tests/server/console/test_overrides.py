import pytest
import yaml

from fedloom_common.errors import BadSpec
from fedloom_server.console.overrides import apply_overrides, read_spec_text

SPEC = "name: plays  # a comment\nlocal:\n  steps: 10\n  clip_norm: 1.0\nstop:\n"


def test_without_settings_the_text_stays_as_it_came():
    assert apply_overrides(SPEC, []) == SPEC
    assert apply_overrides("not: [yaml", []) == "not: [yaml"


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("local.steps=5", ["local", "steps"], 5),
        ("local.optimizer.lr=1e-3", ["local", "optimizer", "lr"], 0.001),
        ("local.clip_norm=null", ["local", "clip_norm"], None),
        ("name=other-plays", ["name"], "other-plays"),
        ("stop.target={value: 2.5}", ["stop", "target"], {"value": 2.5}),
        ("local.optimizer.betas=[0.9, 0.95]", ["local", "optimizer", "betas"], [0.9, 0.95]),
        ("transport.up=int8", ["transport", "up"], "int8"),
        ("transport.down=[bf16, zstd]", ["transport", "down"], ["bf16", "zstd"]),
        ("data=a=b", ["data"], "a=b"),
    ],
)
def test_a_setting_replaces_or_adds_one_value(setting, path, value):
    changed = yaml.safe_load(apply_overrides(SPEC, [setting]))
    expected = yaml.safe_load(SPEC)
    at = expected
    for part in path[:-1]:
        at[part] = at.get(part) or {}
        at = at[part]
    at[path[-1]] = value
    assert changed == expected


def test_a_part_that_is_left_empty_is_refused_unless_a_setting_gives_it():
    spec = SPEC + "model:\n  path: m\n  adapter:\n"
    with pytest.raises(BadSpec, match=r"model\.adapter: nothing is given"):
        apply_overrides(spec, ["local.steps=5"])
    assert yaml.safe_load(apply_overrides(spec, ["model.adapter.rank=4"]))["model"]["adapter"] == {"rank": 4}
    assert yaml.safe_load(apply_overrides(spec, ["model.adapter={}"]))["model"]["adapter"] == {}


def test_the_last_setting_of_a_value_wins():
    changed = apply_overrides(SPEC, ["local.steps=5", "local.steps=6"])
    assert yaml.safe_load(changed)["local"]["steps"] == 6


@pytest.mark.parametrize(
    ("text", "setting", "message"),
    [
        (SPEC, "local.steps", "wanted path=value"),
        (SPEC, "local..steps=5", "wanted path=value"),
        (SPEC, "name.first=x", "name is 'plays' in the spec, so it has no part 'first'"),
        (SPEC, "local.steps=[1", "is not YAML"),
        ("a: [", "local.steps=5", "the run spec is not YAML"),
        ("local: {}\nlocal: {}", "local.steps=5", "the run spec has the key 'local' twice"),
        (SPEC, "stop={a: 1, a: 2}", "--set stop={a: 1, a: 2}: the value has the key 'a' twice"),
        (SPEC, 'stop={"a": 1, "a": 2}', "the value has the key 'a' twice"),
        ("- a", "local.steps=5", "not list"),
    ],
)
def test_a_setting_that_cannot_be_made_is_refused(text, setting, message):
    with pytest.raises(BadSpec) as caught:
        apply_overrides(text, [setting])
    assert message in str(caught.value)


def test_a_spec_that_cannot_be_read_names_the_file(tmp_path):
    with pytest.raises(BadSpec, match=r"missing\.yaml cannot be read: No such file"):
        read_spec_text(str(tmp_path / "missing.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(BadSpec, match=r"latin\.yaml is not UTF-8"):
        read_spec_text(str(tmp_path / "latin.yaml"))
