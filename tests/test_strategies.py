"""The strategies over stand-ins for engine and scorer: what they propose, in what order, the same after a kill."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from support import races
from support.races import Live
from support.searches import INFOS, Engine, Found, Scorer, settings

from mergesearch.config import Config
from mergesearch.engine.live import Engine as RealEngine
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, TensorInfo, single_rule
from mergesearch.results.record import records
from mergesearch.results.table import render, table_rows
from mergesearch.search import store, trials
from mergesearch.search.budget import Budget, Wanted
from mergesearch.search.costs import costs
from mergesearch.search.history import History
from mergesearch.search.outlook import Outlook
from mergesearch.search.soup.affine import affine_of
from mergesearch.search.soup.settings import SoupSettings
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies import of_trial, refuse, study, words
from mergesearch.search.strategies.base import WAIT, Learned, Stated
from mergesearch.search.strategies.baselines import DEFAULTS, SLERP
from mergesearch.search.strategies.greedy_soup import GreedySoup, Ingredient, greedy
from mergesearch.search.strategies.learned_soup import LearnedSoups
from mergesearch.search.strategies.study import FIXED, Study
from mergesearch.search.strategies.warm_start import WarmStart, warm_recipes
from mergesearch.search.trials import Kind
from mergesearch.search.work import Work
from mergesearch.search.worker import Search
from mergesearch.space import OneMethod, RefineSpace, SearchSpace, check_space

MODELS = ("a", "b", "c", "d")
ONE_TASK: dict[str, Any] = {"tasks": [{"task": "quiz"}], "objective": {"scale": "raw"}}


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages that outlive a search that was killed, and wait for no disk."""
    held: dict[str, Any] = {}
    monkeypatch.setattr(store, "_local_storage", lambda url: held.setdefault(url, optuna.storages.InMemoryStorage()))


class Judge(Scorer):
    """Ten documents of one task, with the figure that `figure` gives a recipe."""

    def __init__(self, figure: Callable[[Recipe], float], stop_at: int | None = None, engine: Engine | None = None):
        super().__init__(engine or Engine(), stop_at)
        self.figure = figure

    def score(self) -> Found:
        super().score()
        return Found({"quiz": TaskScore(self.figure(self.engine.loaded[-1]), 0.01, 10, "acc")})


def begin(folder: Path, scorer: Scorer | None = None, learner: Any = None, **changes: Any) -> Search:
    config = settings(folder, **changes)
    scorer = scorer or Scorer(Engine())
    space, run = SearchSpace(config, INFOS, 2), RunFolder.prepare(config)
    return Search(config, run, space, scorer.engine, scorer, infos=INFOS, layers=2, learner=learner)


def history(search: Search) -> History:
    return History(search.study, search.config)


def made_by(search: Search, strategy: str) -> list[Any]:
    return history(search).of(strategy)


def ids(search: Search) -> list[str | None]:
    return [record.recipe_id for record in records(search.history())]


def closeness(config: Config, target: float = 0.4) -> Callable[[Recipe], float]:
    """A smooth figure with one best mix; recipes that are no mix get less than any."""

    def figure(recipe: Recipe) -> float:
        found = affine_of(recipe, tuple(config.models))
        return -9.0 if found is None else 1.0 - float(((found.values - target) ** 2).sum())

    return figure


# --- baselines ----------------------------------------------------------------------------------------------------


def test_published_defaults_are_scored_once_and_slerp_takes_the_two_best(tmp_path: Path) -> None:
    figures = {"a": 0.2, "b": 0.9, "c": 0.5}

    def figure(recipe: Recipe) -> float:
        weights = recipe.rules[0].parameters.get("weight")
        alone = [name for name, weight in weights.items() if weight] if isinstance(weights, dict) else []
        return figures[alone[0]] if len(alone) == 1 else 0.1

    models, wanted = {name: name for name in figures}, {"strategy": "baselines", "defaults": True}
    search = begin(tmp_path / "run", Judge(figure), **ONE_TASK, models=models, search=wanted)
    search.run()
    found = records(search.history())
    assert [record.name for record in found] == ["base", "a", "b", "c", "average", *DEFAULTS, SLERP]
    assert found[-1].recipe["rules"][0]["models"] == ["b", "c"]
    search.run()
    assert len(records(search.history())) == len(found)


def test_samplers_learn_from_baselines_and_warm_starts(tmp_path: Path) -> None:
    space = {"methods": ["linear", "task_arithmetic"], "layer_groups": 2}
    config = settings(tmp_path / "run", space=space, search={"trials": 2, "warm_start": str(tmp_path)})
    study = store.open_study(config, RunFolder.prepare(config))
    store.note(study, "warm_start", [config.recipe(single_rule("task_arithmetic", weight=0.7)).dump()])
    search = begin(tmp_path / "run", space=space, search={"trials": 2, "warm_start": str(tmp_path)})
    search.run()
    proposed = history(search).trials
    assert [trial.strategy for trial in proposed] == ["baselines"] * 4 + ["warm_start", "study"]
    for trial in proposed:
        assert search.space.suggest(optuna.trial.FixedTrial(trial.params)).id  # every parameter is there
    assert proposed[4].params["layers0-0.task_arithmetic.weight.a"] == 0.7
    assert proposed[3].params["method"] == "linear"


# --- greedy soup --------------------------------------------------------------------------------------------------


def matrix(seed: int) -> dict[frozenset[str], np.ndarray]:
    """Scores of 40 documents for the soup of every set of models, as a run would record them."""
    generator = np.random.default_rng(seed)
    sets = [frozenset(s) for size in range(1, 5) for s in itertools.combinations(MODELS, size)]
    return {s: (generator.random(40) < 0.4 + 0.05 * len(s)).astype(float) for s in sets}


def replayed(recorded: dict[frozenset[str], np.ndarray]) -> Callable[[Recipe], float]:
    def figure(recipe: Recipe) -> float:
        if recipe.rules[0].method != "linear":
            return 0.0
        weights = recipe.rules[0].parameters["weight"]
        weights = weights if isinstance(weights, dict) else dict.fromkeys(MODELS, weights)
        return float(recorded[frozenset(name for name, weight in weights.items() if weight)].mean())

    return figure


