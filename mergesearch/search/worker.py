"""One worker of a run: takes a trial, makes its recipe, builds and scores the candidate, tells the study."""

from __future__ import annotations

import contextlib
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
from mergesearch.search import standstill, store, trials
from mergesearch.search.budget import Budget, Wanted, total
from mergesearch.search.expectations import expectations
from mergesearch.search.history import History, spans
from mergesearch.search.keeping import LearningFiles
from mergesearch.search.machine import machine
from mergesearch.search.presence import Presence, signs
from mergesearch.search.races import Races
from mergesearch.search.racing import Blocks
from mergesearch.search.samplers import Choice, SeededPerTrial
from mergesearch.search.storage import Patience, adding, at_once
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies import exhausted, of_trial, strategies_of
from mergesearch.search.strategies.base import WAIT, Learns, Proposal, Sampled, Stated, Strategy, Surroundings, Wait
from mergesearch.search.telling import SearchFailed, Teller
from mergesearch.search.trials import HANDED_BACK, Kind, State, Trial
from mergesearch.search.turns import TurnLost, Turns
from mergesearch.search.watchdog import Watchdog
from mergesearch.search.work import Work
from mergesearch.space import Space

log: logging.Logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # between looks at what other workers are doing
NOTED_EVERY = 1.0  # seconds of learning after which the study is told of them again
PATIENCE = 600.0  # seconds for which a storage that fails is asked again
MOST_LOST = 3  # workers that may end without a word at one trial before it fails
MOST_FAILURES = 10  # candidates that may fail in a row for one reason


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


def _nothing_waits() -> None:
    """Instead of a trial of nobody's, which Optuna makes where none waits any more."""
    raise TurnLost


