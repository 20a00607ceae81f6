"""What an examination finds, and how one is made of checks that never keep each other from being made."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


class Verdict(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    told: str
    """What was found."""
    advice: str = ""
    """What to do about it."""
    part: str = ""
    """What was looked at; ``examine`` fills it in."""


def ok(told: str) -> Finding:
    """Nothing to do."""
    return Finding(Verdict.OK, told)


def warning(told: str, advice: str) -> Finding:
    """It works, or may."""
    return Finding(Verdict.WARNING, told, advice)


def problem(told: str, advice: str) -> Finding:
    """It cannot work."""
    return Finding(Verdict.PROBLEM, told, advice)


Check = Callable[[], Iterable[Finding]]


def examine(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Make every check, in order; one that breaks is a problem of its own."""
    for part, check in checks.items():
        try:
            for finding in check():
                yield Finding(finding.verdict, finding.told, finding.advice, part)
        except Exception as error:  # a report with one line missing is worth more than none
            logger.debug("a check broke", exc_info=True)
            yield Finding(
                Verdict.PROBLEM, f"this could not be checked: {type(error).__name__}: {error}",
                "mend what stands above, and try again; else report it", part,
            )  # fmt: skip