def oracle(recorded: dict[frozenset[str], np.ndarray]) -> list[str]:
    """Recipe 1 of Wortsman et al. 2022."""
    order = sorted(MODELS, key=lambda name: -recorded[frozenset([name])].mean())
    soup = [order[0]]
    for name in order[1:]:
        if recorded[frozenset([*soup, name])].mean() >= recorded[frozenset(soup)].mean():
            soup.append(name)
    return soup


GREEDY = {**ONE_TASK, "models": {name: name for name in MODELS}, "search": {"strategy": "greedy_soup"}}


@pytest.mark.parametrize("seed", range(8))
def test_greedy_soup_is_that_of_a_plain_loop_over_recorded_scores(tmp_path: Path, seed: int) -> None:
    recorded = matrix(seed)
    search = begin(tmp_path / "run", Judge(replayed(recorded)), **GREEDY)
    search.run()
    soup = oracle(recorded)
    tried = [t.key["ingredients"] for t in made_by(search, "greedy_soup")]
    assert len(tried) == 3 and all(len(mix) == len(set(mix)) for mix in tried)
    said = words(history(search))
    if len(soup) == 1:
        assert said == [
            f"greedy soup: only {soup[0]} stays: every other ingredient makes it worse on the search documents"
        ]
    else:
        assert said == [f"greedy soup: {', '.join(soup)} stay, equally weighted"]
        assert soup in tried


def test_an_ingredient_that_changes_nothing_stays_and_one_that_cannot_be_scored_goes() -> None:
    mixes = {("x", "y"): 0.8, ("x", "y", "z"): None, ("x", "y", "w"): 0.79}
    ingredients = [Ingredient(name, score, None) for name, score in [("w", 0.1), ("x", 0.8), ("z", 0.2), ("y", 0.5)]]
    soup = greedy(ingredients, lambda mix: mixes[tuple(i.name for i in mix)])
    assert [i.name for i in soup] == ["x", "y"]
    assert greedy([], lambda mix: None) == []


def test_one_ingredient_left_is_said_in_a_plain_sentence_also_where_the_budget_ends_with_it(tmp_path: Path) -> None:
    recorded = {s: np.full(40, 0.9 if s == {"b"} else 0.2) for s in matrix(0)}
    search = begin(
        tmp_path / "run", Judge(replayed(recorded)), **GREEDY | {"search": {**GREEDY["search"], "trials": 3}}
    )
    search.run()
    assert len(made_by(search, "greedy_soup")) == 3 and Budget(history(search)).used_up
    only = "greedy soup: only b stays: every other ingredient makes it worse on the search documents"
    assert words(history(search)) == [only]


@pytest.mark.parametrize("moment", ["load", "score"])
@pytest.mark.parametrize("at", range(8))
def test_greedy_soup_killed_at_any_moment_is_the_same(tmp_path: Path, moment: str, at: int) -> None:
    figure = replayed(matrix(3))
    whole = begin(tmp_path / "whole", Judge(figure), **GREEDY)
    whole.run()
    engine = Engine(stop_at=at if moment == "load" else None)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "cut", Judge(figure, at if moment == "score" else None, engine), **GREEDY).run()
    again = begin(tmp_path / "cut", Judge(figure), **GREEDY)
    again.run()
    assert ids(again) == ids(whole)
    assert words(history(again)) == words(history(whole))


def test_the_best_trials_are_ingredients_where_asked(tmp_path: Path) -> None:
    space = {"methods": ["linear", "task_arithmetic", "ties"], "layer_groups": 2, "weight": [0.0, 1.0]}
    wanted = {"strategy": ["random", "greedy_soup"], "trials": 14, "greedy_soup": {"trials": 3}}
    changes = {**ONE_TASK, "space": space, "search": wanted}
    figure = closeness(settings(tmp_path / "run"))
    search = begin(tmp_path / "run", Judge(figure), **changes)
    search.run()
    past = history(search)
    assert past.proposals == 14 and len(made_by(search, "random")) >= 14 - 4
    soups = made_by(search, "greedy_soup")
    first = soups[0].number
    mixes = [(t, affine_of(t.recipe, ("a", "b"))) for t in made_by(search, "random") if t.number < first]
    best = sorted((m for m in mixes if m[1] is not None), key=lambda m: -past.value(m[0]))[:3]
    spread = {f"trial {t.number}": (past.value(t), m.values) for t, m in best}
    spread |= {n: (past.value(past.named(n)), np.array([[n == "a", n == "b"]] * 2, float)) for n in ("a", "b")}
    soup, names, score = [], [], -np.inf
    for name in sorted(spread, key=lambda n: -spread[n][0]):
        mixed = 1.0 - ((np.mean([*soup, spread[name][1]], axis=0) - 0.4) ** 2).sum()
        if mixed >= score:
            soup, names, score = [*soup, spread[name][1]], [*names, name], mixed
    said = f"{', '.join(names)} stay, equally weighted" if len(names) > 1 else f"only {names[0]} stays"
    assert said in words(past)[0]
    for trial in soups:
        expected = np.mean([spread[name][1] for name in trial.key["ingredients"]], axis=0)
        assert np.allclose(affine_of(trial.recipe, ("a", "b")).values, expected)


def test_a_greedy_soup_waits_for_no_trial_of_strategies_that_come_later(tmp_path: Path) -> None:
    """Other workers go on with the study, so that at any time some trial of it is at work."""
    search = begin(tmp_path / "run", Judge(replayed(matrix(0))), **GREEDY | {"search": {"strategy": "baselines"}})
    search.run()
    soup = {"strategy": ["greedy_soup", "study"], "greedy_soup": {"trials": 2}}
    config = settings(tmp_path / "run", **GREEDY | {"search": soup})
    trials.enqueue(search.study, strategy="study", kind=Kind.SAMPLED, key={"stage": "study", "sampler": "tpe"})
    handle = search.study.ask()
    asked, past = GreedySoup(replace(search.surroundings, config=config)), History(search.study, config)
    first = asked.next(past, Budget(past))
    assert isinstance(first, Stated) and not any("trial" in name for name in first.key["ingredients"])
    trials.write(handle, strategy="warm_start")
    past = History(search.study, config)
    assert asked.next(past, Budget(past)) is WAIT


