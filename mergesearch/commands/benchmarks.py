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
from mergesearch.evaluate.tasks import Task, split
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


class Benchmarks:
    """What a report scores beside the holdout: winner, finalists, parents and plain average on tasks of its own.

    All documents of a task count, or as many as its `limit`. What was scored before is not scored again.

    Args:
        run: the run.
        chosen: its finalists.

    Raises:
        UserError: a task cannot be loaded, where something is still to be scored.
    """

    def __init__(self, run: Run, chosen: Finalists):
        config = run.config
        tasks = [task.as_task() for task in config.report.tasks]
        # as `lm_eval` would score them
        own = {"tasks": tasks, "guard": [], "holdout": 0.0}
        self._config, self._rows = run.pinned.by_lm_eval.model_copy(update=own), run.batch_size
        self._folder = run.folder.holdout / "benchmarks"
        self._key = _key(self._config)
        parents = {*config.parents, AVERAGE}
        shown = [r for r in chosen.records if not r.name or r.name in parents or r.number == chosen.winner.number]
        self._shown = shown if tasks else []
        self._kept = {record.number: _kept(self._folder, record, self._key) for record in self._shown}
        self._missing = [record for record in self._shown if self._kept[record.number] is None]
        # before anything is scored
        self._tasks: list[Task] = load_tasks(self._config) if self._missing else []

    def sections(
        self, asker: Asker, finished: Callable[[str, str | None], None] = lambda text, error: None
    ) -> tuple[Section, ...]:
        """One for each task; intervals are 1.96 standard errors to each side, and no claim is made of them.

        Args:
            asker: of the run.
            finished: told of each candidate, and why where it failed.
        """
        errors: dict[int, str] = {}
        if self._missing:
            asker.say(f"{len(self._missing)} candidates on {len(self._tasks)} tasks that the search never used")
            errors = self._score(asker, finished)
        if not self._shown:
            return ()
        return tuple(_section(task.task, self._shown, self._kept, errors) for task in self._config.tasks)

    def _score(self, asker: Asker, finished: Callable[[str, str | None], None]) -> dict[int, str]:
        config = self._config
        limits = {task.task: task.limit for task in config.tasks}
        documents = {t.label: split(t, 0.0, config.search.seed, limits[t.label]).search for t in self._tasks}
        engine = asker.engine
        scorer = scorer_of(config, engine.model, engine.pool.tokenizer, self._tasks, documents, batch_size=self._rows)
        errors: dict[int, str] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        for record in self._missing:
            try:
                engine.rebuild(recipe_of(record))
                scores = scorer.score()
                data = {"recipe": record.recipe_id, "key": self._key, "scores": scores.to_json()}
                write_atomically(_file(self._folder, record), json.dumps(data) + "\n")
                self._kept[record.number] = scores
            except CandidateError as error:
                errors[record.number] = str(error)
            label = record.name or f"trial {record.number}"
            finished(f"{label} on the report's own tasks", errors.get(record.number))
        return errors


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
