"""The sweep, and what `auto` does with what it knows: where soups start, and which stages are left out or end early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pytest
from support.searches import INFOS, Engine, Found, Scorer, settings

from mergesearch.evaluate.scores import DocumentScores, TaskScore
from mergesearch.recipe import Recipe, single_rule
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.lines import Documents, Line, LineRace, Point
from mergesearch.search.lines import Found as Swept
from mergesearch.search.outlook import Outlook
from mergesearch.search.paying import Return, ahead_of, latest_half
from mergesearch.search.soup.affine import affine_of
from mergesearch.search.soup.memo import Memo
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies import registered, words
from mergesearch.search.strategies.base import Wait
from mergesearch.search.strategies.learned_soup import LearnedSoups
from mergesearch.search.strategies.study import Study, ended
from mergesearch.search.strategies.sweep import SHARE
from mergesearch.search.trials import Kind, State
from mergesearch.search.work import Work
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

SIZE = 100
SPACE = {"methods": ["task_arithmetic", "ties"]}
ONE: dict[str, Any] = {"tasks": [{"task": "quiz"}], "objective": {"scale": "raw"}, "space": SPACE}


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Any] = {}
    monkeypatch.setattr(store, "_local_storage", lambda url: held.setdefault(url, optuna.storages.InMemoryStorage()))


def quality(recipe: Recipe, best: float = 0.8) -> float:
    """Between 0 and 1: task arithmetic with equal weights at `best` is best, an election never good."""
    found = affine_of(recipe, tuple(recipe.models))
    return 0.2 if found is None else max(0.0, 0.9 - float(((found.values - best) ** 2).mean()))


class World(Scorer):
    """Documents that are right where a number of their own lies below the candidate's quality."""

    def __init__(self, quality: Callable[[Recipe], float] = quality, stderr: float = 0.05, fail_at: int | None = None):
        super().__init__(Engine(), fail_at)
        self.quality, self.stderr = quality, stderr
        self.difficulty = np.random.default_rng(0).permutation((np.arange(SIZE) + 0.5) / SIZE)

    def documents(self, recipe: Recipe, ids: Sequence[int]) -> Documents:
        right = (self.difficulty[list(ids)] < self.quality(recipe)).astype(float)
        return {"quiz": DocumentScores(list(ids), right, "mean")}

    def score(self) -> Found:
        super().score()
        return Found({"quiz": TaskScore(self.quality(self.engine.loaded[-1]), self.stderr, SIZE, "acc")})


class Teacher:
    """Stands in for the learner: races lines over the world's documents; a soup adds something to its start."""

    def __init__(self, world: World, gain: float = 0.05, stop_at: int | None = None):
        self.world, self.gain, self.gradients = world, gain, True
        self.starts: list[str | None] = []
        self.asked, self.stop_at = 0, stop_at
        self.config: Any = None

    def sweep(self, lines: Sequence[Line], budget: int, known: Mapping[str, Documents], work: Work) -> Swept:
        memo = Memo(work.state, "world", work.spent)

        def ask(recipe: Recipe, ids: Sequence[int]) -> Documents:
            if self.stop_at is not None and self.asked == self.stop_at:
                self.stop_at = None
                raise KeyboardInterrupt
            self.asked += 1
            return self.world.documents(recipe, ids)

        def score(rules: Any, documents: Mapping[str, Sequence[int]]) -> Documents:
            recipe = self.config.recipe(rules)
            return memo.scored(recipe.id, documents, lambda: ask(recipe, documents["quiz"]))

        return LineRace(lines, {"quiz": 1.0}, {"quiz": range(SIZE)}, budget, score, known).run()

    def learn(
        self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
    ) -> Recipe:
        self.starts.append(start.id if start else None)
        work.spent(50)
        affine = affine_of(start, tuple(self.config.models)) if start else None
        weight = float(affine.values.mean()) if affine else 0.4
        return self.config.recipe(single_rule("task_arithmetic", weight=round(weight + self.gain, 6)))

    def closed_form(self, name: str, solve: Any, work: Work) -> Recipe:
        raise NotImplementedError


def begin(folder: Path, world: World, teacher: Teacher, **changes: Any) -> Search:
    config = settings(folder, **{**ONE, **changes})
    teacher.config = config
    space, run = SearchSpace(config, INFOS, 2), RunFolder.prepare(config)
    return Search(config, run, space, world.engine, cast(Any, world), infos=INFOS, layers=2, learner=teacher)


def history(search: Search) -> History:
    return History(search.study, search.config)


AUTO = {"strategy": "auto", "trials": 36, "defaults": True}


