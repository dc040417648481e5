"""What a report says, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.results.record import Record
from mergesearch.results.report.data import AVERAGE, BETTER, NOISE, UNTESTED, WORSE, Comparison, Figure


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
