"""YAML in which no key passes unread."""

import pytest

from fedloom_common.errors import BadSpec
from fedloom_common.yamltext import read_yaml


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "has the key 'a' twice, in lines 1 and 3", id="at-the-top"),
        pytest.param("a:\n  b: {c: 1}\n  'b': 2\n", "has the key 'b' twice, in lines 2 and 3", id="quoted"),
        pytest.param("- {a: 1, b: 2, a: 3}\n", "has the key 'a' twice, in line 1", id="on-one-line"),
        pytest.param('{"a": {"b": 1},\n "a": {}}', "has the key 'a' twice, in lines 1 and 2", id="json"),
        pytest.param(
            "x: &x {a: 1}\ny: &y {b: 1}\nz:\n  <<: *x\n  <<: *y\n",
            "has the key '<<' twice, in lines 4 and 5",
            id="merged-twice",
        ),
        pytest.param(
            "x: &x {a: 1}\ny:\n  <<: *x\n  b: 1\n  b: 2\n",
            "has the key 'b' twice, in lines 4 and 5",
            id="beside-what-is-merged",
        ),
    ],
)
def test_a_repeated_key_is_refused_with_both_lines(text: str, told: str) -> None:
    with pytest.raises(BadSpec, match=f"^the file {told}: put what belongs to it under one of them$"):
        read_yaml(text, "the file")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        pytest.param("x: &x {a: 1}\ny: {<<: *x, a: 2}\n", {"x": {"a": 1}, "y": {"a": 2}}, id="over-merged"),
        pytest.param(
            "x: &x {a: 1}\ny: &y {<<: *x, a: 2}\nz: {<<: [*y, *x], a: 3}\n",
            {"x": {"a": 1}, "y": {"a": 2}, "z": {"a": 3}},
            id="over-merged-twice",
        ),
        pytest.param("a: {c: 1}\nb: {c: 1}\n", {"a": {"c": 1}, "b": {"c": 1}}, id="in-two-mappings"),
        pytest.param("1: a\n'1': b\n", {1: "a", "1": "b"}, id="a-number-and-a-text"),
        pytest.param("", None, id="nothing"),
    ],
)
def test_what_is_said_once_is_read(text: str, content: object) -> None:
    assert read_yaml(text, "the file") == content


@pytest.mark.parametrize(
    "text", ["a: [", "? [a]\n: 1\n? [a]\n: 2\n", "? {a: 1}\n: 1\n", "day: 2026-13-01", "!!python/tuple [a]"]
)
def test_what_is_not_yaml_says_so(text: str) -> None:
    with pytest.raises(BadSpec, match=r"^the file is not YAML: "):
        read_yaml(text, "the file")
