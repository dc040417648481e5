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
class ServedRow:
    """One finalist in the form that will be served.

    Attributes:
        candidate, trial: as `Row` has them.
        served: the figures on the holdout in that form, one for each of `AsServed.names`; None where there is none.
        merged: likewise as it was merged.
        error: why it could not be scored in that form.
    """

    candidate: str
    trial: int
    served: tuple[float | None, ...]
    merged: tuple[float | None, ...]
    error: str | None = None


@dataclass(frozen=True)
class AsServed:
    """The finalists in the form that will be served, where the search scored them as merged.

    Attributes:
        form: as `score_as` names it.
        names: the objective first, then the tasks.
        rows: as in the report's sections.
    """

    form: str
    names: tuple[str, ...]
    rows: tuple[ServedRow, ...]


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
        served: the finalists in the form that will be served; None where they are served as they are scored.
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
    served: AsServed | None = None

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
        served = _served(data["served"]) if data.get("served") else None
        known = {"sections": sections, "noise": noise, "guards": guards, "served": served}
        return cls(**{**data, **known, "notes": tuple(data["notes"])})


def _served(data: Mapping[str, Any]) -> AsServed:
    figures = ("served", "merged")
    rows = tuple(ServedRow(**{**row, **{key: tuple(row[key]) for key in figures}}) for row in data["rows"])
    return AsServed(data["form"], tuple(data["names"]), rows)


def _guard(data: Mapping[str, Any]) -> GuardOutcome:
    return GuardOutcome(**{**data, "difference": Figure(**data["difference"]) if data["difference"] else None})


def _row(data: Mapping[str, Any]) -> Row:
    holdout = Figure(**data["holdout"]) if data["holdout"] else None
    compared = tuple(Comparison(**{**c, "difference": Figure(**c["difference"])}) for c in data["compared"])
    # a report of an older version has none
    expected = Figure(**data["expected"]) if data.get("expected") else None
    return Row(**{**data, "holdout": holdout, "compared": compared, "expected": expected})