class _TakenAway(Exception):
    """Another worker is at a trial that this one was at."""


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
        hung: told, from another thread, why a trial was given up at which this worker may be stuck for ever; ends the
            process.
        patience: how long a storage that fails is asked again; `PATIENCE` seconds unless another is given.
        turn: told of each turn that this worker had, as `Turns` tells it, and as "idle" of each wait for what other
            workers are at.
        device: where candidates live, for the record.
        doing: says in a few words what is done for the trial at work, for whoever watches.
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
        hung: Callable[[str], None] = log.error,
        patience: Patience | None = None,
        turn: Callable[[str, float, float], None] = lambda what, waited, lasted: None,
        device: str = "cpu",
        doing: Callable[[], str] = str,
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
        self._hung = hung
        self._turn = turn
        self._watchdog = Watchdog(config.search.trial_timeout, self._give_up)
        self._machine, self._doing = machine(device), doing
        self._races = self._racing(config.racing) if config.racing else None
        with folder.lock("start"):  # workers that begin a run together would each make its tables
            storage = store.open_storage(config, folder, patience or Patience(PATIENCE, say))
            self.study: optuna.Study = store.open_study(config, folder, storage=storage)
        self._turns = Turns(storage, folder, config.name, turn)
        self._sampler = self.study.sampler = SeededPerTrial(
            config.search.seed,
            self._choice,
            cache(lambda label: store.open_stage(self.study, storage, label)),
            lambda: self._turns.turn("stage"),
        )
        self._last: History | None = None
        self._presence: Presence | None = None  # while it is at work
        self.at_work: int | None = None  # the number of the trial that this worker is at
        self._learning: LearningFiles | None = None  # of the soup at work
        self._ended: set[str] = set()  # strategies of which it was said that their space is exhausted
        began = len(self.study.get_trials(deepcopy=False))
        self.surroundings: Surroundings = Surroundings(
            config, self.study, space, coarse, infos, layers, learner, began, self._documents_of
        )
        self.strategies: list[Strategy] = strategies_of(self.surroundings)
        self._teller = Teller(self.study, config, self.history, began, finished)

    def run(self) -> None:
        """Scores what the budget allows; called again, goes on from what is in the storage.

        Raises:
            SearchFailed: the base or every model failed, so no objective can be computed; or the run folder cannot be
                written.
            StorageError: the storage has failed for longer than the patience lasts; the trial at work is taken up by
                the next start.
            KeyboardInterrupt: passed on; the trial at work is taken up by the next start.
        """
        if self._races is not None:
            self._races.tidy(self.history())
        self._look_for_standstills()
        about = {"device": self._machine["device"], "doing": self._doing}
        with Presence(self.folder, self.study, say=self._say, **about) as self._presence:
            while (handle := self._take_next(self._presence)) is not None:
                self.at_work = handle.number
                try:
                    with self._watchdog.watching(handle.number):
                        self._work(handle)
                except KeyboardInterrupt:
                    self._hand_back(handle)
                    raise
                self.at_work = None
                self._teller.scored()
                self._check_failures()
                self._look_for_standstills()

    def is_last(self) -> bool:
        """Whether no trial of the run is at work or waits: true for the first worker that asks then, and for no other
        until there are more trials."""
        with self._turns.turn("end"):
            found = self.history().trials
            return all(trial.state.ended for trial in found) and store.note_ended(self.study, len(found))

    def history(self) -> History:
        """The run so far."""
        self._last = History(self.study, self.config, self._last)
        return self._last

    # --- what to do next ---

    def _take_next(self, presence: Presence) -> optuna.Trial | None:
        """Takes the next trial to work on: one that an ended worker left, a waiting one, or what a strategy proposes.
        None once there is nothing left to do."""
        while True:
            with (
                contextlib.suppress(TurnLost),  # another worker may have proposed meanwhile
                self._turns.turn("take") as still_mine,
                adding(self.study._storage, still_mine),
            ):
                history = self.history()
                left = self._left_behind(presence, history)
                handle = self._ask(history) if left is None else trials.handle(self.study, left.number)
                if handle is None:
                    return None
                if not isinstance(handle, Wait):
                    # a server that restarts ends a turn: another worker may have taken it too, and be through with it
                    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                        trials.write(handle, worker=presence.id, **self._left(left), taken=datetime.now())
                        return handle
            time.sleep(WAIT_SECONDS)
            self._turn("idle", WAIT_SECONDS, 0.0)

    def _left_behind(self, presence: Presence, history: History) -> Trial | None:
        """The first trial at work whose worker has ended."""
        every = cache(lambda: signs(self.study))  # once for all trials: this is everybody's turn
        for trial in history.trials:
            at_work = not trial.state.ended and trial.state is not State.WAITING
            if at_work and (trial.worker == HANDED_BACK or presence.is_gone(trial.worker, every)):
                return trial
        return None

    @staticmethod
    def _left(left: Trial | None) -> dict[str, Any]:
        """What is noted of a trial that a worker left: how long it was at it, and where it ended without a word that
        it did, since that may be the trial's doing."""
        if left is None:
            return {}
        worked = spans(left)
        noted: dict[str, Any] = {"earlier": worked} if worked else {}
        if left.worker == HANDED_BACK or left.state.settled:
            return noted
        further = left.learning_documents > left.lost_at
        return {**noted, "lost": 1 if further else left.lost + 1, "lost_at": left.learning_documents}

    def _hand_back(self, handle: optuna.Trial) -> None:
        """Says that nobody is at a trial any more, so that any worker may go on with it at once."""
        try:
            if trials.at(self.study, handle.number).state.settled:
                return
            if self._learning is not None:
                with contextlib.suppress(OSError):  # then it is gone on with from where it was kept last
                    self._learning.keep(at_once=True)
            trials.hand_back(at_once(self.study._storage), handle)
        except Exception:  # whoever comes next finds out by itself
            log.debug("trial %d was not handed back", handle.number, exc_info=True)

    def _ask(self, history: History) -> optuna.Trial | Wait | None:
        if any(trial.state is State.WAITING for trial in history.trials):
            return self._waiting()
        waits: int | None = None  # the first position that depends on what other workers are at
        for position, strategy in enumerate(self.strategies):
            if waits is not None and not strategy.open_ended:
                continue  # it begins with what those before it have found
            budget = self._budget(position, history, waits)
            if strategy.budgeted and budget.used_up:
                continue
            proposal = strategy.next(history, budget)
            if isinstance(proposal, Wait):
                if history.objective is None:
                    return proposal
                waits = position if waits is None else waits
                continue
            if proposal is None or standstill.ended(history, strategy.name, proposal.key.get("stage")):
                continue
            if not self._is_exhausted(strategy, proposal, history):
                self._enqueue(strategy.name, proposal)
                return self._waiting()
        return None if waits is None else WAIT

    def _waiting(self) -> optuna.Trial | Wait:
        """The first trial that waits. A server that restarts ends a turn, and another worker may have taken what was
        put there: Optuna would then make a trial of nobody's."""
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if waiting:
            assert self._presence is not None
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, TurnLost):
                # before Optuna takes the first of them: a worker killed in between leaves its name on the trial
                trials.assign(self.study, waiting[0], self._presence.id)
                with adding(self.study._storage, _nothing_waits):
                    return self.study.ask()
        return WAIT

    def _is_exhausted(self, strategy: Strategy, proposal: Proposal, history: History) -> bool:
        """Whether a strategy that would go on for ever has long proposed nothing but what is there already."""
        if not history.is_exhausted(strategy.name, proposal.key.get("stage")):
            return False
        if strategy.name not in self._ended:
            self._ended.add(strategy.name)
            self._say(f"note: {exhausted(strategy.name)}")
        return True

    def _budget(self, position: int, history: History, waits: int | None = None) -> Budget:
        """What the strategy at a position may spend: one without an end leaves what those after it want, and those from
        the position on that waits for other workers."""
        mine = self.strategies[position]
        if not mine.open_ended:
            return Budget(history)
        others = self.strategies[position + 1 if waits is None else waits :]
        later: Wanted = total(strategy.wants(history) for strategy in others if strategy is not mine)
        return Budget(history, later, early=waits is not None)

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

    def _work(self, handle: optuna.Trial) -> None:
        number, history = handle.number, self.history()
        trial = history.trials[number]
        if trial.state is State.STOPPED:  # its worker ended before it told
            self._teller.pruned(handle)
        if trial.state.settled:
            return
        try:
            if trial.lost >= MOST_LOST:
                raise CandidateError(
                    f"{trial.lost} workers in a row ended without a word while they were at it: killed by the system, "
                    "perhaps for want of memory, or by a fault in a library"
                )
            recipe = self._recipe(trial, handle, history)
            self._watchdog.further()
            self._started(trials.at(self.study, number))
            self._build_and_score(handle, recipe)
        except _TakenAway as error:
            self._say(f"note: {error}")
        except OSError as error:
            raise SearchFailed(f"trial {number} could not be recorded ({error}): the same command goes on") from error
        except Exception as error:
            log.debug("trial %d failed", number, exc_info=True)
            known = isinstance(error, CandidateError)
            if self._was_taken(number):
                return
            trials.write(handle, error=str(error) if known else f"{type(error).__name__}: {error}")
            self.study.tell(handle, state=TrialState.FAIL)
            self._finished(trials.at(self.study, number))

    def _give_up(self, number: int) -> None:
        """Fails a trial that takes too long, from another thread than the one that is at it."""
        reason = f"it took more than {self.config.search.trial_timeout:g} s (search.trial_timeout)"
        if self._was_taken(number):  # it was settled at that moment, or another worker is at it
            return
        handle = trials.handle(self.study, number)
        trials.write(handle, error=reason)
        try:
            self.study.tell(handle, state=TrialState.FAIL)
        except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return
        self._hung(f"trial {number} was given up: {reason}")

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
        kept = LearningFiles(self.folder, trial.number)
        kept.fetch()
        self._learning = kept
        spent, key = 0, dict(trial.key)  # a trial that is taken up again tells first what it cost before
        before, start, written = trial.learning_seconds or 0.0, time.perf_counter(), 0.0

        def more(documents: int) -> None:
            nonlocal spent, written
            self._watchdog.further()
            spent, seconds = spent + documents, time.perf_counter() - start
            if seconds - written > NOTED_EVERY:  # a step may be quicker than what the study takes to keep it
                written = seconds
                trials.write(handle, learning_seconds=before + seconds)
            trials.write(handle, learning_documents=spent)
            kept.keep()

        def note(more_key: Mapping[str, Any]) -> None:
            key.update(more_key)
            trials.write(handle, key=key)

        state = self.folder.learning(trial.number)
        return Work(history, state, more, lambda: self._is_over(trial.number), note, trial.key)

    def _is_over(self, number: int) -> bool:
        """Whether documents or hours are used up by what has ended and by a trial that is at work."""
        search = self.config.search
        if search.documents is None and search.hours is None:  # it is asked before every step of a soup
            return False
        return Budget(self.history()).is_over(number)

    def _build_and_score(self, handle: optuna.Trial, recipe: Recipe) -> None:
        trials.write(handle, machine=self._machine)
        history = self.history()  # again: to learn a recipe takes its time, and others go on
        if self._take_over(handle, recipe, history) or self._copy_equal(handle, recipe, history):
            return
        if self._races is not None and self._may_race(history.trials[handle.number], history):
            self._race(self._races, handle, recipe, history)
            return
        self._note_scores(handle, self.engine.load(recipe), self.scorer.score())

    def _note_scores(self, handle: optuna.Trial, merge_seconds: float, scores: Scores) -> None:
        self._check_taken(handle.number)  # before a file of whoever is at it now is replaced
        self._keep_documents(handle.number, scores)
        trials.write(handle, merge_seconds=merge_seconds, score_seconds=scores.seconds)
        self._note_settled(handle, scores=scores.tasks)

    def _keep_documents(self, number: int, scores: Scores) -> None:
        path = self.folder.documents(number)
        scores.save_documents(path)
        self.folder.keep(path)

    def _note_settled(self, handle: optuna.Trial, **values: Any) -> None:
        """Notes what a trial came to: last what says that it is settled."""
        self._check_taken(handle.number)
        trials.write(handle, settled_at=datetime.now(), **values)
        if self.history().objective is None:  # else the study is told at once
            self._scored(trials.at(self.study, handle.number))

    def _check_taken(self, number: int) -> None:
        if self._was_taken(number):
            raise _TakenAway(
                f"trial {number} was taken up by another worker meanwhile: what it came to here is dropped"
            )

    def _was_taken(self, number: int) -> bool:
        """Whether another worker, to whom this one looked gone, is at a trial now, or has ended it."""
        trial = trials.at(self.study, number)
        return trial.state.settled or (self._presence is not None and trial.worker != self._presence.id)

    def _check_failures(self) -> None:
        """Gives up where candidate after candidate fails for one reason, which is then none of theirs.

        Raises:
            SearchFailed: with that reason.
        """
        settled = [trial for trial in self.history().trials if trial.state.settled]
        last = [trial for trial in settled if trial.number >= self.surroundings.began][-MOST_FAILURES:]
        reasons = {trials.without_numbers(trial.error) for trial in last if trial.state is State.FAILED}
        if len(last) == MOST_FAILURES and len(reasons) == 1 and all(t.state is State.FAILED for t in last):
            raise SearchFailed(
                f"the last {MOST_FAILURES} candidates all failed for one reason ({last[-1].error}): mend that, and the "
                "same command goes on"
            )

    def _look_for_standstills(self) -> None:
        """Ends, for all workers, the strategies that find nothing better any more, where `search.patience` says so."""
        if self.config.search.patience is None:
            return
        history = self.history()
        for strategy in self.strategies:
            if not strategy.budgeted or not strategy.counts:
                continue
            found = standstill.look(
                history,
                strategy.name,
                lambda: {n: each.value for n, each in expectations(history, self.folder).items()},
                self._documents_of,
            )
            if found is None or found.improves or found.label in self._ended:
                continue
            self._ended.add(found.label)
            if not standstill.is_known(history, found):  # another worker says it
                standstill.note(history, found)
                self._say(f"note: {found.words()}")

    def _take_over(self, handle: optuna.Trial, recipe: Recipe, history: History) -> bool:
        """Gives a trial the scores that its strategy knows already. False where it knows none."""
        trial = history.trials[handle.number]
        held = self._strategy(trial).held(trial)
        if held is None:
            return False
        trials.write(handle, identity=self.engine.identity(recipe), taken_over=True)
        self._note_scores(handle, 0.0, held)
        return True

    def _copy_equal(self, handle: optuna.Trial, recipe: Recipe, history: History) -> bool:
        """Gives a trial what came of an earlier one that does the same to every tensor. False where there is none."""
        identity = self.engine.identity(recipe)
        trials.write(handle, identity=identity)
        equal = [t for t in history.trials if t.number != handle.number and t.identity == identity]
        for other in equal:
            if not other.scores:
                continue
            documents = self.folder.documents(other.number)
            self._check_taken(handle.number)
            if documents.is_file():
                mine = self.folder.documents(handle.number)
                shutil.copyfile(documents, mine)
                self.folder.keep(mine)
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
        self._teller.pruned(handle)
        return True

    # --- racing ---

    def _racing(self, settings: RacingConfig) -> Races:
        return Races(self.config, settings, self.folder, cast(Blocks, self.scorer), self.score_again, self._say)

    def score_again(self, trial: Trial) -> None:
        """Scores a trial whose documents are damaged; its figures stand in the study."""
        try:
            self.engine.load(trial.recipe)
            scores = self.scorer.score()
        except Exception as error:
            raise CandidateError(f"it could not be scored again ({error})") from error
        self._keep_documents(trial.number, scores)

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
        self._check_taken(handle.number)
        # what is expected of the others depends on it too
        self._keep_documents(handle.number, outcome.scores)
        trials.write(
            handle,
            merge_seconds=sum(spent),
            score_seconds=outcome.scores.seconds,
            blocks=outcome.blocks,
            partial=outcome.scores.tasks,
        )
        self._note_settled(handle, stopped=outcome.stopped)
        self._teller.pruned(handle)


__all__ = ["Search", "SearchFailed", "machine"]