def test_the_study_leaves_room_for_the_soup_after_it(tmp_path: Path) -> None:
    wanted = {"strategy": ["study", "greedy_soup"], "trials": 8}
    changes = {**GREEDY, "search": wanted, "space": {"methods": ["linear"]}}
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), **changes)
    search.run()
    order = [t.strategy for t in history(search).trials]
    assert order == ["baselines"] * 6 + ["study"] * 5 + ["greedy_soup"] * 3


def test_greedy_soups_are_scored_on_all_documents_where_others_are_raced(tmp_path: Path) -> None:
    """They are compared with the soup before them; another trial may be far ahead."""
    live = Live(Engine())
    wanted = {"strategy": ["greedy_soup", "study"], "sampler": "tpe", "trials": 6, "defaults": False}
    search = races.start(tmp_path / "run", live, search=wanted)
    search.run()
    (soup,) = made_by(search, "greedy_soup")
    assert soup.scores["quiz"].documents == races.SIZE and soup.blocks is None
    assert {r.state for r in records(search.history())[5:]} >= {"pruned"}


# --- learned soups ------------------------------------------------------------------------------------------------


class Teacher:
    """Stands in for the learner: a mix that depends on what it was asked."""

    def __init__(self, config: Config, broken: bool = False, gradients: bool = True):
        self.config, self.broken, self.gradients, self.asked = config, broken, gradients, []

    def learn(
        self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
    ) -> Recipe:
        self.asked.append((per, loss, start.id if start else None))
        work.spent(25)
        if self.broken:
            raise CandidateError("the loss is NaN at step 3")
        weight = (0.6 if per == "recipe" else 0.7) - (0.05 if loss == "cross_entropy" else 0)
        return self.config.recipe(single_rule("task_arithmetic", weight=weight))

    def closed_form(self, name: str, solve: Any, work: Work) -> Recipe:
        assert solve.__name__ == name
        return self.learn(name, None, None, work)


def test_learned_soups_come_in_order_and_start_from_the_best_mix(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    soup = {"per": ["recipe", "group"], "loss": "expected"}
    wanted = {"strategy": ["learned_soup", "fisher"], "learned_soup": soup, "trials": 14}
    teacher = Teacher(config)
    changes = {**ONE_TASK, "space": {"methods": ["task_arithmetic"]}, "search": wanted}
    search = begin(tmp_path / "run", Judge(closeness(config, 0.62)), teacher, **changes)
    search.run()
    soups = made_by(search, "learned_soup")
    assert teacher.asked == [
        ("recipe", "expected", config.average.id),
        ("group", "expected", soups[0].recipe_id),
        ("fisher", None, None),
    ]
    assert [r.method for r in records(search.history())[4:]] == [
        "learned soup per recipe",
        "learned soup per group",
        "fisher",
    ]
    assert soups[0].params["layers0-1.task_arithmetic.weight.a"] == 0.6  # samplers learn from it
    past = history(search)
    assert past.documents == sum(10 for t in past.trials if t.same_as is None) + 3 * 25


def still_to_learn(search: Search) -> int:
    past = history(search)
    return len(LearnedSoups.expects(Outlook(search.config, [10], past)))


@pytest.mark.parametrize("how", ["without gradients", "broken", "no gain"])
def test_no_round_is_expected_of_soups_that_are_through_without_one(tmp_path: Path, how: str) -> None:
    config = settings(tmp_path / "run")
    soup = {"per": ["recipe"], "loss": ["cross_entropy", "expected"], "rounds": 2, "candidates": 10}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000}
    teacher = Teacher(config, broken=how == "broken", gradients=how != "without gradients")
    judge = Judge(closeness(config, 0.2 if how == "no gain" else 0.62))
    search = begin(tmp_path / "run", judge, teacher, **ONE_TASK, search=wanted)
    assert len(LearnedSoups.expects(Outlook(search.config, [10]))) == 3
    search.run()
    assert still_to_learn(search) == 0


@pytest.mark.parametrize(("rounds", "learned"), [(0, 1), (1, 2), (5, 4)])
def test_the_best_soup_is_learned_on_while_it_pays(tmp_path: Path, rounds: int, learned: int) -> None:
    """Weights 0.53, 0.58, 0.63, 0.68 in turn, and 0.62 is the best: the round that is worse is the last."""

    class Onwards(Teacher):
        def learn(
            self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
        ) -> Recipe:
            super().learn(per, loss, start, work)
            return self.config.recipe(single_rule("task_arithmetic", weight=0.48 + 0.05 * times))

    config = settings(tmp_path / "run")
    soup = {"per": ["recipe"], "loss": "expected", "rounds": rounds}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000}
    teacher = Onwards(config)
    changes = {**ONE_TASK, "space": {"methods": ["task_arithmetic"]}, "search": wanted}
    search = begin(tmp_path / "run", Judge(closeness(config, 0.62)), teacher, **changes)
    search.run()
    soups = made_by(search, "learned_soup")
    assert len(soups) == learned
    assert [start for _, _, start in teacher.asked] == [config.average.id, *[soup.recipe_id for soup in soups[:-1]]]
    labels = [r.method for r in records(search.history()) if "soup" in r.method]
    assert labels == [
        "learned soup per recipe",
        *[f"learned soup per recipe, round {n}" for n in range(2, learned + 1)],
    ]
    assert still_to_learn(search) == 0


