"""The settings of a learned soup, side by side on the development pools, for results/soup-settings.md.

    python -m scripts.bench.soup_settings --pool real zoo1_fresh --seeds 5 6
    python -m scripts.bench.soup_settings --report

A way is what `search.learned_soup` would say. The soup is learned as a run learns it, on all of the pool's search
documents, from one start for all ways: the weight of all models with the lowest loss on a quarter of them. What it came
to is a row of results/soup-settings.csv, which is committed, and what stands there is not run again. The pools are
development pools: what is best here was chosen by this table, and has to be shown elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from mergesearch import config as configuration
from mergesearch.evaluate.losses import Losses
from mergesearch.search.soup.adam import learn, parent_scales
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.folds import learn_by_folds
from mergesearch.search.soup.learning import Documents, SoupResult, hold_apart, size
from mergesearch.search.soup.settings import Loss, SoupSettings
from mergesearch.space import groups_of
from scripts.bench.search import Bench, pool_of
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

STARTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
START = "no learning: the start"
COLUMNS = ("pool", "seed", "way", "loss", "per", "search_score", "holdout_score", "documents", "seconds", "ended")

_REAL = {"steps": 80, "learning_rate": 0.05}
# settings that differ from SoupSettings' own; one more line is one more way
WAYS: dict[str, dict[str, Any]] = {
    "3 folds, decay 3": {"folds": 3, "decay": 3.0},
    "1 fold, decay 3": {"folds": 1, "decay": 3.0},
    "1 fold, decay 1": {"folds": 1, "decay": 1.0},
    "1 fold, decay 0.3": {"folds": 1, "decay": 0.3},
    "1 fold, decay 0": {"folds": 1, "decay": 0.0},
    "3 folds, decay 1": {"folds": 3, "decay": 1.0},
    "3 folds, decay 0": {"folds": 3, "decay": 0.0},
    "3 folds of all steps, decay 3": {"folds": 3, "decay": 3.0, "steps": 300},
    "3 folds of all steps, decay 1": {"folds": 3, "decay": 1.0, "steps": 300},
    "1 fold, decay 0, 80 steps at 0.05": {"folds": 1, "decay": 0.0, **_REAL},
    "1 fold, decay 1, twice the steps": {"folds": 1, "decay": 1.0, "steps": 200},
    "1 fold, decay 0.3, twice the steps at 0.05": {"folds": 1, "decay": 0.3, "steps": 200, "learning_rate": 0.05},
    "1 fold, decay 1, 100 steps at 0.06": {"folds": 1, "decay": 1.0, "learning_rate": 0.06},
    "1 fold, decay 1, 100 steps at 0.1": {"folds": 1, "decay": 1.0, "learning_rate": 0.1},
    "all documents, decay 1": {"folds": 1, "validation": 0, "decay": 1.0},
    "all documents, decay 1, at 0.06": {"folds": 1, "validation": 0, "decay": 1.0, "learning_rate": 0.06},
}


class Pool:
    """One split of a pool's documents, with a live model, and what all ways share."""

    def __init__(self, name: str, seed: int, out: Path, overrides: Sequence[str]):
        self.name, self.seed = name, seed
        found = pool_of(name)[1]
        self.config = configuration.read(found.config, [*found.overrides, *overrides, f"search.seed={seed}"])
        self.out = out / name / str(seed)
        self.out.mkdir(parents=True, exist_ok=True)
        self.bench = Bench(self.config, self.out / "objective.json")
        self.objective = self.bench.objective()
        self.documents: dict[str, list[int]] = {}
        for document in self.bench.scorers["search"].documents():
            self.documents.setdefault(document.task.label, []).append(document.number)
        self._losses: dict[str, Losses] = {}

    def losses(self, kind: Loss) -> Losses:
        if kind not in self._losses:
            self._losses[kind] = Losses(self.bench.scorers["search"], self.bench.engine.model, 16, kind)
        return self._losses[kind]

    def coefficients(self, per: str) -> Coefficients:
        infos, layers = self.bench.pool.infos, self.bench.pool.layers
        groups = groups_of(infos, layers, min(3, layers), ["attention", "mlp", "other"])
        cells: Any = groups if per == "group" else per
        return Coefficients(self.config.average, infos, cells, above=groups if per != "recipe" else None)

    @cached_property
    def few(self) -> Documents:
        """A quarter of the documents, 64 of a task at most."""
        return hold_apart(self.documents, 0.25, self.seed, 64)[1]

    def scales(self, kind: Loss) -> dict[str, float] | None:
        """What each task's loss is divided by; measured once."""
        if self.config.objective.scale != "parents":
            return dict.fromkeys(self.documents, 1.0) if kind in ("expected", "mixed") else None
        file = self.out / f"scales-{kind}.json"
        if not file.is_file():
            found = parent_scales(self.coefficients("recipe"), self.bench.engine, self.losses(kind), self.few)
            file.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def start(self) -> float:
        """The weight of all models with the lowest cross-entropy on a few of the search documents."""
        file = self.out / "start.json"
        if not file.is_file():
            whole, losses = self.coefficients("recipe"), self.losses("cross_entropy")
            found = {}
            for weight in STARTS:
                self.bench.engine.load(whole.recipe(whole.full(weight)))
                with torch.no_grad():
                    each = losses.loss(losses.known(self.few))
                found[weight] = float(np.mean([float(loss.double().mean()) for loss in each.values()]))
            file.write_text(json.dumps(found), encoding="utf-8")
        told = json.loads(file.read_text(encoding="utf-8"))
        return float(min(told, key=lambda weight: told[weight]))

    def score(self, recipe: Any, side: str) -> float:
        return float(self.objective.value(self.bench.score(recipe, side)))


