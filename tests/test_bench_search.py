"""scripts/bench/search.py in small: the same again, resumable, and honest about what it costs."""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bench_pools import put_in_place

from mergesearch.errors import CandidateError
from mergesearch.evaluate.expected import expect
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, Rule
from mergesearch.search.trials import State, Trial
from scripts import make_judging_pools, make_real_pool
from scripts.bench import judging, search, search_moments, search_report, search_rows, winner, yardstick

pytest.importorskip("cma", reason="pip install cma")

DOCUMENTS = 10
STRATEGIES = ("cmaes", "genetic", "random", "tpe")


class Layers:
    """A group of layers, as the search space has them."""

    def __init__(self, first: int, last: int):
        self.layers = (first, last)

    def rule(self, method, models, parameters) -> Rule:
        return Rule(layers=self.layers, method=method, models=tuple(models), parameters=dict(parameters))


def space(method: str = "ties"):
    models = {"a": "A", "b": "B"}
    groups = [Layers(0, 1), Layers(2, 3)]
    return yardstick.YardSpace(
        tuple(models), groups, lambda rules: Recipe(base="base", models=models, rules=tuple(rules)), method
    )


class Judge:
    """Scores a recipe by how far its weights are from 0.7; counts what it is asked. Some candidates may fail."""

    def __init__(self, broken=lambda recipe: False, stop_at: int | None = None):
        self.searched, self.held = [], []
        self.broken, self.stop_at = broken, stop_at

    def search(self, recipe: Recipe) -> tuple[float, int]:
        if self.stop_at is not None and len(self.searched) == self.stop_at:
            raise KeyboardInterrupt
        self.searched.append(recipe.id)
        if self.broken(recipe):
            raise CandidateError("it overflows")
        weights = [w for rule in recipe.rules for w in rule.parameters["weight"].values()]
        return -sum((w - 0.7) ** 2 for w in weights), DOCUMENTS

    def holdout(self, recipe: Recipe) -> float:
        self.held.append(recipe.id)
        return -1.0

    def measures(self):
        return yardstick.Measures(self.search, self.holdout, DOCUMENTS)


def play(path: Path, strategy: str = "cmaes", seed: int = 0, count: int = 20, judge=None, **options):
    judge = judge or Judge()
    ledger = yardstick.Ledger(path, judge.measures(), **options)
    yardstick.STRATEGIES[strategy](space(), seed, count, ledger)
    return yardstick.read_candidates(path)


def without_time(found) -> list:
    return [(c.id, c.value, c.documents, c.holdout, c.error) for c in found]


# --- the space ---


def test_the_start_is_an_equal_mix_at_full_density():
    found = space()
    recipe = found.decode(found.start)
    assert found.dimension == 8
    for rule in recipe.rules:
        assert rule.parameters == {"weight": {"a": 0.5, "b": 0.5}, "density": {"a": 1.0, "b": 1.0}, "normalize": False}


def test_vectors_span_the_ranges_and_are_kept_inside():
    found = space()
    low, high = (found.decode(np.full(8, value)).rules[0].parameters for value in (-3.0, 2.0))
    assert (low["weight"]["a"], low["density"]["a"]) == (0.0, pytest.approx(0.1))
    assert (high["weight"]["a"], high["density"]["a"]) == (1.0, 1.0)


def test_task_arithmetic_has_no_densities():
    found = space("task_arithmetic")
    assert found.dimension == 4
    assert set(found.decode(found.start).rules[0].parameters) == {"weight"}


# --- the strategies and their record ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_gives_the_same_search_again_and_another_seed_another(tmp_path, strategy):
    runs = [play(tmp_path / str(n), strategy, seed) for n, seed in enumerate((0, 0, 1))]
    assert without_time(runs[0]) == without_time(runs[1])
    assert without_time(runs[0]) != without_time(runs[2])
    assert len(runs[0]) == 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numpys_global_generator_is_left_alone(tmp_path, strategy):
    before = np.random.get_state()[1].tolist()
    play(tmp_path / "a", strategy)
    assert np.random.get_state()[1].tolist() == before


