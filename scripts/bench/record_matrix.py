"""Records the scores of candidates document by document, for simulating races and comparing metrics.

    python -m scripts.bench.record_matrix results/quickstart tests/data/raced.npz
    python -m scripts.bench.record_matrix results/quickstart tests/data/soups.npz --holdout 200
    python -m scripts.bench.record_matrix configs/quickstart.yaml results/matrix.npz --random 40 --tpe 30

Of a run folder: the finished trials of a run that raced nothing; with --holdout each is scored on so many documents of
each task's holdout too. Of a configuration: its baselines, then proposals
drawn at random, then proposals of TPE, which has seen all of those; with the scores on the holdout, kept apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from mergesearch import config as configuration
from mergesearch.commands.holding import load_pool
from mergesearch.commands.inputs import load_tasks, scorer_of, splits
from mergesearch.engine.live import Engine
from mergesearch.evaluate.scores import DocumentScores, Scores, load_documents
from mergesearch.evaluate.statistics import figure
from mergesearch.recipe import BASE, Recipe
from mergesearch.results.loading import load_run, recipe_of
from mergesearch.results.record import Record
from mergesearch.results.report.holdout import drawn
from mergesearch.search import objective as objectives
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.baselines import baselines
from mergesearch.space import SearchSpace

Documents = Mapping[str, DocumentScores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder, or a configuration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", type=int, default=40)
    parser.add_argument("--tpe", type=int, default=0)
    parser.add_argument("--holdout", type=int, default=0, help="of a run: the holdout documents of each task")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="KEY=VALUE of the configuration")
    arguments = parser.parse_args()
    if arguments.source.is_dir():
        _of_run(arguments.source, arguments.out, arguments.holdout)
    else:
        _Recording(configuration.read(arguments.source, arguments.overrides), arguments.out).run(
            arguments.random, arguments.tpe
        )


def _of_run(run: Path, out: Path, holdout: int) -> None:
    loaded = load_run(run)
    records, objective = list(loaded.records), loaded.objective
    assert objective is not None, "the run has not scored its baselines yet"
    complete = sorted((r for r in records if r.objective is not None), key=lambda r: (r.name is None, r.number))
    documents = [load_documents(RunFolder(run).documents(record.number)) for record in complete]
    named = sum(record.name is not None for record in complete)
    more: dict[str, Any] = {"learned": np.array([_is_soup(record) for record in complete])}
    if holdout:
        unseen = list(_unseen(loaded.config, complete, holdout))
        for task in objective.weights:
            more[f"{task}.holdout"] = _small(np.stack([found[task].values for found in unseen]))
    write(out, documents, objective, objective.factors(complete[0].scores), named, more)


def _is_soup(record: Record) -> bool:
    return bool(record.strategy and record.strategy.startswith("learned soup"))


def _unseen(config: configuration.Config, chosen: Sequence[Record], most: int) -> Iterator[Documents]:
    """What trials do on the holdout, at most so many documents of each task; equal recipes are scored once."""
    tasks = load_tasks(config)
    parts = splits(config, tasks)
    pool = load_pool(config)
    engine = Engine(pool, config.dtype)
    wanted = drawn({label: part.holdout for label, part in parts.items()}, most, config.search.seed)
    scorer = scorer_of(config, engine.model, pool.tokenizer, tasks, wanted)
    known: dict[str | None, Documents] = {}
    for place, record in enumerate(chosen):
        if record.recipe_id not in known:
            engine.load(recipe_of(record))
            known[record.recipe_id] = scorer.score().documents
        print(f"{place + 1} of {len(chosen)}", file=sys.stderr, flush=True)
        yield known[record.recipe_id]


class _Recording:
    """Scores candidates of a configuration on all of its documents, search and holdout at once."""

    def __init__(self, config: configuration.Config, out: Path):
        self.config, self.out = config, out
        tasks = load_tasks(config)
        self.parts = splits(config, tasks)
        pool = load_pool(config)
        self.space = SearchSpace(config, pool.infos, pool.layers)
        self.engine = Engine(pool, config.dtype)
        both = {label: sorted(part.search + part.holdout) for label, part in self.parts.items()}
        self.scorer = scorer_of(config, self.engine.model, pool.tokenizer, tasks, both)
        self.found: list[tuple[Documents, Documents]] = []

    def run(self, random: int, tpe: int) -> None:
        named = {name: self._score(recipe) for name, recipe in baselines(self.config).items()}
        models = {name: scores for name, scores in named.items() if name in self.config.models}
        scale = objectives.parents(self.config.tasks, named[BASE], models)
        objective = objectives.raw(self.config.tasks) if self.config.objective.scale == "raw" else scale
        sampler = optuna.samplers.TPESampler(seed=self.config.search.seed, group=True, n_startup_trials=random)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for number in range(random + tpe):
            trial = study.ask()
            study.tell(trial, objective.value(self._score(self.space.suggest(trial))))
            if number % 10 == 9 or number == random + tpe - 1:
                self._write(objective, objective.factors(named[BASE]), len(named), {"random": np.array(random)})

    def _score(self, recipe: Recipe) -> dict[str, Any]:
        """The figures on the search documents."""
        start = time.perf_counter()
        self.engine.load(recipe)
        scores = self.scorer.score()
        search = {label: _some(scores.documents[label], part.search) for label, part in self.parts.items()}
        holdout = {label: _some(scores.documents[label], part.holdout) for label, part in self.parts.items()}
        self.found.append((search, holdout))
        print(f"{len(self.found)}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        return _figures(scores, search)

    def _write(self, objective: Objective, factors: Mapping[str, float], named: int, more: dict[str, Any]) -> None:
        for task in objective.weights:
            holdout = [documents[task] for _, documents in self.found]
            more[f"{task}.holdout"] = _small(np.stack([each.values for each in holdout]))
        write(self.out, [search for search, _ in self.found], objective, factors, named, more)


def _some(documents: DocumentScores, wanted: Sequence[int]) -> DocumentScores:
    chosen = np.isin(documents.ids, list(wanted))
    ids = [document for document, keep in zip(documents.ids, chosen, strict=True) if keep]
    gold = None if documents.gold is None else documents.gold[chosen]
    return replace(documents, ids=ids, values=documents.values[chosen], gold=gold)


def _figures(scores: Scores, documents: Documents) -> dict[str, Any]:
    return {
        task: replace(score, value=figure(documents[task].values, documents[task].aggregation))
        for task, score in scores.tasks.items()
    }


def write(
    out: Path,
    documents: Sequence[Documents],
    objective: Objective,
    factors: Mapping[str, float],
    named: int,
    more: Mapping[str, Any],
) -> None:
    """[trials, n] values and log-probabilities of each task, with what makes the objective of them."""
    tasks = list(objective.weights)
    arrays = {task: _small(np.stack([found[task].values for found in documents])) for task in tasks}
    for task in tasks:
        gold = [found[task].gold for found in documents]
        if all(each is not None for each in gold):
            arrays[f"{task}.gold"] = np.stack(gold).astype(np.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        tasks=np.array(tasks),
        aggregations=np.array([documents[0][task].aggregation for task in tasks]),
        factors=np.array([factors[task] for task in tasks]),
        baselines=np.array(named),
        **arrays,
        **more,
    )


def _small(values: np.ndarray) -> np.ndarray:
    """In as few bytes as hold the values: yes and no as bytes, others as float32."""
    return values.astype(np.uint8) if np.isin(values, (0.0, 1.0)).all() else values.astype(np.float32)


if __name__ == "__main__":
    main()
