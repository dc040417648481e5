"""The search: baselines first, then what the study proposes, each trial in the storage the moment it ends."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config, RacingConfig
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import load_documents
from mergesearch.recipe import Recipe
from mergesearch.record import Record, TaskScore
from mergesearch.search import objective as objectives
from mergesearch.search.baselines import BASE, baselines, parent_names
from mergesearch.search.objective import Objective
from mergesearch.search.racing import OTHERS, Best, race, spreads
from mergesearch.search.samplers import SeededPerTrial
from mergesearch.search.store import RunFolder, Worker, abandoned, objective_of, open_study, to_record
from mergesearch.space import SearchSpace

log = logging.getLogger(__name__)

LIBRARIES = ("mergesearch", "torch", "transformers", "lm_eval", "optuna")
WAIT = 1.0  # seconds between looks at what other workers are doing


class Builds(Protocol):
    """The part of the engine that a search needs: makes the live model a recipe's candidate, returns seconds."""

    def load(self, recipe: Recipe) -> float: ...


class DocumentScores(Protocol):
    tasks: dict[str, TaskScore]
    seconds: float

    def save_documents(self, path: Any) -> None: ...


class Scores(Protocol):
    """The part of the scorer that a search needs: scores the live model as it is now. With racing, `Blocks` too."""

    def score(self) -> DocumentScores: ...


class SearchFailed(Exception):
    """The search cannot go on, and why."""


