"""What every part of a run spec, a config and a file of the console's stands on: no key passes unread."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Pattern:
    """What a text must look like: by a pattern in the schema, and in words to who gave another."""

    pattern: str
    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Pydantic's hook for the check."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        """Pydantic's hook for the schema."""
        return handler(schema) | {"pattern": self.pattern}

    def _check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text, re.ASCII) is None:
            raise ValueError(f"wanted {self.words}")
        return text


NAME = "up to 64 small letters, digits, dots, dashes and underscores, with a letter or digit at both ends"
"""What a name looks like, for error messages."""
Name = Annotated[str, Pattern(r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$", f"a name of {NAME}, such as ward-7")]


class Strict(BaseModel):
    """A part of a spec or config: unknown keys are errors, numbers are finite, values are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # JSON has neither: a run that was saved with one could not be read again
    )


def by_name(data: Any) -> Any:
    """A validator: what has no parameters, or only defaults, may be given by its name."""
    return {"name": data} if isinstance(data, str) else data


def by_kind(data: Any) -> Any:
    """A validator: as :func:`by_name`, for parts that call it their kind."""
    return {"kind": data} if isinstance(data, str) else data
