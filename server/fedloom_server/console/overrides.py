"""The text of a run spec as an operator gives it: a file or standard input, with values set over it."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fedloom_common.errors import BadSpec
from fedloom_common.runspec import require_nothing_left_empty
from fedloom_common.yamltext import read_json, read_yaml


def read_spec_text(source: str) -> str:
    """The text of a file, or of standard input for ``-``.

    Raises:
        BadSpec: the file cannot be read, or is not UTF-8 text.
    """
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode()
    except OSError as error:
        raise BadSpec(
            f"the run spec {source} cannot be read: {error.strerror}; give a file, or - for standard input"
        ) from error
    except UnicodeDecodeError as error:
        raise BadSpec(f"the run spec {source} is not UTF-8 text: {error}") from error


def apply_overrides(text: str, overrides: Iterable[str]) -> str:
    """The spec's text with ``path=value`` settings in place; as it came if there are none.

    A value is read as JSON and, if it is none, as YAML: ``1e-3`` is a number in the first only.

    Raises:
        BadSpec: a setting without "=", with a path through something that has no parts, or a text that is
            no YAML, says a thing twice or leaves a part empty.
    """
    overrides = tuple(overrides)
    if not overrides:
        return text
    data = read_yaml(text, "the run spec")
    if not isinstance(data, dict):
        raise BadSpec(f"a run spec is a mapping with keys such as name and model, not {type(data).__name__}")
    # Written again below, with null for what the text leaves empty.
    require_nothing_left_empty(text, besides=(override.partition("=")[0] for override in overrides))
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not all(path.split(".")):
            raise BadSpec(f"--set {override}: wanted path=value, such as local.steps=5")
        _put(data, path.split("."), _value(override, value), override)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _put(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    at = data
    for number, part in enumerate(path[:-1], start=1):
        if at.get(part) is None:
            at[part] = {}
        if not isinstance(at[part], dict):
            raise BadSpec(
                f"--set {override}: {'.'.join(path[:number])} is {at[part]!r} in the spec, "
                f"so it has no part {path[number]!r}"
            )
        at = at[part]
    at[path[-1]] = value


def _value(override: str, text: str) -> Any:
    what = f"--set {override}: the value"
    try:
        return read_json(text, what)
    except ValueError:
        return read_yaml(text, what)
