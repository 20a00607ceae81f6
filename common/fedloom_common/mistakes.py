"""What is wrong with a run spec or a config, a line each: the path, what was wanted, what came."""

import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from fedloom_common.fields import is_model, plain_type, suggestion

_KEYS_TOLD = 5
_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")
_NO_LIST = ("tuple_type", "list_type")

Loc = tuple[int | str, ...]
"""Where pydantic found a mistake: the keys, and the names of a union's members."""


def describe(
    error: ValidationError, cls: type[BaseModel], source_of: Callable[[Loc], str | None] = lambda loc: None
) -> str:
    """Every mistake that pydantic found in what was to be a ``cls``.

    ``source_of`` tells of a place which file, flag or variable set what lies there, if that is known.
    """
    wanted: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        names, kind = _place(cls, item["loc"])
        if item["type"] == "extra_forbidden":
            _, kind = _place(cls, item["loc"][:-1])
        path, came = ".".join(names), _came(item, kind, source_of(item["loc"]))
        # A key that may be of several kinds has a mistake for each of them.
        wanted.setdefault((f"  {path}{_tag(item)}", came), []).append(_wanted(item, kind))
    return "\n".join(
        f"{path}{': ' if path.strip() else ''}{', or '.join(texts)}{came}"
        for (path, came), texts in wanted.items()
    )


def left_empty(text: str, cls: type[BaseModel]) -> dict[str, str]:
    """By its path, what to do about each part that YAML text names and gives nothing for, not even null.

    YAML reads null there, which turns the part off: who writes its name wants it.
    """
    node = yaml.compose(text, yaml.SafeLoader)
    return dict(_left_empty(node, cls, "")) if isinstance(node, yaml.MappingNode) else {}


def _left_empty(node: yaml.MappingNode, cls: type[BaseModel], lead: str) -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        info = cls.model_fields.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        kind = plain_type(info.annotation) if info else None
        if info is None or not is_model(kind):
            continue
        path = f"{lead}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _left_empty(value, kind, f"{path}.")
        elif info.default is None and isinstance(value, yaml.ScalarNode) and not (value.value or value.style):
            needs_more = any(info.is_required() for info in kind.model_fields.values())
            part = f"a mapping with {_keys(kind)}" if needs_more else "{} for its defaults"
            yield path, f"nothing is given: write {part}, or leave {key.value} out"


def _place(cls: type[BaseModel], loc: Iterable[int | str]) -> tuple[list[str], Any]:
    """The keys of pydantic's path that the file has too, and the type of what lies there, if it is known.

    Pydantic's path also has the names of a union's members, which stand in no file.
    """
    names: list[str] = []
    kind: Any = cls
    for part in loc:
        members = _members(kind)
        if members:
            kind = next((member for member in members if _is_named(member, str(part))), None)
            continue
        if part == "[key]":
            continue
        names.append(str(part))
        kind = _part_of(kind, part)
    return names, kind


def _part_of(kind: Any, part: int | str) -> Any:
    if is_model(kind):
        return plain_type(kind.model_fields[str(part)].annotation) if part in kind.model_fields else None
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return plain_type(inner[min(int(part), len(inner) - 1)] if inner[-1] is not ... else inner[0])
    if typing.get_origin(kind) is list:
        return plain_type(inner[0])
    return plain_type(inner[1]) if typing.get_origin(kind) is dict else None


def _members(kind: Any) -> list[Any]:
    """Of a union."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    members = [plain_type(member) for member in typing.get_args(kind)] if is_union else []
    return [member for member in members if member is not types.NoneType]


def _is_named(member: Any, part: str) -> bool:
    """Whether a member of a union is the one that pydantic's path calls so: by its tag, or its type."""
    if is_model(member):
        return part in (_tag_of(member), member.__name__)
    origin = typing.get_origin(member) or member
    return part.startswith(getattr(origin, "__name__", str(origin)).lower())


def _tag_of(member: type[BaseModel]) -> str | None:
    """``lora`` of a part with ``kind: Literal["lora"]``."""
    for key in ("name", "kind"):
        if key in member.model_fields:
            values = typing.get_args(member.model_fields[key].annotation)
            return str(values[0]) if values else None
    return None