def test_the_best_points_of_the_lines_stand_in_the_table(tmp_path: Path) -> None:
    world = World()
    search = begin(
        tmp_path / "run", world, teacher := Teacher(world), search={**AUTO, "strategy": ["sweep"], "trials": 300}
    )
    assert search.config.search.strategies == ["baselines", "sweep"]
    search.run()
    first, *others = history(search).of("sweep")
    assert first.kind is Kind.LEARNED and first.state is State.COMPLETE and first.key["line"] == "task_arithmetic"
    assert abs(first.key["at"] - 0.8) < 0.1 and first.recipe.rules[0].method == "task_arithmetic"
    # a twentieth of the run's documents, those of the candidates that are scored on all of them included
    whole = 300 * SIZE + sum(trial.documents for trial in history(search).of("baselines"))
    assert first.documents + sum(trial.documents for trial in others) <= SHARE * whole + SIZE
    assert first.learning_documents <= first.key["budget"]
    # on top of the trials
    assert history(search).proposals == 0 and not registered()["sweep"].counts
    assert teacher.asked > 5


def test_a_point_that_is_a_baseline_is_that_baseline_and_scored_once(tmp_path: Path) -> None:
    class OnAverage(Teacher):
        def sweep(self, lines: Sequence[Line], budget: int, known: Any, work: Work) -> Swept:
            path = lines[0]
            return Swept([Point(path, path.known["average"], {}, free=True)], 0)

    world = World()
    search = begin(tmp_path / "run", world, OnAverage(world), search={**AUTO, "strategy": ["sweep"]})
    search.run()
    (swept,), average = history(search).of("sweep"), history(search).named("average")
    assert average is not None and swept.same_as == average.number and swept.recipe_id == average.recipe_id
    assert swept.documents == 0 and world.scored.count(swept.recipe_id) == 1


def test_no_race_stops_what_soups_may_start_from(tmp_path: Path) -> None:
    world = World()
    search = begin(tmp_path / "run", world, Teacher(world), search={**AUTO, "strategy": ["sweep"]})
    search.run()
    assert not any(registered()["sweep"].may_race(trial) for trial in history(search).of("sweep"))


def test_a_small_run_sweeps_no_more_than_two_candidates_worth(tmp_path: Path) -> None:
    world = World()
    search = begin(tmp_path / "run", world, Teacher(world), search={**AUTO, "strategy": ["sweep"], "trials": 8})
    search.run()
    (only,) = history(search).of("sweep")
    assert only.documents <= 2 * SIZE + 20
    cost = registered()["sweep"].cost(search.config, [SIZE])
    assert (cost.trials, cost.documents) == (1, SIZE)


def test_after_a_kill_nothing_is_paid_twice(tmp_path: Path) -> None:
    wanted = {**AUTO, "strategy": ["sweep"], "trials": 300}
    world = World()
    begin(tmp_path / "whole", world, whole := Teacher(world), search=wanted).run()
    world = World()
    search = begin(tmp_path / "run", world, teacher := Teacher(world, stop_at=4), search=wanted)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    again = begin(tmp_path / "run", world, rest := Teacher(world), search=wanted)
    again.run()
    assert teacher.asked + rest.asked == whole.asked
    assert history(again).of("sweep")[0].learning_documents <= history(again).of("sweep")[0].key["budget"]


def test_space_methods_limit_the_lines(tmp_path: Path) -> None:
    world = World()
    for methods, line in (["ties"], "ties"), (["slerp"], None):
        folder = tmp_path / methods[0]
        search = begin(
            folder, world, Teacher(world), space={"methods": methods}, search={**AUTO, "strategy": ["sweep"]}
        )
        search.run()
        assert [trial.key["line"].split()[0] for trial in history(search).of("sweep")[:1]] == ([line] if line else [])
        assert (registered()["sweep"].cost(search.config, [SIZE]).trials > 0) is (line is not None)


def test_soups_start_from_the_sweep_and_a_far_greedy_soup_is_left_out(tmp_path: Path) -> None:
    world = World(stderr=0.01)
    search = begin(tmp_path / "run", world, teacher := Teacher(world), search={**AUTO, "trials": 10})
    search.run()
    swept = history(search).of("sweep")[0]
    assert teacher.starts[0] == swept.recipe_id
    assert not history(search).of("greedy_soup")
    assert any("greedy soup: left out" in text for text in words(history(search)))
    # a learned soup is ahead by more than noise, the sweep not by two standard errors
    unsure = World(stderr=0.2)
    search = begin(tmp_path / "unsure", unsure, Teacher(unsure), search={**AUTO, "trials": 10})
    search.run()
    assert history(search).of("learned_soup") and not history(search).of("greedy_soup")
    assert any("greedy soup: left out: the learned soup's" in text for text in words(history(search)))
    # with trials among its ingredients it need not lie between the models
    asked = {**AUTO, "trials": 10, "greedy_soup": {"trials": 3}}
    search = begin(tmp_path / "asked", world, Teacher(world), search=asked)
    search.run()
    assert history(search).of("greedy_soup") and not any("greedy soup: left out" in t for t in words(history(search)))
    near = World(lambda recipe: quality(recipe, 0.5))
    search = begin(tmp_path / "near", near, Teacher(near), search={**AUTO, "trials": 10})
    search.run()
    assert history(search).of("greedy_soup") and not any("greedy soup: left out" in t for t in words(history(search)))


