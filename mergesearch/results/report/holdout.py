"""The finalists' scores on the holdout: on which documents, kept as they come, and no document scored twice.

A report may go by a part of the holdout. The parts are nested, so that a later report on more documents asks only for
those that are missing: what a candidate answered is kept with its scores.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.errors import CandidateError
from mergesearch.evaluate.blocks import ScoresParts
from mergesearch.evaluate.resampling import stream
from mergesearch.evaluate.scores import Scores, load_documents
from mergesearch.recipe import Recipe
from mergesearch.results.record import Record
from mergesearch.results.report.data import SINGLE
from mergesearch.results.report.finalists import Finalists
from mergesearch.schema import read_json
from mergesearch.search.store import write_atomically
from mergesearch.search.worker import Builds

log: logging.Logger = logging.getLogger(__name__)

LOOKS = "looks.json"
_DAMAGED = "remove it, and what it told is found again"
Documents = Mapping[str, Sequence[int]]  # task -> its documents


def drawn(holdout: Documents, most: int | None, seed: int) -> dict[str, list[int]]:
    """At most so many documents of each task, drawn at random from (seed, task) alone; those of a smaller number are
    among those of a larger one.

    Args:
        holdout: all documents that the search never saw.
        most: of each task; None for all.
    """
    return {label: _drawn(label, ids, most, seed) for label, ids in holdout.items()}


def _drawn(label: str, ids: Sequence[int], most: int | None, seed: int) -> list[int]:
    keys = stream("report", seed, label).random_raw(len(ids))
    return sorted(ids[position] for position in np.argsort(keys, kind="stable").tolist()[:most])


def more_of(one: int | None, other: int | None) -> int | None:
    """The larger of two numbers of documents, of which None is all."""
    return None if one is None or other is None else max(one, other)


class HoldoutScores:
    """What was scored on the holdout, in a folder, one candidate at a time, so that nothing is scored twice.

    `NUMBER.json` and `NUMBER.npz` hold a trial's figures and documents, `NUMBER.answers.json` what it answered where
    that was not all of the holdout, `NUMBER-again` all of that for the winner's second scoring. `looks.json` tells who
    the finalists were, and how many documents of each task were looked at, whenever the holdout was.
    """

    def __init__(self, path: Path):
        self.path = path

    # --- looks ---

    @property
    def looks(self) -> list[dict[str, Any]]:
        """Every look so far: `trials`, `winner`, the best single model, `finalists`, and `documents`, the most of each
        task (None for all, as in what an older version noted)."""
        file = self.path / LOOKS
        looks = read_json(file, _DAMAGED) if file.is_file() else []
        return [{"documents": None, **look} for look in looks]

    def at_least(self, most: int | None) -> int | None:
        """How many documents of each task a report goes by that asks for `most`: no fewer than an earlier one did.

        Else who does not like a finding could ask again with fewer.
        """
        for look in self.looks:
            most = more_of(most, look["documents"])
        return most

    def look(self, finalists: Finalists, documents: int | None = None) -> list[dict[str, Any]]:
        """Notes the finalists before anything is scored; returns the earlier looks that asked something else: at which
        another one had won, or which went by fewer documents."""
        self.path.mkdir(parents=True, exist_ok=True)
        looks = self.looks
        mine = {
            "trials": finalists.scored,
            "winner": finalists.winner.number,
            SINGLE: finalists.single.name if finalists.single else None,
            "finalists": [record.number for record in finalists.records],
            "documents": documents,
        }
        if mine not in looks:
            write_atomically(self.path / LOOKS, json.dumps([*looks, mine], indent=1) + "\n")
        return [look for look in looks if any(look[key] != mine[key] for key in ("winner", "documents"))]

    # --- scores ---

    def load(self, record: Record, suffix: str = "", most: int | None = None) -> Scores | None:
        """What was scored before; None where nothing was, or of another recipe, or on fewer documents than `most` of
        each task."""
        data = self._data(record, suffix)
        if data is None or more_of(data["most"], most) != data["most"]:
            return None
        return Scores.from_json(data["scores"], load_documents(self._file(record, suffix).with_suffix(".npz")))

    def most(self, record: Record, suffix: str = "") -> int | None:
        """How many documents of each task a candidate was scored on, at most; None for all, 0 for none."""
        data = self._data(record, suffix)
        return 0 if data is None else data["most"]

    def answers(self, record: Record, suffix: str = "") -> list[tuple[dict[str, list[int]], list[Any]]]:
        """What a candidate answered so far: the documents that it was asked about at a time, and the answers."""
        file = self._file(record, suffix, ".answers.json")
        if self._data(record, suffix) is None or not file.is_file():
            return []
        data = read_json(file, _DAMAGED)
        return [(part["documents"], part["answers"]) for part in data["parts"] if data["recipe"] == record.recipe_id]

    def save(
        self,
        record: Record,
        scores: Scores,
        suffix: str = "",
        most: int | None = None,
        answers: Iterable[tuple[Documents, Sequence[Any]]] = (),
    ) -> None:
        """Keeps a candidate's scores.

        Args:
            record: the candidate.
            scores: on the holdout.
            suffix: for a second scoring.
            most: how many documents of each task that was at most; None for all.
            answers: as `answers` gives them; needed unless it was all.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        scores.save_documents(self._file(record, suffix).with_suffix(".npz"))
        file = self._file(record, suffix, ".answers.json")
        if most is not None:
            parts = [{"documents": documents, "answers": given} for documents, given in answers]
            write_atomically(file, json.dumps({"recipe": record.recipe_id, "parts": parts}) + "\n")
        # last, because a candidate that has it is not scored again
        data = {"recipe": record.recipe_id, "most": most, "scores": scores.to_json()}
        write_atomically(self._file(record, suffix), json.dumps(data) + "\n")
        if most is None:
            file.unlink(missing_ok=True)

    def _data(self, record: Record, suffix: str) -> dict[str, Any] | None:
        file = self._file(record, suffix)
        if not file.is_file():
            return None
        data = {"most": None, **read_json(file, _DAMAGED)}
        return data if data["recipe"] == record.recipe_id else None

    def _file(self, record: Record, suffix: str, ending: str = ".json") -> Path:
        return self.path / f"{record.number:05d}{suffix}{ending}"


