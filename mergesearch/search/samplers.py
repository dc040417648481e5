"""Optuna's samplers, seeded trial by trial: the n-th proposal depends on the seed, n and the history alone.

A run that was killed and taken up again therefore proposes what it would have proposed, and two runs with one seed
propose the same.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # group: the space depends on the method; without it only what all trials have in common is modelled
        return optuna.samplers.TPESampler(seed=seed, group=True)


MAKERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": _tpe,
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for one trial."""
    digest = hashlib.blake2b(f"sampler\x00{seed}\x00{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class SeededPerTrial(BaseSampler):
    """The sampler called `name`, made anew for each trial from (seed, trial number)."""

    def __init__(self, name: str, seed: int):
        self._make = MAKERS[name]
        self._seed = seed
        self._inner = self._make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._make(trial_seed(self._seed, trial.number))
        self._known: set[str] = set()
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        found = self._inner.sample_relative(study, trial, search_space)
        self._known |= found.keys()
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
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
        self._inner.after_trial(study, trial, state, values)
