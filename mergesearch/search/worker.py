"""One worker of a run: takes a trial, makes its recipe, builds and scores the candidate, tells the study."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Protocol, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config, RacingConfig
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import DocumentScores, Scores, load_documents
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.search import objective as objectives
from mergesearch.search import store, trials
from mergesearch.search.budget import Budget, Wanted, total
from mergesearch.search.history import History, hours_at_work
from mergesearch.search.machine import machine
from mergesearch.search.objective import Objective
from mergesearch.search.races import Races
from mergesearch.search.racing import Blocks
from mergesearch.search.samplers import Choice, SeededPerTrial
from mergesearch.search.storage import Patience
from mergesearch.search.store import Presence, RunFolder
from mergesearch.search.strategies import exhausted, of_trial, strategies_of
from mergesearch.search.strategies.base import Learns, Proposal, Sampled, Stated, Strategy, Surroundings, Wait
from mergesearch.search.trials import Kind, State, Trial
from mergesearch.search.work import Work
from mergesearch.space import Space

log: logging.Logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # between looks at what other workers are doing
NOTED_EVERY = 1.0  # seconds of learning after which the study is told of them again
PATIENCE = 600.0  # seconds for which a storage that fails is asked again


class Builds(Protocol):
    """The part of the engine that a search needs."""

    def load(self, recipe: Recipe) -> float:
        """Makes the live model a recipe's candidate; returns seconds."""
        ...

    def identity(self, recipe: Recipe) -> str:
        """Equal for recipes that do the same to every tensor."""
        ...


