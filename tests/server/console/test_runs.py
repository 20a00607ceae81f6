import json

import pytest
import yaml

from fedloom.v1 import runs_pb2 as pb
from fedloom.v1.session_pb2 import WORK_TRAIN, Measurement
from fedloom_common.errors import BadSpec, NotFound, NotPermitted
from fedloom_common.runspec import RunSpec

SPEC = {
    "name": "plays",
    "model": {"config": {"model_type": "gpt2"}},
    "data": "plays",
    "rounds": 3,
    "local": {"steps": 10},
}


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("# my run\n" + yaml.safe_dump(SPEC))
    return path


def test_submit_sends_the_file_as_it_is_and_prints_only_the_id(console, fake, spec_file):
    assert console("run", "submit", str(spec_file)).stdout == "a1b2c3\n"
    (request,) = fake.asked_for(pb.SubmitRequest)
    assert request.spec == spec_file.read_text()


def test_submit_reads_standard_input_and_sets_values(console, fake):
    given = ("--set", "local.steps=5", "--set", "local.optimizer.lr=1e-2", "--set", "seed=7")
    console("run", "submit", "-", *given, text=yaml.safe_dump(SPEC))
    (request,) = fake.asked_for(pb.SubmitRequest)
    sent = RunSpec.model_validate(yaml.safe_load(request.spec))
    assert (sent.local.steps, sent.local.optimizer.lr, sent.seed) == (5, 0.01, 7)
    assert sent.name == "plays"


def test_a_wrong_spec_is_refused_without_a_network(console, tmp_path):
    console.address = ""  # and so without any setting
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**SPEC, "rounds": 0, "roundz": 1}))
    with pytest.raises(BadSpec) as caught:
        console("run", "submit", "bad.yaml")
    assert "rounds:" in str(caught.value)
    assert "roundz: no such key" in str(caught.value)


def test_every_line_of_the_coordinators_objection_is_shown(console, fake, spec_file):
    fake.refusal = BadSpec("the run spec has mistakes:\n  model.path: no such directory\n  data: unknown")
    with pytest.raises(BadSpec) as caught:
        console("run", "submit", str(spec_file))
    assert str(caught.value).splitlines()[1:] == ["  model.path: no such directory", "  data: unknown"]


def test_submit_and_watch_keeps_standard_output_for_the_id(console, fake, spec_file):
    ended = pb.Run(id="a1b2c3", state=pb.RUN_STATE_FINISHED, reason="all 3 rounds are done")
    fake.connections = [[pb.WatchEvent(run=ended)]]
    result = console("run", "submit", str(spec_file), "--watch")
    assert result.stdout == "a1b2c3\n"
    assert "run a1b2c3 is finished: all 3 rounds are done" in result.stderr


def test_list_shows_each_run_and_its_text_literally(console, fake):
    fake.run.name, fake.run.reason = "[red]plays[/red] :smile:", "waits for 2 more sites"
    out = console("run", "list").stdout
    assert "a1b2c3" in out
    assert "[red]plays[/red] :smile:" in out
    assert "queued" in out
    assert "0/3" in out
    assert "waits for 2 more sites" in out


def test_list_as_json(console, fake):
    (run,) = json.loads(console("run", "list", "--json").stdout)
    assert (run["id"], run["state"], run["rounds_total"]) == ("a1b2c3", "queued", 3)


@pytest.fixture
def trained(fake):
    fake.run.spec_json = json.dumps(SPEC)
    reason = "rank 1 died\nRuntimeError: no memory"
    sites = [
        pb.SiteRound(site="bremen", work=WORK_TRAIN, state="done", examples=640, metrics={"loss": 4.5}),
        pb.SiteRound(site="kiel", work=WORK_TRAIN, state="failed", reason=reason),
    ]
    metrics = {"train_loss": 4.5, "loss": 4.25, "perplexity": 70.105}
    fake.rounds = [pb.Round(number=1, state=pb.ROUND_STATE_FINISHED, sites=sites, metrics=metrics)]
    return fake


def test_show_has_the_rounds_and_why_a_site_is_not_done(console, trained):
    out = console("run", "show", "a1").stdout
    assert trained.asked_for(pb.GetRequest) == [pb.GetRequest(run_id="a1")]
    row = next(line.split() for line in out.splitlines() if "1/2" in line)
    assert row[:7] == ["1", "finished", "1/2", "640", "4.5000", "4.2500", "70.11"]
    assert "RuntimeError: no memory" in out


def test_show_names_the_config_as_a_sites_policy_does(console, trained):
    digest = "blake3:" + "7" * 64
    trained.run.assets.add(name="config.json", digest=digest, size_bytes=9)
    assert digest in console("run", "show", "a1").stdout
    assert json.loads(console("run", "show", "a1", "--json").stdout)["run"]["assets"][0]["digest"] == digest


def test_show_one_round_or_say_which_there_are(console, trained):
    assert "seconds by phase" in console("run", "show", "a1", "--round", "1").stdout
    with pytest.raises(NotFound, match="run a1b2c3 has no round 9; its rounds are 1 to 1"):
        console("run", "show", "a1", "--round", "9")


@pytest.mark.parametrize("command", [("show", "a1", "--sites"), ("report", "a1")])
def test_a_metric_that_no_site_measured_is_refused_with_those_that_there_are(console, trained, command):
    before = Measurement(examples=9, metrics={"loss": 4.25, "perplexity": 70.1})
    trained.rounds[0].sites[0].before.CopyFrom(before)
    with pytest.raises(NotFound, match="no site has measured 'los'; --metric can be loss, perplexity"):
        console("run", *command, "--metric", "los")


