"""YAML and JSON that people write: nothing in it is run, and no mapping may say a thing twice."""

import json
from typing import Any

import yaml

from fedloom_common.errors import BadSpec


class Loader(yaml.SafeLoader):
    """YAML's plain types; of two equal keys YAML's own loader would drop the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it was written: later, what merge keys (<<) bring in stands among its own keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise _RepeatedKey(key.value, lines[name], line)
            lines[name] = line
        return node


def read_yaml(text: str, what: str, *, loader: type[Loader] = Loader) -> Any:
    """The content of a text; ``what`` is how errors call it.

    Raises:
        BadSpec: it is not YAML, or a mapping in it has a key twice.
    """
    try:
        return yaml.load(text, loader)  # noqa: S506 (a safe loader)
    except _RepeatedKey as error:
        raise BadSpec(f"{what} {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of days that no calendar has
        raise BadSpec(f"{what} is not YAML: {error}") from error


def read_json(text: str, what: str) -> Any:
    """The content of a text; ``what`` is how errors call it.

    Raises:
        json.JSONDecodeError: it is not JSON.
        BadSpec: an object in it has a key twice.
    """
    return json.loads(text, object_pairs_hook=lambda pairs: _object_of(pairs, what))


def _object_of(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    made = dict[str, Any]()
    for key, value in pairs:
        if key in made:
            raise BadSpec(f"{what} has the key {key!r} twice: put what belongs to it under one of them")
        made[key] = value
    return made


class _RepeatedKey(yaml.YAMLError):
    def __init__(self, key: str, first: int, second: int) -> None:
        places = f"in lines {first} and {second}" if first != second else f"in line {first}"
        super().__init__(f"has the key {key!r} twice, {places}: put what belongs to it under one of them")
