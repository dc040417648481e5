"""What a run came to, as a person would say it: one sentence on its winner."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from mergesearch.commands.story import report_file
from mergesearch.recipe import AVERAGE, BASE
from mergesearch.results.loading import Run, load_run
from mergesearch.results.record import Record, ranked

# names of methods that are said letter by letter, or as a word of their own
_SPELT = {"ties": "TIES", "dare": "DARE", "della": "DELLA", "slerp": "SLERP", "nuslerp": "NuSLERP", "sce": "SCE"}
_SPELT |= {"ram": "RAM"}
# differences below what a table shows are none
_SHOWN = 5e-5


def sentence(run: Run, winner: Record) -> str:
    """What won, by how much over whom, whether that holds on the holdout, and what to type next."""
    return f"{_found(run, winner)}; {_next(run, winner)}"


def verdict_of(folder: Path) -> tuple[Record | None, str]:
    """The winner of a run that has ended, and the sentence on it."""
    run = load_run(folder)
    winner = run.best()
    return winner, "no candidate was scored" if winner is None else sentence(run, winner)


def _found(run: Run, winner: Record) -> str:
    if winner.name in run.config.parents:
        return _no_merge(run, winner)
    what = _words(winner)
    won = f"{what[0].upper()}{what[1:]} (trial {winner.number}) won with {winner.objective:.4f} on the search documents"
    if winner.expected is not None:
        won += f" ({winner.expected.value:.4f} is to be expected of it on others)"
    against = []
    single = _single(run)
    if single is not None:
        against.append((f"the best single model ({single.name})", single))
    average = next((r for r in run.records if r.name == AVERAGE and r.objective is not None), None)
    if average is not None and winner.name != AVERAGE:
        against.append(("the plain average", average))
    differences = [f"{_difference(winner, other)} {name}" for name, other in against]
    return won + "".join(f"{' and' if place else ','} {text}" for place, text in enumerate(differences))


def _no_merge(run: Run, winner: Record) -> str:
    who = "the base itself" if winner.name == BASE else f"the single model {winner.name}"
    text = f"No merge beat {who} ({winner.objective:.4f} on the search documents)"
    merges = [r for r in ranked(run.records) if r.name not in run.config.parents and r.objective is not None]
    best = next((record for record in merges if not record.infeasible), None)
    if best is None:
        return text
    return f"{text}: the best one, {_words(best)} (trial {best.number}), has {best.objective:.4f}"


def _single(run: Run) -> Record | None:
    """The best model alone that may win."""
    there = [r for r in ranked(run.records) if r.name in run.config.models and r.objective is not None]
    return next((record for record in there if not record.infeasible), there[0] if there else None)


def _difference(winner: Record, other: Record) -> str:
    by = (winner.objective or 0.0) - (other.objective or 0.0)
    if abs(by) < _SHOWN:
        return "as much as"
    return f"{abs(by):.4f} {'more' if by > 0 else 'less'} than"


def _words(record: Record) -> str:
    """`a learned soup per tensor`, `a TIES merge`, `the plain average`, `TIES as published (ties 0.2)`."""
    if record.name == AVERAGE:
        return "the plain average"
    if record.name is not None:
        return f"the baseline {record.name}"
    if record.method == record.strategy:  # soups and closed forms are called what they are
        text = record.method if "soup" in record.method else f"{record.method} merge"
    else:
        text = f"{' and '.join(map(_spelt, record.method.split('+')))} merge"
    return f"{'an' if text[:1] in 'aeiou' else 'a'} {text}"


def _spelt(method: str) -> str:
    words = [_SPELT.get(word, word) for word in method.split("_")]
    return ("-" if any(word.isupper() for word in words) else " ").join(words)


def _next(run: Run, winner: Record) -> str:
    folder = shlex.quote(str(run.path))
    export = f"`mergesearch export {folder} OUT` copies it to the folder OUT"
    if not run.config.holdout:
        return f"no documents were held out to see whether that holds (holdout is 0), and {export}"
    holds = _holds(run, winner)
    if holds is None:
        return (
            "whether that holds on the documents that no search saw has not been looked at yet: "
            f"type `mergesearch report {folder}`"
        )
    if holds:
        return f"that holds on the documents that no search saw, and {export}"
    return (
        "on the documents that no search saw that is no improvement beyond noise: "
        f"`mergesearch report {folder}` has the figures"
    )


def _holds(run: Run, winner: Record) -> bool | None:
    """Whether the report on the holdout found an improvement; None where there is none about this winner."""
    try:
        report = json.loads(report_file(run.folder).read_text(encoding="utf-8"))
        return bool(report["improvement"]) if report["winner_trial"] == winner.number else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
