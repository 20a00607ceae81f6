"""What a config's file, its environment variables and its flags say together, before it is validated."""

import json
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedloom_common.errors import BadSpec
from fedloom_common.fields import is_model, leaves, plain_type, suggestion
from fedloom_common.yamltext import read_json, read_yaml

# Kubernetes gives containers variables for each service: of one named fedloom-coordinator, with our prefix.
_FOREIGN = re.compile(r"config|service_(host|port).*|port(_\d+_.*)?")


class Typed(str):
    """Text from a flag or variable, whose relative paths start at the working directory."""

    __slots__ = ()


@dataclass(frozen=True)
class _Value:
    path: tuple[str, ...]
    content: Any
    source: str


@dataclass
class Draft:
    """A config that is being put together, and where each part of it came from."""

    content: dict[str, Any] = field(default_factory=dict)
    sources: dict[tuple[str, ...], str] = field(default_factory=dict)

    def set(self, path: tuple[str, ...], content: Any, source: str) -> None:
        """Put a part in its place, over what was there."""
        self.sources = {known: name for known, name in self.sources.items() if known[: len(path)] != path}
        self.sources[path] = source
        if not path:
            self.content = content
            return
        at = self.content
        for part in path[:-1]:
            if not isinstance(at.get(part), dict):
                at[part] = {}
            at = at[part]
        at[path[-1]] = content

    def source_of(self, loc: tuple[int | str, ...]) -> str | None:
        """Where a part came from."""
        path = tuple(str(part) for part in loc)
        return next(
            (self.sources[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.sources), None
        )


def draft_of(cls: type[BaseModel], file: Path | None, env_prefix: str, flags: Sequence[str]) -> "Draft":
    """The content of a config, not yet validated.

    Raises:
        BadSpec: the file cannot be read, or a flag or variable is of no setting.
    """
    draft = Draft()
    if file is not None:
        draft.set((), _read_file(file), str(file))
    for value in (*_from_environment(cls, env_prefix), *_from_flags(cls, flags)):
        draft.set(value.path, value.content, value.source)
    return draft


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadSpec(f"the config file {file} cannot be read: {reason}") from error
    content = read_yaml(text, f"the config file {file}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadSpec(
            f"the config file {file} must be a mapping of keys to values, not {type(content).__name__}"
        )
    return content


def _from_environment(cls: type[BaseModel], prefix: str) -> list[_Value]:
    found = []
    for variable, text in os.environ.items():
        name = variable.removeprefix(prefix).lower()
        # Compose files pass variables that are not set as empty ones.
        if not variable.startswith(prefix) or not text or _is_foreign(cls, name):
            continue
        path, kind = _locate(cls, name.split("__"), variable)
        found.append(_Value(path, _decode(kind, text, variable), variable))
    return sorted(found, key=lambda value: len(value.path))  # a whole mapping before its parts


def _is_foreign(cls: type[BaseModel], name: str) -> bool:
    """Whether a variable is no setting: it names the config file, or Kubernetes made it."""
    return name not in cls.model_fields and _FOREIGN.fullmatch(name) is not None


def _from_flags(cls: type[BaseModel], flags: Sequence[str]) -> list[_Value]:
    found: dict[tuple[str, ...], _Value] = {}
    rest = list(flags)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--") or flag == "--":
            raise BadSpec(
                f"{flag!r} is not a flag; settings are given as --key value, such as {_example(cls)}"
            )
        path, kind = _locate(cls, flag[2:].split("."), flag)
        if not equals:
            if kind is bool and (not rest or rest[0].startswith("--")):
                text = "true"
            elif not rest or rest[0].startswith("--"):
                raise BadSpec(f"{flag} needs a value; one that begins with -- is given as {flag}=VALUE")
            else:
                text = rest.pop(0)
        content = _decode(kind, text, flag)
        if isinstance(content, list) and path in found and isinstance(found[path].content, list):
            content = [*found[path].content, *content]
        found.pop(path, None)
        found[path] = _Value(path, content, flag)
    return list(found.values())


def _locate(cls: type[BaseModel], parts: Sequence[str], source: str) -> tuple[tuple[str, ...], Any]:
    """The path in the config that a flag's or variable's parts name, and the type that belongs there."""
    kind: Any = cls
    path: list[str] = []
    for part in parts:
        if is_model(kind):
            key = part.replace("-", "_")
            if key not in kind.model_fields:
                raise BadSpec(f"{source}: no such key as {key!r}; {suggestion(kind, key)}")
            kind = plain_type(kind.model_fields[key].annotation)
        elif typing.get_origin(kind) is dict:
            key, kind = part, plain_type(typing.get_args(kind)[1])
        else:
            raise BadSpec(f"{source}: {'.'.join(path)} is a single value, it has no part {part!r}")
        path.append(key)
    return tuple(path), kind


def _decode(kind: Any, text: str, source: str) -> Any:
    """What a flag's or variable's text stands for; pydantic turns plain text into numbers and such."""
    if text == "null":
        return None
    many = typing.get_origin(kind) in (tuple, list, set, frozenset)
    if is_model(kind) or typing.get_origin(kind) is dict or (many and text.startswith("[")):
        try:
            return _typed(read_json(text, source))
        except json.JSONDecodeError as error:
            raise BadSpec(f"{source}: JSON is wanted ({error}), but {text!r} came") from error
    return [Typed(text)] if many else Typed(text)


def _typed(value: Any) -> Any:
    match value:
        case str():
            return Typed(value)
        case list():
            return [_typed(item) for item in value]
        case dict():
            return {key: _typed(item) for key, item in value.items()}
    return value


def _example(cls: type[BaseModel]) -> str:
    flag, kind, _ = next(leaves(cls, ""))
    return f"--{flag} {kind}"
