"""The learning benchmark on models of a few thousand weights: what it counts, keeps and claims."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from learning.__main__ import main
from learning.arms import ALONE, OWN, POOL, Arm, Rates, Setting, run_spec
from learning.corpora import digest_of_corpus, pieces, roles, split_corpus
from learning.federation import federation
from learning.gates import gates_of, parameter_server_bytes, ring_bytes
from learning.profiles import PROFILES, Place, plans
from learning.records import write_record_sites
from learning.results import Point, Result, Results, best, line_of, read_lines
from learning.sentiment import label_of
from learning.sequences import passages
from learning.tables import bytes_to, comparison, each_step_bytes_to, replace_section
from learning.trials import Experiment, grid_of, key_of, run_experiment
from learning.workbench import Workbench, drops_out

from fedloom_client.training.orders import Order
from fedloom_client.training.records import held_out_records

SETTING = Setting(
    model={
        "config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16},
        "tokenizer": "bytes",
    },
    task={"context_tokens": 16},
    sites=2,
    steps=4,
    batch_examples=2,
    warmup_steps=1,
    evaluations=2,
    curve_examples=4,
    final_examples=8,
)
FEW = Arm(name="few", told="FedAvg", local_steps=2, rates=(1e-3, 1e-2))
CENTRAL = Arm(name="central", told="pooled", data=POOL, rates_of="few", seeds=1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate(("one", "two")):
        (folder / f"{name}.txt").write_text("the sun rises over the green hill\n" * 40 * (number + 1))
    return folder


async def test_trials_are_done_once_and_counted_by_the_coordinators_records(corpus, tmp_path, capsys):
    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    experiment = Experiment(name="small", title="", setting=SETTING, arms=(FEW, CENTRAL), seeds=(1, 2))
    results, bench = Results(tmp_path / "results"), Workbench(device="cpu", warm=4, threads=1)
    for _ in range(2):
        async with federation(sites, bench, tmp_path / "federation") as running:
            await run_experiment(experiment, running, sites, results)
    bench.close()
    done = results.of("small")
    assert len(capsys.readouterr().out.splitlines()) == len(done) == 4  # 2 rates and 1 seed more; 1 pooled
    few = next(result for result in done if result.arm == "few")
    pooled = next(result for result in done if result.arm == "central")
    # 4 steps of 2 examples with 15 targets at each of 2 sites; on one machine 4 examples a step
    assert few.tokens == pooled.tokens == 4 * 2 * 15 * 2
    assert few.steps == pooled.steps == 4
    assert [point.steps for point in few.curve] == [0, 2, 4]
    assert few.curve[-1].wire_bytes == few.bytes_up + few.bytes_down
    assert 2 * 2 * few.model_bytes == few.bytes_up  # 2 rounds, 2 sites
    models_down = 3 * 2 * few.model_bytes  # config and tokenizer come to each site once, beside them
    assert models_down < few.bytes_down < models_down + 20_000
    assert set(few.sites) == set(pooled.sites) == {"site-1", "site-2"}
    mean = sum(metrics["loss"] for metrics in few.sites.values()) / 2  # each measured 8 examples
    assert few.metrics["loss"] == pytest.approx(mean)
    assert pooled.curve[0].metrics == few.curve[0].metrics  # of one model, measured on the same examples
    assert pooled.curve[-1].metrics != few.curve[-1].metrics


async def test_a_rate_that_diverges_is_a_result_and_no_end(corpus, tmp_path):
    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    arm = Arm(name="wild", told="", local_steps=2, inner="sgd", rates=(1e30, 1e-2))
    experiment = Experiment(name="wild", title="", setting=SETTING, arms=(arm,), seeds=(1,))
    results, bench = Results(tmp_path / "results"), Workbench(device="cpu", warm=4, threads=1)
    async with federation(sites, bench, tmp_path / "federation") as running:
        await run_experiment(experiment, running, sites, results)
    bench.close()
    by_rate = {result.lr: result for result in results.of("wild")}
    assert by_rate[1e30].figure("loss") == math.inf
    assert "not finite" in by_rate[1e30].failed or "loss is" in by_rate[1e30].failed
    assert best(by_rate.values(), "loss").lr == 1e-2


async def test_rounds_go_on_without_sites_that_drop_out(corpus, tmp_path):
    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    bench = Workbench(device="cpu", warm=4, threads=1)
    arm = replace(FEW, local_steps=1, dropout=0.5)
    async with federation(sites, bench, tmp_path / "federation") as running:
        bench.dropout = 0.5
        run = await running.train(run_spec(SETTING, arm, Rates(local=1e-3), seed=3))
        trained = [a for a in running.store.assignments(run.id) if a.work == "train"]
    bench.close()
    assert run.rounds_done == 4
    assert {a.state for a in trained} == {"done", "failed"}
    assert {a.reason for a in trained if a.state == "failed"} == {"the site dropped out, as the trial asks"}


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_dropout_has_the_share_that_was_asked_for_and_does_not_depend_on_the_runs_id(share):
    def gone(run: str, number: int) -> bool:
        name = f"{run}.{number}.1.train.a"
        order = Order(
            id=name, work="train", run_id=run, round=number, model_path="", assets_dir="", spec={"seed": 7}
        )
        return drops_out(order, "a", share)

    seen = [gone("x", number) for number in range(2000)]
    assert abs(sum(seen) / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)
    assert seen == [gone("another", number) for number in range(2000)]


def test_roles_are_speakers_with_enough_to_say(tmp_path):
    speech = "to be or not to be\n" * 60
    text = f"ACT I.\n\n Ham.\n{speech}\n\nMar.\nLook!\n\nHam.\n{speech}"
    (tmp_path / "hamlet.txt").write_text(text)
    assert list(roles(tmp_path)) == [("hamlet/Ham", speech + "\n" + speech)]


def test_pieces_are_all_of_the_text(corpus):
    assert "".join(text for _, text in pieces(corpus)) == "".join(
        (corpus / name).read_text() for name in ("one.txt", "two.txt")
    )


def test_the_pool_has_every_part_and_the_site_with_most_text_is_alone(corpus, tmp_path):
    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    assert {site: set(sets) for site, sets in sites.items()} == {
        "site-1": {OWN, ALONE, POOL}, "site-2": {OWN, ALONE, POOL}, "pool": {POOL, ALONE},
    }  # fmt: skip
    assert len(sites["pool"][POOL].files) == 2
    assert sites["pool"][ALONE] == sites["site-1"][OWN]
    for site in ("site-1", "site-2"):  # there it is what the site measures on
        assert sites[site][POOL] == sites[site][ALONE] == sites[site][OWN]
    with pytest.raises(SystemExit, match="has 2 parts by file, too few for 3 sites"):
        split_corpus(corpus, "file", 3, tmp_path / "more")


def test_an_arms_grid_is_every_pair_of_rates():
    arm = Arm(name="a", told="", rates=(1.0, 2.0), server_rates=(0.5, None))
    assert [str(rates) for rates in grid_of(arm, {})] == ["1-0.5", "1", "2-0.5", "2"]


def test_the_grid_of_an_arm_that_follows_another_has_the_others_rate_at_the_sites():
    arm = Arm(name="a", told="", rates=(1.0, 2.0), rates_of="b", server_rates=(0.5, 0.7))
    assert [str(rates) for rates in grid_of(arm, {"b": Rates(local=3.0, server=0.1)})] == ["3-0.5", "3-0.7"]


def test_rates_are_told_as_they_were_given():
    assert Rates(local=5e-5).told == "5e-05"
    assert Rates(local=2e-5, server=1e-3).told == "2e-05, server 0.001"


def test_results_of_a_changed_corpus_have_a_folder_of_their_own(corpus):
    before = digest_of_corpus(corpus)
    assert digest_of_corpus(corpus) == before
    (corpus / "more.txt").write_text("and sets")
    assert digest_of_corpus(corpus) != before


def test_arms_that_would_not_see_equal_tokens_are_refused():
    with pytest.raises(AssertionError, match="4 steps are no multiple of 3"):
        run_spec(SETTING, replace(FEW, local_steps=3), Rates(local=1e-3), seed=1)


def result(arm: str, seed: int, loss: float, **facts: object) -> Result:
    blank = Result(
        experiment="gates",
        arm=arm,
        seed=seed,
        lr=1e-3,
        server_lr=None,
        key="",
        metrics={"loss": loss},
        steps=10,
    )
    return replace(blank, **facts)


def test_a_result_reads_back_as_it_was_written(tmp_path):
    point = Point(round=1, steps=2, tokens=3, wire_bytes=4, metrics={"loss": 2.5})
    one = result("a", 1, 2.0, curve=[point])
    assert read_lines(line_of(one)) == [one]
    results = Results(tmp_path)
    results.add(one)
    assert results.find(result("a", 1, math.nan)) == one
    assert results.find(result("a", 1, math.nan, key="of another spec")) is None


def test_results_of_another_machine_are_taken_over_and_those_done_here_stay(tmp_path):
    results = Results(tmp_path)
    results.add(result("a", 1, 2.0))
    results.take_over([result("a", 1, 3.0), result("b", 1, 4.0)])
    results.settle("gates", [result("a", 1, 0.0), result("b", 1, 0.0)])
    assert sorted(one.metrics["loss"] for one in results.of("gates")) == [2.0, 4.0]


def test_a_trial_of_two_experiments_is_done_once(tmp_path):
    results = Results(tmp_path)
    results.add(result("a", 1, 2.0, key="same"))
    twin = results.twin(result("b", 1, math.nan, experiment="rules", key="same"))
    assert twin == result("b", 1, 2.0, experiment="rules", key="same")
    assert results.twin(result("b", 1, math.nan, experiment="rules", key="other")) is None
    assert results.twin(result("b", 2, math.nan, experiment="rules", key="same")) is None


def test_a_pretrained_model_is_the_same_wherever_it_lies():
    setting = replace(SETTING, model={"path": "/one/minilm"})
    keys = {
        key_of(run_spec(one, FEW, Rates(local=1e-3), seed=1), one, FEW, "")
        for one in (setting, replace(setting, model={"path": "/two/minilm"}))
    }
    assert len(keys) == 1


def test_a_claimed_trial_is_another_processs_until_it_is_done_or_given_up(tmp_path):
    results, blank = Results(tmp_path), result("a", 1, 2.0)
    claim = results.claim(blank, wait=False)
    assert Results(tmp_path).claim(blank, wait=False) is None
    with Results(tmp_path).claim(replace(blank, seed=2), wait=False) as another:
        assert another is not None
    with ThreadPoolExecutor() as other, claim:
        waiting = other.submit(results.claim, blank, wait=True)
        assert not waiting.done()
        results.add(blank)
        claim.__exit__()  # not before the result is there
        with waiting.result(60):
            assert results.find(blank) is not None
    assert results.find(blank) == blank


MOVED = {"model_bytes": 25, "sites": {"a": {}, "b": {}}}


def test_gates_hold_the_mean_of_the_seeds_against_their_limits():
    results = [
        *(result("central", seed, 2.0) for seed in (1, 2)),
        *(result("alone", seed, loss) for seed, loss in ((1, 2.2), (2, 2.05))),
        *(result("diloco-h10", seed, loss, **MOVED, bytes_up=100) for seed, loss in ((1, 2.08), (2, 2.10))),
        *(result("diloco-h50", seed, loss, **MOVED, bytes_up=25) for seed, loss in ((1, 2.2), (2, 2.24))),
        *(result("diloco-h10-int8", seed, loss) for seed, loss in ((1, 2.08), (2, 2.121))),
    ]
    gates = gates_of(results, (2e-6, 0.5))
    assert [(gate.figure.split(",")[0], gate.holds) for gate in gates] == [
        ("weights differ by 2.0e-06 at most", False),
        ("1.0450", True),  # (1.04 + 1.05) / 2
        ("1.1100", False),  # (1.10 + 1.12) / 2
        ("+0.50%", True),  # (1 + 1.01) / 2 − 1
        ("0.9849", False),  # 2.10 / 2.05 is over 1 with the second seed
        ("10.00-fold", True),  # 2 ways, 2 sites, 25 bytes, 10 steps over 100 bytes
        ("40.00-fold", False),
    ]
    assert gates[1].noise == "2 seeds: 1.0400 to 1.0500, standard deviation 0.0071"


def test_bytes_to_the_target_are_read_off_the_curve():
    curve = [
        Point(round=n, steps=10 * n, tokens=0, wire_bytes=100 * n, metrics={"loss": loss})
        for n, loss in enumerate((5.0, 3.0, 2.0))
    ]
    one = result("a", 1, 2.0, curve=curve, model_bytes=7)
    assert bytes_to(one, 4.0) == 50
    assert bytes_to(one, 2.5) == 150
    assert bytes_to(one, 1.9) is None
    at_three = replace(one, sites={"a": {}, "b": {}, "c": {}})
    assert each_step_bytes_to(one, 4.0, parameter_server_bytes(at_three)) == 5 * 2 * 3 * 7  # 5 of 10 steps
    assert each_step_bytes_to(one, 4.0, ring_bytes(at_three)) == 5 * 2 * 2 * 7


def test_the_table_takes_the_rates_that_were_chosen():
    experiment = Experiment(name="gates", title="", setting=SETTING, arms=(FEW,), seeds=(1, 2))
    rows = [
        result("few", 1, 2.0),
        result("few", 2, 2.2),
        result("few", 1, 1.9, lr=1.0, failed="the loss is nan"),
        result("few", 1, 2.5, lr=2.0),
    ]
    assert "| FedAvg | 2.1000 ± 0.1414 |" in comparison(experiment, rows)


def test_a_pages_section_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t -->\nold\n<!-- end of t -->\nb\n")
    replace_section(page, "t", "new\n")
    assert page.read_text() == "a\n<!-- t -->\n\nnew\n\n<!-- end of t -->\nb\n"
    with pytest.raises(SystemExit, match="has no marks"):
        replace_section(page, "u", "")


@pytest.mark.slow
async def test_one_round_without_local_steps_is_one_step_of_ddp(corpus, tmp_path):
    from learning.ddp import difference_from_ddp

    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    bench = Workbench(device="cpu", warm=4, threads=1)
    config = {**SETTING.model["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    exact = replace(SETTING, model={**SETTING.model, "config": config})
    async with federation(sites, bench, tmp_path / "federation") as running:
        difference, step = await difference_from_ddp(running, exact, tmp_path / "ddp")
    bench.close()
    assert difference <= 1e-6
    assert step > 0.01


def test_the_pool_holds_out_what_the_sites_hold_out(tmp_path):
    counts = {"a": 103, "b": 58}
    records = {site: [{"text": f"{site}{n}"} for n in range(count)] for site, count in counts.items()}
    sites = write_record_sites(records, tmp_path / "texts")
    held = {}
    for site, name in (("a", OWN), ("b", OWN), ("pool", POOL)):
        rows = [json.loads(line) for line in Path(sites[site][name].files[0]).read_text().splitlines()]
        flags = held_out_records(sites[site][name].held_out)
        pairs = list(zip(rows, flags, strict=False))
        held[site] = [{row["text"] for row, out in pairs if out == kind} for kind in (False, True)]
    assert held["pool"][1] <= held["a"][1] | held["b"][1]
    assert held["pool"][0] <= held["a"][0] | held["b"][0]
    assert sum(map(len, held["pool"])) > 161 - 5


def test_passages_keep_their_words_and_lose_the_rest():
    text = "Ham.\nTo be, or not to be,\nthat's the Question!\n\nMar.\nNo.\n"
    assert list(passages(text)) == [
        {"source": "ham to be or not to be that's the question",
         "target": "Ham. / To be, or not to be, / that's the Question!"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rating", "label"), [(-0.5, "negative"), (-0.49, "neutral"), (0.5, "positive"), (0.0, "neutral")]
)
def test_a_rating_half_a_point_off_zero_says_something(rating, label):
    assert label_of(rating) == label


def test_arms_of_which_more_is_better_are_chosen_by_the_most():
    tried = ((1.0, 0.4), (2.0, 0.6))
    rows = [replace(result("few", 1, 0.0), lr=lr, metrics={"macro_f1": f1}) for lr, f1 in tried]
    setting = replace(SETTING, metric="macro_f1", higher_is_better=True)
    experiment = Experiment(name="gates", title="", setting=setting, arms=(FEW,), seeds=(1,))
    assert "| FedAvg | 0.6000 |" in comparison(experiment, rows)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["fedex", "ffa", "fedit", "stack"])
async def test_adapters_of_every_merge_are_trained_and_measured(corpus, tmp_path, merge):
    sites = split_corpus(corpus, "file", 2, tmp_path / "texts")
    bench = Workbench(device="cpu", warm=1, threads=1)
    adapter = {"kind": "lora", "rank": 2, "alpha": 4, "merge": merge}
    arm = replace(FEW, model={"adapter": adapter}, rates=(1e-2,))
    experiment = Experiment(name="small", title="", setting=SETTING, arms=(arm,), seeds=(1,))
    results = Results(tmp_path / "results")
    async with federation(sites, bench, tmp_path / "federation") as running:
        await run_experiment(experiment, running, sites, results)
    bench.close()
    (done,) = results.of("small")
    assert done.failed == ""
    assert done.metrics["loss"] < done.curve[0].metrics["loss"]


def test_nothing_passes_beside_a_trial_without_a_model():
    results = [
        result("central", 1, 2.0, failed="the loss is nan"),
        result("alone", 1, 3.0),
        result("diloco-h10", 1, 2.0),
        result("diloco-h50", 1, 2.0, failed="the loss is nan"),
    ]
    gates = gates_of(results, None)
    assert [gate.holds for gate in gates] == [False, False, False, False, True, False, False]  # beats alone


def test_what_was_not_measured_passes_no_gate():
    gates = gates_of([], None)
    assert len(gates) == 7
    assert {(gate.figure, gate.holds) for gate in gates} == {("not measured", False)}


def test_results_of_other_trials_are_not_told_of(tmp_path):
    """Such as those of other data or settings, and those that were taken over and belong to neither."""
    results = Results(tmp_path)
    mine, other = result("a", 1, 2.0, key="now"), result("a", 2, 1.0, key="then")
    results.take_over([mine, other])
    assert results.of("gates") == []
    results.settle("gates", [replace(mine, metrics={}), replace(other, key="now")])
    assert results.of("gates") == [mine]
    results.begin("gates")
    assert results.of("gates") == []


def test_an_experiment_that_a_profile_has_not_is_refused(capsys):
    with pytest.raises(SystemExit, match="--only gatse: profile short has gates"):
        main(profile="short", only=["gatse"], report=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_arm_of_a_profile_is_a_run_that_may_be_submitted(profile, tmp_path):
    place = Place(corpus=tmp_path, split="role", downloads=tmp_path, scratch=tmp_path)
    for plan in plans(profile, place):
        experiment = plan.experiment
        known: dict[str, Rates] = {}
        for arm in experiment.arms:
            assert not arm.rates_of or not experiment.arm(arm.rates_of).rates_of
            known[arm.name] = grid_of(arm, known)[0]
            spec = run_spec(experiment.setting, arm, known[arm.name], seed=1)
            assert (spec.local.steps or 0) * spec.rounds == experiment.setting.steps
        assert len(known) == len(experiment.arms)
