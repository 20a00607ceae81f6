"""What is wrong with a run spec, a line each: the path as the file has it, what was wanted, what came."""

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedloom_common.fields import is_model, plain_type, suggestion

_KEYS_TOLD = 5
_NO_MAPPING = ("model_type", "model_attributes_type")
_NO_LIST = ("tuple_type", "list_type")


def describe(error: ValidationError, cls: type[BaseModel] | None = None) -> str:
    """Every mistake that pydantic found; with what was probably meant, if it is told the spec's class."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        names, kind = _place(cls, item["loc"])
        if item["type"] == "extra_forbidden":
            _, kind = _place(cls, item["loc"][:-1])
        path = ".".join(names)
        # A key that may be of several kinds has a mistake for each of them.
        wanted.setdefault((f"  {path}{_tag(item)}", _came(item)), []).append(_wanted(item, kind))
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


def _place(cls: type[BaseModel] | None, loc: Iterable[int | str]) -> tuple[list[str], Any]:
    """The keys of pydantic's path that the file has too, and the type of what lies there, if it is known.

    Pydantic's path also has the names of a union's members, which stand in no file.
    """
    names, kind = [], cls
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
        return f"wanted a mapping{_example(kind, item['input'])}"
    if item["type"] in _NO_LIST:
        came = item["input"]
        return f"wanted a list, such as [{came}]" if isinstance(came, str | int | float) else "wanted a list"
    return str(item["msg"]).removeprefix("Value error, ")


def _example(kind: Any, came: Any) -> str:
    """What came, under the key of the part that takes such a value; else the part's first keys."""
    members = _members(kind) or [kind]
    if not is_model(members[0]):
        return ""
    if len(members) > 1:
        tagged = next((key for key in ("kind", "name") if key in members[0].model_fields), "kind")
        return f", such as {{{tagged}: {_tag_of(members[0])}}}"
    key = None if came is None or isinstance(came, bool) else _key_for(members[0], came)
    if key is None:
        return f" with {_keys(members[0])}"
    example = yaml.safe_dump({key: came}, default_flow_style=True, width=1000, allow_unicode=True)
    return f", such as {example.strip()}"


def _keys(cls: type[BaseModel]) -> str:
    names = list(cls.model_fields)
    first = sorted(names, key=lambda name: not cls.model_fields[name].is_required())[:_KEYS_TOLD]
    return f"keys such as {', '.join(first)}" if len(first) > 1 else f"the key {first[0]}"


def _key_for(cls: type[BaseModel], came: Any) -> str | None:
    """The first key that takes a value, of those that must be given, and then of the others."""
    for name in sorted(cls.model_fields, key=lambda name: not cls.model_fields[name].is_required()):
        try:
            cls.model_validate({name: came})
        except ValidationError as error:
            if any(item["loc"][:1] == (name,) for item in error.errors()):
                continue
        return name
    return None


def _tag(item: Any) -> str:
    """The rest of the path, where it is the key by which a part's kinds are told apart."""
    if not item["type"].startswith("union_tag_"):
        return ""
    key: str = item["ctx"]["discriminator"].strip("'")
    return f".{key}"


def _came(item: Any) -> str:
    if item["type"] in ("missing", "union_tag_not_found") or not item["loc"]:
        return ""  # without a path, parts contradict each other, which the message names
    came = repr(item["ctx"]["tag"] if item["type"] == "union_tag_invalid" else item["input"])
    is_short = not isinstance(item["input"], dict) or item["type"] == "union_tag_invalid"
    return f" (came: {came})" if is_short and len(came) <= 80 else ""