def test_cmaes_climbs(tmp_path):
    found = play(tmp_path / "a", count=200)
    assert found[0].value < -0.01
    assert max(c.value for c in found) > -0.003


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_goes_on_as_it_would_have(tmp_path, strategy):
    whole = play(tmp_path / "whole", strategy, count=31)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut", strategy, count=31, judge=Judge(stop_at=17))
    with (tmp_path / "cut").open("a") as file:
        file.write('{"id": "half a li')
    again = Judge()
    found = play(tmp_path / "cut", strategy, count=31, judge=again)
    assert without_time(found) == without_time(whole)
    assert len(again.searched) == 31 - 17


def test_the_deadline_ends_a_search_and_what_is_known_needs_no_time(tmp_path):
    play(tmp_path / "a", count=9)
    late = Judge()
    with pytest.raises(yardstick.OutOfTime):
        play(tmp_path / "a", count=10, judge=late, deadline=time.time() - 1)
    assert not late.searched
    assert len(play(tmp_path / "a", count=9, deadline=time.time() - 1)) == 9


def test_a_record_of_another_search_is_refused(tmp_path):
    play(tmp_path / "a", seed=0, count=4)
    with pytest.raises(ValueError, match="line 1 is of another search"):
        play(tmp_path / "a", seed=1, count=4)


def test_an_equal_recipe_is_scored_once_and_costs_nothing_more(tmp_path):
    judge = Judge()
    ledger = yardstick.Ledger(tmp_path / "a", judge.measures())
    recipe, other = (space().decode(np.full(8, value)) for value in (0.5, 0.6))
    values = [ledger(r) for r in (recipe, other, recipe)]
    assert values[0] == values[2] != values[1]
    assert judge.searched == [recipe.id, other.id]
    assert [c.documents for c in ledger.done] == [DOCUMENTS, DOCUMENTS, 0]


def test_the_holdout_is_measured_for_each_new_best_and_for_nothing_else(tmp_path):
    judge = Judge()
    found = play(tmp_path / "a", "random", count=40, judge=judge)
    best, expected = -math.inf, []
    for c in found:
        if c.value > best:
            best = c.value
            expected.append(c.id)
    assert judge.held == expected == [c.id for c in found if c.holdout is not None]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failed_candidate_is_charged_and_the_search_goes_on(tmp_path, strategy):
    judge = Judge(broken=lambda recipe: int(recipe.id[:2], 16) % 3 == 0)
    found = play(tmp_path / "a", strategy, count=40, judge=judge)
    failed = [c for c in found if c.value is None]
    assert len(found) == 40 and failed
    assert all(c.documents == DOCUMENTS and c.error == "it overflows" and c.holdout is None for c in failed)


# --- runs of mergesearch as curves ---


def trial(number: int, state: State = State.COMPLETE, minute: int | None = None, **values: Any) -> Trial:
    when = datetime.datetime(2026, 1, 1, 0, number if minute is None else minute) if state.ended else None
    values = {"score_seconds": 2.0, **values}
    return Trial(number, state, recipe_id=f"r{number}", recipe_data={"n": number}, ended_at=when, **values)


def counted(*numbers: int) -> dict[str, TaskScore]:
    return {f"task{n}": TaskScore(0.5, 0.1, count, "acc") for n, count in enumerate(numbers)}


def test_a_run_is_charged_for_all_that_it_asked_and_tells_when_it_had_something_better():
    values = {0: 0.1, 1: 0.4, 3: 0.2}
    trials = [
        trial(0, scores=counted(5, 5)),
        trial(1, minute=9, scores=counted(5, 5), learning_documents=96, learning_seconds=30.0),
        trial(2, State.PRUNED, partial=counted(2, 1)),
        trial(3, scores=counted(5, 5), same_as=0),
        trial(4, State.FAILED, error="no numbers"),
        trial(5, State.SCORED, scores=counted(5, 5)),
    ]
    found = search_moments.moments_of(trials, lambda trial: values[trial.number], {}, lambda scores: {})
    assert [(m.documents, m.seconds, m.highest, m.given.number) for m in found] == [
        (10, 2.0, 0.1, 0),
        (13, 6.0, 0.2, 3),
        (119, 40.0, 0.4, 1),
    ]


