"""What candidates did on some documents, kept on disk, so that nothing that was paid for is paid for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import DocumentScores
from mergesearch.search.store import write_atomically

Documents = Mapping[str, DocumentScores]


@dataclass
class Memo:
    """Scores candidates, each on each choice of documents once, over all starts.

    Attributes:
        path: a JSON file, written whole or not at all; one of something else, or damaged, is begun anew.
        identity: equal where scores mean the same.
        spent: told the document evaluations of each candidate; of those that were kept, when they are asked for.
    """

    path: Path
    identity: str
    spent: Callable[[int], None]
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            self.kept = data["scored"] if data["identity"] == self.identity else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.kept = {}

    def scored(
        self, candidate: str, documents: Mapping[str, Sequence[int]], score: Callable[[], Documents]
    ) -> Documents:
        """A candidate's documents, scored where they are not kept.

        Raises:
            CandidateError: it could not be built or scored, now or before.
        """
        key = hashlib.sha256(json.dumps([candidate, documents], sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.kept:
            try:
                self.kept[key] = {task: _data(scores) for task, scores in score().items()}
            except CandidateError as error:
                self.kept[key] = str(error)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({"identity": self.identity, "scored": self.kept}) + "\n")
        self.spent(sum(map(len, documents.values())))
        found = self.kept[key]
        if isinstance(found, str):
            raise CandidateError(found)
        return {task: _scores(data) for task, data in found.items()}


def _data(scores: DocumentScores) -> dict[str, Any]:
    gold = None if scores.gold is None else scores.gold.tolist()
    return {"ids": scores.ids, "values": scores.values.tolist(), "aggregation": scores.aggregation, "gold": gold}


def _scores(data: Mapping[str, Any]) -> DocumentScores:
    gold = None if data["gold"] is None else np.array(data["gold"], dtype=np.float64)
    return DocumentScores(data["ids"], np.array(data["values"], dtype=np.float64), data["aggregation"], gold)
