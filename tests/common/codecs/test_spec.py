import json
import subprocess
import sys

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.spec import AS_IS, Bf16, Codecs, Fp32, Int4, Int8, TopK, Zstd

CODECS = TypeAdapter(Codecs)


class Transport(BaseModel):
    up: Codecs = AS_IS


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("int8", (Int8(block=256),)),
        ({"name": "int8", "block": 64}, (Int8(block=64),)),
        (["topk", "int8", "zstd"], (TopK(fraction=0.01), Int8(), Zstd())),
        ([{"name": "topk", "fraction": 0.1}, {"name": "int4"}], (TopK(fraction=0.1), Int4(block=64))),
        (["bf16", "zstd"], (Bf16(), Zstd())),
        ("zstd", (Zstd(),)),
    ],
)
def test_a_chain_is_a_name_a_stage_or_a_list_of_them(given, wanted):
    assert CODECS.validate_python(given) == wanted


def test_values_travel_as_they_are_unless_asked_otherwise():
    assert Transport().up == (Fp32(),)
    assert Chain(Transport().up).is_as_is


def test_a_chain_survives_the_way_through_json():
    stages = CODECS.validate_python([{"name": "topk", "fraction": 0.25}, "int8", "zstd"])
    assert CODECS.validate_json(CODECS.dump_json(stages)) == stages


@pytest.mark.parametrize(
    "given", [[], ["int8", "topk"], ["zstd", "int8"], ["int8", "bf16"], ["topk", "topk"], ["zstd", "zstd"]]
)
def test_stages_that_do_not_go_together_are_refused_with_the_right_order(given):
    with pytest.raises(
        ValidationError, match=r"wanted topk, then one of fp32, bf16, fp16, int8 and int4, then zstd"
    ):
        CODECS.validate_python(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int9", "'fp32', 'bf16'"),
        ({"name": "int8", "blocks": 64}, "Extra inputs"),
        ({"name": "int8", "block": 100}, "16, 32, 64"),
        ({"name": "topk", "fraction": 0}, "greater than 0"),
        ({"name": "topk", "fraction": 1.5}, "less than or equal to 1"),
        (8, "valid dictionary"),
    ],
)
def test_a_wrong_stage_is_told(given, message):
    with pytest.raises(ValidationError, match=message):
        CODECS.validate_python(given)


def test_an_editors_schema_takes_the_short_forms():
    schema = json.dumps(Transport.model_json_schema())
    for short in ("topk", "fp32", "zstd"):
        assert f'"{short}"' in schema


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [("spec", "numpy"), ("chain encoder decoder feedback", "torch")],
    ids=["the-spec-needs-no-numpy", "coding-needs-no-torch"],
)
def test_nobody_pays_for_imports_that_are_not_needed(modules, unwanted):
    imports = ", ".join(f"fedloom_common.codecs.{module}" for module in modules.split())
    code = f"import sys, {imports}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "wants"),
    [
        ("topk", True),
        ("int4", False),
        ({"name": "int8", "error_feedback": True}, True),
        ([{"name": "topk", "error_feedback": False}, "int8"], False),
        ("fp32", False),
    ],
)
def test_feedback_is_used_where_a_stage_asks_for_it(given, wants):
    assert Chain(CODECS.validate_python(given)).uses_feedback is wants
