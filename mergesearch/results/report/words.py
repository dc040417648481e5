"""What a report says in words: its finding in one sentence, and its remarks."""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.results.record import Record
from mergesearch.results.report.data import (
    AVERAGE,
    BETTER,
    NOISE,
    OBJECTIVE,
    UNTESTED,
    WORSE,
    AsServed,
    Comparison,
    Figure,
    GuardOutcome,
    Report,
)

METHOD = (
    "Intervals: 95 %, paired bootstrap over documents, stratified by task. Differences: on the same documents, turned "
    "so that + is better; p by the paired randomisation test, two-sided, after Holm's correction (the winner's "
    "objective against the references together, everything else together); * is beyond noise at 5 %. The winner and "
    "the best single model were fixed on the search documents; a search score is biased upwards for whatever was "
    "chosen by it."
)


def sentence(winner: Record, error: str | None, claims: Sequence[Comparison], documents: int) -> str:
    """Whether the winner is an improvement, and over what.

    Args:
        winner: its row of the table.
        error: why it could not be scored on the holdout.
        claims: its objective against each reference.
        documents: the number of holdout documents.
    """
    who = winner.name or f"trial {winner.number} ({winner.method})"
    if error:
        return f"Nothing can be said: the winner, {who}, could not be scored on the holdout ({error})."
    where = f"on {documents:,} holdout documents"
    if winner.name:
        none = f"No improvement by searching: the best on the search's own documents is the baseline {who}"
        return f"{none}{_and_it_is(claims)}, {where}." if claims else f"{none}."
    if not claims:
        return f"Nothing can be said: there is nothing to compare {who} with."
    untested = [c.against for c in claims if c.verdict == UNTESTED]
    if untested:
        return f"Nothing can be said: a task's documents have no values of their own, so {who} cannot be tested."
    return f"{_finding(who, claims)}, {where}."


def _finding(who: str, claims: Sequence[Comparison]) -> str:
    better, worse, noise = ([c for c in claims if c.verdict == verdict] for verdict in (BETTER, WORSE, NOISE))
    if not better and not worse:
        return f"No improvement beyond noise: {who} against {_list(noise)}"
    level = f" and no different beyond noise from {_list(noise)}" if noise else ""
    if better and not worse and not noise:
        return f"Improvement: {who} is better than {_list(better)}"
    if better:
        less = f", which is worse than {_list(worse)}" if worse else ""
        none = f", but none beyond noise over {_list(noise)}" if noise else ""
        return f"Improvement over {_list(better)} by {who}{none}{less}"
    return f"No improvement: {who} is worse than {_list(worse)}{level}"


def _and_it_is(claims: Sequence[Comparison]) -> str:
    words = {BETTER: "better than", WORSE: "worse than", NOISE: "no different beyond noise from"}
    parts = [f"{words.get(c.verdict, 'not tested against')} {_list([c])}" for c in claims]
    return ", which is " + " and ".join(parts)


def _list(claims: Sequence[Comparison]) -> str:
    return " and ".join(f"{name(c)} ({difference(c)})" for c in claims)


def name(claim: Comparison) -> str:
    """`the best single model code`, `the plain average`."""
    return f"the {claim.reference}{'' if claim.reference == AVERAGE else f' {claim.against}'}"


def difference(claim: Comparison) -> str:
    """`+0.0312 [+0.0100, +0.0524], p = 0.002`."""
    p = f", {p_text(claim.p)}" if claim.p is not None else ""
    return f"{figure(claim.difference, '+.4f')}{p}"


def figure(shown: Figure, form: str = ".4f") -> str:
    """`0.5312 [0.5100, 0.5524]`."""
    interval = f" [{shown.low:{form}}, {shown.high:{form}}]" if shown.low is not None else ""
    return f"{shown.value:{form}}{interval}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference_cell(comparison: Comparison | None) -> str:
    """`+0.0312, p = 0.002 *`, and the interval on a line of its own."""
    if comparison is None:
        return "-"
    p = f", {p_text(comparison.p)}{' *' * comparison.beyond_noise}" if comparison.p is not None else ""
    return cell(comparison.difference, p + "\n", "+.4f")


def cell(figure: Figure | None, between: str = "\n", form: str = ".4f") -> str:
    """`0.5312`, and the interval after `between`."""
    if figure is None:
        return "-"
    interval = f"[{figure.low:{form}}, {figure.high:{form}}]" if figure.low is not None else ""
    return f"{figure.value:{form}}{between}{interval}".rstrip()


def remarks(report: Report) -> list[str]:
    """What a report says beside its tables: guards, the winner's curse, the noise floor, notes."""
    return [*_guards(report), *_curse(report), *_noise(report), *_notes(report)]


def _curse(report: Report) -> list[str]:
    """The winner's search score beside what it is worth."""
    rows = report.sections[0].rows if report.sections else ()
    scored = [row for row in rows if row.holdout and row.search is not None]
    changes = {row.trial: row.holdout.value - row.search for row in scored if row.holdout and row.search is not None}
    if report.winner_trial not in changes:
        return []
    expected = next((row.expected for row in scored if row.trial == report.winner_trial), None)
    told = f"; {figure(expected)} was expected there" if expected else ""
    others = [changes[row.trial] for row in scored if row.baseline and row.trial != report.winner_trial]
    beside = f"; the baselines changed by {sum(others) / len(others):+.4f} on average" if others else ""
    return [
        f"Winner's curse: from the search documents to the holdout the {OBJECTIVE} of {report.winner} changed by "
        f"{changes[report.winner_trial]:+.4f}{beside}{told}."
    ]


def _guards(report: Report) -> list[str]:
    return [_guard(report.winner, outcome) for outcome in report.guards]


def _guard(winner: str, outcome: GuardOutcome) -> str:
    allowed = f"allowed {-outcome.max_drop:+.4f}" if outcome.max_drop else "allowed 0"
    if outcome.difference is None:
        return f"Guard {outcome.task}: {winner} or {outcome.against} could not be scored on the holdout."
    against = f"{winner} against {outcome.against} {cell(outcome.difference, ' ', '+.4f')}, {allowed}"
    return f"Guard {outcome.task} ({outcome.metric}), on the holdout, + is better: {against}: {outcome.verdict}."


def served_cells(served: AsServed) -> list[list[str]]:
    """A row for each finalist: its label, then each figure as served, as merged in brackets."""
    rows = []
    for row in served.rows:
        pairs = [_both(*pair) for pair in zip(row.served, row.merged, strict=True)]
        rows.append([row.candidate, *([f"failed: {row.error}", *pairs[1:]] if row.error else pairs)])
    return rows


def _both(served: float | None, merged: float | None) -> str:
    shown = ["-" if value is None else f"{value:.4f}" for value in (served, merged)]
    return f"{shown[0]} ({shown[1]})"


def served_title(served: AsServed) -> str:
    """What heads the table of the finalists in the form that will be served."""
    return f"As served in {served.form}, on the holdout (as merged in brackets)"


def _noise(report: Report) -> list[str]:
    if not report.noise:
        return []
    parts = [f"{n.name} {n.second - n.first:+.2g}{f' ({n.changed} documents changed)' * (n.changed is not None)}"
             for n in report.noise]  # fmt: skip
    return [f"Noise floor: {report.winner} built and scored again ({report.repeat}) differs by {', '.join(parts)}."]


def _notes(report: Report) -> list[str]:
    return [f"Note: {note}." for note in report.notes]
