"""Finalists on tasks that the search never used: `report: {tasks: [...]}`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.commands.holdout import Asker
from mergesearch.commands.inputs import load_tasks, scorer_of
from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.tasks import split
from mergesearch.recipe import AVERAGE
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.record import Record
from mergesearch.results.report.data import Figure, Row, Section
from mergesearch.results.report.finalists import Finalists
from mergesearch.schema import read_json
from mergesearch.search.store import write_atomically

log: logging.Logger = logging.getLogger(__name__)

_DAMAGED = "remove it, and `mergesearch report` scores it again"
# of a normal distribution, both sides
_95 = 1.96


def benchmarks(
    run: Run, chosen: Finalists, asker: Asker, finished: Callable[[str, str | None], None] = lambda text, error: None
) -> tuple[Section, ...]:
    """One section for each of the report's own tasks: winner, finalists, parents and plain average, on all documents of
    the task or as many as its `limit`. What was scored before is not scored again.

    Intervals are 1.96 standard errors to each side; no claim is made of them.

    Raises:
        UserError: a task cannot be loaded.
    """
    config = run.config
    if not config.report.tasks:
        return ()
    mine = config.model_copy(
        update={"tasks": [task.as_task() for task in config.report.tasks], "guard": [], "holdout": 0.0}
    )
    parents = {*config.parents, AVERAGE}
    shown = [r for r in chosen.records if not r.name or r.name in parents or r.number == chosen.winner.number]
    folder = run.folder.holdout / "benchmarks"
    key = _key(mine)
    kept = {record.number: _kept(folder, record, key) for record in shown}
    missing = [record for record in shown if kept[record.number] is None]
    errors: dict[int, str] = {}
    if missing:
        asker.say(f"{len(missing)} candidates on {len(mine.tasks)} tasks that the search never used")
        scored, errors = _score(mine, missing, asker, finished)
        folder.mkdir(parents=True, exist_ok=True)
        for record in missing:
            if record.number in scored:
                data = {"recipe": record.recipe_id, "key": key, "scores": scored[record.number].to_json()}
                write_atomically(_file(folder, record), json.dumps(data) + "\n")
        kept |= scored
    return tuple(_section(task.task, shown, kept, errors) for task in mine.tasks)


def _score(
    config: Config, records: Sequence[Record], asker: Asker, finished: Callable[[str, str | None], None]
) -> tuple[dict[int, Scores], dict[int, str]]:
    tasks = load_tasks(config)
    limits = {task.task: task.limit for task in config.tasks}
    documents = {task.label: split(task, 0.0, config.search.seed, limits[task.label]).search for task in tasks}
    engine = asker.engine
    scorer = scorer_of(config, engine.model, engine.pool.tokenizer, tasks, documents)
    scored: dict[int, Scores] = {}
    errors: dict[int, str] = {}
    for record in records:
        label = record.name or f"trial {record.number}"
        try:
            engine.load(recipe_of(record))
            scored[record.number] = scorer.score()
        except CandidateError as error:
            errors[record.number] = str(error)
        finished(f"{label} on the report's own tasks", errors.get(record.number))
    return scored, errors


def _section(
    task: str, records: Sequence[Record], scores: Mapping[int, Scores | None], errors: Mapping[int, str]
) -> Section:
    found = {number: of.tasks[task] for number, of in scores.items() if of is not None}
    some = next(iter(found.values()), None)
    rows = []
    for record in records:
        score = found.get(record.number)
        half = _95 * score.stderr if score is not None and score.stderr is not None else None
        value = score.value if score is not None else 0.0
        figure = Figure(value) if half is None else Figure(value, value - half, value + half)
        label = record.name or f"trial {record.number}"
        rows.append(
            Row(label, record.number, record.method, None, figure if score else None, (), errors.get(record.number),
                record.name is not None)
        )  # fmt: skip
    metric, up, documents = (some.metric, some.higher_is_better, some.documents) if some else ("", True, 0)
    return Section(task, metric, up, documents, tuple(rows))


def _key(config: Config) -> str:
    """What the figures depend on beside the recipe."""
    asked = [task.model_dump(mode="json") for task in config.tasks]
    how = [config.apply_chat_template, config.fewshot_as_multiturn, config.system_instruction, config.dtype]
    return hashlib.sha256(json.dumps([asked, how, config.search.seed]).encode()).hexdigest()[:16]


def _kept(folder: Path, record: Record, key: str) -> Scores | None:
    file = _file(folder, record)
    if not file.is_file():
        return None
    data: dict[str, Any] = read_json(file, _DAMAGED)
    return Scores.from_json(data["scores"]) if (data["recipe"], data["key"]) == (record.recipe_id, key) else None


def _file(folder: Path, record: Record) -> Path:
    return folder / f"{record.number:05d}.json"
