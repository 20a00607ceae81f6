"""Pauses between tries, longer each time and never the same at two sites."""

import random

FIRST_S = 0.5
LONGEST_S = 30.0


class Backoff:
    """Exponential backoff with full jitter.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._bound_s = first_s

    def next_s(self) -> float:
        """The pause before the next try."""
        bound_s, self._bound_s = self._bound_s, min(self._bound_s * 2, self._longest_s)
        return random.uniform(0, bound_s)  # noqa: S311 (jitter, not a secret)

    def slowest_s(self) -> float:
        """A pause for what only a person can mend."""
        self._bound_s = self._longest_s
        return random.uniform(0.5, 1) * self._longest_s  # noqa: S311

    def reset(self) -> None:
        """Begin again with the shortest pause."""
        self._bound_s = self._first_s
