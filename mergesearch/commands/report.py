"""`mergesearch report`: the finalists scored on the holdout, once, and the report on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergesearch.commands.benchmarks import Benchmarks
from mergesearch.commands.best import refresh_card
from mergesearch.commands.examples import keep_examples
from mergesearch.commands.holdout import (
    AGAIN,
    MERGED,
    Asker,
    ReportCost,
    ReportProgress,
    cost,
    cost_of,
    filed,
    most_documents,
    other_batch_size,
    score_missing,
)
from mergesearch.commands.originals import Originals
from mergesearch.commands.story import report_file
from mergesearch.config import Config
from mergesearch.config.served import is_filed
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import Scores
from mergesearch.results.loading import Run, load_run
from mergesearch.results.record import Record
from mergesearch.results.report import Entry, Question, Report, build
from mergesearch.results.report.data import AVERAGE, LEVEL, OBJECTIVE, SINGLE, AsServed, ServedRow
from mergesearch.results.report.finalists import Finalists, choose
from mergesearch.results.report.holdout import HoldoutScores
from mergesearch.results.states import ENDED, RUNNING, WAITING
from mergesearch.schema import validate
from mergesearch.search import by_lm_eval
from mergesearch.search.guards import with_lengths
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder, write_atomically

log: logging.Logger = logging.getLogger(__name__)


def report_run(
    path: Path,
    finalists: int | None = None,
    documents: int | None = None,
    progress: ReportProgress | None = None,
    *,
    examples: int | None = None,
    tasks: Sequence[str] = (),
    allow_changed: bool = False,
) -> Report:
    """The report on a run's holdout. Whatever was scored by an earlier call, killed or not, is not scored again.

    Args:
        path: the run folder.
        finalists: how many of the best proposals are scored beside the baselines; None for what the configuration
            says.
        documents: the most holdout documents of each task; likewise.
        progress: told how it goes; nobody is without one.
        examples: how many documents on which winner and best single model differ are kept with both answers; None for
            what the configuration says.
        tasks: that the search never uses, as `NAME` or `NAME:METRIC`, beside those of the configuration.
        allow_changed: report also where models or documents are not those that the run was scored with.

    Raises:
        UserError: no such run, no holdout, nothing scored yet, or models or tasks that are not those of the run.
    """
    run = _asked(load_run(path), examples, tasks)
    return _report(run, finalists, documents, progress, None, allow_changed)


def _asked(run: Run, examples: int | None, tasks: Sequence[str]) -> Run:
    """The run with what the command line asks of its report."""
    data = run.config.dump()
    named = [dict(zip(("task", "metric"), task.split(":", 1), strict=False)) for task in tasks]
    known = {task["task"] for task in named}
    data["report"]["tasks"] = [*(t for t in data["report"]["tasks"] if t["task"] not in known), *named]
    data["report"]["examples"] = data["report"]["examples"] if examples is None else examples
    return replace(run, config=validate(Config, data, "--task"))


def has_holdout(path: Path) -> bool:
    """Whether a run kept documents back that a report could go by.

    Raises:
        UserError: it is no run folder.
    """
    return bool(RunFolder.open(path).config().holdout)


def report_at_end(
    run: Run, engine: Engine, progress: ReportProgress | None = None, *, allow_changed: bool = False
) -> Report | None:
    """What a run ends with where `report.at_end` asks for it; None where it does not, or where another worker is still
    at a trial, which then reports: its trial may win.

    Args:
        run: as it is at its end, the winner exported.
        engine: the run's own, so that the models are not loaded twice.
        progress: told how it goes.
        allow_changed: as for `report_run`.

    Raises:
        UserError: as for `report_run`.
    """
    if not run.config.report.at_end or not run.config.holdout:
        return None
    if any(record.state in (RUNNING, WAITING) for record in run.records) or run.best() is None:
        return None
    return _report(run, None, None, progress, engine, allow_changed)


def _report(
    run: Run,
    finalists: int | None,
    documents: int | None,
    progress: ReportProgress | None,
    engine: Engine | None,
    allow_changed: bool,
) -> Report:
    config, objective = run.config, run.objective
    if not config.holdout:
        raise UserError(
            f"{run.path} has no holdout (holdout: 0), so there is nothing to report on: search with another one"
        )
    if objective is None:
        raise UserError(f"{run.path} has not scored its baselines yet: go on with `mergesearch run`")
    chosen = choose(run.records, config, finalists or config.report.finalists)
    scored = HoldoutScores(run.folder.holdout)
    originals = Originals(run.pinned, run.digests, allow_changed, progress.say if progress else log.warning)
    # the engine at hand has the weights that the run began with
    changes = originals.check(parents=None if engine is None else ())
    with run.folder.lock("report"):
        most = most_documents(run, documents)
        notes = _notes(run, objective, scored.look(chosen, most), chosen, most)
        expected = cost_of(run, chosen, most)
        if progress:
            progress.expect(expected.candidates + expected.again)
        benchmarks = Benchmarks(run, chosen)
        asker = Asker(run, originals, engine, progress.say if progress else log.info)
        told: dict[str, Any] = {"finished": progress.finished} if progress else {}
        failed = score_missing(run, chosen, most, asker, **told)
        keep_examples(run, chosen, config.report.examples, most, asker)
        own = benchmarks.sections(asker, **told)
        run = replace(run, changes=tuple(dict.fromkeys([*run.changes, *changes, *asker.changes])))
        notes = [*run.changes, *notes, *(_own(section.name) for section in own)]
        if means := by_lm_eval.means(run.kinds):
            notes.append(f"figures on the holdout are lm-eval's own model's; those of the search are by {means}")
        notes += _as_merged(config, chosen.winner, scored, most)
        entries = _entries(chosen, scored, objective, failed, most)
        report = build(_question(run, chosen, objective, notes), entries)
        served = _as_files(config, chosen, scored, objective, failed, most)
        report = replace(report, sections=(*report.sections, *own), served=served)
        write_atomically(report_file(run.folder), json.dumps(report.to_data(), indent=1) + "\n")
    refresh_card(run, chosen.winner)
    return report


def _as_merged(config: Config, winner: Record, scored: HoldoutScores, most: int | None) -> list[str]:
    """The winner's figures in both forms, where it is served in another one than it was merged in."""
    here, merged = scored.load(winner, "", most), scored.load(winner, MERGED, most)
    if config.score_as is None or here is None or merged is None:
        return []
    figures = ", ".join(
        f"{task} {score.value:.4f} ({merged.tasks[task].value:.4f})" for task, score in here.tasks.items()
    )
    return [f"the winner as served in {config.score_as} (and as merged, in {config.dtype}): {figures}"]


