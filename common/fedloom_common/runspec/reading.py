"""The run spec as text: read from YAML and JSON, its mistakes told a line each, its schema."""

import json
import re
from typing import Any

from pydantic import ValidationError

from fedloom_common.errors import BadSpec
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
    try:
        spec = RunSpec.model_validate(data)
    except ValidationError as error:
        raise BadSpec("the run spec has mistakes:\n" + describe(error)) from error
    if mistakes := list(spec.mistaken_goals()):
        raise BadSpec("the run spec has mistakes:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return spec


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
            "it has\n" + describe(error)
        ) from error


def describe(error: ValidationError) -> str:
    """Every mistake that pydantic found, a line each: path, what was wanted, what came."""
    return "\n".join(_describe_one(item) for item in error.errors())


def run_spec_schema() -> str:
    """JSON Schema of the run spec, for editors and other languages."""
    return json.dumps(RunSpec.model_json_schema(), indent=2)


def _describe_one(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    wanted = item["msg"].removeprefix("Value error, ")
    if not path:
        return f"  {wanted}"  # parts that contradict each other, which it names
    if item["type"].startswith("union_tag_"):
        return f"  {path}{_wrong_tag(item)}"
    if item["type"] == "extra_forbidden":
        wanted = "no such key"
    if item["type"] in ("model_type", "model_attributes_type"):
        wanted = "wanted a mapping"
    if item["type"] == "missing":
        return f"  {path}: required, but not given"
    came = repr(item["input"])
    if isinstance(item["input"], dict) or len(came) > 80:
        return f"  {path}: {wanted}"
    return f"  {path}: {wanted} (came: {came})"


def _wrong_tag(item: Any) -> str:
    """Of a part that comes in several kinds: the rest of its path, what was wanted, what came."""
    key = item["ctx"]["discriminator"].strip("'")
    if item["type"] == "union_tag_not_found":
        return f".{key}: required, but not given"
    return f".{key}: wanted one of {item['ctx']['expected_tags']} (came: {item['ctx']['tag']!r})"