def score_finalists(
    records: Sequence[Record],
    scored: HoldoutScores,
    engine: Builds,
    scorer: ScoresParts,
    documents: Documents,
    *,
    most: int | None = None,
    suffix: str = "",
    finished: Callable[[str, str | None], None] = lambda text, error: None,
) -> dict[int, str]:
    """Scores whoever was not scored before on the documents that are missing; returns why for those who could not be,
    by trial. They are tried again by the next report.

    Args:
        records: whom to score.
        scored: where their scores are kept.
        engine: builds candidates.
        scorer: scores the live model on the whole holdout, or on parts of it.
        documents: what the report goes by.
        most: how many of each task these are at most; None for all.
        suffix: for a second scoring.
        finished: told of each in a few words, and why where it failed.
    """
    failed: dict[int, str] = {}
    for record in records:
        if scored.load(record, suffix, most) is not None:
            continue
        label = f"{record.name or f'trial {record.number}'}{suffix.replace('-', ', ', 1)}"
        try:
            engine.load(Recipe.from_data(dict(record.recipe or {}), label))
            scores, answers = _score(scorer, documents, scored.answers(record, suffix), keep=most is not None)
        except OSError:
            raise
        except Exception as error:
            log.debug("%s failed on the holdout", label, exc_info=True)
            reason = str(error) if isinstance(error, CandidateError) else f"{type(error).__name__}: {error}"
            failed[record.number] = reason
            finished(f"{label}: failed: {reason}", reason)
            continue
        scored.save(record, scores, suffix, most, answers)
        finished(f"{label}: {scores.seconds:.1f} s", None)
    return failed


def _score(
    scorer: ScoresParts, documents: Documents, before: Sequence[tuple[Documents, Sequence[Any]]], keep: bool
) -> tuple[Scores, list[tuple[Documents, Sequence[Any]]]]:
    """The scores on the documents, and the answers to each part of them where they are to be kept."""
    known = {label: {i for part, _ in before for i in part.get(label, ())} for label in documents}
    missing = {label: [i for i in ids if i not in known[label]] for label, ids in documents.items()}
    for part, answers in before:
        scorer.only({label: part.get(label, ()) for label in documents}).restore(answers)
    start = time.perf_counter()
    asked = scorer.only(missing)
    asked.answer()
    scores = replace(scorer.only(documents).collect(), seconds=time.perf_counter() - start)
    return scores, [*before, (missing, asked.answers())] if keep else []
