"""What `mergesearch report` does: the finalists scored on the holdout, once, and the report made of that."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from mergesearch.commands.run import holdout_report, refresh_card
from mergesearch.commands.score import holdout_scorers
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.results.record import Record, read_records
from mergesearch.results.report import Entry, Question, Report, build
from mergesearch.results.report.data import AVERAGE, SINGLE
from mergesearch.results.report.finalists import Finalists, Kept, choose, score_finalists
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder, write_atomically

log = logging.getLogger(__name__)

FINALISTS = 3
AGAIN = "-again"


def report_run(run: Path, finalists: int = FINALISTS, say: Callable[[str], None] = log.info) -> Report:
    """The report on a run's holdout. Whatever was scored by an earlier call, killed or not, is not scored again.

    Args:
        run: the run folder.
        finalists: how many of the best proposals are scored beside the baselines.
        say: told in a few words what is being done.

    Raises:
        UserError: no such run, no holdout, nothing scored yet, or tasks whose documents are not those of the run.
    """
    config, records, objective = read_records(run)
    if not config.holdout:
        raise UserError(f"{run} has no holdout (holdout: 0), so there is nothing to report on: search with another one")
    if objective is None:
        raise UserError(f"{run} has not scored its baselines yet: go on with `mergesearch run`")
    folder = RunFolder.open(run)
    chosen = choose(records, config, finalists)
    kept = Kept(folder.holdout)
    with folder.lock("report"):
        notes = _notes(config, records, objective, kept.look(chosen))
        failed = _score(config, folder, chosen, kept, say)
        report = build(_question(config, chosen, objective, notes), _entries(chosen, kept, objective, failed))
        write_atomically(holdout_report(folder), json.dumps(report.to_data(), indent=1) + "\n")
    refresh_card(folder, config, records, chosen.winner)
    return report


def _score(
    config: Config, folder: RunFolder, chosen: Finalists, kept: Kept, say: Callable[[str], None]
) -> dict[int, str]:
    """Scores what is missing; the models are loaded only where something is."""
    first = [record for record in chosen.records if kept.load(record) is None]
    again = [chosen.winner] if kept.load(chosen.winner, AGAIN) is None else []
    if not first and not again:
        return {}
    engine, scorer, other = holdout_scorers(config, folder, other_batch_size(config.batch_size), say)
    say(f"scoring {len(first)} finalists on the holdout, and the winner twice")
    failed = score_finalists(first, kept, engine, scorer, say=say)
    if chosen.winner.number not in failed:
        score_finalists(again, kept, engine, other, suffix=AGAIN, say=lambda text: say(f"{text}, again"))
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


def _entries(chosen: Finalists, kept: Kept, objective: Objective, failed: dict[int, str]) -> list[Entry]:
    return [_entry(record, record is chosen.winner, kept, objective, failed) for record in chosen.records]


def _entry(record: Record, winner: bool, kept: Kept, objective: Objective, failed: dict[int, str]) -> Entry:
    scores = kept.load(record)
    again = kept.load(record, AGAIN) if winner else None
    return Entry(
        record=record,
        scores=scores,
        objective=objective.value(scores.tasks) if scores else None,
        error=None if scores else failed.get(record.number, "not scored"),
        repeated=again,
        repeated_objective=objective.value(again.tasks) if again else None,
    )


def _notes(config: Config, records: list[Record], objective: Objective, earlier: list[dict]) -> list[str]:
    notes = list(objective.notes)
    proposed = sum(record.name is None and record.state not in ("running", "waiting") for record in records)
    if proposed < config.search.trials and config.search.hours is None:
        notes.append(f"the search is not finished ({proposed} of {config.search.trials} trials)")
    if earlier:
        looks = ", ".join(f"after {look['trials']} trials, when trial {look['winner']} led" for look in earlier)
        notes.append(f"the holdout was looked at before ({looks}): a search that was steered by it is biased on it")
    return notes
