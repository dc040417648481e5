"""What a run has cost and will still cost, in words."""

from __future__ import annotations

from datetime import datetime

from mergesearch.search import store
from mergesearch.search.budget import Budget
from mergesearch.search.estimate import Estimate, Part, estimate
from mergesearch.search.history import ROOM, History
from mergesearch.search.strategies import registered


def costs(history: History) -> list[str]:
    """What a run has cost, and what is left of its budget, in words: `cost: ...`, where hours are kept back for
    the report `kept: ...`, and `left: ...`."""
    ended = [trial for trial in history.trials if trial.state.ended]
    seconds = sum(trial.seconds for trial in ended)
    tokens = store.noted(history.study, "tokens_per_document")
    spent = f"{len(ended)} trials, {history.documents:,} document evaluations"
    spent += f", {round(tokens * history.documents):,} prompt tokens" if tokens else ""
    learned = sum(trial.learning_documents for trial in history.trials)
    spent += f", {learned:,} of the evaluations to learn soups" if learned else ""
    lines = [f"cost: {spent}; {seconds:.0f} s merging and scoring, {history.hours:.2f} h at work"]
    left = _left(history)
    if not left:
        return lines
    kept = history.hours_kept
    if kept:
        words = history.notes[ROOM]["words"]
        lines.append(f"kept: {duration(3600 * kept)} of {history.config.search.hours:g} h {words}")
    return [*lines, f"left: {left}"]


def _left(history: History) -> str:
    """What is left of each budget, and what that will come to; empty once nothing is."""
    budget, rest = history.config.search, estimate(history.config, history, now=datetime.now())
    if rest is None or not rest.parts:
        return ""
    of_budget = [] if Budget(history).used_up else [f"{budget.trials - history.proposals} trials"]
    if of_budget and budget.documents is not None:
        of_budget.append(f"{budget.documents - history.documents:,} document evaluations")
    if of_budget and budget.hours is not None:
        of_budget.append(f"{budget.hours - history.hours_kept - history.hours:.2f} h")
    about = f"about {_count(rest.trials, 'trial')}, {rest.documents:,} document evaluations"
    about += "" if rest.seconds is None else f", {duration(rest.seconds)}"
    about += "".join(f", of which {_words_of_part(part)}" for part in rest.parts if part.unless)
    return f"{about}; of the budget {', '.join(of_budget)}" if of_budget else about


def words_of(rest: Estimate) -> str:
    """`about 2 min 10 s: 14 baselines 1 min 20 s, 2 learned soups 30 s, 6 of the study 20 s`."""
    parts = ", ".join(_words_of_part(part) for part in rest.parts)
    if rest.seconds is None:
        return f"about {rest.documents:,} document evaluations: {parts}"
    fixed = {"loading": rest.loading, "scoring once more by lm-eval": rest.again, "writing the winner": rest.exporting}
    parts += "".join(f", {what} {duration(seconds)}" for what, seconds in fixed.items() if seconds >= 1)
    return f"about {duration(rest.seconds)}: {parts}"


def _words_of_part(part: Part) -> str:
    name = registered()[part.strategy].trials_in_words(part.trials)
    words = name if part.seconds is None else f"{name} {duration(part.seconds)}"
    return f"{words} unless {part.unless}" if part.unless else words


def duration(seconds: float) -> str:
    """`8 s`, `2 min 10 s`, `3 h 5 min`, `2 days 4 h`: as exact as a person would say it."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 600:
        minutes, rest = divmod(round(seconds / 5) * 5, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    name = "day" if days == 1 else "days"
    return f"{days} {name} {hours} h" if hours else f"{days} {name}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


__all__ = ["costs", "duration", "words_of"]
