import pytest
from rich.console import Console

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import (
    PHASE_DOWNLOAD,
    PHASE_PREPARE,
    PHASE_TRAIN,
    PHASE_UPLOAD,
    WORK_EVALUATE,
    WORK_TRAIN,
    Progress,
)
from fedloom_server.console.board import Board

START_S = 1_000_000.0


def round_event(number, state, sites=(), **more):
    return pb.WatchEvent(round=pb.Round(number=number, state=state, sites=sites, **more))


def train(site, state="open", **more):
    return pb.SiteRound(site=site, work=WORK_TRAIN, state=state, **more)


def progress_event(site, phase, done=0, total=0, *, round_number=1, work=WORK_TRAIN, **more):
    progress = Progress(phase=phase, done=done, total=total, **more)
    return pb.WatchEvent(
        site_progress=pb.SiteProgress(site=site, round=round_number, work=work, progress=progress)
    )


def run_event(**more):
    facts = {"id": "a1b2c3", "name": "plays", "state": pb.RUN_STATE_RUNNING, "rounds_total": 8}
    return pb.WatchEvent(run=pb.Run(**(facts | more)))


def board(*events):
    board = Board()
    for event in events:
        board.fold(event)
    return board


def text(board, *, width=100, height=None):
    console = Console(width=width, record=True, file=None, quiet=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(board.render(height=height, now_s=START_S + 75))
    return capture.get()


def line_of(shown, word):
    return next(line for line in shown.splitlines() if word in line)


def test_the_header_has_the_run_its_state_and_its_round():
    shown = text(
        board(
            run_event(rounds_done=2, started_at_s=START_S),
            round_event(3, pb.ROUND_STATE_TRAINING, started_at_s=START_S + 60),
        )
    )
    for fact in ("plays", "a1b2c3", "running", "round 3 of 8", "1m 15s"):
        assert fact in shown


def test_each_site_has_its_phase_amount_loss_and_speed():
    sites = [train("bremen"), train("hamburg"), train("kiel"), train("ulm", "done", examples=640)]
    shown = text(
        board(
            run_event(),
            round_event(1, pb.ROUND_STATE_TRAINING, sites),
            progress_event("bremen", PHASE_TRAIN, 13, 20, loss=3.41234, tokens_per_s=10321.6),
            progress_event("hamburg", PHASE_UPLOAD, 9_400_000, 13_500_000),
        )
    )
    assert [word for word in line_of(shown, "bremen").split() if word not in bar(shown, "bremen")] == (
        ["bremen", "train", "13", "/", "20", "loss", "3.4123", "10,322", "tok/s"]
    )
    assert "upload" in line_of(shown, "hamburg")
    assert "9.4 MB / 13.5 MB" in line_of(shown, "hamburg")
    assert "assigned" in line_of(shown, "kiel")
    assert "640 examples" in line_of(shown, "ulm")


def bar(shown, site):
    return [word for word in line_of(shown, site).split() if set(word) <= set("━╸╺")]


def test_a_bar_is_as_full_as_the_work_is_done():
    shown = text(
        board(
            run_event(),
            round_event(1, pb.ROUND_STATE_TRAINING, [train("half"), train("full", "done"), train("none")]),
            progress_event("half", PHASE_TRAIN, 10, 20),
        ),
        width=200,
    )
    lengths = {site: len("".join(bar(shown, site))) for site in ("half", "full", "none")}
    assert lengths["full"] == 24
    assert lengths["half"] == 12
    assert lengths["none"] == 0


def test_progress_of_an_earlier_round_is_not_shown_for_the_next():
    shown = text(
        board(
            run_event(),
            progress_event("bremen", PHASE_TRAIN, 20, 20, round_number=1),
            round_event(2, pb.ROUND_STATE_TRAINING, [train("bremen")]),
        )
    )
    assert "assigned" in line_of(shown, "bremen")


def test_a_site_that_evaluates_shows_that_and_not_its_training():
    works = [train("bremen", "done"), pb.SiteRound(site="bremen", work=WORK_EVALUATE, state="open")]
    shown = text(
        board(
            run_event(),
            round_event(1, pb.ROUND_STATE_EVALUATING, works),
            progress_event("bremen", PHASE_DOWNLOAD, 1_000_000, 0, work=WORK_EVALUATE),
        )
    )
    assert "download" in line_of(shown, "bremen")
    assert "1.0 MB" in line_of(shown, "bremen")


def test_the_latest_state_of_a_round_wins():
    shown = text(
        board(
            run_event(),
            round_event(1, pb.ROUND_STATE_TRAINING),
            round_event(1, pb.ROUND_STATE_FAILED, reason="1 of 3 sites reported", attempt=1),
            round_event(1, pb.ROUND_STATE_FINISHED, attempt=2, metrics={"loss": 4.25}),
        )
    )
    assert "1 (try 2)" in line_of(shown, "finished")
    assert "failed" not in shown


def test_every_metric_has_a_column_by_its_own_name():
    finished = round_event(1, pb.ROUND_STATE_FINISHED, metrics={"accuracy": 0.75, "loss": 4.25})
    shown = text(board(run_event(), finished))
    assert "accuracy" in shown
    assert "0.7500" in shown


def test_the_first_line_of_what_went_wrong_is_shown():
    lost = train("kiel", "failed", reason="rank 1 died\nTraceback: …")
    shown = text(board(run_event(), round_event(1, pb.ROUND_STATE_FINISHED, [lost])))
    assert "round 1  kiel failed: rank 1 died" in shown
    assert "Traceback" not in shown


def test_text_of_sites_is_shown_and_not_obeyed():
    lost = train("kiel", "failed", reason="[bold red]x[/] \x1b[2J :smile:")
    shown = text(board(run_event(), round_event(1, pb.ROUND_STATE_FINISHED, [lost])))
    assert "[bold red]x[/] �[2J :smile:" in shown


def test_a_lost_connection_keeps_the_display():
    kept = board(run_event(), round_event(1, pb.ROUND_STATE_TRAINING, [train("bremen")]))
    kept.lost = "no coordinator answers at 127.0.0.1:1"
    shown = text(kept)
    assert "reconnecting: no coordinator answers at 127.0.0.1:1" in shown
    assert "bremen" in shown


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (200, 60)])
def test_a_hundred_sites_and_rounds_fit_every_terminal(width, height):
    sites = [train(f"site-{number:03}", "done" if number < 30 else "open") for number in range(100)]
    reasons = [train(f"site-{number:03}", "lost", reason="silent for 300 s") for number in range(100)]
    metrics = {"train_loss": 4.5, "loss": 4.25, "perplexity": 70.105}
    events = [
        round_event(number, pb.ROUND_STATE_FINISHED, reasons, metrics=metrics) for number in range(1, 99)
    ]
    full = board(run_event(), *events, round_event(99, pb.ROUND_STATE_TRAINING, sites))
    lines = text(full, width=width, height=height).rstrip().splitlines()
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    assert any("open" in line and "30 done" in line for line in lines)


