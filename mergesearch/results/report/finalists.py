"""The finalists of a run: who is scored on the holdout, chosen on the search documents alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.recipe import AVERAGE
from mergesearch.results.record import Record, best_single, ranked


@dataclass(frozen=True)
class Finalists:
    """Who is scored on the holdout.

    Attributes:
        winner: the best candidate on the search documents, what `export --trial best` gives; a baseline may be it.
        single: the model with the best objective on the search documents; None where none could be scored.
        average: the plain average; None where it could not be scored.
        records: all of them, best on the search documents first.
        scored: how many trials were complete when they were chosen.
    """

    winner: Record
    single: Record | None
    average: Record | None
    records: tuple[Record, ...]
    scored: int


def choose(records: Sequence[Record], config: Config, count: int) -> Finalists:
    """The finalists of a run: its `count` best proposals, no recipe twice, and every baseline.

    Raises:
        UserError: nothing was scored yet.
    """
    complete = [record for record in ranked(records) if record.objective is not None]
    if not complete:
        raise UserError("the run has no finished trial to report on: go on with `mergesearch run`")
    if complete[0].infeasible:
        raise UserError("every finished trial breaks a guard, so there is no winner to report on: raise a max_drop")
    baselines = [record for record in complete if record.name]
    known = {record.recipe_id for record in baselines}
    proposed: list[Record] = []
    for record in complete:
        if record.name is None and not record.infeasible and record.recipe_id not in known and len(proposed) < count:
            known.add(record.recipe_id)
            proposed.append(record)
    chosen = {record.number for record in (complete[0], *baselines, *proposed)}
    return Finalists(
        winner=complete[0],
        single=best_single(baselines, config.models),
        average=next((record for record in baselines if record.name == AVERAGE), None),
        records=tuple(record for record in complete if record.number in chosen),
        scored=len(complete),
    )
