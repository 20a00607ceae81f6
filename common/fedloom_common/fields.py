"""What the fields of a config say of themselves: their types as flags see them, help, known keys."""

import difflib
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel
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


def suggestion(cls: type[BaseModel], key: str) -> str:
    """The key that was probably meant, or all that there are."""
    close = difflib.get_close_matches(key, cls.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(cls.model_fields)}"


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
