"""What a report on the holdout holds, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.05  # the share of false claims that is accepted
OBJECTIVE = "objective"
# what a candidate is compared with
SINGLE, AVERAGE = "best single model", "plain average"
# what a comparison says
BETTER, WORSE, NOISE, UNTESTED = "better", "worse", "noise", "untested"
# what becomes of a guard
KEPT, BROKEN, UNSCORED = "kept", "broken", "unscored"


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval; None where documents have no values of their own."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A paired difference on the same documents, turned so that more is better.

    Attributes:
        reference: what it is compared with, `SINGLE` or `AVERAGE`.
        against: that candidate's label.
        difference: candidate minus reference, with its 95 % interval.
        p_raw, p: two-sided, as tested and after Holm's correction; None where it cannot be tested.
        verdict: `better`, `worse` or `noise` at the corrected 5 %; a difference within the noise floor is noise.
            `untested` without p.
    """

    reference: str
    against: str
    difference: Figure
    p_raw: float | None
    p: float | None
    verdict: str

    @property
    def beyond_noise(self) -> bool:
        """Whether it is a difference beyond noise."""
        return self.verdict in (BETTER, WORSE)


@dataclass(frozen=True)
class Row:
    """One candidate in one section.

    Attributes:
        candidate: `trial N` or the baseline's name.
        trial: its number.
        method: what it was made by; a baseline's name again.
        baseline: whether no search proposed it.
        search: its score on the search documents.
        expected: of the objective, what it was expected to be on others; None where that is not known.
        holdout: its score on the holdout documents; None where it could not be scored.
        compared: differences to the references; empty for baselines.
    """

    candidate: str
    trial: int
    method: str
    search: float | None
    holdout: Figure | None
    compared: tuple[Comparison, ...] = ()
    error: str | None = None
    baseline: bool = False
    expected: Figure | None = None


@dataclass(frozen=True)
class Section:
    """One measure, the objective or a task, for all candidates, the best on the search documents first."""

    name: str
    metric: str
    higher_is_better: bool
    documents: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Noise:
    """One measure of the winner, built and scored a second time: requests in another order, another batch size.

    Attributes:
        changed: documents whose value changed at all; None for the objective.
    """

    name: str
    first: float
    second: float
    documents: int
    changed: int | None = None


@dataclass(frozen=True)
class GuardOutcome:
    """One guard on the holdout.

    Attributes:
        task: the guard's task.
        against: whom it is against.
        difference: the winner's figure minus theirs, turned so that more is better, with its 95 % interval.
        max_drop: how far below 0 it may be.
        verdict: `kept`, `broken`, or `unscored` where one of the two could not be scored.
    """

    task: str
    metric: str
    against: str
    difference: Figure | None
    max_drop: float
    verdict: str


@dataclass(frozen=True)
class Report:
    """A report on the holdout.

    Attributes:
        run: the run's name.
        winner: the candidate that the claim is about, as `Row.candidate`.
        winner_trial: its number.
        references: what it is compared with: what the reference is -> its label.
        sentence: the finding, in one sentence.
        improvement: whether the winner is better than every reference.
        sections: the objective first, then the tasks.
        noise: of the winner, section by section; empty where it could not be scored twice.
        repeat: in words, how the second scoring differed.
        notes: what a reader should know besides.
        guards: of the winner, on the holdout.
    """

    run: str
    winner: str
    references: Mapping[str, str]
    sentence: str
    improvement: bool
    sections: tuple[Section, ...]
    noise: tuple[Noise, ...]
    repeat: str
    notes: tuple[str, ...]
    guards: tuple[GuardOutcome, ...] = ()
    winner_trial: int = -1

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Report:
        """What `to_data` gave, after JSON."""
        sections = tuple(
            Section(**{**section, "rows": tuple(_row(row) for row in section["rows"])}) for section in data["sections"]
        )
        noise = tuple(Noise(**item) for item in data["noise"])
        guards = tuple(_guard(item) for item in data.get("guards", ()))
        return cls(**{**data, "sections": sections, "noise": noise, "notes": tuple(data["notes"]), "guards": guards})


def _guard(data: Mapping[str, Any]) -> GuardOutcome:
    return GuardOutcome(**{**data, "difference": Figure(**data["difference"]) if data["difference"] else None})


def _row(data: Mapping[str, Any]) -> Row:
    holdout = Figure(**data["holdout"]) if data["holdout"] else None
    compared = tuple(Comparison(**{**c, "difference": Figure(**c["difference"])}) for c in data["compared"])
    # a report of an older version has none
    expected = Figure(**data["expected"]) if data.get("expected") else None
    return Row(**{**data, "holdout": holdout, "compared": compared, "expected": expected})
