"""What every part of a run spec, a config and a file of the console's stands on: no key passes unread."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]


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