def test_an_ended_run_shows_every_round():
    events = [round_event(number, pb.ROUND_STATE_FINISHED) for number in range(1, 41)]
    ended = board(*events, run_event(state=pb.RUN_STATE_FINISHED))
    assert ended.ended
    assert text(ended).count("finished") == 41


def test_a_line_for_each_thing_that_is_new():
    board = Board()
    done = train("bremen", "done", examples=640, metrics={"loss": 4.8})
    lines = [
        board.fold(run_event(reason="waits for 2 sites")),
        board.fold(round_event(1, pb.ROUND_STATE_TRAINING, [train("bremen"), train("kiel")])),
        board.fold(progress_event("bremen", PHASE_PREPARE, 1, 9)),
        board.fold(progress_event("bremen", PHASE_PREPARE, 2, 9)),
        board.fold(progress_event("bremen", PHASE_TRAIN, 1, 9)),
        board.fold(
            round_event(1, pb.ROUND_STATE_TRAINING, [done, train("kiel", "refused", reason="task: no")])
        ),
        board.fold(round_event(1, pb.ROUND_STATE_FINISHED, [done], metrics={"loss": 4.25})),
        board.fold(round_event(1, pb.ROUND_STATE_FINISHED, [done], metrics={"loss": 4.25})),
        board.fold(run_event(state=pb.RUN_STATE_FINISHED)),
    ]
    assert lines == [
        ["run a1b2c3 is running: waits for 2 sites"],
        ["round 1 is training"],
        ["round 1  bremen: train, prepare"],
        [],
        ["round 1  bremen: train"],
        ["round 1  bremen: train done: 640 examples, loss 4.8000", "round 1  kiel: train refused: task: no"],
        ["round 1 is finished: loss 4.2500"],
        [],
        ["run a1b2c3 is finished"],
    ]


