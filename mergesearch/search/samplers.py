"""Optuna's samplers, seeded trial by trial: the n-th proposal depends on the seed, n and the history alone.

A run that was killed and taken up again therefore proposes what it would have proposed, and two runs with one seed
propose the same.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mergesearch.search import trials
from mergesearch.space import Space


@dataclass(frozen=True)
class Choice:
    """A sampler, and what it needs to know of the space.

    Attributes:
        name: of `MAKERS`.
        space: the distributions by name, for samplers that need one fixed space; empty for those that do not.
        start: where to begin, by name.
        stage: of those that need one fixed space, the stage: its trials have a study of their own.
    """

    name: str
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""


def _tpe(seed: int, choice: Choice) -> BaseSampler:
    # group: the space depends on the method; without it only what all trials have in common is modelled
    # liar: trials at work elsewhere count as bad until they are known, so that workers do not ask for the same
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _cmaes(seed: int, choice: Choice) -> BaseSampler:
    numbers = {name: value for name, value in choice.start.items() if name in choice.space}
    return optuna.samplers.CmaEsSampler(
        seed=seed, x0=numbers or None, warn_independent_sampling=False, consider_pruned_trials=True
    )


def _gp(seed: int, choice: Choice) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=4, warn_independent_sampling=False)


MAKERS: dict[str, Callable[[int, Choice], BaseSampler]] = {
    "tpe": _tpe,
    "cmaes": _cmaes,
    "gp": _gp,
    "nsga2": lambda seed, choice: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "random": lambda seed, choice: optuna.samplers.RandomSampler(seed=seed),
}
# these model one space of a fixed set of numbers
FIXED_SPACE = ("cmaes", "gp")


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The distributions of a space whose parameters do not depend on each other."""
    recorder = _Distributions()
    space.suggest(recorder)
    return {name: d for name, d in recorder.distributions.items() if not d.single()}


class _Distributions:
    """Stands in for a trial: notes every distribution, and answers with its middle."""

    def __init__(self) -> None:
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_float(self, name: str, low: float, high: float) -> float:
        self.distributions[name] = FloatDistribution(low, high)
        return (low + high) / 2

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.distributions[name] = IntDistribution(low, high)
        return (low + high) // 2

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.distributions[name] = CategoricalDistribution(choices)
        return choices[0]


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for one trial."""
    digest = hashlib.blake2b(f"sampler\x00{seed}\x00{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class SeededPerTrial(BaseSampler):
    """A sampler made anew for each trial from (seed, trial number).

    Args:
        seed: of the run.
        choose: which sampler proposes a trial.
        stages: opens the study of a stage by its label.
        lock: held while such a study is brought up to date.
    """

    def __init__(
        self,
        seed: int,
        choose: Callable[[FrozenTrial], Choice],
        stages: Callable[[str], Study],
        lock: Callable[[], AbstractContextManager[Any]],
    ):
        self._seed, self._choose, self._stages, self._lock = seed, choose, stages, lock
        self._inner: BaseSampler = optuna.samplers.RandomSampler(seed=seed)
        self._choice = Choice("random")
        self._known: set[str] = set()
        self._stated: Mapping[str, Any] = {}

    @contextlib.contextmanager
    def stating(self, parameters: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, suggestions are answered with these: a trial whose recipe is known gets its parameters."""
        self._stated = parameters
        try:
            yield
        finally:
            self._stated = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._choice = self._choose(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.simplefilter("ignore", FutureWarning)  # of CMA-ES's x0, which Optuna 6 may drop
            self._inner = MAKERS[self._choice.name](trial_seed(self._seed, trial.number), self._choice)
        self._known = set()
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._choice.space:
            return {k: d for k, d in self._choice.space.items() if not isinstance(d, CategoricalDistribution)}
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._choice.space:
            parameters = self._from_stage(study, trial, search_space)
        else:
            parameters = self._inner.sample_relative(study, trial, search_space)
        self._known |= parameters.keys()
        return parameters

    def _from_stage(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the stage's own study proposes for a trial; the same again where it was asked for this trial before."""
        with self._lock(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CMA-ES says that it takes no notice of constraints
            stage = self._stages(self._choice.stage)
            bring_up_to_date(stage, study, search_space)
            stage.sampler = _OfOneSpace(self._inner, search_space, trial.number)
            if trial.number not in trials.copies(stage):
                stage.add_trial(trials.begin_copy(trial.number))
            asked = optuna.Trial(stage, trials.copies(stage)[trial.number]._trial_id)
        # a Gaussian process takes seconds, in which nobody waits; it sees the copies of trials that are at work
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {name: _suggest(asked, name, search_space[name]) for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self._stated:
            return self._stated[param_name]
        # a trial that was killed while it was being proposed has some parameters already: draw them again, so that the
        # remaining ones are those it would have had
        for name in trial.params:
            self._draw_again(study, trial, name)
        self._known.add(param_name)
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def _draw_again(self, study: Study, trial: FrozenTrial, name: str) -> None:
        if name not in self._known:
            self._known.add(name)
            self._inner.sample_independent(study, trial, name, trial.distributions[name])

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CMA-ES says that it takes no notice of constraints
            self._inner.after_trial(study, trial, state, values)


class _OfOneSpace(BaseSampler):
    """A sampler that is asked for all parameters of one space at once.

    Args:
        number: of the run's trial that is proposed. CMA-ES seeds each proposal with it: the trial's own number in the
            stage's study depends on the order in which copies came there.
    """

    def __init__(self, inner: BaseSampler, space: dict[str, BaseDistribution], number: int):
        self._inner, self._space, self._number = inner, space, number
        self._known: set[str] = set()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        numbered = copy.copy(trial)
        numbered.number = self._number
        return self._inner.sample_relative(study, numbered, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # as in `SeededPerTrial`: what a killed worker drew is drawn again first
        for name, distribution in trial.distributions.items():
            if name not in self._known:
                self._known.add(name)
                self._inner.sample_independent(study, trial, name, distribution)
        self._known.add(param_name)
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> float | int:
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    if isinstance(distribution, FloatDistribution):
        return trial.suggest_float(name, distribution.low, distribution.high)
    raise TypeError(f"{name} is no number: {distribution}")


def bring_up_to_date(stage: Study, study: Study, names: Iterable[str]) -> None:
    """Tells a stage's own study what came of the trials that it proposed, and adds to it every other trial of the run
    that is a point of its space.

    Args:
        stage: of one fixed space.
        study: the run's own.
        names: the parameters of the space.
    """
    wanted, there = set(names), trials.copies(stage)
    for trial in study.get_trials(deepcopy=False):
        known = there.get(trial.number)
        if not trial.state.is_finished() or (known is not None and known.state.is_finished()):
            continue
        if known is not None:
            _tell(stage, known, trial)
        elif trial.state != TrialState.FAIL and wanted <= trial.params.keys():
            stage.add_trial(trials.copy_of(trial, wanted))


def _tell(stage: Study, known: FrozenTrial, trial: FrozenTrial) -> None:
    asked = optuna.Trial(stage, known._trial_id)
    for task, excess in trial.constraints.items():
        if task not in known.constraints:
            asked.set_constraint(task, excess)
    for step, value in trial.intermediate_values.items():
        asked.report(value, step)
    values = trial.values if trial.state == TrialState.COMPLETE else None
    stage.tell(known.number, values, trial.state, skip_if_finished=True)