def _as_files(
    config: Config,
    chosen: Finalists,
    scored: HoldoutScores,
    objective: Objective,
    failed: Mapping[int, str],
    most: int | None,
) -> AsServed | None:
    """The finalists as files for llama.cpp, where that is how they are served."""
    if not is_filed(config.score_as):
        return None
    suffix = filed(config.score_as)
    tasks = tuple(chosen.winner.scores)

    def figures(scores: Scores | None) -> tuple[float | None, ...]:
        if scores is None:
            return (None,) * (1 + len(tasks))
        return objective.value(scores.tasks), *(scores.tasks[task].value for task in tasks)

    def row(record: Record) -> ServedRow:
        served = scored.load(record, suffix, most)
        error = None if served else failed.get(record.number, "not scored")
        label = record.name or f"trial {record.number}"
        return ServedRow(label, record.number, figures(served), figures(scored.load(record, "", most)), error)

    return AsServed(config.score_as, (OBJECTIVE, *tasks), tuple(map(row, chosen.records)))


def _question(run: Run, chosen: Finalists, objective: Objective, notes: list[str]) -> Question:
    config = run.config
    references = {SINGLE: chosen.single, AVERAGE: chosen.average}
    return Question(
        run=config.name,
        winner=chosen.winner.number,
        references={
            what: record.number for what, record in references.items() if record and record is not chosen.winner
        },
        factors=objective.factors(chosen.winner.scores),
        seed=config.search.seed,
        repeat=_repeat(run.batch_size),
        notes=tuple(notes),
        guards=_guards(chosen, objective),
    )