@pytest.mark.parametrize("documents", [700, 1_100, 1_500, 2_500])
@pytest.mark.parametrize("losses", [["cross_entropy"], ["cross_entropy", "mixed"]])
def test_learning_takes_no_more_than_is_said(tmp_path: Path, documents: int, losses: list[str]) -> None:
    """Though every round helps, so that all are learned that may be, and each takes all that it may."""

    class Onwards(Teacher):
        def learn(
            self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
        ) -> Recipe:
            work.spent(cost)
            mixed = 0.02 * (loss == "mixed")
            return self.config.recipe(single_rule("task_arithmetic", weight=0.48 + mixed + 0.05 * times))

    soup = {"per": ["recipe"], "loss": losses, "steps": 20, "documents": 2, "rounds": 3}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000, "documents": documents}
    changes = {**ONE_TASK, "space": {"methods": ["task_arithmetic"]}, "search": wanted}
    config = settings(tmp_path / "run", **changes)
    cost = config.search.key("learned_soup", object).cost("mixed", len(config.models), [10])
    search = begin(tmp_path / "run", Judge(closeness(config, 0.9)), Onwards(config), **changes)
    search.run()
    soups = made_by(search, "learned_soup")
    assert [soup for soup in soups if "round" in soup.key]
    spent = sum(soup.learning_documents for soup in soups)
    assert spent <= LearnedSoups.cost(config, [10]).documents <= documents
    assert still_to_learn(search) == 0


@pytest.mark.parametrize(("shares", "first"), [(5.0, "mixed"), (4.0, "cross_entropy")])
def test_the_best_of_all_losses_is_learned_on_where_the_budget_lasts(tmp_path: Path, shares: float, first: str) -> None:
    """Else the first loss's. Three soups are two losses' and a round, and two thirds of the budget are for them. Where
    it lasts for all, the cheaper loss comes first."""

    class Onwards(Teacher):
        def learn(
            self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
        ) -> Recipe:
            mixed = 0.1 * (loss == "mixed")
            return self.config.recipe(single_rule("task_arithmetic", weight=0.48 + mixed + 0.05 * times))

    soup = {"per": ["recipe"], "loss": ["cross_entropy", "mixed"], "steps": 20, "documents": 2, "rounds": 1}
    changes: dict[str, Any] = {**ONE_TASK, "space": {"methods": ["task_arithmetic"]}}
    wanted: dict[str, Any] = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000}
    config = settings(tmp_path / "run", **changes, search=wanted)
    cost = config.search.key("learned_soup", SoupSettings).cost("mixed", len(config.models), [10])
    wanted["documents"] = round(shares * cost)
    search = begin(tmp_path / "run", Judge(closeness(config, 0.9)), Onwards(config), **changes, search=wanted)
    expected = LearnedSoups.expects(Outlook(search.config, [10]))
    search.run()
    soups = [(soup.key["loss"], "round" in soup.key) for soup in made_by(search, "learned_soup")]
    assert len(expected) == 3
    listed = [("cross_entropy", False), ("cross_entropy", True), ("mixed", False)]
    together = [("mixed", False), ("cross_entropy", False), ("mixed", True)]
    assert soups[:3] == (together if first == "mixed" else listed)


def test_the_mean_over_folds_is_not_learned_on(tmp_path: Path) -> None:
    """Its folds learned from all documents: none are left to say whether going on helps."""
    config = settings(tmp_path / "run")
    soup = {"per": ["recipe"], "loss": "expected", "rounds": 2, "folds": 3}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000}
    search = begin(tmp_path / "run", Judge(closeness(config, 0.62)), Teacher(config), **ONE_TASK, search=wanted)
    search.run()
    assert len(made_by(search, "learned_soup")) == 1


def test_a_soup_that_no_guard_refuses_is_learned_on(tmp_path: Path) -> None:
    class Two(Teacher):
        def learn(
            self, per: str, loss: str | None, start: Recipe | None, work: Work, times: int = 1, steps: Any = None
        ) -> Recipe:
            super().learn(per, loss, start, work)
            return self.config.recipe(single_rule("task_arithmetic", weight={"recipe": 0.6, "group": 0.55}[per]))

    config = settings(tmp_path / "run")
    soup = {"per": ["recipe", "group"], "loss": "expected", "rounds": 1}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000}
    search = begin(tmp_path / "run", Judge(closeness(config, 0.62)), Two(config), **ONE_TASK, search=wanted)
    search.run()
    first, second, *_ = made_by(search, "learned_soup")
    past = history(search)
    refused = replace(first, excess={"quiz": 0.1})
    kept = replace(second, key={**second.key, "start": first.key["start"]})
    past.trials = [*past.trials[: first.number], refused, kept]
    found = LearnedSoups(search.surroundings)._round(["expected"], past, Budget(past))
    assert found.key["start"] == second.number and past.value(first) > past.value(second)


def test_a_soup_that_the_budget_does_not_last_for_takes_fewer_steps(tmp_path: Path) -> None:
    """Its rate then falls to the end, where the budget would have cut all steps short."""
    told: list[Any] = []

    class Told(Teacher):
        def learn(self, *args: Any) -> Recipe:
            told.append(args[5])
            return super().learn(*args[:5])

    config = settings(tmp_path / "run")
    soup = {"per": ["recipe"], "loss": "expected", "steps": 100, "documents": 1, "rounds": 0, "validation": 0.5}
    for most in (400, 10_000):
        wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 10_000, "documents": most}
        search = begin(tmp_path / str(most), Judge(closeness(config, 0.62)), Told(config), **ONE_TASK, search=wanted)
        search.run()
    few, every = told
    assert every is None and 10 < few < 100
    first = LearnedSoups(search.surroundings).settings
    spent = sum(10 for trial in history(search).trials[:4])
    assert first.model_copy(update={"steps": few}).cost("expected", 2, [10]) <= 400 - spent - 10
    assert first.model_copy(update={"steps": few + 1}).cost("expected", 2, [10]) > 400 - spent - 10