def test_sites_are_shown_by_the_loss_where_a_run_stops_on_what_training_tells(console, trained):
    stop = {"target": {"metric": "train_loss", "value": 1.0}}
    trained.run.spec_json, trained.run.best_metric = json.dumps(SPEC | {"stop": stop}), "train_loss"
    assert console("run", "show", "a1", "--sites").stdout.startswith("loss on each site's held-out part")


def test_the_shown_spec_can_be_submitted_again(console, trained, tmp_path):
    (tmp_path / "again.yaml").write_text(console("run", "show", "a1", "--spec").stdout)
    console("run", "submit", "again.yaml")
    assert yaml.safe_load(trained.asked_for(pb.SubmitRequest)[0].spec) == SPEC


@pytest.mark.parametrize(
    "command", [("export", "a1", "--to", "m", "--round"), ("clone", "a1", "--from-round")]
)
def test_a_number_that_no_round_has_is_refused_without_a_network(console, command):
    with pytest.raises(BadSpec, match="99999999999: wanted a round's number"):
        console("run", *command, "99999999999")


def test_show_as_json(console, trained):
    data = json.loads(console("run", "show", "a1", "--json").stdout)
    assert data["run"]["spec"] == SPEC
    assert [work["state"] for work in data["rounds"][0]["sites"]] == ["done", "failed"]


def test_stop_gives_the_reason_and_resume_takes_it_back(console, fake):
    assert "a1b2c3 is stopped: too slow" in console("run", "stop", "a1", "--reason", "too slow").stdout
    assert "a1b2c3 is queued" in console("run", "resume", "a1").stdout
    assert fake.asked == [pb.StopRequest(run_id="a1", reason="too slow"), pb.ResumeRequest(run_id="a1")]


def test_submit_tells_the_priority(console, fake, spec_file):
    console("run", "submit", str(spec_file), "--priority", "-5")
    assert fake.asked_for(pb.SubmitRequest)[0].priority == -5


def test_list_shows_priority_and_what_a_run_waits_for(console, fake):
    fake.run.state, fake.run.priority = pb.RUN_STATE_WAITING, 7
    fake.run.reason = "waits for sites: 1 of 3 sites that fit, 1 connected"
    row = next(line.split() for line in console("run", "list").stdout.splitlines() if "a1b2c3" in line)
    assert row[:4] == ["a1b2c3", "plays", "waiting", "7"]
    assert "1 of 3 sites that fit" in " ".join(row)


def test_pause_gives_the_reason(console, fake):
    assert "a1b2c3 is paused: grid" in console("run", "pause", "a1", "--reason", "grid").stdout
    assert fake.asked == [pb.PauseRequest(run_id="a1", reason="grid")]


def test_clone_sends_the_changed_spec_and_prints_only_the_id(console, fake):
    fake.run.spec_json = json.dumps(SPEC)
    assert console("run", "clone", "a1", "--set", "local.steps=3", "--priority", "2").stdout == "c10e\n"
    (request,) = fake.asked_for(pb.CloneRequest)
    assert yaml.safe_load(request.spec) == {**SPEC, "local": {"steps": 3}}
    assert (request.run_id, request.priority, request.HasField("from_round")) == ("a1b2c3", 2, False)


@pytest.mark.parametrize(("given", "number", "latest"), [("7", 7, False), ("latest", None, True)])
def test_a_clone_goes_on_from_a_round(console, fake, given, number, latest):
    fake.run.spec_json = json.dumps(SPEC)
    console("run", "clone", "a1", "--from-round", given)
    (request,) = fake.asked_for(pb.CloneRequest)
    assert (request.from_round if request.HasField("from_round") else None) == number
    assert request.from_latest is latest


def test_a_clone_from_what_is_no_round_is_refused_without_a_network(console):
    console.address = ""
    with pytest.raises(BadSpec, match="--from-round last: wanted a round's number, or latest"):
        console("run", "clone", "a1", "--from-round", "last")


def test_failures_show_site_round_cause_and_last_lines(console, fake):
    fake.failures = [
        pb.RunFailure(round=2, attempt=1, site="kiel", work=WORK_TRAIN, cause="failed", message="no memory",
                      log="line 1\n[red]line 2[/red]", at_s=1e9),
        pb.RunFailure(round=2, attempt=1, cause="attempt failed", message="1 of 2 sites reported", at_s=1e9),
    ]  # fmt: skip
    out = console("run", "failures", "a1").stdout
    for text in ("2.1", "kiel", "failed", "no memory", "    [red]line 2[/red]", "(coordinator)"):
        assert text in out
    assert json.loads(console("run", "failures", "a1", "--json").stdout)[0]["site"] == "kiel"
    shown = console("run", "show", "a1").stdout
    assert "1 of 2 sites reported" in shown
    assert "fedloom run failures a1b2c3" in shown


def test_a_viewer_is_told_that_it_may_not_stop(console, fake):
    fake.refusal = NotPermitted("viewer alice may not call Stop")
    with pytest.raises(NotPermitted, match="viewer alice may not call Stop"):
        console("run", "stop", "a1")


def test_the_schema_needs_no_coordinator(console):
    console.address = ""
    schema = json.loads(console("run", "schema").stdout)
    assert "rounds" in schema["required"]
