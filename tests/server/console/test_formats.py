import io
import json
import math
import re

import pytest
from rich.console import Console
from rich.text import Text

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import PHASE_TRAIN, WORK_TRAIN, Counts, Measurement, Progress
from fedloom_server.console.formats import (
    FittingTable,
    as_data,
    bytes_text,
    enum_word,
    first_line,
    json_text,
    metric_text,
    plain,
    seconds_text,
    time_text,
)
from fedloom_server.console.run_views import run_facts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("\x1b[2Jgone", "�[2Jgone", id="terminal-escape"),
        pytest.param("a\rb\x07", "a�b�", id="control-characters"),
        pytest.param("safe\u202egpj", "safe�gpj", id="right-to-left-override"),
        pytest.param("Köln [red]x[/red]\nü", "Köln [red]x[/red]\nü", id="ordinary-text"),
    ],
)
def test_text_from_the_network_cannot_steer_the_terminal(text, shown):
    assert plain(text) == shown


def test_the_first_line_skips_blank_ones():
    assert first_line("\n  \n  RuntimeError: out of memory\nTraceback") == "RuntimeError: out of memory"
    assert first_line("") == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1m 00s"),
        (75, "1m 15s"),
        (3599.7, "1h 00m"),
        (90061, "1d 01h"),
    ],
)
def test_a_duration_shows_its_two_largest_units(seconds, shown):
    assert seconds_text(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (3.52071, "3.5207"),
        (33.8081, "33.81"),
        (123456.0, "1.235e+05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_metric_has_as_many_digits_as_it_needs(value, shown):
    assert metric_text(value) == shown


def test_a_time_that_is_not_yet_is_a_dash():
    assert time_text(0) == "–"
    assert bytes_text(13_500_000) == "13.5 MB"


def test_enums_are_words_and_unknown_numbers_stay():
    assert enum_word(pb.RunState.DESCRIPTOR, pb.RUN_STATE_FINISHED) == "finished"
    assert enum_word(pb.RunState.DESCRIPTOR, 99) == "99"


def test_data_of_a_message_has_numbers_words_and_the_embedded_json():
    run = pb.Run(id="a1", state=pb.RUN_STATE_RUNNING, spec_json='{"rounds": 3}')
    work = pb.SiteRound(site="kiel", work=WORK_TRAIN, examples=1 << 60, metrics={"loss": float("nan")})
    item = pb.Round(number=1, state=pb.ROUND_STATE_TRAINING, sites=[work])
    data = json.loads(json_text(as_data(pb.GetResponse(run=run, rounds=[item]))))
    assert (data["run"]["state"], data["run"]["spec"]) == ("running", {"rounds": 3})
    assert "model" not in data["run"]
    (site,) = data["rounds"][0]["sites"]
    assert (site["work"], site["examples"], site["metrics"]) == ("train", 1 << 60, {"loss": "NaN"})


def test_data_leaves_out_what_is_absent():
    progress = Progress(assignment_id="x", phase=PHASE_TRAIN, done=3, total=9)
    event = as_data(pb.WatchEvent(site_progress=pb.SiteProgress(site="kiel", round=1, progress=progress)))
    assert list(event) == ["site_progress"]
    assert event["site_progress"]["progress"] == {
        "assignment_id": "x",
        "phase": "train",
        "done": 3,
        "total": 9,
    }


def test_a_run_tells_how_its_updates_are_aggregated():
    aggregation = {
        "rule": {"name": "multi_krum", "byzantine": 2, "selected": None},
        "clip": {"factor": 1.5, "rounds": 10},
        "server_optimizer": {"name": "diloco", "lr": 0.7, "momentum": 0.9, "schedule": {"kind": "constant"}},
    }
    run = pb.Run(id="a1", spec_json=json.dumps({"aggregation": aggregation}))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(run_facts(run, 0.0))
    wanted = "multi_krum (byzantine 2), clip (factor 1.5, rounds 10), diloco (lr 0.7, momentum 0.9)"
    assert re.search(rf"aggregation +{re.escape(wanted)}", console.export_text())


def test_a_map_of_messages_is_data_all_the_way_down():
    told = Measurement(metrics={"loss": math.inf}, metric_counts={"hits": Counts(values=[1, 1 << 53])})
    data = as_data(told)
    assert (data["metrics"], data["metric_counts"]) == (
        {"loss": "Infinity"},
        {"hits": {"values": [1, 1 << 53]}},
    )
    assert json.loads(json_text(data)) == data


def rows_at(width: int) -> list[str]:
    table = FittingTable("run", "at", ">loss", ">down", "why", optional=["down", "loss"])
    at = Text("10-26 10:31:10", no_wrap=True)
    table.add_row("a1b2c3", at, "4.8255", "374.6 kB", "the last round is done")
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_table_folds_text_between_words_before_it_leaves_a_column_out():
    assert rows_at(80)[1] == "a1b2c3  10-26 10:31:10  4.8255  374.6 kB  the last round is done"
    assert rows_at(53) == [
        "run    at               loss     down why",
        "a1b2c3 10-26 10:31:10 4.8255 374.6 kB the last round",
        "                                      is done",
    ]


def test_a_table_leaves_columns_out_before_it_cuts_a_number():
    assert rows_at(38)[:2] == ["run    at               loss … why", "a1b2c3 10-26 10:31:10 4.8255   the"]
    assert rows_at(30)[:2] == ["run    at             … why", "a1b2c3 10-26 10:31:10   the"]
