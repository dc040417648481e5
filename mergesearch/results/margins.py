"""How far candidates are ahead of the best single model on the search documents.

The table shows this and not the objective's own standard error: that one counts how hard the documents are, which all
candidates share, and on the `parents` scale how small the models' gains over the base are, so it is large and nearly
the same in every row. Two candidates are compared on the same documents, and there it is the differences that vary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mergesearch.evaluate.scores import DocumentScores, load_documents
from mergesearch.evaluate.statistics import Difference, difference
from mergesearch.results.record import Record, best_single
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder


@dataclass(frozen=True)
class Margins:
    """The differences of a run's candidates to its best single model, computed when they are asked for.

    Attributes:
        models: the names of the run's models.
        single: the best of them; None where none could be scored.
        folder: where the scores of documents are.
        objective: what is compared; None while the parents have not fixed it.
    """

    models: tuple[str, ...]
    single: Record | None
    folder: RunFolder
    objective: Objective | None

    @classmethod
    def of_run(
        cls, records: Sequence[Record], models: Sequence[str], folder: RunFolder, objective: Objective | None
    ) -> Margins:
        """Of a run's records."""
        return cls(tuple(models), best_single(records, models), folder, objective)

    def of(self, record: Record) -> Difference | None:
        """The candidate's objective minus the best single model's, and its standard error: the paired one of each
        task, the tasks taken as independent and the scale as fixed.

        The error is None where a task's documents have no values of their own, or are no longer there. None where there
        is nothing to compare, and for the best single model itself.
        """
        single, objective = self.single, self.objective
        if single is None or objective is None or record.number == single.number:
            return None
        if record.objective is None or single.objective is None:
            return None
        documents = sum(score.documents for task, score in record.scores.items() if task in objective.weights)
        return Difference(record.objective - single.objective, self._error(record, single, objective), documents)

    def _error(self, record: Record, single: Record, objective: Objective) -> float | None:
        ours, theirs = self._documents(record.number), self._theirs
        factors = objective.factors(record.scores)
        if not factors.keys() <= ours.keys() & theirs.keys():
            return None
        squares = 0.0
        for task, factor in factors.items():
            mine, other = ours[task], theirs[task]
            if mine.ids != other.ids:
                return None
            error = difference(mine.values, other.values, mine.aggregation).stderr
            if error is None or not math.isfinite(error):
                return None
            squares += (factor * error) ** 2
        return math.sqrt(squares)

    @cached_property
    def _theirs(self) -> dict[str, DocumentScores]:
        """The best single model's documents, which every difference needs."""
        return self._documents(self.single.number) if self.single else {}

    def _documents(self, number: int) -> dict[str, DocumentScores]:
        try:
            return load_documents(self.folder.documents(number))
        except (OSError, ValueError):
            return {}