def test_a_candidate_is_named_by_its_kind_and_which_one_of_it_it_is():
    def words(strategy: str, **values: Any) -> str:
        return search_moments.in_words(Trial(0, State.COMPLETE, strategy, **values), ["math", "code"])

    assert words("baselines", name="base") == "base"
    assert words("baselines", name="math") == "single model, math"
    assert words("baselines", name="ties 0.2") == "published default, ties 0.2"
    assert words("baselines", name="slerp of the two best") == "slerp of the two best"
    assert words("study", recipe_data={"rules": [{"method": "ties"}, {"method": "ties"}]}) == "study, ties"
    learned = {"per": "tensor", "loss": "cross_entropy", "start": 5, "round": 2}
    assert words("learned_soup", key=learned) == "learned soup per tensor by cross-entropy, round 2"


def test_a_run_gives_whoever_is_expected_to_be_best_and_not_the_highest():
    draws = (winner.World("", 15, 60, 0.03).draw(seed) for seed in range(20))
    factors = {"quiz": 1.0}
    for draw in draws:
        documents = dict(enumerate(draw.candidates))
        values = {n: winner.score(each, factors) for n, each in documents.items()}
        expected = [each.value for each in expect(draw.candidates, factors)]
        best = int(np.argmax(expected))
        if values[best] < max(values.values()):
            break
    trials = [trial(n, scores=counted(60)) for n in documents]
    *_, last = search_moments.moments_of(trials, lambda t: values[t.number], documents, lambda scores: factors)
    assert last.highest == max(values.values()) > values[best]
    assert last.given.number == best
    assert last.documents <= 15 * 60


# --- what is finished, and what is missing ---


def small(tmp_path: Path, *more: str) -> list[str]:
    return ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "search"), *more]


def curve(*rows, settings="abc", budget=100, end=None, commit="", best="") -> search_rows.Curve:
    points = [search_rows.Point(documents, float(documents), value, holdout) for documents, value, holdout in rows]
    spent = end or points[-1].documents
    return search_rows.Curve(points, spent, float(spent), settings, budget, commit, best)


def test_rows_are_read_as_they_were_written_and_what_has_no_end_is_not_finished(tmp_path):
    file = tmp_path / "search.csv"
    key, other = search_rows.Key("zoo1", "auto", 3), search_rows.Key("real", "cmaes", 0)
    told = {"commit": "0123abc+", "best": "single model, b"}
    found = {key: curve((10, 0.1, 0.0), (30, 0.25, math.nan), end=50, **told), other: curve((7, 1.0, 0.5))}
    for each in found:
        search_rows.add(file, each, found[each])
    again = search_rows.read(file)
    assert repr(again) == repr(dict(sorted(found.items())))
    assert again[key].at(math.inf)[0] == 0.25 and again[key].documents == 50
    text = file.read_text().splitlines()
    old = [",".join(line.split(",")[:11]) for line in text if "single model" not in line]
    file.write_text("\n".join(old) + "\n")  # of a version that did not note the best
    assert search_rows.read(file)[other] == found[other]
    file.write_text("\n".join(line for line in text if ",end," not in line or line[:4] == "pool") + "\n")
    assert search_rows.read(file) == {} == search_rows.read(tmp_path / "none.csv")


def test_every_search_has_a_file_of_its_own_and_is_missing_until_it_has_rows(tmp_path):
    arguments = small(tmp_path, "--seeds", "3", "4")
    units = search.units(search.options(arguments))
    assert len({unit.file for unit in units}) == len({unit.run for unit in units}) == len(units)
    unit = units[0]
    assert not search.is_done(unit, {})
    for budget, done in ((unit.budget - 1, False), (unit.budget, True)):
        rows = {unit.key: curve((5, 0.1, 0.1), settings=unit.settings, budget=budget)}
        assert search.is_done(unit, rows) is done
    with pytest.raises(SystemExit, match="run with other settings"):
        search.is_done(unit, {unit.key: curve((5, 0.1, 0.1), settings="another", budget=10**9)})


