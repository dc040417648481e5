"""`mergesearch run`: a search made ready, with all that it works on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergesearch.checkpoints import Pool
from mergesearch.commands.best import refresh_best
from mergesearch.commands.inputs import (
    check_racing,
    load_pool,
    load_tasks,
    samples_of,
    scorer_of,
    spaces,
    splits,
)
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.evaluate.blocks import BlockScorer
from mergesearch.results.loading import NOTES, Run, run_of
from mergesearch.results.record import Record, record_of
from mergesearch.search import store, strategies
from mergesearch.search.soup.learner import Learner
from mergesearch.search.store import RunFolder, write_documents
from mergesearch.search.worker import Search
from mergesearch.space import check_space

log: logging.Logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A search with all that it works on. The study is opened once, by the search."""

    config: Config
    folder: RunFolder
    pool: Pool
    engine: Engine
    search: Search

    def read(self) -> Run:
        """The run as it is by now."""
        return run_of(self.search.history(), self.folder)

    def export_best(self) -> list[str]:
        """Exports the best candidate to `best/` in the run folder, and says where it is; see `refresh_best`."""
        winner, best = refresh_best(self.folder, self.engine, self.read), self.folder.best
        if winner is None:
            return ["no candidate was scored, so none is exported"]
        return [
            f"winner: trial {winner.number} ({winner.method}), exported to {best}",
            f"its recipe: {best / 'recipe.yaml'}; by hand: {best / 'README.md'}",
        ]


def _ignore(_: Any) -> None:
    """Stands in for a listener nobody gave."""


def prepare(
    config: Config,
    *,
    say: Callable[[str], None] = log.info,
    started: Callable[[Record], None] = _ignore,
    finished: Callable[[Record], None] = _ignore,
) -> Session:
    """Everything that `Search.run` needs. All of the input is checked before anything is written.

    Args:
        config: the run's configuration.
        say: told in a few words what is being done.
        started, finished: as for `Search`.

    Raises:
        UserError: what is wrong with the input.
    """
    check_space(config)
    RunFolder(config.folder).check(config)
    store.begun(config)
    strategies.refuse(config)
    say(f"loading {len(config.scored)} tasks")
    tasks = load_tasks(config)
    documents = splits(config, tasks)
    check_racing(config, tasks)
    say(f"loading the base and {len(config.models)} models")
    pool = load_pool(config)
    for note in pool.notes:
        say(f"note: {note}")
    space, coarse = spaces(config, pool)
    engine = Engine(pool, config.dtype)
    say("building requests")
    searched = {label: part.search for label, part in documents.items()}
    scorer = scorer_of(config, engine.model, pool.tokenizer, tasks, searched)
    blocks = BlockScorer(scorer, searched, config.racing.blocks, config.search.seed) if config.racing else None
    folder = RunFolder.prepare(config)
    write_documents(folder, samples_of(tasks, documents))
    each = sum(map(len, searched.values()))
    search = Search(
        config,
        folder,
        space,
        engine,
        blocks or scorer,
        coarse=coarse,
        infos=pool.infos,
        layers=pool.layers,
        learner=Learner(config, engine, scorer, pool.infos, pool.layers, searched, say),
        started=lambda trial: started(record_of(trial, store.objective_of(search.study))),
        finished=lambda trial: finished(record_of(trial, store.objective_of(search.study))),
        device=str(pool.device),
    )
    store.note(search.study, NOTES, list(pool.notes))
    store.note(search.study, "tokens_per_document", scorer.prompt_tokens / max(1, each))
    return Session(config, folder, pool, engine, search)


__all__ = ["Session", "prepare"]