def _repeat(batch_size: int) -> str:
    return f"requests shuffled, batch size {other_batch_size(batch_size)} instead of {batch_size}"


def _guards(chosen: Finalists, objective: Objective) -> dict[str, tuple[int, float]]:
    numbers = {record.name: record.number for record in chosen.records}
    return {g.name: (numbers[g.against], g.max_drop) for g in objective.guards if g.against in numbers}


def _entries(
    chosen: Finalists, scored: HoldoutScores, objective: Objective, failed: Mapping[int, str], most: int | None
) -> list[Entry]:
    def entry(record: Record) -> Entry:
        scores = scored.load(record, "", most)
        again = scored.load(record, AGAIN, most) if record is chosen.winner else None
        scores, again = (with_lengths(objective.guards, each) if each else None for each in (scores, again))
        return Entry(
            record=record,
            scores=scores,
            objective=objective.value(scores.tasks) if scores else None,
            error=None if scores else failed.get(record.number, "not scored"),
            repeated=again,
            repeated_objective=objective.value(again.tasks) if again else None,
        )

    return [entry(record) for record in chosen.records]


# --- what a reader should know besides --------------------------------------------------------------------------------


def _notes(
    run: Run, objective: Objective, earlier: Sequence[Mapping[str, Any]], chosen: Finalists, most: int | None
) -> list[str]:
    notes, budget = list(objective.notes), run.config.search
    proposed = sum(record.name is None and record.state in ENDED for record in run.records)
    if proposed < budget.trials and budget.hours is None:
        notes.append(f"the search is not finished ({proposed} of {budget.trials} trials)")
    if objective.worst:
        values = dict(zip(objective.weights, objective.values(chosen.winner.scores), strict=True))
        notes.append(
            f"objective.worst is {objective.worst:g}: in intervals and differences the worst task of each candidate is "
            f"taken to be {min(values, key=lambda task: values[task])}, the winner's on the search documents"
        )
    if most is not None:
        notes.append(
            f"it goes by {_most(most)} of the holdout, drawn by the seed; report.documents, or --documents, takes more"
        )
    return [*notes, *_looks(earlier, chosen.winner.number, most)]


def _own(task: str) -> str:
    return f"{task} is no part of the search and has no holdout: its figures are of all documents that were asked"


def _looks(earlier: Sequence[Mapping[str, Any]], winner: int, most: int | None) -> list[str]:
    """What earlier looks at the holdout mean for this one."""
    notes = []
    others = [look for look in earlier if look["winner"] != winner]
    if others:
        looks = ", ".join(f"after {look['trials']} trials, when trial {look['winner']} led" for look in others)
        notes.append(f"the holdout was looked at before ({looks}): a search that was steered by it is biased on it")
    fewer = list(dict.fromkeys(look["documents"] for look in earlier if look["documents"] != most))
    if fewer:
        looks, count = " and ".join(_most(documents) for documents in fewer), len(earlier) + 1
        notes.append(
            f"this is look {count} at the holdout, after one on {looks}: whoever stops at the look that pleases is "
            f"wrong more often than in {LEVEL:.0%} of reports, with {count} looks in up to {count * LEVEL:.0%}"
        )
    return notes


def _most(documents: int | None) -> str:
    return "all documents" if documents is None else f"at most {documents:,} documents of each task"


__all__ = ["ReportCost", "ReportProgress", "cost", "has_holdout", "report_at_end", "report_run"]
