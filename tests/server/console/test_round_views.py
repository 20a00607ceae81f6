"""What `fedloom run show` tells of rounds with more than one try, and with late updates."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import WORK_ALONE, WORK_EVALUATE, WORK_TRAIN, Measurement
from fedloom_server.console.round_views import rounds_table, totals_table, troubles_table
from fedloom_server.console.run_views import run_facts


def shown(table: Table | None) -> list[str]:
    assert table is not None
    output = StringIO()
    Console(file=output, width=100).print(table)
    return output.getvalue().splitlines()


def test_each_cause_stands_with_the_try_that_it_ended() -> None:
    causes = [
        pb.SiteRound(site="kiel", work=WORK_TRAIN, state="failed", reason=reason, attempt=attempt)
        for attempt, reason in ((1, "no memory"), (2, "no disk"))
    ]
    finished = pb.Round(number=7, attempt=3, state=pb.ROUND_STATE_FINISHED, sites=causes)
    first, second = (line for line in shown(troubles_table([finished])) if "kiel" in line)
    assert first.split() == ["7", "kiel", "train", "failed", "no", "memory"]
    assert second.split() == ["7", "(try", "2)", "kiel", "train", "failed", "no", "disk"]


def test_a_late_update_is_not_among_those_of_the_round_that_went_on_without_it() -> None:
    works = [
        pb.SiteRound(site=site, work=WORK_TRAIN, state="done", examples=80, attempt=1, is_late=is_late)
        for site, is_late in (("bremen", False), ("kiel", True))
    ]
    finished = pb.Round(number=7, attempt=1, state=pb.ROUND_STATE_FINISHED, sites=works, target=1)
    row = next(line.split() for line in shown(rounds_table([finished], 0)) if "finished" in line)
    assert row[:4] == ["7", "finished", "1/2", "80"]


def test_what_a_failed_try_brought_is_not_among_a_rounds_updates() -> None:
    works = [
        pb.SiteRound(site=site, work=WORK_TRAIN, state="done", examples=80, attempt=attempt)
        for site, attempt in (("bremen", 1), ("kiel", 2), ("mainz", 2))
    ]
    finished = pb.Round(number=7, attempt=2, state=pb.ROUND_STATE_FINISHED, sites=works)
    row = next(line.split() for line in shown(rounds_table([finished], 0)) if "finished" in line)
    assert row[:6] == ["7", "(try", "2)", "finished", "2/2", "160"]


def test_a_sites_latest_loss_is_also_that_of_the_model_that_it_trained_from() -> None:
    before = Measurement(examples=9, metrics={"loss": 3.25})
    work = pb.SiteRound(site="kiel", work=WORK_TRAIN, state="done", attempt=1, before=before)
    lines = shown(totals_table([pb.Round(number=2, attempt=1, sites=[work])]))
    assert "3.2500" in next(line for line in lines if "kiel" in line)
    last = pb.SiteRound(site="kiel", work=WORK_EVALUATE, state="done", attempt=1, metrics={"loss": 2.5})
    lines = shown(totals_table([pb.Round(number=2, attempt=1, sites=[last, work])]))  # in whatever order
    assert "2.5000" in next(line for line in lines if "kiel" in line)


def test_training_alone_begins_with_the_initial_model_whose_loss_is_not_the_latest() -> None:
    initial = Measurement(examples=9, metrics={"loss": 5.5})
    facts = {"site": "kiel", "state": "done", "attempt": 1}
    works = [
        pb.SiteRound(work=WORK_TRAIN, before=initial, **facts),
        pb.SiteRound(work=WORK_EVALUATE, metrics={"loss": 3.0}, **facts),
        pb.SiteRound(work=WORK_ALONE, before=initial, **facts),
    ]
    line = next(it for it in shown(totals_table([pb.Round(number=1, sites=works)])) if "kiel" in it)
    assert "3.0000" in line
    assert "5.5000" not in line


def test_the_best_round_and_the_final_model_are_named() -> None:
    run = pb.Run(
        id="a1", rounds_done=3, rounds_total=9, best_round=1, best_metric="loss", best_value=2.0,
        final_round=1,
    )  # fmt: skip
    lines = [" ".join(line.split()) for line in shown(run_facts(run, 0))]
    assert "best round 1, loss 2.0000" in lines
    assert "final the model of round 1, which export gives" in lines
    run.final_round = 3
    assert not any(line.strip().startswith("final") for line in shown(run_facts(run, 0)))


def test_before_a_model_is_measured_none_is_the_best() -> None:
    assert not any(line.strip().startswith("best") for line in shown(run_facts(pb.Run(id="a1"), 0)))


def test_perplexity_has_a_column_only_where_it_is_measured() -> None:
    rounds = [pb.Round(number=1, attempt=1, state=pb.ROUND_STATE_FINISHED, metrics={"loss": 1.0})]
    assert not any("perplexity" in line for line in shown(rounds_table(rounds, 0)))
    rounds[0].metrics["perplexity"] = 2.7183
    assert any("perplexity" in line for line in shown(rounds_table(rounds, 0)))


def test_a_rules_parameters_are_written_as_in_the_spec() -> None:
    spec = '{"aggregation": {"rule": {"name": "krum", "byzantine": 1, "weighted": false}}}'
    lines = [" ".join(line.split()) for line in shown(run_facts(pb.Run(id="a1", spec_json=spec), 0))]
    assert "aggregation krum (byzantine 1, weighted false)" in lines
