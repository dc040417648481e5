"""The study over stand-ins for engine and scorer: order, budget, faults, resumption."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.late import some
from support.searches import Engine, Found, Scorer, start

from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Recipe
from mergesearch.results.loading import load_run
from mergesearch.results.record import ranked, records
from mergesearch.search import store, trials
from mergesearch.search.history import History, spans, worked_hours
from mergesearch.search.trials import Trial
from mergesearch.search.worker import SearchFailed


def proposals(folder: Path) -> list[tuple[str | None, str | None, float | None]]:
    found = load_run(folder).records
    return [(record.name, record.recipe_id, record.objective) for record in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str | None, str | None, float | None]]:
    """What a run that nothing stopped proposes and finds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder).run()
    return proposals(folder)


def test_baselines_come_first_and_the_budget_is_kept(tmp_path: Path) -> None:
    seen: list[Trial] = []
    search = start(tmp_path / "run")
    search._finished = search._teller._finished = seen.append
    search.run()
    found = records(search.history())
    assert [record.name for record in found[:5]] == ["base", "a", "b", "average", None]
    assert len(found) == 4 + 14 and all(record.state == "complete" for record in found)
    assert sorted(record.number for record in seen) == list(range(18))
    best = found[5]
    assert best.recipe and best.recipe_id and best.merge_seconds == 0.25 and best.score_seconds == 0.5
    assert best.machine["torch"] and best.machine["device"] == "cpu" and best.stderr
    assert (tmp_path / "run" / "scores" / "00005.npz").read_text() == "documents"


def test_the_parents_fix_the_scale(tmp_path: Path) -> None:
    search = start(tmp_path / "run")
    search.run()
    base, a, b = records(search.history())[:3]
    assert base.objective == pytest.approx(0.0) or store.noted(search.study, "objective")["notes"]
    quiz = max(a.scores["quiz"].value, b.scores["quiz"].value)
    origin, unit = store.noted(search.study, "objective")["scales"]["quiz"]
    assert (origin, unit) == (base.scores["quiz"].value, quiz - base.scores["quiz"].value) or (origin, unit) == (0, 1)


@pytest.mark.parametrize("against", ["base", "best"])
def test_a_guard_keeps_winners_from_getting_worse(tmp_path: Path, against: str) -> None:
    guard = [{"task": "bits", "max_drop": 0.1, "against": against}]
    search = start(tmp_path / "run", tasks=[{"task": "quiz"}], guard=guard)
    search.run()
    found = records(search.history())
    references = [r.scores["bits"].value for r in found[1:3]] if against == "best" else [found[0].scores["bits"].value]
    for record, trial in zip(found, search.study.get_trials(), strict=True):
        excess = record.scores["bits"].value - (min(references) + 0.1)
        assert trial.constraints == {"bits": pytest.approx(excess)}
        assert bool(record.infeasible) == (excess > 0)
    order = ranked(found)
    assert 0 < sum(record.infeasible is None for record in found) < len(found)
    assert [bool(r.infeasible) for r in order] == sorted(bool(r.infeasible) for r in order)
    assert search.study.best_trial.number == order[0].number
    assert "guard bits: bits_per_byte at most" in store.noted(search.study, "objective")["notes"][-1]


def test_a_guard_against_what_could_not_be_scored_ends_the_run(tmp_path: Path) -> None:
    engine = Engine(lambda recipe: CandidateError("NaN") if recipe.methods == ["task_arithmetic"] else None)
    changes = {"objective": {"scale": "raw"}, "guard": [{"task": "bits", "max_drop": 0.1}]}
    with pytest.raises(SearchFailed, match="guard bits is against base, and base could not be scored"):
        start(tmp_path / "run", engine, tasks=[{"task": "quiz"}], **changes).run()


def test_two_runs_with_one_seed_are_the_same_and_another_seed_differs(tmp_path: Path, whole: list[Any]) -> None:
    start(tmp_path / "again").run()
    assert proposals(tmp_path / "again") == whole
    start(tmp_path / "other", search={"trials": 3, "seed": 4}).run()
    assert not {row[1] for row in proposals(tmp_path / "other")[4:]} & {row[1] for row in whole}


