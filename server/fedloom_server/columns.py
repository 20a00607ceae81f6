"""Column types that hold what Python holds, in every database."""

import math
from collections.abc import Mapping

from sqlalchemy import JSON, Dialect, Text
from sqlalchemy.types import TypeDecorator


class Characters(TypeDecorator[str]):
    """Text. PostgreSQL has no NUL character, which a site's error message may hold."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Put a visible sign in the place of NULs."""
        return None if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}")


class Numbers(TypeDecorator[dict[str, float]]):
    """Numbers by name. JSON has no infinity, which a perplexity may reach."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, float] | None, dialect: Dialect) -> object:
        """Write what JSON does not have as text."""
        if value is None:
            return None
        return {name: number if math.isfinite(number) else str(number) for name, number in value.items()}

    def process_result_value(
        self, value: Mapping[str, float | str] | None, dialect: Dialect
    ) -> dict[str, float]:
        """The numbers again."""
        return {name: float(number) for name, number in (value or {}).items()}