def test_what_another_worker_is_learning_is_not_planned_with(tmp_path: Path) -> None:
    """Both would be cut short in the middle, at a rate that has not fallen yet."""
    soup = {"per": ["recipe"], "loss": ["expected", "cross_entropy"], "steps": 100, "documents": 1, "rounds": 0}
    wanted = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 0}
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), **ONE_TASK, search=wanted)
    search.run()
    mine = search.config.search.key("learned_soup", SoupSettings)
    one = mine.usual_cost("expected", 0, [10]) + 10
    left = one + mine.model_copy(update={"steps": 50}).usual_cost("cross_entropy", 3, [10]) + 10
    planned = {"strategy": ["learned_soup"], "learned_soup": soup, "trials": 1000, "documents": 4 * 10 + left}
    config = settings(tmp_path / "run", search=planned, **ONE_TASK)
    soups = LearnedSoups(replace(search.surroundings, config=config, learner=Teacher(config)))
    handle = ask_for_a_soup(search)
    key = {"per": "recipe", "loss": "expected", "start": None, "gradients": True}
    for spent in (0, 100):
        trials.write(handle, key=key, learning_documents=spent)
        past = History(search.study, config)
        proposal = soups.next(past, Budget(past))
        assert isinstance(proposal, Learned) and proposal.key["loss"] == "cross_entropy"
        assert proposal.key["steps"] == 50


def test_soups_of_each_loss_start_from_none_of_the_other(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    teacher = Teacher(config)
    soup = {"per": ["recipe", "group"], "loss": ["expected", "cross_entropy"]}
    changes = {**ONE_TASK, "search": {"strategy": "learned_soup", "learned_soup": soup}}
    search = begin(tmp_path / "run", Judge(closeness(config, 0.62)), teacher, **changes)
    search.run()
    soups = made_by(search, "learned_soup")
    assert teacher.asked == [
        ("recipe", "expected", config.average.id),
        ("group", "expected", soups[0].recipe_id),
        ("recipe", "cross_entropy", config.average.id),
        ("group", "cross_entropy", soups[2].recipe_id),
    ]
    assert [r.method for r in records(search.history())[-2:]] == [
        "learned soup per recipe by cross-entropy",
        "learned soup per group by cross-entropy",
    ]


def test_a_soup_is_told_when_the_budget_is_used_up(tmp_path: Path) -> None:
    teacher = Teacher(settings(tmp_path / "run"))
    spent: list[bool] = []

    def learn(per: str, loss: str, start: Recipe, work: Work, times: int = 1, steps: Any = None) -> Recipe:
        for _ in range(4):
            spent.append(work.stop())
            work.spent(100)
        return teacher.config.recipe(single_rule("task_arithmetic", weight=0.6))

    teacher.learn = learn
    wanted = {"strategy": "learned_soup", "documents": 4 * 10 + 250}
    search = begin(tmp_path / "run", None, teacher, search=wanted)
    search.run()
    assert spent == [False, False, False, True] and len(made_by(search, "learned_soup")) == 1


def test_the_study_leaves_room_to_learn_the_soups_after_it(tmp_path: Path) -> None:
    soup = {"per": "recipe", "loss": "expected", "steps": 4, "documents": 2, "folds": 1}
    # of 10 documents 2 are looked at twice and by 3 parents; the closed form reads all, for each model, and backward
    each, soups, closed = 10, 3 * 4 * 2 + (2 + 3) * 2, 3 * 2 * 10
    kept = 2 * each + soups + closed
    wanted = {"strategy": ["study", "learned_soup", "fisher"], "learned_soup": soup | {"per": ["recipe"]}}
    changes = {**ONE_TASK, "search": wanted | {"documents": 4 * each + 81 + kept, "trials": 1000}}
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), Teacher(settings(tmp_path / "run")), **changes)
    search.run()
    order = [t.strategy for t in history(search).trials]
    # at last what the soups left of what was kept for them
    assert order == ["baselines"] * 4 + ["study"] * 9 + ["learned_soup", "fisher"] + ["study"] * 4


def test_what_is_kept_for_a_soup_stays_so_while_it_is_learned(tmp_path: Path) -> None:
    """Another worker's study would use it up."""
    soup = {"per": ["recipe"], "loss": ["expected", "cross_entropy"], "steps": 4, "documents": 2}
    wanted = {"strategy": ["study", "learned_soup"], "learned_soup": soup, "documents": 200, "trials": 0}
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), **ONE_TASK, search=wanted)
    search.run()
    soups, past = LearnedSoups(replace(search.surroundings, learner=Teacher(search.config))), history(search)
    cost = search.config.search.learned_soup.cost("expected", 2, [10])
    assert soups.wants(past) == (2, 2 * cost)
    assert Budget(past, soups.wants(past)).kept == min(2 * cost + 20, 100)  # no more than half of the budget
    handle = ask_for_a_soup(search)
    assert soups.wants(history(search)) == (1, 2 * cost + 10)
    trials.write(handle, learning_documents=cost - 5)
    assert soups.wants(history(search)) == (1, cost + 5 + 10)
    trials.write(handle, scores={"quiz": TaskScore(0.5, 0.1, 10, "acc")})
    assert soups.wants(history(search)) == (1, cost)
    search.study.tell(handle, 0.5)
    without = LearnedSoups(replace(search.surroundings, learner=Teacher(search.config, gradients=False)))
    assert without.wants(history(search)) == (1, 100 * 10)
    assert Budget(history(search), Wanted(1, 1000)).kept == 100


def ask_for_a_soup(search: Search) -> optuna.Trial:
    """Another worker is at the first soup."""
    key = {"per": "recipe", "loss": "expected", "start": None}
    trials.enqueue(search.study, strategy="learned_soup", kind=Kind.LEARNED, key=key)
    return search.study.ask()


def test_the_study_plans_with_what_is_left_to_it(tmp_path: Path) -> None:
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), search={"trials": 0}, **ONE_TASK)
    search.run()
    soup = {"per": ["recipe"], "loss": "expected", "steps": 4, "documents": 2}
    wanted = {"sampler": "auto", "trials": 99, "documents": 400, "learned_soup": soup}
    config = settings(tmp_path / "run", search=wanted, **ONE_TASK)
    run = replace(search.surroundings, config=config, learner=Teacher(config))
    study, past = Study(run), History(search.study, config)
    assert study.stage(past, Budget(past)).until == (400 - 40) // 10 // 2
    kept = 10 + config.search.learned_soup.cost("expected", 2, [10])
    later = LearnedSoups(run).wants(past)
    assert study.stage(past, Budget(past, later)).until == (400 - 40 - kept) // 10 // 2