@pytest.mark.parametrize("moment", ["load", "score"])
@pytest.mark.parametrize("at", some([0, 2, 4, 15], now=[0, 15]))
def test_stopped_anywhere_the_same_command_ends_as_if_it_had_not_been(
    tmp_path: Path, moment: str, at: int, whole: list[Any]
) -> None:
    engine = Engine(stop_at=at if moment == "load" else None)
    first = Scorer(engine, fail_at=at if moment == "score" else None)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", scorer=first).run()
    second = Scorer(Engine())
    start(tmp_path / "cut", scorer=second).run()
    assert proposals(tmp_path / "cut") == whole
    assert len(first.scored) + len(second.scored) == 18  # none scored twice, none lost


@pytest.mark.parametrize(
    "key",
    some(
        ["worker", "taken", "recipe_id", "recipe_data", "machine", "identity", "merge_seconds", "scores"],
        now=["taken", "recipe_data", "scores"],
    ),
)
def test_killed_after_any_write_it_ends_as_if_it_had_not_been(
    tmp_path: Path, key: str, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = optuna.Trial.set_user_attr

    def killed(self: optuna.Trial, name: str, value: Any) -> None:
        write(self, name, value)
        if (self.number, name) == (7, key):
            raise KeyboardInterrupt

    monkeypatch.setattr(optuna.Trial, "set_user_attr", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut").run()
    monkeypatch.undo()
    start(tmp_path / "cut").run()
    assert proposals(tmp_path / "cut") == whole and None not in [recipe for _, recipe, _ in whole]


@pytest.mark.parametrize("at", some([2, 5, 40, 60], now=[5, 60]))
def test_killed_while_a_trial_is_proposed_it_gets_the_same_parameters(
    tmp_path: Path, at: int, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    suggest, calls = optuna.Trial.suggest_float, []

    def killed(self: optuna.Trial, *arguments: Any, **options: Any) -> float:
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return suggest(self, *arguments, **options)

    monkeypatch.setattr(optuna.Trial, "suggest_float", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut").run()
    monkeypatch.undo()
    start(tmp_path / "cut").run()
    assert proposals(tmp_path / "cut") == whole


def test_a_larger_budget_goes_on_from_a_finished_run(tmp_path: Path, whole: list[Any]) -> None:
    start(tmp_path / "run", search={"trials": 5, "seed": 3}).run()
    scorer = Scorer(Engine())
    start(tmp_path / "run", scorer=scorer).run()
    assert len(scorer.scored) == 9
    assert proposals(tmp_path / "run") == whole


def test_a_failing_candidate_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    def broken(recipe: Recipe) -> Exception | None:
        return CandidateError("ties made NaN in layers.0.mlp") if recipe.methods == ["ties"] else None

    search = start(tmp_path / "run", Engine(broken))
    search.run()
    failed = [record for record in records(search.history()) if record.state == "failed"]
    assert failed and {record.error for record in failed} == {"ties made NaN in layers.0.mlp"}
    assert len(records(search.history())) == 18


@pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError("no memory"), ZeroDivisionError("zero")])
def test_no_error_of_one_candidate_ends_the_run(tmp_path: Path, error: Exception) -> None:
    engine = Engine(lambda recipe: error if len(recipe.rules) == 2 else None)  # proposals have a rule for each group
    search = start(tmp_path / "run", engine, search={"trials": 2, "seed": 3})
    search.run()
    reasons = {record.error for record in records(search.history()) if record.state == "failed"}
    assert reasons == {f"{type(error).__name__}: {error}"}


def test_a_base_that_cannot_be_scored_ends_the_run_and_is_tried_again(tmp_path: Path) -> None:
    engine = Engine(lambda recipe: CandidateError("no") if recipe.methods == ["task_arithmetic"] else None)
    with pytest.raises(SearchFailed, match=r"base could not be scored.*no"):
        start(tmp_path / "run", engine).run()
    search = start(tmp_path / "run", search={"trials": 1, "seed": 3})
    search.run()
    assert sum(record.state == "complete" for record in records(search.history())) == 5


def test_a_model_that_cannot_be_scored_is_left_out_of_the_scale(tmp_path: Path) -> None:
    only_b = {"weight": {"a": 0.0, "b": 1.0}}
    engine = Engine(lambda r: CandidateError("no") if r.rules[0].parameters == only_b else None)
    search = start(tmp_path / "run", engine, search={"trials": 1, "seed": 3})
    search.run()
    found = records(search.history())
    assert found[2].state == "failed" and found[1].objective is not None


def test_raw_needs_no_parents(tmp_path: Path) -> None:
    engine = Engine(lambda recipe: CandidateError("no") if recipe.methods == ["task_arithmetic"] else None)
    search = start(tmp_path / "run", engine, objective={"scale": "raw"}, search={"trials": 1, "seed": 3})
    search.run()
    found = records(search.history())[4]
    assert found.objective == pytest.approx((found.scores["quiz"].value - found.scores["bits"].value) / 2)


def test_a_disk_that_fails_ends_the_run_with_what_was_scored_kept(tmp_path: Path, whole: list[Any]) -> None:
    class Full(Scorer):
        def score(self) -> Found:
            found = super().score()
            if len(self.scored) == 7:
                raise OSError(28, "No space left on device")
            return found

    with pytest.raises(SearchFailed, match="No space left"):
        start(tmp_path / "run", scorer=Full(Engine())).run()
    start(tmp_path / "run").run()
    assert proposals(tmp_path / "run") == whole


def test_a_worker_says_which_trial_it_is_at(tmp_path: Path) -> None:
    seen: list[int | None] = []

    class Asks(Scorer):
        def score(self) -> Found:
            seen.append(search.at_work)
            return super().score()

    search = start(tmp_path / "run", scorer=Asks(Engine()), search={"trials": 2, "seed": 3})
    assert search.at_work is None
    search.run()
    assert seen == [trial.number for trial in search.history().trials] and search.at_work is None


def test_hours_are_a_budget(tmp_path: Path) -> None:
    search = start(tmp_path / "run", search={"trials": 14, "hours": 1e-9, "seed": 3})
    search.run()
    assert len(records(search.history())) == 4
    assert History(search.study, search.config).hours > 0


def test_workers_may_begin_a_run_together(tmp_path: Path) -> None:
    for attempt in range(3):
        barrier, faults = threading.Barrier(4), []

        def begin(folder: Path, barrier: threading.Barrier, faults: list[BaseException]) -> None:
            try:
                barrier.wait()
                start(folder)
            except BaseException as error:
                faults.append(error)

        folder = tmp_path / f"run{attempt}"
        workers = [threading.Thread(target=begin, args=(folder, barrier, faults)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert faults == []


def test_hours_count_work_alone(tmp_path: Path) -> None:
    search = start(tmp_path / "run")
    search.study.enqueue_trial({})
    handle = search.study.ask()
    trials.write(handle, taken=handle.datetime_start)
    search.study.tell(handle, 0.0)
    done = trials.read(search.study.get_trials()[0])
    assert done.begun_at is not None
    done = replace(done, begun_at=done.begun_at - timedelta(hours=14))  # a worker that was killed had begun it
    assert worked_hours(spans(done)) < 0.01


def test_the_storage_may_be_elsewhere(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    start(tmp_path / "run", storage=url, search={"trials": 2, "seed": 0}).run()
    assert not (tmp_path / "run" / "study.db").exists()
    assert len(proposals(tmp_path / "run")) == 6


def test_a_storage_with_another_configuration_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    start(tmp_path / "one", storage=url)
    with pytest.raises(UserError, match=r"another configuration.*search.seed"):
        start(tmp_path / "two", storage=url, search={"trials": 14, "seed": 9})


def test_a_run_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "run")
    with pytest.raises(UserError, match=r"another configuration.*holdout: 0.2, there 0.5"):
        start(tmp_path / "run", holdout=0.2)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    with pytest.raises(UserError, match=r"not empty and no run folder"):
        start(tmp_path / "mine")
    with pytest.raises(UserError, match="no run folder"):
        load_run(tmp_path / "mine")


def test_nothing_is_warned_about(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(tmp_path / "run", search={"trials": 12, "seed": 3}).run()
