"""Configs from a YAML file, the environment and flags, in rising order of precedence."""

import glob
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError, ValidationInfo, create_model

from fedloom_common.drafts import Typed, draft_of
from fedloom_common.errors import BadSpec
from fedloom_common.fields import settings_help
from fedloom_common.mistakes import describe
from fedloom_common.strict import Pattern

__all__ = ["Address", "ConfigGlob", "ConfigPath", "Fitting", "load_fitting", "load_settings", "settings_help"]

M = TypeVar("M", bound=BaseModel)

MOST_PORTS = 65535


def _port_exists(address: str) -> str:
    if int(address.rpartition(":")[2]) > MOST_PORTS:  # the system would take another in silence
        raise ValueError(f"ports go up to {MOST_PORTS}")
    return address


Address = Annotated[
    str, Pattern(r"^.+:\d+$", "host:port, such as fed.example.org:7443"), AfterValidator(_port_exists)
]
"""host:port."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    path = _expanded(value)
    base = _base(value, info)
    return path if base is None or not isinstance(path, Path) else base / path


def _resolve_glob(value: Any, info: ValidationInfo) -> Any:
    path = _expanded(value)
    base = _base(value, info)
    if not isinstance(path, Path):
        return path
    # The folder is no pattern, whatever characters its name has.
    return str(path if base is None else Path(glob.escape(str(base))) / path)


def _expanded(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    if not str(value):
        raise ValueError("a path may not be empty")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no such home folder: {error}") from error


def _base(value: Any, info: ValidationInfo) -> Path | None:
    if isinstance(value, Typed):
        return Path.cwd()
    return (info.context or {}).get("base")


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]
"""A path; in a file it is relative to the file's folder, in a flag or variable to the working directory."""

ConfigGlob = Annotated[str, BeforeValidator(_resolve_glob)]
"""A path or glob pattern, relative to the same folders as ``ConfigPath``."""


def load_settings(cls: type[M], file: Path | None, *, env_prefix: str, flags: Sequence[str] = ()) -> M:
    """Read a config: flags win over the environment, and the environment over the file.

    ``tls.key`` is ``--tls.key PATH`` as a flag and, with the prefix FEDLOOM_CLIENT_, the variable
    FEDLOOM_CLIENT_TLS__KEY. A list is given as a repeated flag or as JSON, a mapping as JSON.

    Raises:
        BadSpec: one line for each mistake: its path, what was wanted, what came, and from where.
    """
    draft = draft_of(cls, file, env_prefix, flags)
    try:
        return cls.model_validate(draft.content, context=_context(file))
    except ValidationError as error:
        where = "" if file else ", and no --config FILE is given"
        raise BadSpec(f"the config has mistakes{where}:\n" + describe(error, cls, draft.source_of)) from error


@dataclass(frozen=True)
class Fitting:
    """What of a config is right."""

    values: dict[str, Any]
    """By field; without those that are wrong, or missing and have no default."""
    mistakes: list[str]


def load_fitting(
    cls: type[BaseModel], file: Path | None, *, env_prefix: str, flags: Sequence[str] = ()
) -> Fitting:
    """Read a config as ``load_settings`` does, and keep what is right of one that is not."""
    try:
        draft = draft_of(cls, file, env_prefix, flags)
    except BadSpec as error:
        return Fitting({}, [str(error)])
    mistakes: list[str] = []
    try:
        whole = cls.model_validate(draft.content, context=_context(file))
        return Fitting({name: getattr(whole, name) for name in cls.model_fields}, [])
    except ValidationError as error:
        mistakes = describe(error, cls, draft.source_of).splitlines()
    values = {}
    for name, field_info in cls.model_fields.items():
        part = create_model("Part", **{name: (field_info.annotation, field_info)})  # type: ignore[call-overload]
        given = {name: draft.content[name]} if name in draft.content else {}
        with suppress(ValidationError):
            values[name] = getattr(part.model_validate(given, context=_context(file)), name)
    return Fitting(values, mistakes)


def _context(file: Path | None) -> dict[str, Any]:
    return {"base": None if file is None else file.absolute().parent}