def test_hours_are_kept_as_long_as_one_worker_has_taken(tmp_path: Path) -> None:
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), search={"trials": 4}, **ONE_TASK)
    search.run()
    past = History(search.study, settings(tmp_path / "run", search={"trials": 100, "hours": 0.8}, **ONE_TASK))
    # two workers side by side, 8 trials of 10 documents, 0.1 hours each
    begun = [datetime(2026, 1, 1) + timedelta(hours=0.1 * (trial.number // 2)) for trial in past.trials]
    past.trials = [
        replace(trial, begun_at=start, taken=start, settled_at=(end := start + timedelta(hours=0.1)), ended_at=end)
        for trial, start in zip(past.trials, begun, strict=True)
    ]
    assert past.hours == pytest.approx(0.4) and past.documents == 80 and not Budget(past).used_up
    # 40 documents would take one of them the other 0.4 hours, and no more than half of the hours are kept
    over = [Budget(past, Wanted(2, documents)).used_up for documents in (19, 21, 1000)]
    assert over == [False, True, True]
    past.config = settings(tmp_path / "run", search={"trials": 100, "hours": 0.9}, **ONE_TASK)
    assert not Budget(past, Wanted(2, 1000)).used_up


def test_a_second_worker_waits_until_the_first_says_whether_there_are_gradients(tmp_path: Path) -> None:
    soup = {"per": ["recipe"], "loss": ["expected", "cross_entropy"]}
    search = begin(tmp_path / "run", None, None, search={"strategy": "learned_soup", "learned_soup": soup})
    asked = LearnedSoups(replace(search.surroundings, learner=Teacher(search.config)))

    def proposed() -> Any:
        past = history(search)
        return asked.next(past, Budget(past))

    assert proposed().key["loss"] == "expected"
    handle = ask_for_a_soup(search)
    assert proposed() is WAIT
    key = {"per": "recipe", "loss": "expected", "start": None}
    trials.write(handle, key=key | {"gradients": True})
    assert proposed().key["loss"] == "cross_entropy"
    trials.write(handle, key=key | {"gradients": False})
    assert proposed() is None


def test_without_gradients_a_second_loss_changes_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    teacher = Teacher(config, gradients=False)
    soup = {"per": ["recipe", "group"], "loss": ["expected", "cross_entropy"]}
    search = begin(tmp_path / "run", None, teacher, search={"strategy": "learned_soup", "learned_soup": soup})
    search.run()
    assert [(per, loss) for per, loss, _ in teacher.asked] == [("recipe", "expected"), ("group", "expected")]


def test_a_soup_that_cannot_be_learned_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    teacher = Teacher(settings(tmp_path / "run"), broken=True)
    soup = {"per": ["recipe", "group"], "loss": "expected"}
    wanted = {"strategy": ["learned_soup", "study"], "learned_soup": soup, "trials": 4}
    search = begin(tmp_path / "run", None, teacher, search=wanted)
    search.run()
    assert [t.error for t in made_by(search, "learned_soup")] == ["the loss is NaN at step 3"] * 2
    assert len(made_by(search, "study")) == 2


# --- the study ----------------------------------------------------------------------------------------------------

AUTO = {**ONE_TASK, "space": {"methods": ["linear", "task_arithmetic"]}, "search": {"sampler": "auto", "trials": 12}}


def stages(search: Search) -> list[tuple[str, str]]:
    return [(t.key["stage"], t.key["sampler"]) for t in made_by(search, "study")]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str | None], Search]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_local_storage", lambda url: optuna.storages.InMemoryStorage())
        folder = tmp_path_factory.mktemp("staged") / "run"
        search = begin(folder, Judge(closeness(settings(folder))), **AUTO)
        search.run()
    return ids(search), search


def test_auto_chooses_the_method_and_then_refines_the_numbers(staged: tuple[list[str | None], Search]) -> None:
    _, search = staged
    assert stages(search) == [("study", "tpe")] * 6 + [("refine", "gp")] * (1 + 6)
    fixed = store.noted(search.study, FIXED)
    refined = [t for t in made_by(search, "study") if t.key["stage"] == "refine"]
    assert refined[0].recipe.dump() == fixed["recipe"] and refined[0].same_as is not None
    method = fixed["recipe"]["rules"][0]["method"]
    assert {m for t in refined for m in t.recipe.methods} == {method}
    past = history(search)
    best = max(past.value(t) or 0.0 for t in past.trials if t.key.get("stage") != "refine")
    assert past.value(past.trials[fixed["from"]]) == best
    space = RefineSpace(search.config, refined[0].recipe)
    for trial in refined:
        assert len(trial.params) == space.dimension
        for turned in space.turned:
            assert turned.low <= trial.params[turned.name] <= turned.high


def test_a_recipe_of_many_numbers_is_refined_by_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MOST_NUMBERS", 1)
    search = begin(tmp_path / "run", Judge(closeness(settings(tmp_path / "run"))), **AUTO)
    search.run()
    refined = [t for t in made_by(search, "study") if t.key["stage"] == "refine"]
    assert sum(t.same_as is None for t in refined) == 6 and refined[0].same_as is not None
    assert {name for t in refined for name in t.params} == {"refine.weight.a", "refine.weight.b"}
    assert refined[0].params == {"refine.weight.a": 1.0, "refine.weight.b": 1.0}


@pytest.mark.parametrize("at", [4, 9, 10, 11, 14])
def test_auto_killed_at_any_moment_proposes_the_same(
    tmp_path: Path, at: int, staged: tuple[list[str | None], Search]
) -> None:
    figure = closeness(settings(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "run", Judge(figure, stop_at=at), **AUTO).run()
    again = begin(tmp_path / "run", Judge(figure), **AUTO)
    again.run()
    assert ids(again) == staged[0]


def test_a_long_budget_is_refined_by_cmaes_the_same_after_a_kill(tmp_path: Path) -> None:
    changes = {**ONE_TASK, "space": {"methods": ["linear"]}, "search": {"sampler": "auto", "trials": 48}}
    figure = closeness(settings(tmp_path / "one"))
    one = begin(tmp_path / "one", Judge(figure), **changes)
    one.run()
    assert stages(one) == [("study", "tpe")] * 12 + [("refine", "cmaes")] * (1 + 36)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "two", Judge(figure, stop_at=40), **changes).run()
    two = begin(tmp_path / "two", Judge(figure), **changes)
    two.run()
    assert ids(one) == ids(two)


@pytest.mark.parametrize("sampler", ["cmaes", "gp", "nsga2", "random", "tpe"])
def test_every_sampler_runs_the_same_twice(tmp_path: Path, sampler: str) -> None:
    changes = {**ONE_TASK, "space": {"methods": ["task_arithmetic"]}, "search": {"sampler": sampler, "trials": 8}}
    figure = closeness(settings(tmp_path / "one"))
    searches = [begin(tmp_path / name, Judge(figure), **changes) for name in ("one", "two")]
    for search in searches:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            search.run()
    assert ids(searches[0]) == ids(searches[1]) and len(set(ids(searches[0]))) >= 4 + 8 - 1
    assert set(stages(searches[0])) == {("study", sampler)}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"search": {"sampler": "cmaes"}}, "search.sampler is cmaes, which chooses no methods or models"),
        ({"search": {"sampler": "gp"}}, "search.sampler is gp, which chooses no methods or models"),
        ({"search": {"sampler": "gp"}, "space": {"stack": {}}}, "search.sampler is gp, which chooses"),
        (
            {"objective": "pareto", "search": {"sampler": "cmaes"}, "space": {"methods": ["linear"]}},
            "takes one objective",
        ),
        ({"objective": "pareto", "space": {"grow": True}}, "objective is pareto"),
        ({"space": {"grow": True, "depth": "split"}}, "space.grow refines depth split no further"),
        ({"space": {"depth": "split", "layer_groups": 2}}, "layer_groups goes with depth groups"),
        ({"search": {"strategy": ["study", "random"]}}, "random would never begin"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        read = settings(tmp_path, **changes)
        check_space(read)
        refuse(read)
    assert "\n" not in str(caught.value)


def test_growing_begins_with_one_group_and_splits_the_best(tmp_path: Path) -> None:
    space = {"methods": ["linear", "task_arithmetic"], "layer_groups": 2, "grow": True}
    changes = {**ONE_TASK, "space": space, "search": {"sampler": "auto", "trials": 12}}
    config = settings(tmp_path / "run", **changes)
    small = config.space.model_copy(update={"layer_groups": 1})
    coarse = SearchSpace(config.model_copy(update={"space": small}), INFOS, 2)
    judge = Judge(closeness(config))
    search = Search(config, RunFolder.prepare(config), SearchSpace(config, INFOS, 2), judge.engine, judge,
                    coarse=coarse, infos=INFOS, layers=2)  # fmt: skip
    search.run()
    assert [label for label, _ in stages(search)] == ["coarse"] * 6 + ["refine"] * 6
    by_stage = {label: [t.recipe for t in made_by(search, "study") if t.key["stage"] == label]
                for label in ("coarse", "refine")}  # fmt: skip
    assert {len(r.rules) for r in by_stage["coarse"]} == {1}
    assert {tuple(rule.layers for rule in r.rules) for r in by_stage["refine"]} == {((0, 0), (1, 1))}
    first, _ = by_stage["refine"][0].rules
    assert first.parameters == store.noted(search.study, FIXED)["recipe"]["rules"][1]["parameters"]
    assert search.study.get_trials()[3].params["layers0-1.linear.weight.a"] == 1.0  # the coarse stage learns from it


@pytest.mark.parametrize("depth", ["control_points", "split"])
def test_other_depths_are_refined_within_their_space(tmp_path: Path, depth: str) -> None:
    infos = [TensorInfo(f"layers.{n}.mlp", n, "mlp", (2, 2)) for n in range(4)]
    space = {"methods": ["linear", "task_arithmetic"], "depth": depth}
    config = settings(tmp_path / "run", **ONE_TASK, space=space, search={"sampler": "auto", "trials": 10})
    searched, judge = SearchSpace(config, infos, 4), Judge(closeness(config))
    search = Search(config, RunFolder.prepare(config), searched, judge.engine, judge, infos=infos, layers=4)
    search.run()
    assert [label for label, _ in stages(search)] == ["study"] * 5 + ["refine"] * (1 + 5)
    fixed = Recipe.from_data(store.noted(search.study, FIXED)["recipe"], "test")
    around = OneMethod(config, fixed, infos, 4)
    refined = [t for t in made_by(search, "study") if t.key["stage"] == "refine"]
    assert around.start == refined[0].params and "method" not in around.start
    for trial in refined:
        assert searched.parameters(trial.recipe) == pytest.approx({**trial.params, "method": fixed.methods[0]})
    assert len({t.recipe.id for t in refined}) == 1 + 5


def test_random_takes_the_budget_and_the_control_comes_on_top(tmp_path: Path) -> None:
    search = begin(tmp_path / "run", search={"strategy": "random", "trials": 5, "random_control": True})
    search.run()
    order = [t.strategy for t in history(search).trials]
    assert order == ["baselines"] * 4 + ["random"] * 5 + ["random_control"] * 5
    assert len(set(ids(search))) == 14


# --- warm start, budgets, equal recipes ---------------------------------------------------------------------------


def test_a_run_begins_with_the_best_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the other run is read from its folder
    other = begin(tmp_path / "other", search={"trials": 5})
    other.run()
    config = settings(tmp_path / "run", search={"trials": 4, "seed": 9, "warm_start": str(tmp_path / "other")})
    best = [r for r in sorted(records(other.history()), key=lambda r: -r.objective) if r.name is None][:3]
    warm = [recipe for recipe, learned in warm_recipes(config) if not learned]
    assert [recipe.rules for recipe in warm] == [Recipe.from_data(r.recipe, "best").rules for r in best]
    assert {recipe.seed for recipe in warm} == {9}
    search = begin(tmp_path / "run", search={"trials": 4, "seed": 9, "warm_start": str(tmp_path / "other")})
    search.run()
    assert [t.recipe_id for t in made_by(search, "warm_start")] == [recipe.id for recipe in warm]
    assert all(t.params for t in made_by(search, "warm_start")) and len(made_by(search, "study")) == 1
    (tmp_path / "other").rename(tmp_path / "away")
    refuse(config)  # a run that has begun goes on without them
    assert WarmStart(search.surroundings).recipes == warm
    (tmp_path / "away").rename(tmp_path / "other")
    third = settings(tmp_path / "third", models={"a": "a", "z": "z"}, search={"warm_start": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"search.warm_start: .*other merges other models \(a, b\)"):
        warm_recipes(third)
    with pytest.raises(UserError, match="no run folder"):
        warm_recipes(settings(tmp_path / "fourth", search={"warm_start": str(tmp_path)}))


def test_a_soup_that_another_run_learned_by_answers_stays_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = settings(tmp_path / "other")
    wanted = {"strategy": ["learned_soup"], "learned_soup": {"per": ["recipe"], "loss": "expected"}}
    other = begin(tmp_path / "other", Judge(closeness(config, 0.62)), Teacher(config), **ONE_TASK, search=wanted)
    other.run()
    assert made_by(other, "learned_soup")
    search = begin(tmp_path / "run", search={"trials": 4, "strategy": "random", "warm_start": str(tmp_path / "other")})
    search.run()
    (warm,) = made_by(search, "warm_start")
    assert warm.recipe.rules[0].parameters == {"weight": 0.6} and of_trial(warm).by_answers(warm)
    assert not any(of_trial(trial).by_answers(trial) for trial in history(search).trials[: warm.number])


def test_document_evaluations_are_a_budget_and_the_costs_are_told(tmp_path: Path) -> None:
    changes = {**ONE_TASK, "search": {"trials": 50, "documents": 75}}
    search = begin(tmp_path / "run", Judge(lambda recipe: 0.5), **changes)
    search.run()
    past = history(search)
    assert past.documents == 80 and len(past.trials) == 8 and Budget(past).used_up
    store.note(search.study, "tokens_per_document", 12.5)
    (line,) = costs(history(search))
    assert line.startswith("cost: 8 trials, 80 document evaluations, 1,000 prompt tokens; 6 s merging and scoring")
    more = settings(tmp_path / "run", **changes | {"search": {"trials": 50, "documents": 125}})
    line = costs(History(search.study, more))[1]
    assert line.startswith("left: about 5 trials, 50 document evaluations, 4 s; of the budget 46 trials, 45 ")


def test_recipes_that_do_the_same_are_scored_once(tiny_pool: Callable[..., Any], tmp_path: Path) -> None:
    written = tiny_pool(models=2)
    pool = written.load()
    engine = RealEngine(pool, "float32")
    changes = {**ONE_TASK, "base_model": written.base, "models": written.models, "dtype": "float32"}
    config = settings(tmp_path / "run", **changes, search={"strategy": "greedy_soup"})
    whole = config.average
    each = config.recipe(single_rule("linear", weight={"a": 1.0, "b": 1.0}))
    rule = whole.rules[0]
    split = config.recipe(tuple(rule.model_copy(update={"layers": (n, n)}) for n in range(pool.layers)))
    assert len({r.id for r in (whole, each, split)}) == 3
    assert len({engine.identity(r) for r in (whole, each, split)}) == 1
    other = config.recipe(single_rule("linear", weight={"a": 1.0, "b": 0.5}))
    reseeded = each.model_copy(update={"seed": 8})
    assert engine.identity(other) != engine.identity(whole) == engine.identity(reseeded)
    dropped = config.recipe(single_rule("dare_ties", density=0.5))
    assert engine.identity(dropped) != engine.identity(dropped.model_copy(update={"seed": 8}))

    calls = []

    class Weighs:
        def score(self) -> Found:
            calls.append(1)
            value = float(sum(p.detach().double().sum() for p in engine.model.parameters()))
            return Found({"quiz": TaskScore(value, 0.01, 10, "acc")})

    space = SearchSpace(config, pool.infos, pool.layers)
    search = Search(config, RunFolder.prepare(config), space, engine, Weighs())
    search.run()
    (soup,) = made_by(search, "greedy_soup")
    assert soup.same_as == 3 and len(calls) == 4
    assert history(search).value(soup) == history(search).value(history(search).trials[3])
    assert history(search).documents == 40


# --- several objectives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["auto", "nsga2", "gp"])
def test_pareto_keeps_an_objective_for_each_task_and_the_table_marks_the_front(tmp_path: Path, sampler: str) -> None:
    guard = [{"task": "bits", "max_drop": 0.9}]
    space = {"methods": ["task_arithmetic"], "layer_groups": 2}
    changes = {"objective": "pareto", "guard": guard, "space": space, "search": {"sampler": sampler, "trials": 14}}
    search = begin(tmp_path / "run", **changes)
    search.run()
    assert len(search.study.directions) == 2
    found = records(search.history())
    kept = [r for r in found if not r.infeasible]
    assert 0 < len(kept) < len(found)
    better = {
        r.number: [
            o.number
            for o in kept
            if o.scores["quiz"].value >= r.scores["quiz"].value
            and o.scores["bits"].value <= r.scores["bits"].value
            and o.scores != r.scores
        ]
        for r in kept
    }
    front = [number for number, others in better.items() if not others]
    assert [r.number for r in found if r.front] == front and 0 < len(front) < len(kept)
    assert [row["trial"] for row in table_rows(found, sort="front")][: len(front)] == [
        r["trial"] for r in table_rows(found) if r["trial"] in front
    ]
    assert [row["front"] for row in json.loads(render(found, "json"))].count(True) == len(front)
    lines = render(found, "md").splitlines()
    assert lines[0].startswith("| rank | front | trial |") and sum(
        line.split("|")[2].strip() == "*" for line in lines
    ) == len(front)
    assert render(found, "csv").splitlines()[0].startswith("rank,front,trial")
    assert "front" not in table_rows([r for r in found if not r.front])[0]
