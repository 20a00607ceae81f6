"""What the fields of a config say of themselves: their types as flags see them, help, and mistakes."""

import difflib
import itertools
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo


def settings_help(cls: type[BaseModel], *, env_prefix: str) -> str:
    """Every setting as its flag, with description and default, for the end of a command's help."""
    width = min(shutil.get_terminal_size().columns, 100) - 4  # the help around it has margins
    title = f"Settings, also keys of the config file, and variables: --a.b is {env_prefix}A__B"
    lines = textwrap.wrap(title, width)
    for flag, kind, info in leaves(cls, ""):
        lines += ["", f"  --{flag} {kind}"]
        text = (info.description or "").replace("``", "`").replace("\n", " ")
        lines += textwrap.wrap(
            text + _default(flag, info), width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def plain_type(annotation: Any) -> Any:
    """The type itself, without Annotated and without "or None"."""
    if typing.get_origin(annotation) is Annotated:
        return plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not types.NoneType]
        if len(members) == 1:
            return plain_type(members[0])
    return annotation


def is_model(kind: Any) -> typing.TypeGuard[type[BaseModel]]:
    """Whether a type is a part with settings of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def leaves(cls: type[BaseModel], lead: str) -> Iterator[tuple[str, str, FieldInfo]]:
    """Every flag's name and kind of value, and the field it sets."""
    for name, info in cls.model_fields.items():
        kind = plain_type(info.annotation)
        if is_model(kind):
            yield from leaves(kind, f"{lead}{name}.")
        elif typing.get_origin(kind) is dict and is_model(plain_type(typing.get_args(kind)[1])):
            yield f"{lead}{name}", "JSON", info
            yield from leaves(plain_type(typing.get_args(kind)[1]), f"{lead}{name}.NAME.")
        else:
            yield f"{lead}{name}", _kind_name(kind), info


def mistake(cls: type[BaseModel], item: Any, source: str | None) -> str:
    """One of pydantic's errors as a line: path, what was wanted, what came, and from which source."""
    path = ".".join(str(part) for part in item["loc"] if part != "[key]") or "(the whole)"
    origin = f" in {source}" if source else ""
    if item["type"] == "missing":
        return f"  {path}: required, but not given{origin}"
    if item["type"] == "extra_forbidden":
        kind = _kind_at(cls, item["loc"][:-1])
        model = kind if is_model(kind) else cls
        return f"  {path}: " + unknown_setting(model, str(item["loc"][-1]), "") + f" (came{origin})"
    wanted = _shape(_kind_at(cls, item["loc"]), item) or item["msg"].removeprefix("Value error, ")
    came = repr(item["input"])
    is_secret = _kind_at(cls, item["loc"]) is SecretStr
    if isinstance(item["input"], dict) or len(came) > 80 or is_secret:
        return f"  {path}: {wanted}{origin and f' (came{origin})'}"
    return f"  {path}: {wanted} (came: {came}{origin})"


def unknown_setting(cls: type[BaseModel], key: str, lead: str) -> str:
    """What to say of a key that is none of a config's, with the one that was probably meant."""
    return f"{lead}no setting {key!r}; {suggestion(cls, key)}"


def suggestion(cls: type[BaseModel], key: str) -> str:
    """The key that was probably meant, or all that there are."""
    close = difflib.get_close_matches(key, cls.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.model_fields)}"


def _shape(kind: Any, item: Any) -> str | None:
    """What was wanted where something else came than a list or mapping, with an example made of it."""
    if item["type"] in ("tuple_type", "list_type"):
        return f"wanted a list, such as {_example(kind, item['input'])}"
    if item["type"] == "dict_type":
        return f"wanted a mapping, such as {_example(kind, item['input'])}"
    if item["type"] in ("model_type", "model_attributes_type") and is_model(kind):
        return f"wanted a mapping with keys such as {', '.join(itertools.islice(kind.model_fields, 3))}"
    return None


def _example(kind: Any, came: Any) -> str:
    if is_model(kind):
        needed = [name for name, info in kind.model_fields.items() if info.is_required()]
        parts = ((name, _example(plain_type(kind.model_fields[name].annotation), came)) for name in needed)
        return f"{{{', '.join(f'{name}: {part}' for name, part in parts)}}}"
    if typing.get_origin(kind) is dict:
        return f"{{name: {_example(plain_type(typing.get_args(kind)[1]), came)}}}"
    if typing.get_origin(kind) in (tuple, list):
        return f"[{_example(plain_type(typing.get_args(kind)[0]), came)}]"
    first = came[0] if isinstance(came, list) and came else came
    return str(first) if isinstance(first, str | int | float) else "…"


def _kind_at(cls: type[BaseModel], loc: Iterable[int | str]) -> Any:
    kind: Any = cls
    for part in loc:
        if is_model(kind) and part in kind.model_fields:
            kind = plain_type(kind.model_fields[str(part)].annotation)
        elif typing.get_args(kind):
            kind = plain_type(typing.get_args(kind)[1 if typing.get_origin(kind) is dict else 0])
    return kind


def _kind_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (tuple, list, set, frozenset):
        return f"{_kind_name(plain_type(arguments[0]))} (repeat for more)"
    if origin is dict:
        return "JSON"
    return {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false", Path: "PATH"}.get(kind, "TEXT")


def _default(flag: str, info: FieldInfo) -> str:
    if info.is_required():
        part, dot, _ = flag.rpartition(".")
        return f" (required in {part})" if dot else " (required)"
    # Round brackets: typer takes square ones for markup, and leaves them out.
    default = info.get_default(call_default_factory=True)
    return "" if default is None else f" (default: {_shown(default)})"


def _shown(default: Any) -> str:
    if isinstance(default, Mapping | list | tuple):
        return json.dumps(default, default=str)
    return str(default)