def test_a_second_start_within_noise_has_a_soup_of_its_own(tmp_path: Path) -> None:
    def twins(recipe: Recipe) -> float:
        return max(quality(recipe, 0.4), quality(recipe, 1.2) - 0.001)

    world = World(twins)
    soup = {"loss": "expected"}
    wanted = {"strategy": ["learned_soup"], "trials": 100, "defaults": True, "learned_soup": soup}
    search = begin(tmp_path / "run", world, teacher := Teacher(world), search=wanted)
    search.run()
    # nothing at 1.2 yet: the plain average and the published defaults lie close to each other
    assert len(teacher.starts) == 1
    wanted = {**wanted, "strategy": ["sweep", "learned_soup"]}

    class Wide(Teacher):
        def sweep(self, lines: Any, budget: int, known: Any, work: Work) -> Swept:
            found = super().sweep(lines, budget, known, work)
            points = [point for point in found.points if point.line.name == "task_arithmetic"]
            points[0].value = 1.2
            return Swept(points, found.cost)

    search = begin(tmp_path / "wide", world, teacher := Wide(world), search=wanted)
    search.run()
    first, second = history(search).of("learned_soup")
    assert second.key["second"] and first.key["rival"] == second.key["start"] != first.key["start"]
    assert len(set(teacher.starts)) == 2
    short = {**wanted, "documents": SIZE * 14 + 200}
    search = begin(tmp_path / "short", world, Wide(world), search=short)
    search.run()
    assert len(history(search).of("learned_soup")) <= 1


def test_stages_end_where_they_do_not_pay(tmp_path: Path) -> None:
    world = World(stderr=0.2)
    wanted = {**AUTO, "learned_soup": {"per": ["recipe", "tensor"]}}
    search = begin(tmp_path / "run", world, teacher := Teacher(world, gain=0.0), search=wanted)
    search.run()
    past = history(search)
    # the first soup of each loss brought nothing, so no other is learned
    assert [trial.key["loss"] for trial in past.of("learned_soup")] == ["cross_entropy", "expected"]
    assert len(teacher.starts) == 2
    told = words(past)
    assert any("learned soup by the expected loss: 1 more left out" in text for text in told)
    assert any("learned soup by cross-entropy: 1 more left out" in text for text in told)
    assert any("study: stage" in text and "less than noise" in text for text in told)
    assert past.proposals < 36
    one = [trial for trial in past.of("study") if trial.key["stage"] == "study"]
    brought = latest_half(one, past)
    assert brought is not None and not brought.pays and brought.proposals >= 12
    assert latest_half(one[:3], past) is None
    # of a single soup nothing but its rounds is left out
    search = begin(tmp_path / "alone", world, Teacher(world, gain=0.0), search=AUTO)
    search.run()
    assert any("learned soup by cross-entropy: not learned on: trial" in text for text in words(history(search)))
    # who names the study wants its budget spent
    for wanted in ({**AUTO, "study_ends": "budget"}, {**AUTO, "strategy": ["baselines", "study"]}):
        config = settings(tmp_path / "run", **{**ONE, "search": wanted})
        assert ended(History(search.study, config), "study") is None


def far(recipe: Recipe) -> float:
    """Best where no line of the sweep leads."""
    found = affine_of(recipe, tuple(recipe.models))
    return 0.9 if found is not None and found.values.mean() > 2.5 else quality(recipe) / 2


def test_there_is_no_study_behind_a_soup_that_is_far_ahead(tmp_path: Path) -> None:
    world = World(far)
    for name, gain, more, studied in [
        ("run", 3.0, {}, False),
        ("near", 0.0, {}, True),
        ("budget", 3.0, {"study_ends": "budget"}, True),
        ("chosen", 3.0, {"strategy": ["baselines", "sweep", "learned_soup", "study"]}, True),
    ]:
        search = begin(tmp_path / name, world, Teacher(world, gain), search={**AUTO, **more})
        search.run()
        past = history(search)
        assert past.of("learned_soup") and bool(past.of("study")) is studied
        assert any("study: left out: trial" in text for text in words(past)) is not studied
        if not studied:
            assert Study.expects(Outlook(past.config, [SIZE], past)) == []


