"""docs/security.md says of roles and limits what the code does."""

from pathlib import Path

import pytest

from fedloom_common.identity import Role
from fedloom_server.config import Limits
from fedloom_server.rpc.access import TABLE, Rule

PAGE = Path(__file__).parents[2] / "docs/security.md"
ROLES = (Role.SITE, Role.OPERATOR, Role.VIEWER, Role.COORDINATOR)


def rows(first_column: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    lines = PAGE.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} "))
    table = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_page_tells_what_each_role_may_call() -> None:
    told = [" | ".join(row) for row in rows("method")]
    wanted = [" | ".join([f"`{method[1:]}`", *_cells(rule)]) for method, rule in TABLE.items()]
    assert not (missing := set(wanted) - set(told)), f"add to {PAGE.name}: | {' |, | '.join(missing)} |"
    assert sorted(told) == sorted(wanted)


def _cells(rule: Rule) -> list[str]:
    return ["yes" if role in rule.roles else "–" for role in ROLES]


def test_the_page_tells_the_default_limits() -> None:
    defaults = Limits()
    told = {}
    for names, values, _ in rows("`limits:`"):
        told |= dict(zip(names.replace("`", "").split(", "), values.split(", "), strict=True))
    assert told == {name: f"{value:g}" for name, value in defaults.model_dump().items()}


@pytest.mark.parametrize("rule", [rule.audited for rule in TABLE.values() if rule.audited])
def test_an_audited_action_reads_as_noun_and_verb(rule: str) -> None:
    noun, _, verb = rule.partition(".")
    assert noun in ("run", "model", "file", "site")
    assert verb.isalpha()
