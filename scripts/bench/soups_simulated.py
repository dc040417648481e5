"""What keeps a learned soup from overfitting, where the truth is known, for results/soups-simulated.md.

    python -m scripts.bench.soups_simulated > results/soups-simulated.md

A candidate's error on a document is a . (w - w*) + noise, and its loss half the square of that: w are the weights of 4
models on 39 tensors, w* is best on all documents that there are, and a says how a document's error moves with each
weight: partly as one for all tensors of a model, partly as each tensor pleases. That is linear regression on few
documents, which is what a loss looks like near its least. The best weights are a whole model's, plus what groups and
tensors differ by; in a first world little, in a second one much. What is reported is the loss on all documents that
there are, less the best one, as a share of the start's. The steps are Adam's as `search.soup.adam` takes them, the
same number of documents for every way; levels and the choice of a step are the package's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergesearch.search.soup.early_stopping import EarlyStopping
from mergesearch.search.soup.levels import Levels
from scripts.bench.shared import tables

MODELS, TENSORS, GROUPS, TASKS = 4, 39, 9, 4
STEPS, DRAWN, RATE, NEVER = 100, 4, 0.03, 10_000
WORLDS = {"little": (0.25, 0.05, 0.05), "much": (0.25, 0.2, 0.2)}  # spread of the models', groups' and tensors' part
DOCUMENTS = (24, 100, 380)
REPEATS = 8


@dataclass(frozen=True)
class Way:
    """How a soup is learned: `per` tensor, group or model; the number of folds, 1 for a quarter held apart, 0 for all
    documents and no look; whether weights are a sum of levels, and how these decay; whether a look is at the mean of
    the weights since the look before; whether a share of the deviations is chosen by the folds."""

    per: str = "tensor"
    folds: int = 1
    levels: bool = False
    decay: float = 0.0
    average: bool = False
    shares: Sequence[float] = ()


WAYS = {
    "tensor, a quarter held apart (until now)": Way(),
    "group, a quarter held apart": Way("group"),
    "model, a quarter held apart": Way("model"),
    "tensor, all documents, all steps": Way(folds=0),
    "tensor, a quarter held apart, levels": Way(levels=True),
    "tensor, a quarter held apart, levels, decay 3": Way(levels=True, decay=3.0),
    "tensor, 3 folds": Way(folds=3),
    "tensor, 3 folds, levels": Way(folds=3, levels=True),
    "tensor, 3 folds, levels, decay 1": Way(folds=3, levels=True, decay=1.0),
    "tensor, 3 folds, levels, decay 3": Way(folds=3, levels=True, decay=3.0),
    "tensor, 3 folds, levels, decay 10": Way(folds=3, levels=True, decay=10.0),
    "tensor, 3 folds, levels, decay 3, averaged": Way(folds=3, levels=True, decay=3.0, average=True),
    "tensor, 3 folds, levels, decay 3, share by folds": Way(folds=3, levels=True, decay=3.0, shares=(0.0, 0.5)),
    "tensor, 3 folds, levels, share by folds": Way(folds=3, levels=True, shares=(0.0, 0.5)),
    "tensor, 5 folds, levels, decay 3": Way(folds=5, levels=True, decay=3.0),
    "group, 3 folds, levels": Way("group", folds=3, levels=True),
    "tensor, all documents, levels, decay 3, all steps": Way(folds=0, levels=True, decay=3.0),
}


class World:
    """Documents of each task, and what is best on all that there are."""

    def __init__(self, kind: str, documents: int, generator: np.random.Generator):
        model, group, tensor = WORLDS[kind]
        self.group_of = np.arange(TENSORS) * GROUPS // TENSORS
        part = generator.normal(0, group, (GROUPS, MODELS))[self.group_of]
        self.best = 0.8 + generator.normal(0, model, MODELS) + part + generator.normal(0, tensor, (TENSORS, MODELS))
        self.start = np.full((TENSORS, MODELS), 0.6)
        count = TASKS * documents
        common = generator.normal(0, 1 / math.sqrt(MODELS), (count, 1, MODELS)) / TENSORS
        own = generator.normal(0, 1 / math.sqrt(TENSORS * MODELS), (count, TENSORS, MODELS)) / math.sqrt(TENSORS)
        self.moves, self.noise = common + own, generator.normal(0, 0.3, count)
        self.tasks = [np.arange(task * documents, (task + 1) * documents) for task in range(TASKS)]

    def errors(self, weights: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Of some documents, [documents]."""
        return np.einsum("dck,ck->d", self.moves[ids], weights - self.best) + self.noise[ids]

    def beyond(self, weights: np.ndarray) -> float:
        """The loss on all documents that there are, less the best one: the mean of (a . (w - w*))^2 / 2."""
        gap = weights - self.best
        common = (gap.mean(axis=0) ** 2).sum() / MODELS
        return float(common + (gap**2).sum() / (TENSORS**2 * MODELS)) / 2