@pytest.mark.parametrize(("lead", "studied"), [(0.02, True), (0.03, False)])
def test_a_lead_within_a_quarter_of_the_noise_is_none(tmp_path: Path, lead: float, studied: bool) -> None:
    """The standard error of a difference is 0.05 * sqrt(2), a quarter of that 0.018."""

    def near(recipe: Recipe) -> float:
        found = affine_of(recipe, tuple(recipe.models))
        return 0.5 + lead * 0.8 if found is not None and found.values.mean() > 2.5 else min(0.5, quality(recipe))

    world = World(near)
    search = begin(tmp_path / "run", world, Teacher(world, 3.0), search=AUTO)
    search.run()
    past = history(search)
    assert past.complete()[0].strategy == "learned_soup" and bool(past.of("study")) is studied


def test_a_study_that_began_without_the_soups_ends_behind_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does while another is at what the soups wait for."""
    world = World(far)
    with monkeypatch.context() as patch:
        patch.setattr(LearnedSoups, "next", lambda *given: None)
        search = begin(tmp_path / "run", world, Teacher(world, 3.0), search={**AUTO, "trials": 8})
        search.run()
    early = len(history(search).of("study"))
    search = begin(tmp_path / "run", world, Teacher(world, 3.0), search=AUTO)
    search.run()
    past = history(search)
    assert early and len(past.of("study")) == early
    assert any("study: ended: trial" in text for text in words(past))


def test_a_stage_pays_where_it_brings_more_than_a_part_of_the_noise() -> None:
    assert Return(12, 0.006, 1200, 0.02).pays and not Return(12, 0.004, 1200, 0.02).pays
    assert "12 proposals brought 0.0040 for 1,200 document evaluations" in Return(12, 0.004, 1200, 0.02).words()


def test_what_is_ahead_is_paired_where_documents_are_known(tmp_path: Path) -> None:
    world = World()
    search = begin(tmp_path / "run", world, Teacher(world), search={**AUTO, "strategy": "baselines"})
    search.run()
    past = history(search)
    best, *_, worst = past.complete()
    there = {trial.number: world.documents(trial.recipe, range(SIZE)) for trial in (best, worst)}
    gap, noise = ahead_of(worst, best, past, there.get)
    plain, wider = ahead_of(worst, best, past, lambda number: None)
    assert gap == plain < 0 and 0 < noise < wider * 1.5 and wider == pytest.approx(0.05 * 2**0.5)


# --- several workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["sweep", "greedy_soup"])
def test_a_worker_goes_on_with_the_study_while_another_is_at_what_earlier_strategies_wait_for(
    tmp_path: Path, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is stopped in the middle until the other has nothing left to do."""
    reached, released, meanwhile = threading.Event(), threading.Event(), []

    def hold() -> None:
        if not reached.is_set() and history(first).of(held):
            reached.set()
            assert released.wait(60)

    class Slow(Teacher):
        def sweep(self, *arguments: Any) -> Swept:
            hold()
            return super().sweep(*arguments)

    wanted = {**AUTO, "study_ends": "budget", "learned_soup": {"per": ["recipe"], "loss": "expected"}}
    changes = {"models": {name: name for name in "abc"}, "search": wanted}
    worlds = [World(lambda recipe: quality(recipe, 1 / 3)) for _ in range(2)]
    worlds[0].engine.broken = lambda recipe: hold()
    first, second = (begin(tmp_path / "run", world, Slow(world), **changes) for world in worlds)
    slow = threading.Thread(target=first.run)
    slow.start()
    assert reached.wait(60)
    left = sum(strategy.wants(history(first)).trials for strategy in first.strategies)

    def ask(past: History) -> Any:
        found = Search._ask(second, past)
        if isinstance(found, Wait) and not released.is_set():
            meanwhile.extend(past.of("study"))
            released.set()
        return found

    monkeypatch.setattr(second, "_ask", ask)
    second.run()
    slow.join(60)
    found = history(first)
    # all that is not kept for those that wait, and nothing that would be noted for good before they are through
    begun = 2 if held == "greedy_soup" else 0  # a learned soup comes first
    assert left and len(meanwhile) == 36 - left - begun
    assert {trial.key["stage"] for trial in meanwhile} == {"study"}
    assert len(found.of("sweep")) >= 1 and len(found.of("greedy_soup")) == 2 and len(found.of("learned_soup")) == 1
    assert found.proposals == 36 and {trial.state for trial in found.trials} == {State.COMPLETE}