class Search:
    """One worker of one run. Any number of them may share the storage; there is no coordinator.

    Args:
        config: the run's configuration.
        folder: its run folder.
        space: what may be proposed.
        engine: builds candidates.
        scorer: scores the live model.
        started: called with the record of each trial that begins.
        finished: called with the record of each trial that ends, in the order in which they end here.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        space: SearchSpace,
        engine: Builds,
        scorer: Scores,
        *,
        started: Callable[[Record], None] = lambda record: None,
        finished: Callable[[Record], None] = lambda record: None,
        device: str = "cpu",
    ):
        self.config = config
        self.folder = folder
        self.space = space
        self.engine = engine
        self.scorer = scorer
        self._started = started
        self._finished = finished
        self._machine = machine(device)
        self.study = open_study(config, folder)
        self.study.sampler = SeededPerTrial(config.search.sampler, config.search.seed)
        self._recipes = baselines(config)
        self._arranged = False

    def run(self) -> None:
        """Scores what the budget allows; called again, goes on from what is in the storage.

        Raises:
            SearchFailed: the base or every model failed, so no objective can be computed.
            KeyboardInterrupt: passed on; the trial at work is taken up by the next start.
        """
        with Worker(self.folder) as worker:
            with self.folder.lock("setup"):
                self._enqueue_baselines()
            while (trial := self._take(worker)) is not None:
                self._work(trial)
                self._settle()

    # --- what to do next ---

    def _enqueue_baselines(self) -> None:
        if objective_of(self.study):
            return
        trials = self.study.get_trials(deepcopy=False)
        there = {trial.user_attrs.get("name") for trial in trials if trial.state != TrialState.FAIL}
        for name, recipe in self._recipes.items():
            if name not in there:
                parameters = self.space.parameters(recipe) or {}
                attributes = {"name": name, "recipe": recipe.dump(), "recipe_id": recipe.id}
                self.study.enqueue_trial(parameters, user_attrs=attributes)

    def _take(self, worker: Worker) -> optuna.Trial | None:
        """The next trial to work on: one that an ended worker left, a waiting one, or a new proposal."""
        while True:
            with self.folder.lock("take"):
                trial = self._left_behind(worker) or self._ask()
                if trial is not None:
                    trial.set_user_attr("worker", worker.id)
                    return trial
            if not self._awaited():
                return None
            time.sleep(WAIT)

    def _left_behind(self, worker: Worker) -> optuna.Trial | None:
        left = abandoned(self.study, worker)
        return optuna.Trial(self.study, left._trial_id) if left else None

    def _ask(self) -> optuna.Trial | None:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if waiting or (objective_of(self.study) and not self._spent()):
            return self.study.ask()
        return None

    def _awaited(self) -> bool:
        """Whether there will be more to do once other workers have scored the baselines."""
        return objective_of(self.study) is None and not self._spent()

    def _spent(self) -> bool:
        proposed = [t for t in self.study.get_trials(deepcopy=False) if not t.user_attrs.get("name")]
        hours = self.config.search.hours
        return len(proposed) >= self.config.search.trials or (hours is not None and worked_hours(self.study) >= hours)

    # --- one trial ---

    def _work(self, trial: optuna.Trial) -> None:
        if "stopped" in trial.user_attrs:  # its worker ended before it told
            self._prune(trial)
        if "scores" in trial.user_attrs or "stopped" in trial.user_attrs:  # only the objective is missing
            return
        try:
            recipe = self._recipe(trial)
            self._started(self._record(trial.number))
            self._build_and_score(trial, recipe)
        except OSError as error:
            raise SearchFailed(
                f"trial {trial.number} could not be recorded ({error}): the same command goes on"
            ) from error
        except Exception as error:
            log.debug("trial %d failed", trial.number, exc_info=True)
            self._fail(trial, str(error) if isinstance(error, CandidateError) else f"{type(error).__name__}: {error}")

    def _recipe(self, trial: optuna.Trial) -> Recipe:
        stated = trial.user_attrs.get("recipe")
        if stated:
            return Recipe.from_data(stated, f"trial {trial.number}")
        recipe = self.space.suggest(trial)
        trial.set_user_attr("recipe", recipe.dump())
        trial.set_user_attr("recipe_id", recipe.id)
        return recipe

    def _build_and_score(self, trial: optuna.Trial, recipe: Recipe) -> None:
        trial.set_user_attr("machine", self._machine)
        if self._copy_equal(trial, recipe):
            return
        if self.config.racing and not trial.user_attrs.get("name"):
            self._race(trial, recipe, self.config.racing)
            return
        self._keep(trial, self.engine.load(recipe), self.scorer.score())

    def _keep(self, trial: optuna.Trial, merge_seconds: float, found: DocumentScores) -> None:
        found.save_documents(self.folder.documents(trial.number))
        trial.set_user_attr("merge_seconds", merge_seconds)
        trial.set_user_attr("score_seconds", found.seconds)
        # last, because a trial that has it is not scored again
        trial.set_user_attr("scores", {task: asdict(score) for task, score in found.tasks.items()})

    def _copy_equal(self, trial: optuna.Trial, recipe: Recipe) -> bool:
        """The scores of an earlier trial with the same recipe, where there is one."""
        for other in self.study.get_trials(deepcopy=False):
            found = other.user_attrs
            if other.number == trial.number or found.get("recipe_id") != recipe.id or "scores" not in found:
                continue
            documents = self.folder.documents(other.number)
            if documents.is_file():
                shutil.copyfile(documents, self.folder.documents(trial.number))
            trial.set_user_attr("same_as", other.number)
            trial.set_user_attr("merge_seconds", 0.0)
            trial.set_user_attr("score_seconds", 0.0)
            trial.set_user_attr("scores", found["scores"])
            return True
        return False

    # --- racing ---

    def _race(self, trial: optuna.Trial, recipe: Recipe, racing: RacingConfig) -> None:
        spent: list[float] = []
        blocks = self.folder.blocks(recipe.id)
        self._arrange()
        outcome = race(
            self.scorer,
            self._best(),
            self._factors(),
            racing.error,
            blocks,
            lambda: spent.append(self.engine.load(recipe)),
        )
        if outcome.stopped is None:
            self._keep(trial, sum(spent), outcome.scores)
            shutil.rmtree(blocks, ignore_errors=True)
            return
        trial.set_user_attr("merge_seconds", sum(spent))
        trial.set_user_attr("score_seconds", outcome.scores.seconds)
        trial.set_user_attr("blocks", outcome.blocks)
        trial.set_user_attr("partial", {task: asdict(score) for task, score in outcome.scores.tasks.items()})
        trial.set_user_attr("stopped", outcome.stopped)
        self._prune(trial)

    def _prune(self, trial: optuna.Trial) -> None:
        """Tells the study, with the objective on the documents so far, by which samplers rank pruned trials."""
        found = trial.user_attrs
        objective = objective_of(self.study)
        value = objective.ranking({task: TaskScore(**data) for task, data in found["partial"].items()})
        trial.report(value, step=found["blocks"])
        self.study.tell(trial, state=TrialState.PRUNED)
        self._finished(self._record(trial.number))

    def _best(self) -> Best | None:
        """The best finished trial whose documents are here and that breaks no guard."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        complete = [trial for trial in complete if all(excess <= 0 for excess in trial.constraints.values())]
        there = [trial for trial in complete if self.folder.documents(trial.number).is_file()]
        if not there:
            return None
        best = min(there, key=lambda trial: (-trial.value, trial.number))
        # the baselines, and the latest of the others
        named = [t.number for t in there if t.user_attrs.get("name") and t is not best]
        late = [t.number for t in there if not t.user_attrs.get("name") and t is not best][-OTHERS:]
        documents = [load_documents(self.folder.documents(number)) for number in (best.number, *named, *late)]
        return Best(best.number, documents[0], documents[1:])

    def _arrange(self) -> None:
        """Draws the blocks once, from the parents' scores: the same for every trial, worker and start."""
        if self._arranged:
            return
        if "spread" not in self.study.user_attrs:
            wanted = set(parent_names(self.config))
            parents = [t.number for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("name") in wanted
                       and "scores" in t.user_attrs and self.folder.documents(t.number).is_file()]  # fmt: skip
            found = [load_documents(self.folder.documents(number)) for number in parents]
            self.study.set_user_attr("spread", spreads(found, self._factors()) if len(found) > 1 else None)
        self.scorer.arrange(self.study.user_attrs["spread"])
        self._arranged = True

    def _factors(self) -> dict[str, float]:
        objective = objective_of(self.study)
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        scores = {task: TaskScore(**data) for task, data in complete[0].user_attrs["scores"].items()}
        return objective.factors(scores)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("error", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        self._finished(self._record(trial.number))

    # --- objective ---

    def _settle(self) -> bool:
        """Gives every scored trial its objective once the parents have fixed the scale. True where any was given."""
        objective = objective_of(self.study) or self._fix_objective()
        if objective is None:
            return False
        given = False
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "scores" in trial.user_attrs:
                given = self._give(trial, objective) or given
        return given

    def _give(self, trial: FrozenTrial, objective: Objective) -> bool:
        scores = {task: TaskScore(**data) for task, data in trial.user_attrs["scores"].items()}
        value = objective.ranking(scores)
        try:
            for task, excess in objective.excess(scores).items():
                if task not in trial.constraints:
                    optuna.Trial(self.study, trial._trial_id).set_constraint(task, excess)
            self.study.tell(trial.number, value)
        except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return False  # another worker was faster
        self._finished(self._record(trial.number))
        return True

    def _fix_objective(self) -> Objective | None:
        """The objective as the parents' scores fix it; None while one of them is still to be scored."""
        by_name = {trial.user_attrs.get("name"): trial for trial in self.study.get_trials(deepcopy=False)}
        found: dict[str, dict[str, TaskScore]] = {}
        for name in parent_names(self.config):
            trial = by_name.get(name)
            if trial is None or (trial.state != TrialState.FAIL and "scores" not in trial.user_attrs):
                return None
            if trial.state != TrialState.FAIL:
                found[name] = {task: TaskScore(**data) for task, data in trial.user_attrs["scores"].items()}
        objective = self._objective(found, by_name)
        try:
            objective = objectives.with_conditions(objective, self.config, found)
        except LookupError as error:
            raise SearchFailed(str(error)) from None
        self.study.set_user_attr("objective", objective.to_data())
        return objective

    def _objective(self, found: dict[str, dict[str, TaskScore]], by_name: dict[str, FrozenTrial]) -> Objective:
        if self.config.objective.scale == "raw":
            return objectives.raw(self.config.tasks)
        models = {name: scores for name, scores in found.items() if name != BASE}
        if BASE not in found or not models:
            failed = BASE if BASE not in found else next(iter(self.config.models))
            reason = by_name[failed].user_attrs.get("error", "unknown")
            raise SearchFailed(f"{failed} could not be scored, so objective.scale parents has no scale: {reason}")
        return objectives.parents(self.config.tasks, found[BASE], models)

    def _record(self, number: int) -> Record:
        trial = self.study.get_trials(deepcopy=False)[number]
        return to_record(trial, objective_of(self.study))


def machine(device: str) -> dict[str, str]:
    """The device and the versions that a score was measured with."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {"device": device, "python": platform.python_version(), **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def worked_hours(study: optuna.Study) -> float:
    """Wall-clock hours in which at least one trial was at work, over all starts and workers of the run."""
    spans = [
        (trial.datetime_start, trial.datetime_complete or datetime.now())
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_start and trial.state.is_finished()
    ]
    seconds, end = 0.0, datetime.min
    for start, stop in sorted(spans):
        seconds += max(0.0, (stop - max(start, end)).total_seconds())
        end = max(end, stop)
    return seconds / 3600


__all__ = ["Search", "SearchFailed", "machine", "worked_hours"]
