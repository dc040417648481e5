"""What keeps a learned soup from overfitting, measured on the holdout of the zoo of version 0.1, for results/soups.md.

    python -m scripts.bench.soups results/bench-soups --seeds 0 1
    python -m scripts.bench.soups results/bench-soups --report
    python -m scripts.bench.soups_simulated > results/soups-simulated.md

Each way to learn is run on few search documents with one start, the best of a few weights that are the same for all
models; what it found is scored on the holdout. The pool is a development pool, and this its holdout development data:
what is chosen here has to be shown elsewhere. A way that is finished is read again, so that the same command goes on
after a kill; --only names ways, --stop-after ends it in time.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergesearch import config as configuration
from mergesearch.engine.live import Engine
from mergesearch.evaluate.losses import Losses
from mergesearch.search.soup.adam import learn, parent_scales
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.early_stopping import EarlyStopping
from mergesearch.search.soup.folds import together
from mergesearch.search.soup.learning import Documents, SoupResult, folds_of, hold_apart, size
from mergesearch.search.soup.settings import SoupSettings
from mergesearch.space import groups_of
from scripts.bench.search import Bench, slug
from scripts.bench.shared import tables, zoo1
from scripts.bench.shared.notes import notes_of

STARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
FOLDS = 3
# search documents of each task: few, so that overfitting shows
LIMIT = 24
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
THE_PRESENT = "tensor, a quarter held apart"
START = "no learning: the start"
NEVER = 10_000


@dataclass(frozen=True)
class Way:
    """One way to learn.

    Attributes:
        per: what has weights of its own.
        loss: what is learned by.
        folds: how many parts are held out in turn; 0: a quarter is held apart, 1: nothing is.
        levels: whether weights are a sum of levels.
        settings: of the learning that differ from the present ones.
    """

    per: str = "tensor"
    loss: str = "expected"
    folds: int = FOLDS
    levels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


# as many documents in all, whichever way
_LONG = {"steps": 60, "documents": 2, "look_every": 10}
_SHORT = {**_LONG, "steps": 60 // FOLDS, "look_every": 5, "patience": NEVER}
_WHOLE = {**_LONG, "patience": NEVER}
WAYS: dict[str, Way] = {
    THE_PRESENT: Way(folds=0, settings=_LONG),
    START: Way("recipe", folds=0),
    "tensor, folds, levels, decay 3": Way(levels=True, settings={**_SHORT, "decay": 3.0}),
    "tensor, folds": Way(settings=_SHORT),
    "group, folds, levels": Way("group", levels=True, settings=_SHORT),
    "tensor, all documents, levels, decay 3": Way(folds=1, levels=True, settings={**_WHOLE, "decay": 3.0}),
    "model, folds": Way("recipe", settings=_SHORT),
    "tensor, folds, levels": Way(levels=True, settings=_SHORT),
    "tensor, folds, levels, decay 3, averaged": Way(levels=True, settings={**_SHORT, "decay": 3.0, "average": True}),
    "tensor, folds, levels, decay 3, cross-entropy": Way(
        loss="cross_entropy", levels=True, settings={**_SHORT, "decay": 3.0}
    ),
    "tensor, folds, levels, decay 10": Way(levels=True, settings={**_SHORT, "decay": 10.0}),
    "group, a quarter held apart": Way("group", folds=0, settings=_LONG),
    "tensor, a quarter held apart, cross-entropy": Way(loss="cross_entropy", folds=0, settings=_LONG),
}


class Pool:
    """One split of the pool's documents, with a live model, losses on both sides, and one start for all ways."""

    def __init__(self, seed: int, out: Path, overrides: Sequence[str]):
        limits = [f"tasks.{number}.limit={LIMIT}" for number in range(4)]
        plain = ["dtype=float32", "scoring=auto", "holdout=0.12", f"search.seed={seed}"]
        self.config = configuration.read(zoo1.SEARCH, [*plain, *limits, *overrides])
        self.out, self.seed = out, seed
        self.bench = Bench(self.config, out / str(seed))
        self.engine: Engine = self.bench.engine
        self.sides = {side: [*scorer.documents()] for side, scorer in self.bench.scorers.items()}
        self.documents = self._ids("search")
        self.objective = self.bench.objective()
        self._losses: dict[tuple[str, str], Losses] = {}

    def _ids(self, side: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for document in self.sides[side]:
            found.setdefault(document.task.label, []).append(document.number)
        return {label: sorted(ids) for label, ids in found.items()}

    def losses(self, side: str, kind: str) -> Losses:
        if (side, kind) not in self._losses:
            self._losses[side, kind] = Losses(self.bench.scorers[side], self.engine.model, 32, kind)  # type: ignore[arg-type]
        return self._losses[side, kind]

    def coefficients(self, per: str, levels: bool = False) -> Coefficients:
        infos, layers = self.bench.pool.infos, self.bench.pool.layers
        groups = groups_of(infos, layers, min(3, layers), ["attention", "mlp", "other"])
        cells: Any = groups if per == "group" else per
        return Coefficients(self.config.average, infos, cells, above=groups if levels else None)

    def scales(self, kind: str) -> dict[str, float]:
        """What each task's loss is divided by; measured once."""
        file = self.out / str(self.seed) / f"scales-{kind}.json"
        if not file.is_file():
            found = parent_scales(self.coefficients("recipe"), self.engine, self.losses("search", kind), self.documents)
            file.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def start(self) -> float:
        """The weight of all models with the lowest expected loss on the search documents."""
        file = self.out / str(self.seed) / "start.json"
        if not file.is_file():
            whole = self.coefficients("recipe")
            found = {weight: self.mean_loss(whole.recipe(whole.full(weight)), "search") for weight in STARTS}
            file.write_text(json.dumps(found), encoding="utf-8")
        told = json.loads(file.read_text(encoding="utf-8"))
        return float(min(told, key=lambda weight: told[weight]))

    def mean_loss(self, recipe: Any, side: str) -> float:
        """The mean over tasks of the expected loss, in units of the scale."""
        return float(np.mean([each.mean() for each in self.expected(recipe, side).values()]))

    def expected(self, recipe: Any, side: str) -> dict[str, np.ndarray]:
        """Each document's expected loss, in units of the scale."""
        self.engine.load(recipe)
        scales, documents = self.scales("expected"), self._ids(side)
        losses = self.losses(side, "expected")
        with torch.no_grad():
            found = losses.loss(losses.known(documents))
        return {label: each.double().numpy() / scales[label] for label, each in found.items()}

    def judged(self, recipe: Any, whole: bool) -> dict[str, Any]:
        """What a recipe is worth on the holdout: each document's expected loss, and of a whole judgement the objective
        and the tasks' scores."""
        losses = {label: each.tolist() for label, each in self.expected(recipe, "holdout").items()}
        if not whole:
            return {"losses": losses}
        scores = self.bench.score(recipe, "holdout")
        tasks = {label: score.value for label, score in scores.items()}
        return {"losses": losses, "holdout": self.objective.value(scores), "tasks": tasks}


def run(pool: Pool, name: str, way: Way) -> list[dict[str, Any]]:
    """Learns one way, and reads what it found in every manner that it allows."""
    if name == START:
        whole = pool.coefficients("recipe")
        row = {"seed": pool.seed, "way": name, "reading": "as it is", "documents": len(STARTS) * size(pool.documents)}
        return [{**row, **pool.judged(whole.recipe(whole.full(pool.start)), whole=True)}]
    coefficients = pool.coefficients(way.per, way.levels)
    settings = SoupSettings().model_copy(update={"decay": 0.0, "average": False, **way.settings})
    start = coefficients.full(pool.start)
    parts: list[tuple[Documents, Documents]]
    if way.folds == 0:
        parts = [hold_apart(pool.documents, settings.validation, pool.seed, settings.validation_documents)]
    elif way.folds == 1:
        few = hold_apart(pool.documents, 0.05, pool.seed, 1)[1]
        parts = [(pool.documents, few)]
    else:
        parts = [*folds_of(pool.documents, way.folds, pool.seed)]
    found = []
    for number, (documents, held) in enumerate(parts):
        file = pool.out / str(pool.seed) / f"{slug(name)}-{number}.json"
        found.append(
            learn(
                coefficients,
                start,
                pool.engine,
                pool.losses("search", way.loss),
                settings,
                seed=pool.seed,
                documents=documents,
                validation=held,
                scales=pool.scales(way.loss),
                state=file,
            )
        )
    cost = sum(each.documents for each in found)
    rows = []
    for reading, values, more in readings(pool, coefficients, way, settings, found, [held for _, held in parts]):
        row = {"seed": pool.seed, "way": name, "reading": reading, "documents": cost + more}
        rows.append({**row, **pool.judged(coefficients.recipe(values), whole=not rows)})
        told = {key: value for key, value in rows[-1].items() if key != "losses"}
        print(json.dumps({**told, "loss": loss_of(rows[-1])[0]}), flush=True)
    return rows


def readings(
    pool: Pool,
    coefficients: Coefficients,
    way: Way,
    settings: SoupSettings,
    found: Sequence[SoupResult],
    held: Sequence[Documents],
) -> list[tuple[str, np.ndarray, int]]:
    """(reading, weights, document evaluations that it costs more) of what was learned."""
    if way.folds == 0:
        return [("kept", found[0].values, 0), ("last", found[0].looks[-1].values, 0)]
    if way.folds == 1:
        middle = found[0].looks[len(found[0].looks) // 2].values
        return [("half the steps", middle, 0), ("all steps", found[0].looks[-1].values, 0)]
    pooled = EarlyStopping(NEVER, {label: 1 / scale for label, scale in pool.scales(way.loss).items()})
    looks = together(found)
    chosen = [number for number, look in enumerate(looks) if pooled.look(look.losses, look.values)][-1]
    best = min(range(len(looks)), key=lambda number: pooled.loss(looks[number].losses))
    last = len(looks) - 1
    told = [("mean of the folds at the chosen step", looks[chosen].values, 0)]
    if best != chosen:
        told.append(("mean of the folds at the best step", looks[best].values, 0))
    if last != chosen:
        told.append(("mean of the folds at the last step", looks[last].values, 0))
    told.append(("one fold alone, at the chosen step", found[0].looks[chosen].values, 0))
    if coefficients.levels is None:
        return told
    losses_of = {share: 0.0 for share in SHARES}
    for each, out in zip(found, held, strict=True):
        for share in SHARES:
            values = coefficients.levels.shrunk(each.looks[chosen].values, share)
            losses_of[share] += _loss(pool, coefficients.recipe(values), out, way.loss)
    share = min(losses_of, key=lambda each: losses_of[each])
    print(f"  deviations by share: {losses_of}", flush=True)
    if share != 1:
        values = coefficients.levels.shrunk(looks[chosen].values, share)
        told.append((f"deviations times {share:g}, by the folds", values, len(SHARES) * size(pool.documents)))
    return told


def _loss(pool: Pool, recipe: Any, documents: Documents, kind: str) -> float:
    pool.engine.load(recipe)
    losses, scales = pool.losses("search", kind), pool.scales(kind)
    with torch.no_grad():
        found = losses.loss(losses.known(documents))
    return float(sum(float(each.double().sum()) / scales[label] for label, each in found.items()))


def loss_of(row: Mapping[str, Any], against: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """(the mean over tasks of a row's loss on the holdout, less another's of the same seed; its standard error)."""
    mine = {task: np.array(each) for task, each in row["losses"].items()}
    if against is not None:
        mine = {task: each - np.array(against["losses"][task]) for task, each in mine.items()}
    variance = sum(float(each.var(ddof=1)) / len(each) for each in mine.values()) / len(mine) ** 2
    return float(np.mean([each.mean() for each in mine.values()])), math.sqrt(variance)


TITLES = (
    *("way", "reading", "document evaluations", "loss less the present way's", "loss less the start's", "objective"),
    "seeds",
)


def report(out: Path, path: Path) -> None:
    """Writes the table: for each way and reading the loss less the present way's, paired over documents and seeds."""
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for name in WAYS:
        for file in sorted(out.glob(f"*/{slug(name)}.rows.json")):
            for row in json.loads(file.read_text(encoding="utf-8")):
                rows.setdefault((name, row["reading"]), {})[row["seed"]] = row
    reference = rows.get((THE_PRESENT, "kept"), {})
    start = rows.get((START, "as it is"), {})
    table: list[list[str]] = []
    for (name, reading), found in rows.items():
        seeds = sorted(found.keys() & reference.keys())
        if not seeds:
            continue
        cells = [name, reading, f"{np.mean([found[seed]['documents'] for seed in seeds]):,.0f}"]
        for against in (reference, start):
            pairs = [loss_of(found[seed], against[seed]) for seed in seeds if seed in against]
            gap = float(np.mean([value for value, _ in pairs])) if pairs else math.nan
            noise = math.sqrt(sum(error**2 for _, error in pairs)) / max(1, len(pairs))
            cells.append(f"{gap:+.4f} ± {noise:.4f}")
        values = [found[seed]["holdout"] for seed in seeds if "holdout" in found[seed]]
        table.append([*cells, f"{np.mean(values):.3f}" if values else "", str(len(seeds))])
    text = (
        "# Soups that do not overfit\n\n"
        "`python -m scripts.bench.soups FOLDER --seeds 0 1`, then `--report`: a machine with 2 CPU "
        f"cores, float32, torch {torch.__version__}. The zoo of version 0.1, {LIMIT} search documents of each of its 4 "
        "tasks, 60 steps of 2 documents of each task for every way. The loss is the mean over tasks of the expected "
        "loss on the holdout, each task's in units of how much the best single model's is lower than the base's: less "
        "is better. `±` is one standard error, document by document. The objective on the holdout was measured for the "
        "first reading of each way alone. This pool is a development pool: what is best here was chosen by this "
        "table, and is no result.\n\n"
        "What the truth being known makes possible is in soups-simulated.md beside this page.\n\n"
    )
    path.write_text(text + "\n".join([*tables.table(TITLES, table), *notes_of(path), ""]), encoding="utf-8")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/bench-soups"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=list(WAYS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--report", action="store_true", help="write the table and run nothing")
    parser.add_argument("--results", type=Path, default=Path("results/soups.md"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    deadline = time.time() + chosen.stop_after
    if chosen.report:
        report(chosen.out, chosen.results)
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for seed in chosen.seeds:
        pool: Pool | None = None
        for name in chosen.only or WAYS:
            file = chosen.out / str(seed) / f"{slug(name)}.rows.json"
            if file.is_file() or time.time() > deadline:
                continue
            if pool is None:
                file.parent.mkdir(parents=True, exist_ok=True)
                pool = Pool(seed, chosen.out, chosen.overrides)
                print(f"seed {seed}: start at {pool.start:g}, {size(pool.documents)} search documents", flush=True)
            began = time.time()
            rows = run(pool, name, WAYS[name])
            file.write_text(json.dumps(rows), encoding="utf-8")
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
