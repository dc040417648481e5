"""`run --fork`: which trials of another run still hold, and what taking them over costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.searches import INFOS, Engine, settings

from mergesearch.commands.forking import forked
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore, load_documents
from mergesearch.results.loading import load_run
from mergesearch.search import store, strategies
from mergesearch.search.store import DIGESTS, RunFolder, write_documents
from mergesearch.search.trials import State, Trial
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

SIZE = 20
FIRST = {"quiz": "q1", "maze": "m1"}


class Scorer:
    """Scores of each task that depend on the recipe that was loaded last."""

    def __init__(self, engine: Engine, tasks: list[str]):
        self.engine, self.tasks = engine, tasks

    def score(self) -> Scores:
        drawn = np.random.default_rng(int(self.engine.loaded[-1].id[:8], 16))
        values = {task: drawn.random(SIZE) for task in ("quiz", "maze", "new") if task in self.tasks}
        tasks = {task: TaskScore(float(v.mean()), 0.05, SIZE, "acc") for task, v in values.items()}
        return Scores(tasks, {task: DocumentScores(list(range(SIZE)), v, "mean") for task, v in values.items()}, 1.0)


def search(
    folder: Path, tasks: dict[str, str], models: dict[str, str] | None = None, ids: int = SIZE, **changes: Any
) -> Search:
    """A search over tasks and models (name: digest), with all that a command notes before it."""
    models = models or {"a": "1", "b": "2"}
    options = {"trials": 3, "seed": 3, "strategy": "random", "defaults": False, **changes.pop("search", {})}
    named: dict[str, Any] = {"tasks": [{"task": task} for task in tasks], "models": {name: name for name in models}}
    config = settings(folder, **named, search=options, **changes)
    engine = Engine()
    made = RunFolder.prepare(config)
    write_documents(made, {"search": {task: list(range(ids)) for task in tasks}, "holdout": {}})
    scorer = Scorer(engine, list(tasks))
    found = Search(config, made, SearchSpace(config, INFOS, 2), engine, scorer, say=lambda text: None)
    weights = {"base_model": "0", **{f"models.{name}": digest for name, digest in models.items()}}
    parents = {where: {"form": d, "size": 1, "blocks": d, "whole": None} for where, d in weights.items()}
    documents = {task: {"documents": 2 * SIZE, "digest": digest} for task, digest in tasks.items()}
    store.note(found.study, DIGESTS, {"parents": parents, "tasks": documents})
    return found


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Search:
    done = search(tmp_path_factory.mktemp("fork") / "old", FIRST)
    done.run()
    return done


def fork(old: Search, folder: Path, tasks: dict[str, str], models: dict[str, str] | None = None, **more: Any) -> Search:
    options = {"fork": str(old.folder.path), **more.pop("search", {})}
    return search(folder, tasks, models, search=options, name="new", **more)


def taken(run: Search) -> list[Trial]:
    return [trial for trial in run.history().trials if trial.strategy == "taken_over"]


def built(run: Search) -> list[str]:
    return [recipe.id for recipe in run.engine.loaded]  # type: ignore[attr-defined]


def word(run: Search) -> str:
    return next(text for text in strategies.words(run.history()) if text.startswith("taken over"))


def test_with_a_task_less_everything_holds_and_costs_nothing(old: Search, tmp_path: Path) -> None:
    run = fork(old, tmp_path / "new", {"maze": "m1"})
    run.run()
    before = {trial.recipe_id: trial for trial in old.history().trials if trial.state is State.COMPLETE}
    mine = taken(run)
    assert {trial.recipe_id for trial in mine} == before.keys() and not before.keys() & set(built(run))
    for trial in mine:
        assert trial.state is State.COMPLETE and trial.documents == 0
        theirs = before[trial.recipe_id]
        assert trial.scores == {"maze": theirs.scores["maze"]} and trial.name == theirs.name
        documents = load_documents(run.folder.documents(trial.number))
        assert list(documents) == ["maze"]
        kept = load_documents(old.folder.documents(theirs.number))["maze"]
        assert np.array_equal(documents["maze"].values, kept.values)
    # the objective's scale is of the one task, and the budget is the new run's own
    assert run.history().proposals == 3 and run.history().documents == 3 * SIZE
    assert word(run) == f"taken over from test: {len(before)} of its {len(before)} scored trials still hold"
    read = load_run(tmp_path / "new")
    assert {record.method for record in read.records} >= {"base", "a", "b", "average"}
    assert all(record.expected is not None for record in read.records if record.objective is not None)
    again = fork(old, tmp_path / "new", {"maze": "m1"})
    again.run()
    assert len(again.history().trials) == len(run.history().trials)


def test_with_another_model_what_merges_none_of_it_holds(old: Search, tmp_path: Path) -> None:
    run = fork(old, tmp_path / "new", FIRST, {"a": "1", "b": "other weights"})
    run.run()
    assert {trial.name for trial in taken(run)} == {"base", "a"}
    assert word(run).endswith("scored trials still hold (b changed or left)")
    named = {trial.name for trial in run.history().trials}
    assert {"base", "a", "b", "average"} <= named


def test_with_a_model_more_the_parents_hold_and_the_average_is_another(old: Search, tmp_path: Path) -> None:
    run = fork(old, tmp_path / "new", FIRST, {"a": "1", "b": "2", "c": "3"})
    run.run()
    mine = taken(run)
    assert {"base", "a", "b"} <= {trial.name for trial in mine} and "average" not in {trial.name for trial in mine}
    # proposals of the old run are of its models, by name now
    proposed = [trial for trial in mine if trial.name is None]
    assert proposed and all(rule.models and "c" not in rule.models for trial in proposed for rule in trial.recipe.rules)
    average = run.history().named("average")
    assert average is not None and average.strategy == "baselines" and average.recipe_id in built(run)


@pytest.mark.parametrize(
    "tasks, more, why",
    [
        ({**FIRST, "new": "n1"}, {}, "it did not score task new"),
        ({"quiz": "others"}, {}, "task quiz has other documents"),
        ({"quiz": "q1"}, {"ids": SIZE - 1}, "task quiz is split into other search and holdout documents"),
    ],
)
def test_why_nothing_holds(old: Search, tmp_path: Path, tasks: dict[str, str], more: dict[str, Any], why: str) -> None:
    run = fork(old, tmp_path / "new", tasks, **more, search={"trials": 0})
    run.run()
    assert taken(run) == [] and word(run).endswith(f"still hold ({why})")
    assert run.history().named("base") is not None


def test_other_settings_are_refused_before_anything_is_loaded(old: Search, tmp_path: Path) -> None:
    run: Config = fork(old, tmp_path / "new", FIRST, search={"seed": 4}).config
    with pytest.raises(UserError, match=r"search\.fork: search\.seed is 4, in .*old 3, so none of its trials holds"):
        strategies.refuse(run)
    strategies.refuse(fork(old, tmp_path / "other", FIRST).config)


def test_documents_that_are_lost_are_scored_anew(old: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fork(old, tmp_path / "new", FIRST, search={"trials": 0})
    real = RunFolder.documents
    lost = next(trial for trial in old.history().trials if trial.name == "a")
    there = old.folder.path

    def documents(self: RunFolder, number: int) -> Path:
        return Path("/nowhere") if (self.path, number) == (there, lost.number) else real(self, number)

    monkeypatch.setattr(RunFolder, "documents", documents)
    run.run()
    mine = next(trial for trial in taken(run) if trial.name == "a")
    assert mine.recipe_id in built(run) and mine.documents == 2 * SIZE and mine.state is State.COMPLETE


def test_what_was_learned_by_answers_stays_so(old: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = next(trial.number for trial in old.history().trials if trial.name is None)
    monkeypatch.setattr(
        "mergesearch.search.strategies.taken_over.learned_by_answers", lambda trial: trial.number == learned
    )
    run = fork(old, tmp_path / "new", FIRST)
    run.run()
    assert [t.key["from"] for t in taken(run) if strategies.of_trial(t).by_answers(t)] == [learned]


def test_the_command_line(old: Search, tmp_path: Path) -> None:
    data = {key: value for key, value in old.config.dump().items() if value is not None}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(data))
    folder = old.folder.path
    assert forked(file, [], "new") == [
        f"output={folder.parent / 'new'}", "name=new", f"search.fork={folder.resolve()}",
    ]  # fmt: skip
    assert forked(file, ["search.trials=9"], str(tmp_path / "x" / "y"))[:3] == [
        "search.trials=9", f"output={tmp_path / 'x' / 'y'}", "name=y",
    ]  # fmt: skip
    with pytest.raises(UserError, match="is the run itself"):
        forked(file, [], folder.name)
    with pytest.raises(UserError, match=r"there is no run in .*elsewhere to begin from"):
        forked(file, [f"output={tmp_path / 'elsewhere'}"], "new")
