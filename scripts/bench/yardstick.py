"""What people search merges with today, for scripts/bench/search.py to compare with: CMA-ES as mergekit-evolve has it,
a genetic algorithm as mergenetic has it, random search and TPE, over one method's weights and densities per group of
layers.

Chosen before any result was seen: `ties` without normalisation (so that the weights set the size of the merge too),
three groups of layers, weights in [0, 1], densities in [0.1, 1]. CMA-ES starts at weight 1/K and density 1 with a sigma
of a sixth of each range (a sixth for weights) and a population of 4 + 3 ln n. Every candidate is scored on
all search documents.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna

from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe, Rule

WEIGHT, DENSITY = (0.0, 1.0), (0.1, 1.0)
LAYER_GROUPS = 3
GENERATION = 25
SIGMA = 1 / 6


# --- the space ---


class Group(Protocol):
    """A group of tensors, as mergesearch's own search space cuts them."""

    def rule(self, method: str, models: Sequence[str], parameters: Mapping[str, Any]) -> Rule: ...


@dataclass(frozen=True)
class YardSpace:
    """A vector of numbers in [0, 1] is a recipe: for each group of layers a weight and a density of each model.

    Attributes:
        models: their names.
        groups: groups of layers.
        recipe: makes a recipe of rules.
        method: `ties`, or `task_arithmetic`, which has no densities.
    """

    models: tuple[str, ...]
    groups: Sequence[Group]
    recipe: Callable[[Sequence[Rule]], Recipe]
    method: str = "ties"

    @property
    def has_density(self) -> bool:
        return self.method != "task_arithmetic"

    @property
    def dimension(self) -> int:
        return len(self.groups) * len(self.models) * (1 + self.has_density)

    @property
    def start(self) -> np.ndarray:
        """Weight 1/K and density 1 everywhere, float64[dimension]."""
        weight = (1 / len(self.models) - WEIGHT[0]) / (WEIGHT[1] - WEIGHT[0])
        one = [weight] * len(self.models) + [1.0] * len(self.models) * self.has_density
        return np.array(one * len(self.groups))

    def decode(self, vector: Sequence[float]) -> Recipe:
        """The recipe of a vector; what lies outside [0, 1] is moved to the nearest bound."""
        inside = np.clip(np.asarray(vector, dtype=np.float64), 0.0, 1.0).reshape(len(self.groups), -1)
        return self.recipe([self._rule(group, row) for group, row in zip(self.groups, inside, strict=True)])

    def _rule(self, group: Group, row: np.ndarray) -> Rule:
        count = len(self.models)
        parameters: dict[str, Any] = {"weight": self._spread(row[:count], WEIGHT)}
        if self.has_density:
            parameters |= {"density": self._spread(row[count:], DENSITY), "normalize": False}
        return group.rule(self.method, self.models, parameters)

    def _spread(self, values: np.ndarray, bounds: tuple[float, float]) -> dict[str, float]:
        low, high = bounds
        return {model: low + (high - low) * float(v) for model, v in zip(self.models, values, strict=True)}


# --- the record of what was evaluated ---


class OutOfTime(KeyboardInterrupt):
    """The time of this call is used up; the next goes on. Like the interrupt of a user, no search records it as a
    failure of a candidate."""


@dataclass(frozen=True)
class Candidate:
    """One line of a search's record.

    Attributes:
        id: the recipe's.
        value: the objective on the search documents; None for a candidate that failed.
        documents: how many documents it was scored on; 0 where an equal recipe had been scored before.
        holdout: the objective on the holdout, for a candidate that became the best; None for others.
        seconds: what building and scoring it took.
        error: why it failed.
    """

    id: str
    value: float | None
    documents: int
    holdout: float | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Measures:
    """How candidates are measured.

    Attributes:
        search: a recipe -> (objective on the search documents, how many documents that took).
        holdout: a recipe -> objective on the holdout. Reported, never used for choosing.
        cost: documents that a candidate is charged which fails while it is scored.
    """

    search: Callable[[Recipe], tuple[float, int]]
    holdout: Callable[[Recipe], float]
    cost: int = 0


