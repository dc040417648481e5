"""The finalists of a run: who they are, chosen on the search documents alone, and their scores on the holdout, kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.config import Config
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.scores import Scores, load_documents
from mergesearch.recipe import AVERAGE, Recipe
from mergesearch.results.record import Record, best_single, ranked
from mergesearch.results.report.data import SINGLE
from mergesearch.search.store import write_atomically
from mergesearch.search.worker import Builds

log: logging.Logger = logging.getLogger(__name__)

LOOKS = "looks.json"


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


class HoldoutScores:
    """What was scored on the holdout, in a folder, one candidate at a time, so that nothing is scored twice.

    `NUMBER.json` and `NUMBER.npz` hold a trial's figures and documents, `NUMBER-again` those of the winner's second
    scoring, `looks.json` who the finalists were whenever the holdout was looked at.
    """

    def __init__(self, path: Path):
        self.path = path

    def look(self, finalists: Finalists) -> list[dict[str, Any]]:
        """Notes the finalists before anything is scored; returns the earlier looks at which another one had won."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / LOOKS
        looks = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        mine = {
            "trials": finalists.scored,
            "winner": finalists.winner.number,
            SINGLE: finalists.single.name if finalists.single else None,
            "finalists": [record.number for record in finalists.records],
        }
        if mine not in looks:
            write_atomically(file, json.dumps([*looks, mine], indent=1) + "\n")
        return [look for look in looks if look["winner"] != mine["winner"]]

    def load(self, record: Record, suffix: str = "") -> Scores | None:
        """What was scored before; None where nothing was, or of another recipe."""
        file = self._file(record, suffix)
        if not file.is_file():
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["recipe"] != record.recipe_id:
            return None
        return Scores.from_json(data["scores"], load_documents(file.with_suffix(".npz")))

    def save(self, record: Record, scores: Scores, suffix: str = "") -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self._file(record, suffix)
        scores.save_documents(file.with_suffix(".npz"))
        # last, because a candidate that has it is not scored again
        write_atomically(file, json.dumps({"recipe": record.recipe_id, "scores": scores.to_json()}) + "\n")

    def _file(self, record: Record, suffix: str) -> Path:
        return self.path / f"{record.number:05d}{suffix}.json"


def score_finalists(
    records: Sequence[Record],
    scored: HoldoutScores,
    engine: Builds,
    scorer: Any,
    *,
    suffix: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[int, str]:
    """Scores whoever was not scored before; returns why for those who could not be, by trial. They are tried again by
    the next report.

    Args:
        records: whom to score.
        scored: where their scores are kept.
        engine: builds candidates.
        scorer: scores the live model on the holdout documents.
        suffix: for a second scoring.
        say: told about each that was scored.
    """
    failed: dict[int, str] = {}
    for record in records:
        if scored.load(record, suffix) is not None:
            continue
        label = record.name or f"trial {record.number}"
        try:
            engine.load(Recipe.from_data(dict(record.recipe or {}), label))
            scores = scorer.score()
        except OSError:
            raise
        except Exception as error:
            log.debug("%s failed on the holdout", label, exc_info=True)
            reason = str(error) if isinstance(error, CandidateError) else f"{type(error).__name__}: {error}"
            failed[record.number] = reason
            say(f"{label}: failed: {reason}")
            continue
        scored.save(record, scores, suffix)
        say(f"{label}: {scores.seconds:.1f} s")
    return failed