def test_a_second_try_of_a_round_tells_its_outcomes_again():
    board = Board()
    first = train("kiel", "failed", reason="no memory")
    board.fold(round_event(1, pb.ROUND_STATE_TRAINING, [first], attempt=1))
    again = round_event(1, pb.ROUND_STATE_TRAINING, [first, first], attempt=2)
    assert board.fold(again) == [
        "round 1 (try 2)  kiel: train failed: no memory",
        "round 1 (try 2) is training",
    ]


def test_an_outcome_stands_with_the_try_that_it_ended():
    works = [train("kiel", "failed", reason=reason, attempt=i) for i, reason in ((1, "memory"), (3, "disk"))]
    assert Board().fold(round_event(1, pb.ROUND_STATE_TRAINING, works, attempt=4)) == [
        "round 1  kiel: train failed: memory",
        "round 1 (try 3)  kiel: train failed: disk",
        "round 1 (try 4) is training",
    ]


def test_what_is_measured_after_a_rounds_end_has_a_line():
    board = Board()
    board.fold(round_event(1, pb.ROUND_STATE_FINISHED, metrics={"train_loss": 4.5}))
    measured = round_event(1, pb.ROUND_STATE_FINISHED, metrics={"train_loss": 4.5, "loss": 4.25})
    assert board.fold(measured) == ["round 1 is measured: loss 4.2500"]
    assert board.fold(measured) == []


def test_before_the_first_event_there_is_no_empty_board():
    assert text(Board()).strip() == "connecting …"


def test_a_version_is_called_one_and_tells_how_far_behind_its_updates_are():
    sites = [
        train("fast", "done", turn=7, staleness=0, assignment_id="r.7.1.train.fast"),
        train("fast", "done", turn=8, staleness=0, assignment_id="r.8.1.train.fast"),
        train("slow", turn=1, staleness=3, assignment_id="r.1.1.train.slow"),
    ]
    shown = text(
        board(run_event(), round_event(4, pb.ROUND_STATE_TRAINING, sites, metrics={"train_staleness": 1.5}))
    )
    assert "version 4 of 8" in shown
    assert "2/3" in line_of(shown, "training")


def test_work_that_a_version_hands_on_to_the_next_is_told_once():
    watched, slow = Board(), {"turn": 1, "assignment_id": "r.1.1.train.slow"}
    watched.fold(run_event())
    watched.fold(round_event(1, pb.ROUND_STATE_TRAINING, [train("slow", **slow)]))
    event = {"assignment_id": "r.1.1.train.slow"}
    assert watched.fold(progress_event("slow", PHASE_TRAIN, 1, 9, **event)) == ["version 1  slow: train"]
    watched.fold(round_event(2, pb.ROUND_STATE_TRAINING, [train("slow", **slow, staleness=1)]))
    assert watched.fold(progress_event("slow", PHASE_TRAIN, 2, 9, round_number=2, **event)) == []
    assert "2 / 9" in line_of(text(watched), "slow")
    done = train("slow", "done", examples=5, **slow)
    assert watched.fold(round_event(2, pb.ROUND_STATE_TRAINING, [done])) == [
        "version 2  slow: train done: 5 examples"
    ]
    assert watched.fold(round_event(3, pb.ROUND_STATE_TRAINING, [done])) == ["version 3 is training"]
