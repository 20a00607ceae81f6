"""The run spec as text: read from YAML and JSON, its schema."""

import json
import re
from collections.abc import Iterable

from pydantic import ValidationError

from fedloom_common.errors import BadSpec
from fedloom_common.mistakes import describe, left_empty
from fedloom_common.runspec.run import RunSpec
from fedloom_common.yamltext import Loader, read_yaml


class _Yaml(Loader):
    """YAML as people and JSON write it: 1e-5 is a number, which YAML 1.1 reads as text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_run_spec(text: str) -> RunSpec:
    """Read a run spec from YAML or JSON text.

    Raises:
        BadSpec: one line for each wrong key or value: its path, what came, what was wanted.
    """
    data = read_yaml(text, "the run spec", loader=_Yaml)
    if not isinstance(data, dict):
        raise BadSpec(f"a run spec is a mapping with keys such as name and model, not {type(data).__name__}")
    require_nothing_left_empty(text)
    try:
        spec = RunSpec.model_validate(data)
    except ValidationError as error:
        raise BadSpec("the run spec has mistakes:\n" + describe(error, RunSpec)) from error
    if mistakes := [*spec.mistaken_goals(), *spec.cohort.without_effect()]:
        raise BadSpec("the run spec has mistakes:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return spec


def require_nothing_left_empty(text: str, *, besides: Iterable[str] = ()) -> None:
    """Check that YAML text gives something for each part that it names; ``besides`` are paths set later.

    Raises:
        BadSpec: a line for each part: its path, what to do.
    """
    given = tuple(f"{path}." for path in besides)
    empty = {
        path: advice
        for path, advice in left_empty(text, RunSpec).items()
        if not any(one.startswith(f"{path}.") for one in given)
    }
    if empty:
        lines = [f"  {path}: {advice}" for path, advice in empty.items()]
        raise BadSpec("the run spec has mistakes:\n" + "\n".join(lines))


def read_run_spec(json_text: str) -> RunSpec:
    """Read a run spec as the coordinator sends it: JSON, with every default.

    Raises:
        BadSpec: it is not one; the coordinator's release may be another.
    """
    try:
        return RunSpec.model_validate_json(json_text)
    except ValidationError as error:
        raise BadSpec(
            "this site cannot read the coordinator's run spec: install matching releases of fedloom at both; "
            "it has\n" + describe(error, RunSpec)
        ) from error


def run_spec_schema() -> str:
    """JSON Schema of the run spec, for editors and other languages."""
    return json.dumps(RunSpec.model_json_schema(), indent=2)