def learned(world: World, way: Way, generator: np.random.Generator) -> np.ndarray:
    """The weights that a way finds."""
    levels = Levels(_spread(way, world.group_of))
    orders = [generator.permutation(ids) for ids in world.tasks]
    if way.folds == 0:
        return _walk(world, way, levels, orders, orders, STEPS, generator)[0][-1]
    if way.folds == 1:
        cuts = [max(1, len(order) // 4) for order in orders]
        held = [order[:cut] for order, cut in zip(orders, cuts, strict=True)]
        rest = [order[cut:] for order, cut in zip(orders, cuts, strict=True)]
        values, losses = _walk(world, way, levels, rest, held, STEPS, generator)
        return values[_chosen(values, losses)]
    parts = [[order[fold :: way.folds] for order in orders] for fold in range(way.folds)]
    found = []
    for fold, held in enumerate(parts):
        rest = [np.concatenate([part[t] for n, part in enumerate(parts) if n != fold]) for t in range(TASKS)]
        found.append(_walk(world, way, levels, rest, held, -(-STEPS // way.folds), generator))
    looks = range(len(found[0][0]))
    means = [np.mean([values[look] for values, _ in found], axis=0) for look in looks]
    pooled = [
        {task: np.concatenate([losses[look][task] for _, losses in found]) for task in losses_tasks()} for look in looks
    ]
    place = _chosen(means, pooled)
    best, lowest = means[place], sum(each.mean() for each in pooled[place].values())
    for share in way.shares if place else ():
        total = sum(
            _losses(world, levels.shrunk(values[place], share), [ids])["0"].mean() * len(ids) / sum(map(len, parts_of))
            for task in range(TASKS)
            for parts_of in [[part[task] for part in parts]]
            for (values, _), ids in zip(found, parts_of, strict=True)
        )
        if total < lowest:
            best, lowest = levels.shrunk(means[place], share), total
    return best


def losses_tasks() -> list[str]:
    """The tasks' labels."""
    return [str(task) for task in range(TASKS)]


def _walk(
    world: World,
    way: Way,
    levels: Levels,
    rest: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
    steps: int,
    generator: np.random.Generator,
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """(weights, held-out losses) at every look of one learning."""
    raw = levels.raw(world.start)
    first, second, passed, since = np.zeros_like(raw), np.zeros_like(raw), np.zeros_like(raw), 0
    values, losses = [world.start], [_losses(world, world.start, held)]
    for step in range(steps):
        ids = np.concatenate([generator.choice(order, min(DRAWN, len(order)), replace=False) for order in rest])
        errors = world.errors(levels.spread @ raw, ids)
        gradient = levels.spread.T @ (np.einsum("d,dck->ck", errors, world.moves[ids]) / len(ids))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = RATE * (0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
        ahead = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        raw = raw - rate * ahead[0] / (np.sqrt(ahead[1]) + 1e-8)
        raw[1:] *= 1 - min(1.0, rate * way.decay)
        passed, since = passed + raw, since + 1
        if (step + 1) % 10 == 0 or step + 1 == steps:
            values.append(levels.spread @ (passed / since if way.average else raw))
            losses.append(_losses(world, values[-1], held))
            passed, since = np.zeros_like(raw), 0
    return values, losses


def _losses(world: World, weights: np.ndarray, held: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {str(task): world.errors(weights, ids) ** 2 / 2 for task, ids in enumerate(held)}


def _chosen(values: Sequence[np.ndarray], losses: Sequence[dict[str, np.ndarray]]) -> int:
    """The look that early stopping keeps; its patience is at an end after four worse looks in a row."""
    stopping, chosen = EarlyStopping(4, dict.fromkeys(losses[0], 1 / TASKS)), 0
    for look, (mine, each) in enumerate(zip(values, losses, strict=True)):
        if stopping.look(each, mine):
            chosen = look
        if stopping.over:
            break
    return chosen


def _spread(way: Way, group_of: np.ndarray) -> np.ndarray:
    """Which rows of raw numbers a tensor's weights are the sum of."""
    whole, groups, tensors = np.ones((TENSORS, 1)), np.eye(GROUPS)[group_of], np.eye(TENSORS)
    if way.per == "model":
        return whole
    finest = groups if way.per == "group" else tensors
    if not way.levels:
        return finest
    return np.concatenate([whole, groups] + ([tensors] if way.per == "tensor" else []), axis=1)


def table(repeats: int = REPEATS) -> str:
    """The simulated part of the page."""
    columns = [(kind, documents) for kind in WORLDS for documents in DOCUMENTS]
    rows = []
    for name, way in WAYS.items():
        cells = []
        for kind, documents in columns:
            shares = []
            for seed in range(repeats):
                world = World(kind, documents, np.random.default_rng([seed, documents]))
                found = learned(world, way, np.random.default_rng([seed, 1]))
                shares.append(world.beyond(found) / world.beyond(world.start))
            cells.append(f"{np.mean(shares):.3f} ± {np.std(shares, ddof=1) / math.sqrt(repeats):.3f}")
        rows.append([name, *cells])
    titles = ["way", *(f"{kind}, {documents} documents a task" for kind, documents in columns)]
    return "\n".join(
        [
            "# Soups that do not overfit, simulated: linear regression on few documents",
            "",
            f"`python -m scripts.bench.soups_simulated`; the script says what is simulated. {STEPS} steps of {DRAWN} "
            f"documents of each of {TASKS} tasks for every way, {repeats} worlds; the loss beyond the best one as a "
            "share of the start's, less is better.",
            "",
            *tables.table(titles, rows),
            "",
        ]
    )


def main() -> int:
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