@dataclass
class Ledger:
    """A search's record on disk: a line of JSON for each candidate, the moment it is measured.

    A search is run again from its beginning after an interruption: its first candidates are answered from the file, and
    since each strategy is a function of its seed and of the answers, it goes on as it would have.

    Attributes:
        path: the file.
        measures: what measures a candidate that is not in the file.
        deadline: `time.time()` after which nothing new is measured.
    """

    path: Path
    measures: Measures
    deadline: float = math.inf
    done: list[Candidate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = read_candidates(self.path, repair=True)

    def __call__(self, recipe: Recipe) -> float | None:
        """The objective of a candidate on the search documents; None where it failed.

        Raises:
            OutOfTime: it is not in the file, and the deadline is over.
            ValueError: the file is of another search.
        """
        position = len(self.done)
        found = self._known[position] if position < len(self._known) else self._measure(recipe)
        if found.id != recipe.id:
            raise ValueError(f"{self.path}: line {position + 1} is of another search: name another folder")
        self.done.append(found)
        return found.value

    def _measure(self, recipe: Recipe) -> Candidate:
        equal = next((c for c in self.done if c.id == recipe.id), None)
        if equal is not None:
            return self._note(Candidate(recipe.id, equal.value, 0, error=equal.error))
        if time.time() > self.deadline:
            raise OutOfTime
        began = time.perf_counter()
        try:
            value, documents = self.measures.search(recipe)
        except CandidateError as error:
            return self._note(Candidate(recipe.id, None, self.measures.cost, error=str(error)))
        seconds = time.perf_counter() - began
        holdout = self.measures.holdout(recipe) if self._is_best(value) else None
        return self._note(Candidate(recipe.id, value, documents, holdout, seconds))

    def _is_best(self, value: float) -> bool:
        return all(c.value is None or value > c.value for c in self.done)

    def _note(self, candidate: Candidate) -> Candidate:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(candidate)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return candidate


def read_candidates(path: Path, repair: bool = False) -> list[Candidate]:
    """The candidates in a file. A last line that a kill cut short is left out and, with `repair`, cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if repair and whole != text:
        path.write_text(whole, encoding="utf-8")
    return [Candidate(**json.loads(line)) for line in whole.splitlines()]


# --- the strategies ---

Evaluate = Callable[[Recipe], float | None]


def cmaes(space: YardSpace, seed: int, candidates: int, evaluate: Evaluate) -> None:
    """CMA-ES (Hansen 2016, package `cma`) within bounds; it goes on to the last candidate, whatever its own criteria
    for stopping say."""
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses matplotlib, which nobody asked it to use
        import cma
    options = {
        "bounds": [0.0, 1.0],
        "popsize": 4 + int(3 * math.log(space.dimension)),
        "seed": math.nan,  # leaves numpy's global generator alone
        "randn": lambda *shape: rng.standard_normal(shape),
        "verbose": -9,
    }
    optimizer = cma.CMAEvolutionStrategy(space.start, SIGMA, options)
    left = candidates
    while left > 0:
        vectors = optimizer.ask()
        values = [evaluate(space.decode(vector)) for vector in vectors[:left]]
        left -= len(values)
        if len(values) == len(vectors):
            optimizer.tell(vectors, _losses(values))


def _losses(values: Sequence[float | None]) -> list[float]:
    """What CMA-ES minimises; a failed candidate ranks last."""
    worst = min((v for v in values if v is not None), default=0.0) - 1.0
    return [-(worst if v is None else v) for v in values]


def random_search(space: YardSpace, seed: int, candidates: int, evaluate: Evaluate) -> None:
    """Uniformly random vectors."""
    rng = np.random.default_rng(seed)
    for _ in range(candidates):
        evaluate(space.decode(rng.random(space.dimension)))


def tpe(space: YardSpace, seed: int, candidates: int, evaluate: Evaluate) -> None:
    """Optuna's TPE with its defaults, without warm start."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _by_optuna(optuna.samplers.TPESampler(seed=seed), space, candidates, evaluate)


def _by_optuna(sampler: optuna.samplers.BaseSampler, space: YardSpace, candidates: int, evaluate: Evaluate) -> None:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(candidates):
        trial = study.ask()
        value = evaluate(space.decode([trial.suggest_float(f"x{n}", 0.0, 1.0) for n in range(space.dimension)]))
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)


def genetic(space: YardSpace, seed: int, candidates: int, evaluate: Evaluate) -> None:
    """The genetic algorithm that mergenetic (Minut et al. 2025) takes from pymoo, with pymoo's operators: simulated
    binary crossover (probability 0.9, eta 15), polynomial mutation (eta 20) and elitist selection, of Optuna's NSGA-II,
    which on one objective is that algorithm; 25 in a generation, the first one uniformly random."""
    from optuna.samplers.nsgaii import PolynomialMutation, SBXCrossover

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.NSGAIISampler(
            population_size=GENERATION,
            crossover=SBXCrossover(eta=15),
            crossover_prob=0.9,
            mutation=PolynomialMutation(eta=20),
            seed=seed,
        )
    _by_optuna(sampler, space, candidates, evaluate)


STRATEGIES: dict[str, Callable[[YardSpace, int, int, Evaluate], None]] = {
    "cmaes": cmaes,
    "genetic": genetic,
    "random": random_search,
    "tpe": tpe,
}
