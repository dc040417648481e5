"""A run as it stands: its configuration, a record for each trial, what it has to say beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.results import table
from mergesearch.results.margins import Margins
from mergesearch.results.record import Record, ranked, records
from mergesearch.results.workers import AtWork, crew_of
from mergesearch.search import by_lm_eval, revisions, store, strategies
from mergesearch.search.costs import costs
from mergesearch.search.expectations import expectations
from mergesearch.search.history import History
from mergesearch.search.objective import Objective
from mergesearch.search.presence import signs
from mergesearch.search.store import DIGESTS, RunFolder, open_run

if TYPE_CHECKING:
    from pandas import DataFrame


# where a study notes what its parents do not have in common
NOTES = "pool_notes"
# where it notes what was changed with the user's leave
CHANGES = "changes"
# where it notes how its memory was shared out: the parents' residency, and how many requests are asked at once
SETTLED = "memory"
RESIDENCY, BATCH_SIZE = "residency", "batch_size"


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
        settled: how the run's memory was shared out, as the study notes it; empty where it noted nothing.
        kinds: by what each type of request was answered in the search, as far as that is noted.
        revisions: the models that were read from the hub, with their commits, by where the configuration names them.
        crew: who is at work on it.
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
    settled: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    crew: AtWork = field(default_factory=AtWork)

    @property
    def batch_size(self) -> int:
        """Requests at once: what the configuration says, or what was found when the run began."""
        return batch_size_of(self.config, self.settled) or 1

    @property
    def pinned(self) -> Config:
        """The configuration with models of the hub at the commits that the run has read: what is to be loaded."""
        return revisions.at(self.config, self.revisions)

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
        """The record of the best candidate that breaks no guard, what `export --trial best` gives: the one that is
        expected to have the best objective on documents that no search saw. None where there is none yet."""
        return best_of(self.records)


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
    every = tuple(records(history, expectations(history, folder)))
    kinds = by_lm_eval.kinds(history.study) or {}
    beside = _beside(every, kinds)
    lost = given_up(every, objective, history.config)
    words = [f"note: {note}" for note in (*changes, *objective_notes, *beside, *lost, *strategies.words(history))]
    notes = tuple(store.noted(history.study, NOTES) or ())
    digests = store.noted(history.study, DIGESTS) or {}
    crew = crew_of(history, signs(history.study))
    return Run(
        folder.path,
        history.config,
        every,
        objective,
        (*words, *crew.words(), *costs(history)),
        notes,
        digests=digests,
        changes=changes,
        settled=store.noted(history.study, SETTLED) or {},
        kinds=kinds,
        revisions=store.noted(history.study, revisions.REVISIONS) or {},
        crew=crew,
    )


def batch_size_of(config: Config, settled: Mapping[str, Any]) -> int | None:
    """Requests at once, as the configuration says or as it was found and noted; None where it is still to be found."""
    return settled.get(BATCH_SIZE) if config.batch_size == "auto" else config.batch_size


def best_of(every: Sequence[Record]) -> Record | None:
    """See `Run.best`."""
    first = next(iter(ranked(every)), None)
    return first if first is not None and first.objective is not None and not first.infeasible else None


def given_up(every: Sequence[Record], objective: Objective | None, config: Config) -> list[str]:
    """Which skills the best candidate gave up for others, in words; empty where there is none."""
    best = best_of(every)
    if best is None or objective is None or not best.scores:
        return []
    parents = {record.name: record.scores for record in every if record.name in config.parents and record.scores}
    low = objective.neglected(best.scores, parents)
    if not low:
        return []
    merges = [record for record in every if record.name not in parents and record.objective is not None]
    shares = [objective.shares(merge.scores, parents) for merge in merges]
    named = []
    for task, share in low:
        most = f", of all merges at most {max(each[task] for each in shares):.2f}" if shares else ""
        named.append(f"{task} ({share:.2f}{most})")
    text = f"the best candidate has less than half of its tasks' mean share of {', '.join(named)}"
    text += "; the base is 0, the best model 1"
    if not config.objective.worst:
        text += ": a higher weight of the task, or `objective: {worst: 0.5}`, keeps more of it"
    return [text]


def _beside(every: Sequence[Record], kinds: Mapping[str, str]) -> list[str]:
    """Which figures are whose, where the search was scored by token tries."""
    whose = by_lm_eval.by_whom(kinds)
    if not whose:
        return []
    asked = [record for record in every if record.by_lm_eval]
    text = f"{whose} (scoring: auto), every candidate alike"
    if not asked:
        return [f"{text}; once the search has ended lm-eval's own model scores parents, average and winner once more"]
    other = [
        f"trial {record.number} {task} {record.scores[task].value:.4f}, by lm-eval {score.value:.4f}"
        for record in asked
        for task, score in record.by_lm_eval.items()
        if task in record.scores and f"{record.scores[task].value:.4f}" != f"{score.value:.4f}"
    ]
    trials = ", ".join(str(record.number) for record in asked)
    found = "; ".join(other) if other else "it gives the same figures"
    return [f"{text}; lm-eval's own model scored trials {trials} once more: {found}"]


def recipe_of(record: Record) -> Recipe:
    """The recipe of a record that has one."""
    return Recipe.from_data(dict(record.recipe or {}), f"trial {record.number}")