@pytest.fixture
def two_pools(tmp_path, monkeypatch):
    def run(unit):
        return curve((10, 0.5, 0.4), settings=unit.settings)

    return put_in_place(monkeypatch, tmp_path, ("mine", "other"), run)


def test_what_is_run_again_begins_anew_and_nothing_of_it_is_lost(tmp_path, two_pools, capsys):
    arguments = small(tmp_path, "--pool", "mine", "--seeds", "3", "--only", "cmaes", "auto")
    yardstick_unit, own = search.units(search.options(arguments))
    for _ in range(2):
        yardstick_unit.file.parent.mkdir(parents=True, exist_ok=True)
        yardstick_unit.file.write_text("old")
        (own.run / "scores").mkdir(parents=True)
        search.main([*arguments, "--again", "cmaes", "auto"])
        assert not yardstick_unit.file.exists() and not own.run.exists()
    for n in (1, 2):
        assert yardstick_unit.file.with_name(f"cmaes-3.jsonl.{n}").read_text() == "old"
        assert own.run.with_name(f"auto-3.{n}").is_dir()
    own.run.mkdir()
    search.main([*arguments, "--again", "cmaes"])
    assert own.run.is_dir()


def test_a_row_names_the_code_that_the_command_began_with(tmp_path, two_pools, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(judging, "commit", lambda: asked.append(1) or f"c{len(asked)}")
    search.main(small(tmp_path, "--pool", "mine", "--seeds", "3", "4", "--only", "auto"))
    assert [each.commit for each in search_rows.read(tmp_path / "search.csv").values()] == ["c1", "c1"]


def test_a_row_names_every_code_that_had_a_part_in_it(tmp_path, two_pools, monkeypatch, capsys):
    arguments = small(tmp_path, "--pool", "mine", "--only", "auto", "cmaes", "--seeds", "3")
    ends = {"auto": [yardstick.OutOfTime, yardstick.OutOfTime, None], "cmaes": [None]}

    def run(unit):
        if end := ends[unit.key.search].pop(0):
            raise end
        return curve((10, 0.5, 0.4), settings=unit.settings)

    monkeypatch.setattr(search, "run_own", run)
    monkeypatch.setattr(search, "run_yardstick", run)
    # cmaes was begun by a version that noted no commits
    began = search.units(search.options(arguments))[1].file
    began.parent.mkdir(parents=True)
    began.write_text("")
    for commit in ("a1", "a1", "b2+"):
        monkeypatch.setattr(judging, "commit", lambda commit=commit: commit)
        search.main(arguments)
    ran = {key.search: each.commit for key, each in search_rows.read(tmp_path / "search.csv").items()}
    assert ran == {"auto": "a1 then b2+", "cmaes": "unknown then a1"}


def test_a_search_that_fails_is_named_with_its_traceback_and_the_status_is_1(tmp_path, two_pools, monkeypatch, capsys):
    def broken(unit):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(search, "run_own", broken)
    arguments = small(tmp_path, "--pool", "mine", "--seeds", "3", "--only", "auto", "cmaes")
    assert search.main(arguments) == 1
    said = capsys.readouterr()
    assert "auto seed 3 on mine: FAILED, RuntimeError: no such layer" in said.out
    assert "1 of 2 searches are not finished" in said.out and said.out.count("auto seed 3 on mine") == 2
    assert "Traceback" in said.err and 'raise RuntimeError("no such layer")' in said.err
    assert "cmaes" in (tmp_path / "search.md").read_text()
    monkeypatch.setattr(search, "run_own", lambda unit: curve((10, 0.5, 0.4), settings=unit.settings))
    assert search.main(arguments) == 0


def test_settings_are_the_same_wherever_a_search_runs(tmp_path, monkeypatch):
    arguments = small(tmp_path, "--pool", "zoo1", "--only", "auto", "--seeds", "0")
    (unit,) = search.units(search.options(arguments))
    (elsewhere,) = search.units(search.options([*arguments, "--set", "device=cuda", "--set", "batch_size=8"]))
    (other,) = search.units(search.options([*arguments, "--set", "holdout=0.1"]))
    before = unit.settings
    assert before == elsewhere.settings != other.settings
    monkeypatch.setitem(search.RUNS, "auto", ["search.strategy=study"])
    assert unit.settings != before


def test_the_plain_command_runs_what_belongs_to_each_pool_on_disk_and_is_missing(tmp_path, two_pools, capsys):
    mine, other = two_pools["mine"], two_pools["other"]
    two_pools["mine"] = replace(mine, seeds=(3, 4), searches=("auto", "cmaes"), overrides=("holdout=0.3",))
    two_pools["other"] = replace(other, seeds=(7,), searches=("tpe",))
    two_pools["none"] = search.Pool(tmp_path / "none.yaml", 1, 1, "make none")
    assert search.main(small(tmp_path)) == 0
    found = {(key.pool, key.search, key.seed) for key in search_rows.read(tmp_path / "search.csv")}
    both = {("mine", name, seed) for name in ("auto", "cmaes") for seed in (3, 4)}
    assert found == {*both, ("other", "tpe", 7)}
    assert "left out: none, which is not on disk: `make none`" in capsys.readouterr().err
    search.main(small(tmp_path, "--pool", "other", "--only", "tpe", "--seeds", "7", "8"))
    assert "tpe seed 8" in (said := capsys.readouterr().out) and "tpe seed 7" not in said
    search.main(small(tmp_path, "--list"))
    said = capsys.readouterr().out
    assert "\nmine: nothing\nother: nothing\nnone: not on disk: `make none`" in said
    search.main(small(tmp_path, "--list", "--seeds", "3", "9"))
    assert "\nmine: auto (seeds 9), cmaes (seeds 9)\nother: tpe (seeds 3 9)\n" in capsys.readouterr().out


def test_rows_of_other_settings_are_neither_done_nor_run_over(tmp_path, two_pools, capsys):
    arguments = small(tmp_path, "--pool", "mine", "--seeds", "3", "--only", "auto")
    search.main([*arguments, "--set", "dtype=float32"])
    with pytest.raises(SystemExit) as refused:
        search.main([*arguments, "--documents", "999"])
    said = str(refused.value)
    assert "auto seed 3 on mine, run with other settings" in said and "another --set, which to give again" in said
    assert '`--pool mine --seeds 3 --only "auto" --again "auto"`' in said and "takes these rows out for good" in said
    search.main(small(tmp_path, "--pool", "mine", "--seeds", "3", "--only", "cmaes"))
    both = (tmp_path / "search.csv").read_bytes()
    assert b"mine,cmaes" in both
    with pytest.raises(SystemExit, match="auto seed 3 on mine, run with other settings"):
        search.main(small(tmp_path, "--pool", "mine", "--seeds", "3", "--only", "auto", "--again", "cmaes"))
    assert (tmp_path / "search.csv").read_bytes() == both
    assert search.main(small(tmp_path, "--pool", "mine", "--seeds", "3", "--again", "auto", "--only", "auto")) == 0
    assert b"mine,cmaes" in (after := (tmp_path / "search.csv").read_bytes()) and after != both


def test_rows_of_settings_that_are_gone_stay_unless_they_are_named(tmp_path, two_pools, capsys):
    two_pools["mine"] = replace(two_pools["mine"], seeds=(3,), searches=("auto",), past={"0ld": "soups of old"})
    del two_pools["other"]
    old = {search_rows.Key("mine", "auto", 3): curve((10, 0.5, 0.4), settings="0ld")}
    search_rows.write(tmp_path / "search.csv", old)
    assert search.main(small(tmp_path)) == 0
    assert "left as it is: auto seed 3 on mine, run with soups of old" in capsys.readouterr().out
    assert search_rows.read(tmp_path / "search.csv").keys() == old.keys()
    search.main(small(tmp_path, "--pool", "mine", "--again", "tpe"))
    assert search_rows.read(tmp_path / "search.csv")[next(iter(old))].settings == "0ld"
    with pytest.raises(SystemExit, match="run with soups of old: no command gives these settings again"):
        search.main(small(tmp_path, "--only", "auto"))
    search.main(small(tmp_path, "--pool", "mine", "--again", "auto"))
    assert "0ld" not in [each.settings for each in search_rows.read(tmp_path / "search.csv").values()]


def test_rows_are_taken_out_of_named_pools_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        search.main(small(tmp_path, "--again", "auto"))
    assert "say on which pools, with --pool" in capsys.readouterr().err


@pytest.fixture
def every_pools_file(tmp_path, monkeypatch):
    """The configuration of each pool, as the scripts that make pools write it; no model is trained."""
    for module, names in (
        (make_real_pool, ("save_base", "fine_tune", "save", "write_table")),
        (make_judging_pools, ("train", "Rows", "write_table")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: [1, 2])
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    made = ["--base", str(tmp_path / "base"), "--out"]
    make_real_pool.make(make_real_pool.REAL, make_real_pool.options([*made, str(tmp_path / "real")]))
    judged = make_judging_pools.options([*made, str(tmp_path / "judging")])
    for name, zoo in make_judging_pools.ZOOS.items():
        make_judging_pools.make_zoo(name, zoo, judged.out / name, judged, 1, 6)
    for name in make_judging_pools.REALS:
        make_judging_pools.make_real(name, judged.out / name, judged)
    known = {
        name: replace(pool, config=tmp_path / pool.config.relative_to("models"))
        if pool.config.parts[0] == "models"
        else pool
        for name, pool in search.POOLS.items()
    }
    monkeypatch.setattr(search, "POOLS", known)
    return known


def test_the_committed_rows_are_of_the_searches_that_there_are(tmp_path, every_pools_file):
    """Of every pool, whether its models are on disk or not: each row but those of version 0.1 has the settings that
    the plain command gives its search, or settings that are named as gone, and as many documents. Else the plain
    command would refuse or run for days what is done; whoever changes a search takes its rows out."""
    finished = search_rows.read(Path(search.__file__).parents[2] / "results" / "search.csv")
    ours = {key: each for key, each in finished.items() if not key.search.endswith(search_report.EARLIER)}
    units = {unit.key: unit for unit in search.units(search.options([]))}
    assert units.keys() >= ours.keys(), "the plain command knows no such search, seed or pool"
    assert {key.pool for key in ours} == set(search.POOLS)
    for key, each in ours.items():
        past = search.POOLS[key.pool].past
        assert each.settings in past or search.is_done(units[key], finished), key


def test_pools_have_names_and_files_and_what_is_not_there_is_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nmodels: {b: y, a: x}\n")
    assert search.pool_of(str(mine)) == ("mine", search.Pool(mine, 25_000, 25_000))
    assert search.pool_of("zoo1")[1].yardstick == 610_400
    with pytest.raises(SystemExit, match=r"name one of zoo1, real, .*judge_real_seven, or a file"):
        search.pool_of(str(tmp_path / "none.yaml"))


# --- the page ---


def measured() -> dict[search_rows.Key, search_rows.Curve]:
    return {
        search_rows.Key("zoo1", "cmaes", 0): curve((10, 0.1, 0.0), (20, 0.5, 0.3), (40, 0.6, 0.2)),
        search_rows.Key("zoo1", "cmaes", 1): curve((10, 0.2, 0.1), (30, 0.3, 0.3), end=40),
        search_rows.Key("zoo1", "auto", 0): curve((5, 0.1, 0.0), (12, 0.7, 0.5)),
        search_rows.Key("zoo1", "auto", 1): curve((5, 0.2, 0.2), (30, 0.25, 0.4), end=50),
    }


def of_zoo1(found):
    return search_report.by_pool(found, ["cmaes", "auto"])["zoo1"]


def test_a_curve_tells_score_and_cost():
    candidates = [
        yardstick.Candidate(f"c{n}", value, 10, holdout, seconds=3.0)
        for n, (value, holdout) in enumerate([(0.1, 0.0), (0.5, 0.3), (0.4, None), (None, None), (0.6, 0.2)])
    ]
    found = search_rows.curve_of(candidates, "abc", 60)
    assert [(p.documents, p.seconds, p.search, p.holdout) for p in found.points] == [
        (10, 3.0, 0.1, 0.0),
        (20, 6.0, 0.5, 0.3),
        (50, 15.0, 0.6, 0.2),
    ]
    assert found.at(49) == (0.5, 0.3) and (found.documents, found.seconds, found.each) == (50, 15.0, 10)
    assert all(map(math.isnan, found.at(9)))
    assert (found.cost_of(0.5), found.cost_of(0.61)) == (20, math.inf)


def test_the_report_compares_seed_by_seed_at_equal_cost():
    curves = of_zoo1(measured())
    # seed 0: after 12 documents .5 and 0; seed 1: after 40 documents .4 and .3
    found = search_report.differences(curves["auto"], curves["cmaes"])
    assert [spent for spent, _ in found] == [12, 40]
    assert [difference for _, difference in found] == pytest.approx([0.5, 0.1])
    assert search_report.reach_cells(curves["auto"], curves["cmaes"]) == ("1 of 2", "12", "0.300")
    assert search_report.reach_cells(curves["auto"], {}) == ("–", "–", "–")


def test_the_table_says_what_code_ran_a_search():
    seeds = {n: curve((12, 0.2, 0.1), commit=commit) for n, commit in enumerate(["bb1", "", "aa2+", "bb1"])}
    assert search_report.commits_cell(seeds) == "bb1, aa2+"
    assert search_report.commits_cell({0: curve((12, 0.2, 0.1))}) == "–"


def test_the_table_says_what_the_searches_give_where_that_was_recorded():
    assert search_report.given({"auto": {0: curve((12, 0.2, 0.1))}}) == []
    seeds = {n: curve((12, 0.2, 0.1), best=best) for n, best in enumerate(["average", "", "average", "base"])}
    *_, line, _ = search_report.given({"cmaes": {0: curve((12, 0.2, 0.1))}, "published defaults": seeds})
    assert line == "| best baseline | average (2); not recorded (1); base (1) |"


def test_auto_stands_beside_each_of_the_others_where_both_have_ended():
    assert search_report.rivals({"cmaes": {0: curve((12, 0.2, 0.1))}}) == []
    curves = {
        "auto": {0: curve((12, 0.7, 0.5)), 1: curve((50, 0.25, 0.4)), 2: curve((12, 0.1, 0.2))},
        "tpe": {0: curve((90, 0.2, 0.1)), 1: curve((90, 0.2, 0.4))},
        "random": {7: curve((9, 0.9, 0.9))},
        "auto without racing": {0: curve((12, 0.2, 0.1))},
    }
    *_, line, _ = search_report.rivals(curves)
    assert line.startswith("| tpe | 2 | +0.2000 ± ") and line.endswith(" | +1.0 | 1 | 1 |")
    assert "random" not in str(search_report.rivals(curves)) and "racing" not in str(search_report.rivals(curves))


def test_what_is_left_out_of_auto_is_compared_with_auto():
    curves = of_zoo1(measured())
    assert search_report.ablations(curves) == []
    curves["auto without racing"] = {0: curve((12, 0.2, 0.1)), 1: curve((50, 0.35, 0.6))}
    # seed 0: .2 and .1 against .7 and .5; seed 1: .35 and .6 against .25 and .4
    *_, line, _ = search_report.ablations(curves)
    assert line.startswith("| auto without racing | 2 | -0.2000 ± ") and "| -0.7 | -0.1000 ± " in line


def test_what_the_first_version_did_stands_beside_it_and_is_no_part_of_what_is_now():
    curves = of_zoo1(measured())
    assert search_report.since(curves) == []
    curves["auto (0.1)"] = {0: curve((12, 0.2, 0.1))}
    curves["auto without racing (0.1)"] = {0: curve((12, 0.1, 0.3))}
    # seed 0: .7 and .5 against .2 and .1
    *_, line, _ = search_report.since(curves)
    assert line == "| auto | 1 | +0.5000 | – | +0.4000 | – |"
    assert search_report.ablations(curves) == []
    *_, line, _ = search_report.ablations(curves, search_report.EARLIER)
    assert line == "| auto without racing (0.1) | 1 | -0.1000 | – | +0.2000 | – |"


def test_the_interval_is_students():
    mean = search_report.Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean.value, mean.stderr) == (3.0, pytest.approx(math.sqrt(0.5)))
    assert mean.half == pytest.approx(2.776445 * math.sqrt(0.5))


def test_the_page_has_every_pool_and_is_printed_from_the_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_report, "draw", lambda *_: False)
    found = {**measured(), search_rows.Key("real", "auto", 0): curve((400, 0.9, 0.8), (800, 0.95, 0.85))}
    search_rows.write(tmp_path / "here.csv", found)
    lost = tmp_path / "elsewhere.csv"
    search_rows.write(lost, {search_rows.Key("real", "tpe", 0): curve((400, 0.7, 0.6))})
    arguments = ["--results", str(tmp_path / "here"), "--take", str(lost)]
    assert search.main(arguments) == 0
    text = (tmp_path / "here.md").read_text()
    assert text.index("## Pool zoo1") < text.index("## Pool real")
    assert "| auto | 2 | 0.4750" in text and "| 31 | 1 of 2 | 12 | 0.300 |" in text  # seconds, too
    assert "| tpe | 1 | 0.7000 | 0.6000 | 400 | 400 |" in text
    with pytest.raises(SystemExit, match="no search is finished"):
        search.main(["--results", str(tmp_path / "nothing"), "--report"])