def _wanted(item: Any, kind: Any) -> str:
    """What was wanted in place of what came."""
    if item["type"] == "union_tag_invalid":
        return f"wanted one of {item['ctx']['expected_tags']}"
    if item["type"] in ("missing", "union_tag_not_found"):
        return "required, but not given"
    if item["type"] == "extra_forbidden":
        return "no such key" + (f"; {suggestion(kind, str(item['loc'][-1]))}" if is_model(kind) else "")
    if item["type"] in _NO_MAPPING:
        return f"wanted a mapping{_mapping_like(kind, item['input'])}"
    if item["type"] in _NO_LIST:
        example = _made_of(kind, item["input"])
        return "wanted a list" + (f", such as {_shown(example)}" if example else "")
    return str(item["msg"]).removeprefix("Value error, ")


def _mapping_like(kind: Any, came: Any) -> str:
    """An example of the mapping that was wanted, made of what came; else the first keys of a part."""
    members = _members(kind) or [kind]
    if len(members) > 1:
        key = next((key for key in ("kind", "name") if key in members[0].model_fields), "kind")
        return f", such as {_shown({key: _tag_of(members[0])})}"
    example = _made_of(members[0], came)
    if example is not None:
        return f", such as {_shown(example)}"
    return f" with {_keys(members[0])}" if is_model(members[0]) else ""


def _shown(example: Any) -> str:
    text: str = yaml.safe_dump(example, default_flow_style=True, width=1000, allow_unicode=True)
    return text.strip()


def _made_of(kind: Any, came: Any) -> Any:
    """A value of a kind that has in it what came instead; None if it has no place there."""
    if is_model(kind):
        return _part_made_of(kind, came)
    inner = [plain_type(argument) for argument in typing.get_args(kind)]
    if typing.get_origin(kind) is dict:
        part = _made_of(inner[1], came)
        return None if part is None else {"name": part}
    if typing.get_origin(kind) in (tuple, list):
        part = _made_of(inner[0], came)
        return None if part is None else [part]
    first = came[0] if isinstance(came, list | tuple) and came else came
    if isinstance(first, str):
        return str(first)  # a subclass of it, too
    return first if isinstance(first, int | float) and not isinstance(first, bool) else None


def _part_made_of(cls: type[BaseModel], came: Any) -> dict[str, Any] | None:
    """What came, under the first key that takes it: of those that must be given, then of the others."""
    for name, info in sorted(cls.model_fields.items(), key=lambda field: not field[1].is_required()):
        kind = plain_type(info.annotation)
        if not info.is_required() and (is_model(kind) or typing.get_origin(kind) is dict):
            continue  # nobody could guess that it was meant
        value = _made_of(kind, came)
        if value is not None and _takes(cls, name, value):
            return {name: value}
    return None


def _takes(cls: type[BaseModel], name: str, value: Any) -> bool:
    try:
        cls.model_validate({name: value})
    except ValidationError as error:  # perhaps only of other keys, which are not given
        return all(item["loc"][:1] != (name,) for item in error.errors())
    return True


def _keys(cls: type[BaseModel]) -> str:
    names = list(cls.model_fields)
    first = sorted(names, key=lambda name: not cls.model_fields[name].is_required())[:_KEYS_TOLD]
    return f"keys such as {', '.join(first)}" if len(first) > 1 else f"the key {first[0]}"


def _tag(item: Any) -> str:
    """The rest of the path, where it is the key by which a part's kinds are told apart."""
    if not item["type"].startswith("union_tag_"):
        return ""
    key: str = item["ctx"]["discriminator"].strip("'")
    return f".{key}"


def _came(item: Any, kind: Any, source: str | None) -> str:
    """What came, if it is short and may be told, and from which source."""
    origin = f" in {source}" if source else ""
    if item["type"] in ("missing", "union_tag_not_found"):
        return origin
    is_tag = item["type"] == "union_tag_invalid"
    came = repr(item["ctx"]["tag"] if is_tag else item["input"])
    # A mistake without a path is of parts that contradict each other, which its message names. What stands
    # under an unknown key may be a password whose key was misspelt.
    is_told = item["loc"] and kind is not SecretStr and item["type"] != "extra_forbidden"
    is_short = len(came) <= 80 and (is_tag or not isinstance(item["input"], dict))
    if is_told and is_short:
        return f" (came: {came}{origin})"
    return f" (came{origin})" if origin else ""
