"""A run as it stands: its configuration, a record for each trial, what it has to say beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.results import table
from mergesearch.results.margins import Margins
from mergesearch.results.record import Record, ranked, records
from mergesearch.search import store, strategies
from mergesearch.search.costs import costs
from mergesearch.search.history import History
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder, open_run

if TYPE_CHECKING:
    from pandas import DataFrame


# where a study notes what its parents do not have in common
NOTES = "pool_notes"
# where it notes what tells its parents and documents from others, and what was changed with the user's leave
DIGESTS, CHANGES = "digests", "changes"


@dataclass(frozen=True)
class Run:
    """A run at the moment at which it was read.

    >>> from mergesearch import Run, load_run
    >>> run = load_run("tiny")
    >>> isinstance(run, Run), run.config.name
    (True, 'tiny')

    Attributes:
        path: the run folder, as it was named.
        config: the configuration.
        records: one for each trial, by number.
        objective: what the study maximises; None until the baselines are scored.
        notes: on what the parents do not have in common.
        digests: what tells the parents and documents that it was scored with from others; empty where it noted none.
        changes: what of these was changed and let through, a sentence each.
        words: lines to be shown beside the table: notes, what the run has cost, what is left of its budget.
    """

    path: Path
    config: Config
    records: tuple[Record, ...]
    objective: Objective | None
    words: tuple[str, ...]
    notes: tuple[str, ...] = ()
    digests: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> RunFolder:
        """The files of the run."""
        return RunFolder(self.path)

    def frame(self, top: int | None = None, sort: str = "rank") -> DataFrame:
        """The result table, one row a trial; its columns are described at `mergesearch.results.table.frame`.

        Args:
            top: only the first rows.
            sort: a column's name; the best come first where a column has a best.

        Raises:
            UserError: there is no column `sort`.
        """
        return table.frame(self.records, top, sort)

    def margins(self) -> Margins:
        """How far the candidates are ahead of the best single model."""
        return Margins.of_run(self.records, list(self.config.models), self.folder, self.objective)

    def best(self) -> Record | None:
        """The record of the best candidate that breaks no guard, what `export --trial best` gives; None where there is
        none yet."""
        first = next(iter(ranked(self.records)), None)
        return first if first is not None and first.objective is not None and not first.infeasible else None


def load_run(path: str | Path) -> Run:
    """Reads a run folder, whether its search has ended or not.

    Args:
        path: the run folder.

    Raises:
        UserError: it is no run folder, or its storage cannot be read.
    """
    config, study = open_run(path)
    return run_of(History(study, config), RunFolder(path))


def run_of(history: History, folder: RunFolder) -> Run:
    """A run whose study is open already."""
    objective = history.objective
    objective_notes = objective.notes if objective else ()
    changes = tuple(store.noted(history.study, CHANGES) or ())
    words = [f"note: {note}" for note in (*changes, *objective_notes, *strategies.words(history))]
    every = tuple(records(history))
    notes = tuple(store.noted(history.study, NOTES) or ())
    digests = store.noted(history.study, DIGESTS) or {}
    return Run(
        folder.path,
        history.config,
        every,
        objective,
        (*words, *costs(history)),
        notes,
        digests=digests,
        changes=changes,
    )


def recipe_of(record: Record) -> Recipe:
    """The recipe of a record that has one."""
    return Recipe.from_data(dict(record.recipe or {}), f"trial {record.number}")