@pytest.mark.slow
def test_one_command_runs_what_is_missing_and_prints_the_page(tmp_path, monkeypatch, capsys):
    """On the demo zoo of version 0.1, on few documents: a yardstick, one of mergesearch's own, and the entropy soup."""
    monkeypatch.setattr(search_report, "draw", lambda *_: False)
    soup = "search.learned_soup={per: [tensor], loss: [entropy], start: 0.3, steps: 2, documents: 1}"
    monkeypatch.setitem(
        search.RUNS, "entropy_soup", ["search.strategy=[baselines, learned_soup]", "search.defaults=false", soup]
    )
    named = {"zoo_code": "acc", "zoo_prose": "bits_per_byte", "zoo_strings": "exact_match"}
    tasks = ", ".join(f"{{task: {task}, metric: {metric}, limit: 4}}" for task, metric in named.items())
    changes = [f"tasks=[{tasks}]", "holdout=0.5", "device=cpu", "dtype=float32"]
    arguments = small(
        tmp_path, "--pool", "zoo1", "--seeds", "1", *(part for change in changes for part in ("--set", change))
    )
    chosen = ["--documents", "24", "--only", "cmaes"], ["--documents", "200", "--only", "entropy_soup"]
    for each in chosen:
        search.main([*arguments, *each])
    said = capsys.readouterr().out
    assert said.count("0 of 1 searches are not finished") == 2 and "FAILED" not in said
    found = {key.search: each for key, each in search_rows.read(tmp_path / "search.csv").items()}
    assert found["cmaes"].documents == 24 and all(each.commit == judging.commit() for each in found.values())
    assert all(each.seconds > 0 and math.isfinite(each.at(math.inf)[1]) for each in found.values())
    assert found["entropy_soup"].documents > 6 * 12  # the parents and the average, and what learning took
    assert (tmp_path / "out" / "scales" / "zoo1-1.json").is_file()
    before = (tmp_path / "search.csv").read_bytes()
    monkeypatch.setattr(search, "run_unit", lambda unit: pytest.fail(f"{unit.name} runs again"))
    for each in chosen:
        search.main([*arguments, *each])
    assert (tmp_path / "search.csv").read_bytes() == before