def run(pool: Pool, way: str, loss: Loss, per: str) -> dict[str, Any]:
    """Learns a soup in one way, and scores it on both sides."""
    coefficients = pool.coefficients(per)
    row: dict[str, Any] = {"pool": pool.name, "seed": pool.seed, "way": way, "loss": loss, "per": per}
    began, start = time.perf_counter(), coefficients.full(pool.start)
    if way == START:
        recipe, cost, ended = coefficients.recipe(start), len(STARTS) * size(pool.few), f"weight {pool.start:g}"
    else:
        found = _learn(pool, coefficients, start, SoupSettings.model_validate(WAYS[way]), loss)
        recipe, cost, ended = found.recipe, found.documents, found.note
    row |= {"documents": cost, "seconds": round(time.perf_counter() - began), "ended": ended}
    return row | {f"{side}_score": pool.score(recipe, side) for side in ("search", "holdout")}


def _learn(pool: Pool, coefficients: Coefficients, start: np.ndarray, settings: SoupSettings, loss: Loss) -> SoupResult:
    losses, told = pool.losses(loss), {"seed": pool.seed, "scales": pool.scales(loss)}
    if settings.folds > 1:
        documents = pool.documents
        return learn_by_folds(coefficients, start, pool.bench.engine, losses, settings, documents=documents, **told)
    documents, held = pool.documents, {}
    if settings.validation:
        documents, held = hold_apart(pool.documents, settings.validation, pool.seed, settings.validation_documents)
    parts = {"documents": documents, "validation": held}
    return learn(coefficients, start, pool.bench.engine, losses, settings, **parts, **told)


# --- rows ---


def read(file: Path) -> list[dict[str, str]]:
    """The rows that stand in a file; none where it is missing."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def add(file: Path, row: Mapping[str, Any]) -> None:
    with FileLock(file.with_suffix(".lock")):
        fresh = not file.is_file()
        with file.open("a", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def report(file: Path, page: Path) -> None:
    """Writes a table for each pool, loss and what has weights of its own: scores less those of the present way."""
    rows = read(file)
    text = [
        "# The settings of a learned soup, side by side",
        "",
        "`python -m scripts.bench.soup_settings`, which runs what is missing in soup-settings.csv, then `--report`. "
        "All ways of a seed have the same documents and start. Development pools: what is best here was chosen by "
        "this table, and is no result. *Documents* and *seconds* are of learning alone; a score is the mean over "
        "seeds; a difference is paired by seed, ± one standard error over seeds.",
    ]
    for pool, loss, per in sorted({(row["pool"], row["loss"], row["per"]) for row in rows}):
        mine = [row for row in rows if (row["pool"], row["loss"], row["per"]) == (pool, loss, per)]
        by_way: dict[str, dict[str, dict[str, str]]] = {}
        for row in mine:
            by_way.setdefault(row["way"], {})[row["seed"]] = row
        # what nothing was learned for is the same by any loss
        start = {row["seed"]: row for row in rows if row["way"] == START and row["pool"] == pool}
        table = [_cells(way, found, start) for way, found in by_way.items()]
        text += ["", f"## Pool {pool}, per {per}, by {loss.replace('_', '-')}", "", *tables.table(TITLES, table)]
    page.write_text("\n".join([*text, *notes_of(page), ""]), encoding="utf-8")


TITLES = ("way", "seeds", "search score", "holdout score", "less the start's", "documents", "seconds")


def _cells(way: str, found: Mapping[str, Mapping[str, str]], start: Mapping[str, Mapping[str, str]]) -> list[str]:
    means = {
        key: float(np.mean([float(row[key]) for row in found.values()]))
        for key in ("search_score", "holdout_score", "documents", "seconds")
    }
    gaps = [float(row["holdout_score"]) - float(start[seed]["holdout_score"]) for seed, row in found.items()]
    noise = f" ± {np.std(gaps, ddof=1) / math.sqrt(len(gaps)):.3f}" if len(gaps) > 1 else ""
    scores = [f"{means['search_score']:.3f}", f"{means['holdout_score']:.3f}", f"{np.mean(gaps):+.3f}{noise}"]
    return [way, ", ".join(sorted(found)), *scores, f"{means['documents']:,.0f}", f"{means['seconds']:,.0f}"]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench-soup-settings"), help="for what ways share")
    parser.add_argument("--pool", nargs="+", default=["zoo1_fresh"], help="as in scripts.bench.search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6])
    parser.add_argument("--only", nargs="+", choices=[START, *WAYS])
    parser.add_argument("--loss", nargs="+", default=["expected", "cross_entropy"])
    parser.add_argument("--per", nargs="+", default=["tensor"])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--report", action="store_true", help="write the page and run nothing")
    parser.add_argument(
        "--results", type=Path, default=Path("results/soup-settings"), help="the page's path, no ending"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    deadline, file = time.time() + chosen.stop_after, chosen.results.with_suffix(".csv")
    if chosen.report:
        report(file, chosen.results.with_suffix(".md"))
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name in chosen.pool:
        for seed in chosen.seeds:
            pool: Pool | None = None
            for way in [START, *(chosen.only or WAYS)]:
                for loss in chosen.loss[:1] if way == START else chosen.loss:
                    for per in chosen.per:
                        key = {"pool": name, "seed": str(seed), "way": way, "loss": loss, "per": per}
                        if any(key.items() <= row.items() for row in read(file)) or time.time() > deadline:
                            continue
                        pool = pool or Pool(name, seed, chosen.out, chosen.overrides)
                        row = run(pool, way, loss, per)
                        add(file, row)
                        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
