"""`mergesearch report`: the finalists scored on the holdout, once, and the report on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.commands.best import refresh_card
from mergesearch.commands.score import holdout_scorers
from mergesearch.commands.story import report_file
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.results.loading import Run, load_run
from mergesearch.results.record import Record
from mergesearch.results.report import Entry, Question, Report, build
from mergesearch.results.report.data import AVERAGE, SINGLE
from mergesearch.results.report.finalists import Finalists, HoldoutScores, choose, score_finalists
from mergesearch.results.states import ENDED
from mergesearch.search.objective import Objective
from mergesearch.search.store import write_atomically

log: logging.Logger = logging.getLogger(__name__)

FINALISTS = 3
AGAIN = "-again"


def report_run(path: Path, finalists: int = FINALISTS, say: Callable[[str], None] = log.info) -> Report:
    """The report on a run's holdout. Whatever was scored by an earlier call, killed or not, is not scored again.

    Args:
        path: the run folder.
        finalists: how many of the best proposals are scored beside the baselines.
        say: told in a few words what is being done.

    Raises:
        UserError: no such run, no holdout, nothing scored yet, or tasks whose documents are not those of the run.
    """
    run = load_run(path)
    config, objective = run.config, run.objective
    if not config.holdout:
        raise UserError(
            f"{path} has no holdout (holdout: 0), so there is nothing to report on: search with another one"
        )
    if objective is None:
        raise UserError(f"{path} has not scored its baselines yet: go on with `mergesearch run`")
    chosen = choose(run.records, config, finalists)
    scored = HoldoutScores(run.folder.holdout)
    with run.folder.lock("report"):
        notes = _notes(run, objective, scored.look(chosen))
        failed = _score(run, chosen, scored, say)
        report = build(_question(config, chosen, objective, notes), _entries(chosen, scored, objective, failed))
        write_atomically(report_file(run.folder), json.dumps(report.to_data(), indent=1) + "\n")
    refresh_card(run, chosen.winner)
    return report


def _score(run: Run, chosen: Finalists, scored: HoldoutScores, say: Callable[[str], None]) -> dict[int, str]:
    """Scores what is missing, and loads the models only where something is. Returns why trials could not be scored."""
    first = [record for record in chosen.records if scored.load(record) is None]
    again = [chosen.winner] if scored.load(chosen.winner, AGAIN) is None else []
    if not first and not again:
        return {}
    other = other_batch_size(run.config.batch_size)
    engine, scorer, other_scorer = holdout_scorers(run.config, run.folder, other, say)
    say(f"scoring {len(first)} finalists on the holdout, and the winner twice")
    failed = score_finalists(first, scored, engine, scorer, say=say)
    if chosen.winner.number not in failed:
        score_finalists(again, scored, engine, other_scorer, suffix=AGAIN, say=lambda text: say(f"{text}, again"))
    return failed


def other_batch_size(batch_size: int) -> int:
    """For the second scoring of the winner."""
    return batch_size * 2 // 3 if batch_size > 1 else 2


def _question(config: Config, chosen: Finalists, objective: Objective, notes: list[str]) -> Question:
    references = {SINGLE: chosen.single, AVERAGE: chosen.average}
    return Question(
        run=config.name,
        winner=chosen.winner.number,
        references={
            what: record.number for what, record in references.items() if record and record is not chosen.winner
        },
        factors=objective.factors(chosen.winner.scores),
        seed=config.search.seed,
        repeat=_repeat(config),
        notes=tuple(notes),
        guards=_guards(chosen, objective),
    )


def _repeat(config: Config) -> str:
    size = f"requests shuffled, batch size {other_batch_size(config.batch_size)}"
    # token tries take no batch size from the configuration, so lm-eval's own model is the other way to batch
    return f"{size} of lm-eval's own model" if config.scoring == "auto" else f"{size} instead of {config.batch_size}"


def _guards(chosen: Finalists, objective: Objective) -> dict[str, tuple[int, float]]:
    numbers = {record.name: record.number for record in chosen.records}
    return {g.task: (numbers[g.against], g.max_drop) for g in objective.guards if g.against in numbers}


def _entries(chosen: Finalists, scored: HoldoutScores, objective: Objective, failed: Mapping[int, str]) -> list[Entry]:
    return [_entry(record, record is chosen.winner, scored, objective, failed) for record in chosen.records]


def _entry(
    record: Record, winner: bool, scored: HoldoutScores, objective: Objective, failed: Mapping[int, str]
) -> Entry:
    scores = scored.load(record)
    again = scored.load(record, AGAIN) if winner else None
    return Entry(
        record=record,
        scores=scores,
        objective=objective.value(scores.tasks) if scores else None,
        error=None if scores else failed.get(record.number, "not scored"),
        repeated=again,
        repeated_objective=objective.value(again.tasks) if again else None,
    )


def _notes(run: Run, objective: Objective, earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    notes, budget = list(objective.notes), run.config.search
    proposed = sum(record.name is None and record.state in ENDED for record in run.records)
    if proposed < budget.trials and budget.hours is None:
        notes.append(f"the search is not finished ({proposed} of {budget.trials} trials)")
    if earlier:
        looks = ", ".join(f"after {look['trials']} trials, when trial {look['winner']} led" for look in earlier)
        notes.append(f"the holdout was looked at before ({looks}): a search that was steered by it is biased on it")
    return notes
