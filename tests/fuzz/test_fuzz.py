"""The parsers of what peers send, with every input that fuzzing has kept and a few seconds of new ones."""

from pathlib import Path

import pytest
from fuzz.targets import TARGETS, Verdict, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).resolve().parent / "corpus"
SEEDS = seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_is_read_or_refused_as_it_must_be(name):
    kept = sorted((CORPUS / name).iterdir())
    assert kept
    assert {TARGETS[name](path.read_bytes()) for path in kept} == set(Verdict)


@pytest.mark.parametrize("name", TARGETS)
def test_a_well_formed_input_is_read(name):
    assert TARGETS[name](SEEDS[name][0]) is Verdict.READ


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150)
@given(data=st.data())
def test_spoilt_inputs_are_read_or_refused_as_they_must_be(name, data):
    """A good input with some bytes replaced, cut out or put in."""
    content = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(0, 4))):
        begin = data.draw(st.integers(0, len(content)))
        content[begin : begin + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    assert TARGETS[name](bytes(content)) in Verdict
