"""Races over recorded scores: the rule of `search.racing` applied to the documents of trials that were scored in full.

Used by test_racing.py and by scripts/bench/racing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.blocks import split_blocks
from mergesearch.evaluate.scores import DocumentScores
from mergesearch.search.racing import OTHERS, lead, spreads

Documents = Mapping[str, DocumentScores]
# (a proposal, the best finished trial, finished ones that help to predict, all finished proposals) -> how many
# documents the proposal was scored on
Race = Callable[[int, int, Sequence[int], Sequence[int]], int]


@dataclass(frozen=True)
class Matrix:
    """The scores of trials on the same documents.

    Attributes:
        values: by task, [trials, n] or [trials, n, 2].
        aggregations: by task.
        factors: of each task in the objective.
        baselines: how many trials come first and are never stopped.
        gold: of tasks whose answers hold it, [trials, n], the log-probability of the right choice.
        random: how many proposals after them were drawn at random; the rest came from a sampler that learns.
    """

    values: Mapping[str, np.ndarray]
    aggregations: Mapping[str, str]
    factors: Mapping[str, float]
    baselines: int
    random: int = 0
    gold: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Matrix:
        with np.load(path) as found:
            tasks = [str(task) for task in found["tasks"]]
            values = {task: found[task].astype(np.float64) for task in tasks}
            aggregations = dict(zip(tasks, map(str, found["aggregations"]), strict=True))
            factors = dict(zip(tasks, found["factors"].tolist(), strict=True))
            random = int(found["random"]) if "random" in found else 0
            gold = {task: found[f"{task}.gold"].astype(np.float64) for task in tasks if f"{task}.gold" in found}
            return cls(values, aggregations, factors, int(found["baselines"]), random, gold)

    def first(self, proposals: int) -> Matrix:
        """The baselines and so many proposals."""
        upto = self.baselines + proposals
        return replace(
            self,
            values={task: v[:upto] for task, v in self.values.items()},
            gold={task: v[:upto] for task, v in self.gold.items()},
        )

    def smooth(self) -> Matrix:
        """The same trials with gold_prob as the metric of every task that has it, on the scale of the parents: the
        base, which is the first baseline, and the best of the models, which are all the others but the last."""
        values = {**self.values, **{task: np.exp(gold) for task, gold in self.gold.items()}}
        factors = {
            task: factor * self._unit(self.values[task]) / self._unit(values[task]) if task in self.gold else factor
            for task, factor in self.factors.items()
        }
        return replace(self, values=values, factors=factors)

    def _unit(self, values: np.ndarray) -> float:
        means = values[: self.baselines].mean(axis=1)
        return float(means[1:-1].max() - means[0])

    @property
    def trials(self) -> int:
        return len(next(iter(self.values.values())))

    def sizes(self) -> dict[str, int]:
        return {task: values.shape[1] for task, values in self.values.items()}

    def documents(self, trial: int, only: Mapping[str, Sequence[int]] | None = None) -> dict[str, DocumentScores]:
        found = {}
        for task, values in self.values.items():
            ids = sorted(only[task]) if only else list(range(values.shape[1]))
            found[task] = DocumentScores(ids, values[trial][ids], self.aggregations[task])
        return found

    def objective(self, trial: int) -> float:
        return sum(
            factor * statistics.figure(self.values[task][trial], self.aggregations[task])
            for task, factor in self.factors.items()
        )


@dataclass(frozen=True)
class Raced:
    """What racing did to one search.

    Attributes:
        evaluations: documents scored.
        full: documents that scoring everything takes.
        stopped: trials that were stopped.
        wrong: those of them that would have become the best.
        contenders: trials that would have become the best, stopped or not.
        same_winner: whether the best finished trial is the best of all.
    """

    evaluations: int
    full: int
    stopped: int
    wrong: int
    contenders: int
    same_winner: bool


def race_all(
    matrix: Matrix,
    blocks: int,
    error: float,
    seed: int,
    shuffle: bool = True,
    by_spread: bool = True,
    learn: bool = True,
) -> Raced:
    """One search over the recorded trials: the baselines first, then the others, in a random order where `shuffle`.
    Without `by_spread` every task gives the same fraction of its documents to a block; without `learn` only the best
    trial's documents are looked at."""
    sizes = matrix.sizes()
    spread = spreads([matrix.documents(trial) for trial in range(matrix.baselines)], matrix.factors)
    everything = {task: list(range(size)) for task, size in sizes.items()}
    parts = split_blocks(everything, blocks, seed, spread if by_spread else None)
    order = list(range(matrix.trials))
    if shuffle:
        rest = order[matrix.baselines :]
        np.random.default_rng(seed).shuffle(rest)
        order[matrix.baselines :] = rest

    def race(trial: int, best: int, others: Sequence[int], late: Sequence[int]) -> int:
        return race_one(matrix, trial, best, others if learn else [], parts, error)

    return play(matrix, order, race)


def play(matrix: Matrix, order: Sequence[int], race: Race) -> Raced:
    """One search over the recorded trials.

    Args:
        order: of the trials, the baselines first.
        race: of each proposal.
    """
    objectives = [matrix.objective(trial) for trial in range(matrix.trials)]
    full = sum(matrix.sizes().values())
    named = order[: matrix.baselines]
    late: list[int] = []
    best, evaluations, stopped, wrong, contenders = order[0], 0, 0, 0, 0
    for trial in order:
        better, seen = objectives[trial] > objectives[best], full
        if trial >= matrix.baselines:
            others = [other for other in (*named, *late[-OTHERS - 1 :]) if other != best]
            seen = race(trial, best, others, late)
            contenders += better
            late += [trial] * (seen == full)
        evaluations += seen
        if seen < full:
            stopped += 1
            wrong += better
        elif better:
            best = trial
    winner = objectives[best] == max(objectives)
    return Raced(evaluations, full * len(order), stopped, wrong, contenders, winner)


def race_one(
    matrix: Matrix,
    trial: int,
    best: int,
    others: Sequence[int],
    parts: Sequence[Mapping[str, list[int]]],
    error: float,
) -> int:
    """Documents scored of a trial until it was stopped or finished.

    Args:
        best: whom it races against.
        others: finished ones that help to predict.
        parts: the blocks.
    """
    theirs, sizes = matrix.documents(best), matrix.sizes()
    known = [matrix.documents(other) for other in others]
    for number in range(1, len(parts)):
        so_far = {task: [i for part in parts[:number] for i in part[task]] for task in sizes}
        ours = matrix.documents(trial, so_far)
        if lead(ours, theirs, matrix.factors, sizes, known).upper(error) < 0:
            return sum(map(len, so_far.values()))
    return sum(sizes.values())