class ScoresLive(Protocol):
    """The part of the scorer that a search needs: scores the live model as it is now. With racing, `Blocks` too."""

    def score(self) -> Scores: ...


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
        coarse: the space that the study begins with, where it grows.
        infos, layers: the pool's tensors, where a stage of the study refines a recipe group by group.
        learner: learns soups; without it there are none.
        started: called with each trial that begins.
        scored: called with each trial that is scored before the parents fix the objective; it ends later.
        finished: called with each trial that ends, in the order in which they end here.
        say: told what a reader should know.
        patience: how long a storage that fails is asked again; `PATIENCE` seconds unless another is given.
        device: where candidates live, for the record.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        space: Space,
        engine: Builds,
        scorer: ScoresLive,
        *,
        coarse: Space | None = None,
        infos: Sequence[TensorInfo] = (),
        layers: int = 0,
        learner: Learns | None = None,
        started: Callable[[Trial], None] = lambda trial: None,
        scored: Callable[[Trial], None] = lambda trial: None,
        finished: Callable[[Trial], None] = lambda trial: None,
        say: Callable[[str], None] = log.warning,
        patience: Patience | None = None,
        device: str = "cpu",
    ):
        self.config = config
        self.folder = folder
        self.space = space
        self.engine = engine
        self.scorer = scorer
        self._started = started
        self._scored = scored
        self._finished = finished
        self._say = say
        self._machine = machine(device)
        self._races = self._racing(config.racing) if config.racing else None
        with folder.lock("start"):  # workers that begin a run together would each make its tables
            storage = store.open_storage(config, folder, patience or Patience(PATIENCE, say))
            self.study: optuna.Study = store.open_study(config, folder, storage=storage)
        self._sampler = self.study.sampler = SeededPerTrial(
            config.search.seed,
            self._choice,
            cache(lambda label: store.open_stage(self.study, storage, label)),
            lambda: folder.lock("stage"),
        )
        self._last: History | None = None
        self._ended: set[str] = set()  # strategies of which it was said that their space is exhausted
        began = len(self.study.get_trials(deepcopy=False))
        self.surroundings: Surroundings = Surroundings(
            config, self.study, space, coarse, infos, layers, learner, began, self._documents_of
        )
        self.strategies: list[Strategy] = strategies_of(self.surroundings)

    def run(self) -> None:
        """Scores what the budget allows; called again, goes on from what is in the storage.

        Raises:
            SearchFailed: the base or every model failed, so no objective can be computed; or the run folder cannot be
                written.
            StorageError: the storage has failed for longer than the patience lasts; the trial at work is taken up by
                the next start.
            KeyboardInterrupt: passed on; the trial at work is taken up by the next start.
        """
        with Presence(self.folder) as presence:
            while (handle := self._take_next(presence)) is not None:
                self._work(handle)
                self._tell_scored()

    def history(self) -> History:
        """The run so far."""
        self._last = History(self.study, self.config, self._last)
        return self._last

    # --- what to do next ---

    def _take_next(self, presence: Presence) -> optuna.Trial | None:
        """Takes the next trial to work on: one that an ended worker left, a waiting one, or what a strategy proposes.
        None once there is nothing left to do."""
        while True:
            with self.folder.lock("take"):
                history = self.history()
                left = self._left_behind(presence, history)
                handle = self._ask(history) if left is None else self._handle(left)
                if handle is None:
                    return None
                if not isinstance(handle, Wait):
                    trials.write(handle, worker=presence.id, taken=datetime.now())
                    return handle
            time.sleep(WAIT_SECONDS)

    def _left_behind(self, presence: Presence, history: History) -> int | None:
        """The first trial at work whose worker has ended."""
        for trial in history.trials:
            at_work = not trial.state.ended and trial.state is not State.WAITING
            if at_work and presence.is_gone(trial.worker):
                return trial.number
        return None

    def _ask(self, history: History) -> optuna.Trial | Wait | None:
        if any(trial.state is State.WAITING for trial in history.trials):
            return self.study.ask()
        for position, strategy in enumerate(self.strategies):
            budget = self._budget(position, history)
            if strategy.budgeted and budget.used_up:
                continue
            proposal = strategy.next(history, budget)
            if isinstance(proposal, Wait):
                return proposal
            if proposal is not None and not self._is_exhausted(strategy, proposal, history):
                self._enqueue(strategy.name, proposal)
                return self.study.ask()
        return None

    def _is_exhausted(self, strategy: Strategy, proposal: Proposal, history: History) -> bool:
        """Whether a strategy that would go on for ever has long proposed nothing but what is there already."""
        if not history.is_exhausted(strategy.name, proposal.key.get("stage")):
            return False
        if strategy.name not in self._ended:
            self._ended.add(strategy.name)
            self._say(f"note: {exhausted(strategy.name)}")
        return True

    def _budget(self, position: int, history: History) -> Budget:
        """What the strategy at a position may spend: one without an end leaves what those after it want."""
        if not self.strategies[position].open_ended:
            return Budget(history)
        later: Wanted = total(strategy.wants(history) for strategy in self.strategies[position + 1 :])
        return Budget(history, later)

    def _enqueue(self, strategy: str, proposal: Proposal) -> None:
        values: dict[str, Any] = {"strategy": strategy, "kind": proposal.kind, "key": proposal.key}
        if isinstance(proposal, Stated):
            values |= {"recipe_data": proposal.recipe.dump(), "recipe_id": proposal.recipe.id}
            values |= {"name": proposal.name} if proposal.name else {}
        trials.enqueue(self.study, **values)

    def _choice(self, frozen: FrozenTrial) -> Choice:
        """The sampler that proposes a trial, asked by Optuna before each."""
        trial = trials.read(frozen)
        if trial.kind is not Kind.SAMPLED or trial.recipe_data is not None:
            return Choice("random")  # it is not sampled
        try:
            proposal = self._strategy(trial).again(trial, self.history())
        except CandidateError:  # the trial fails with the same error once a worker is at it
            return Choice("random")
        return proposal.choice if isinstance(proposal, Sampled) else Choice("random")

    def _documents_of(self, number: int) -> Mapping[str, DocumentScores] | None:
        """What a trial did on each search document; None where that is not known, or damaged."""
        try:
            return load_documents(self.folder.documents(number))
        except (OSError, ValueError):
            return None

    def _strategy(self, trial: Trial) -> Strategy:
        """The strategy that proposed a trial, whether or not it is one of this worker's list."""
        mine = next((strategy for strategy in self.strategies if strategy.name == trial.strategy), None)
        return mine or of_trial(trial)(self.surroundings)

    # --- one trial ---

    def _handle(self, number: int) -> optuna.Trial:
        """Optuna's own object of a running trial, through which it is written to."""
        return optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def _trial(self, number: int) -> Trial:
        return trials.read(self.study.get_trials(deepcopy=False)[number])

    def _work(self, handle: optuna.Trial) -> None:
        number, history = handle.number, self.history()
        trial = history.trials[number]
        if trial.state is State.STOPPED:  # its worker ended before it told
            self._tell_pruned(handle)
        if trial.state.settled:
            return
        try:
            recipe = self._recipe(trial, handle, history)
            self._started(self._trial(number))
            self._build_and_score(handle, recipe)
        except OSError as error:
            raise SearchFailed(f"trial {number} could not be recorded ({error}): the same command goes on") from error
        except Exception as error:
            log.debug("trial %d failed", number, exc_info=True)
            known = isinstance(error, CandidateError)
            trials.write(handle, error=str(error) if known else f"{type(error).__name__}: {error}")
            self.study.tell(handle, state=TrialState.FAIL)
            self._finished(self._trial(number))

    def _recipe(self, trial: Trial, handle: optuna.Trial, history: History) -> Recipe:
        """The trial's recipe: stated, chosen by a sampler, or found on the search documents."""
        strategy = self._strategy(trial)
        if trial.recipe_data is not None:
            recipe = trial.recipe
            self._state_parameters(strategy.known_in(trial, history), handle, recipe)
            return recipe
        proposal = strategy.again(trial, history)
        if isinstance(proposal, Sampled):
            recipe = proposal.space.suggest(handle)
        else:
            before, start = trial.learning_seconds or 0.0, time.perf_counter()
            recipe = proposal.find(self._work_for(trial, handle, history))
            trials.write(handle, learning_seconds=before + time.perf_counter() - start)
            self._state_parameters(strategy.known_in(trial, history), handle, recipe)
        # last what says that the recipe is known
        trials.write(handle, recipe_id=recipe.id, recipe_data=recipe.dump())
        return recipe

    def _state_parameters(self, space: Space, handle: optuna.Trial, recipe: Recipe) -> None:
        """Gives a trial whose recipe no sampler chose the parameters that would have proposed it, where the space holds
        it, so that samplers learn from it."""
        parameters = space.parameters(recipe)
        if parameters is not None:
            with self._sampler.stating(parameters):
                space.suggest(handle)

    def _work_for(self, trial: Trial, handle: optuna.Trial, history: History) -> Work:
        spent, key = 0, dict(trial.key)  # a trial that is taken up again tells first what it cost before
        before, start, written = trial.learning_seconds or 0.0, time.perf_counter(), 0.0

        def more(documents: int) -> None:
            nonlocal spent, written
            spent, seconds = spent + documents, time.perf_counter() - start
            if seconds - written > NOTED_EVERY:  # a step may be quicker than what the study takes to keep it
                written = seconds
                trials.write(handle, learning_seconds=before + seconds)
            trials.write(handle, learning_documents=spent)

        def note(more_key: Mapping[str, Any]) -> None:
            key.update(more_key)
            trials.write(handle, key=key)

        return Work(history, self.folder.learning(trial.number), more, lambda: self._is_over(trial.number), note)

    def _is_over(self, number: int) -> bool:
        """Whether documents or hours are used up by what has ended and by a trial that is at work."""
        search = self.config.search
        if search.documents is None and search.hours is None:  # it is asked before every step of a soup
            return False
        history = self.history()
        return Budget(history).is_over(hours_at_work(history.trials[number]))

    def _build_and_score(self, handle: optuna.Trial, recipe: Recipe) -> None:
        trials.write(handle, machine=self._machine)
        history = self.history()  # again: to learn a recipe takes its time, and others go on
        if self._copy_equal(handle, recipe, history):
            return
        if self._races is not None and self._may_race(history.trials[handle.number], history):
            self._race(self._races, handle, recipe, history)
            return
        self._note_scores(handle, self.engine.load(recipe), self.scorer.score())

    def _note_scores(self, handle: optuna.Trial, merge_seconds: float, scores: Scores) -> None:
        scores.save_documents(self.folder.documents(handle.number))
        trials.write(handle, merge_seconds=merge_seconds, score_seconds=scores.seconds)
        self._note_settled(handle, scores=scores.tasks)

    def _note_settled(self, handle: optuna.Trial, **values: Any) -> None:
        """Notes what a trial came to: last what says that it is settled."""
        trials.write(handle, settled_at=datetime.now(), **values)
        if self.history().objective is None:  # else the study is told at once
            self._scored(self._trial(handle.number))

    def _copy_equal(self, handle: optuna.Trial, recipe: Recipe, history: History) -> bool:
        """Gives a trial what came of an earlier one that does the same to every tensor. False where there is none."""
        identity = self.engine.identity(recipe)
        trials.write(handle, identity=identity)
        equal = [t for t in history.trials if t.number != handle.number and t.identity == identity]
        for other in equal:
            if not other.scores:
                continue
            documents = self.folder.documents(other.number)
            if documents.is_file():
                shutil.copyfile(documents, self.folder.documents(handle.number))
            trials.write(handle, same_as=other.number, merge_seconds=0.0, score_seconds=0.0)
            self._note_settled(handle, scores=other.scores)
            return True
        stopped = next((other for other in equal if other.stopped is not None), None)
        if stopped is None or self._races is None or not self._may_race(history.trials[handle.number], history):
            return False
        # whom it could not beat is there still
        trials.write(
            handle,
            same_as=stopped.number,
            merge_seconds=0.0,
            score_seconds=0.0,
            blocks=stopped.blocks,
            partial=stopped.partial,
        )
        self._note_settled(handle, stopped=stopped.stopped)
        self._tell_pruned(handle)
        return True

    # --- racing ---

    def _racing(self, settings: RacingConfig) -> Races:
        return Races(self.config, settings, self.folder, cast(Blocks, self.scorer), self._score_again, self._say)

    def _score_again(self, trial: Trial) -> None:
        """Scores a trial whose documents are damaged; its figures stand in the study."""
        try:
            self.engine.load(trial.recipe)
            scores = self.scorer.score()
        except Exception as error:
            raise CandidateError(f"it could not be scored again ({error})") from error
        scores.save_documents(self.folder.documents(trial.number))

    def _may_race(self, trial: Trial, history: History) -> bool:
        """Whether there is somebody to race against, and the strategy allows it."""
        there = history.objective is not None and any(other.state is State.COMPLETE for other in history.trials)
        return there and self._strategy(trial).may_race(trial)

    def _race(self, races: Races, handle: optuna.Trial, recipe: Recipe, history: History) -> None:
        spent: list[float] = []
        outcome = races.run(recipe, history, lambda: spent.append(self.engine.load(recipe)))
        if outcome.stopped is None:
            self._note_scores(handle, sum(spent), outcome.scores)
            races.forget(recipe)
            return
        trials.write(
            handle,
            merge_seconds=sum(spent),
            score_seconds=outcome.scores.seconds,
            blocks=outcome.blocks,
            partial=outcome.scores.tasks,
        )
        self._note_settled(handle, stopped=outcome.stopped)
        self._tell_pruned(handle)

    def _tell_pruned(self, handle: optuna.Trial) -> None:
        """Tells the study, with the objective on the documents so far, by which samplers rank pruned trials."""
        trial, objective = self._trial(handle.number), self.history().objective
        if objective is not None and trial.blocks is not None:
            handle.report(objective.ranking(trial.partial), step=trial.blocks)
        self.study.tell(handle, state=TrialState.PRUNED)
        self._finished(self._trial(handle.number))

    # --- objective ---

    def _tell_scored(self) -> None:
        """Tells the study the objective of every scored trial, once the parents have fixed its scale."""
        history = self.history()
        objective = history.objective or self._fix_objective(history)
        if objective is None:
            return
        for trial in history.trials:
            if trial.state is State.SCORED:
                self._tell(trial, objective)

    def _tell(self, trial: Trial, objective: Objective) -> None:
        pareto = self.config.objective.pareto
        values = objective.values(trial.scores) if pareto else objective.ranking(trial.scores)
        try:
            for task, excess in objective.excess(trial.scores).items():
                if task not in trial.excess:
                    self._handle(trial.number).set_constraint(task, excess)
            self.study.tell(trial.number, values)
        except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return  # another worker was faster
        self._finished(self._trial(trial.number))

    def _fix_objective(self, history: History) -> Objective | None:
        """The objective as the parents' scores fix it; None while one of them is still to be scored."""
        parents: dict[str, Trial] = {}
        for name in self.config.parents:
            trial = next((trial for trial in reversed(history.trials) if trial.name == name), None)
            failed = trial is not None and trial.state is State.FAILED
            # one that failed before this worker began is scored again by it
            if trial is None or (failed and trial.number < self.surroundings.began):
                return None
            if not failed and not trial.scores:
                return None
            parents[name] = trial
        scores = {name: trial.scores for name, trial in parents.items() if trial.scores}
        errors = {name: trial.error or "unknown" for name, trial in parents.items() if not trial.scores}
        try:
            objective = objectives.fix(self.config, scores, errors)
        except LookupError as error:
            raise SearchFailed(str(error)) from None
        store.note(self.study, "objective", objective.to_data())
        return objective


__all__ = ["Search", "SearchFailed", "machine"]
