"""What the study is told of trials: an objective once the parents have fixed its scale, or that a race was lost."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from mergesearch.config import Config
from mergesearch.search import objective as objectives
from mergesearch.search import store, trials
from mergesearch.search.history import History
from mergesearch.search.objective import Objective
from mergesearch.search.trials import State, Trial


class SearchFailed(Exception):
    """The search cannot go on, and why."""


class Teller:
    """Tells a run's study what its trials came to.

    Args:
        study: the run's.
        config: of the run.
        history: the run as it is by now.
        began: how many trials there were when this worker began.
        finished: called with each trial that the study was told of here.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: Config,
        history: Callable[[], History],
        began: int,
        finished: Callable[[Trial], None],
    ):
        self._study, self._config, self._history = study, config, history
        self._began, self._finished = began, finished

    def scored(self) -> None:
        """Tells the objective of every scored trial, once the parents have fixed its scale.

        Raises:
            SearchFailed: the base or every model failed, so no objective can be computed.
        """
        history = self._history()
        objective = history.objective or self._fix_objective(history)
        if objective is None:
            return
        for trial in history.trials:
            if trial.state is State.SCORED:
                self._tell(trial, objective)

    def pruned(self, handle: optuna.Trial) -> None:
        """Tells that a race stopped a trial, with the objective on the documents so far, by which samplers rank it."""
        trial, objective = trials.at(self._study, handle.number), self._history().objective
        if objective is not None and trial.blocks is not None:
            handle.report(objective.ranking(trial.partial), step=trial.blocks)
        self._study.tell(handle, state=TrialState.PRUNED)
        self._finished(trials.at(self._study, handle.number))

    def _tell(self, trial: Trial, objective: Objective) -> None:
        pareto = self._config.objective.pareto
        values = objective.values(trial.scores) if pareto else objective.ranking(trial.scores)
        try:
            for task, excess in objective.excess(trial.scores).items():
                if task not in trial.excess:
                    trials.handle(self._study, trial.number).set_constraint(task, excess)
            self._study.tell(trial.number, values)
        except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return  # another worker was faster
        self._finished(trials.at(self._study, trial.number))

    def _fix_objective(self, history: History) -> Objective | None:
        """The objective as the parents' scores fix it; None while one of them is still to be scored."""
        parents: dict[str, Trial] = {}
        for name in self._config.parents:
            trial = next((trial for trial in reversed(history.trials) if trial.name == name), None)
            failed = trial is not None and trial.state is State.FAILED
            # one that failed before this worker began is scored again by it
            if trial is None or (failed and trial.number < self._began):
                return None
            if not failed and not trial.scores:
                return None
            parents[name] = trial
        scores = {name: trial.scores for name, trial in parents.items() if trial.scores}
        errors = {name: trial.error or "unknown" for name, trial in parents.items() if not trial.scores}
        try:
            objective = objectives.fix(self._config, scores, errors)
        except LookupError as error:
            raise SearchFailed(str(error)) from None
        store.note(self._study, "objective", objective.to_data())
        return objective
