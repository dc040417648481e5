"""Runs for pages, made of nothing but records and trials: no model, no study."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.config import Config
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.recipe import single_rule
from mergesearch.results.loading import Run
from mergesearch.results.page.subject import Subject
from mergesearch.results.record import Record, record_of
from mergesearch.results.report import Entry, Question, build
from mergesearch.results.report.data import AVERAGE, SINGLE
from mergesearch.results.report.holdout import HoldoutScores
from mergesearch.schema import validate
from mergesearch.search.objective import Objective, Scale
from mergesearch.search.trials import State, Trial

# names that would break a page that trusts them
HOSTILE = '<script>alert("1")</script>&amp;\'"{{ 7*7 }}%{x}</textarea></script>' + "x" * 200
DOCUMENTS = 40
KINDS = {
    "layers": 4,
    "kinds": {
        "embed.weight": ["embedding", 0],
        "layers.#.attn.weight": ["attention", None],
        "layers.#.mlp.weight": ["mlp", None],
        "norm.weight": ["norm", 3],
    },
}
BEGUN = datetime(2026, 1, 2, 3, 4, 5)


def subject(folder: Path, hostile: str = "", trials: int = 10, reported: bool = True, **changes: Any) -> Subject:
    """A run of baselines, a soup, a study with a failed trial and a guard, and its report on the holdout.

    Args:
        folder: the run folder, where documents' scores are written.
        hostile: a text that is put wherever a name can stand.
        trials: of the study.
        reported: whether there is a report.
    """
    task = f"quiz {hostile}".strip()
    config = validate(
        Config,
        {
            "name": "night",
            "base_model": f"base {hostile}".strip(),
            "models": {"math": f"math {hostile}", "code": "code"},
            "tasks": [{"task": task}, {"task": "bits"}],
            "guard": [{"task": "safe", "max_drop": 0.1}],
            "output": str(folder),
            **changes,
        },
        "test",
    )
    objective = _objective(task)
    every = _trials(config, task, hostile, trials)
    for trial in every:
        if trial.scores:
            _scores(trial, 0).save_documents(folder / "scores" / f"{trial.number:05d}.npz")
    records = tuple(record_of(trial, objective) for trial in every)
    run = Run(folder, config, records, objective, ("cost: 3 trials", f"note: {hostile}"), notes=(f"note {hostile}",))
    held = _report(run, every, objective) if reported else None
    example = {
        "task": task, "document": 3, "prompt": f"What is {hostile}?", "target": "four", "against": "math",
        "ours": {"value": "1", "answer": "four"}, "theirs": {"value": "0", "answer": f"five {hostile}"},
    }  # fmt: skip
    shares = {f"weight.{hostile or 'math'}": 0.75, "lambda": 0.25}
    return Subject(
        run=run,
        trials=every,
        verdict=f"Something won. {hostile}".strip(),
        report=held,
        importances=[{"method": "ties", "trials": 9, "shares": shares}],
        examples=[example],
        anatomy=KINDS,
    )


def _objective(task: str) -> Objective:
    from mergesearch.search.guards import Guard

    scales = {task: Scale(0.2, 0.5), "bits": Scale(-2.0, 0.5)}
    return Objective({task: 1.0, "bits": 1.0}, scales, guards=(Guard("safe", "base", 0.5, 0.1),))


def _trials(config: Config, task: str, hostile: str, count: int) -> list[Trial]:
    stated: list[tuple[str | None, str, Any]] = [
        ("base", "baselines", single_rule("task_arithmetic", weight=0.0)),
        ("math", "baselines", single_rule("linear", weight={"math": 1.0, "code": 0.0})),
        ("code", "baselines", single_rule("linear", weight={"math": 0.0, "code": 1.0})),
        ("average", "baselines", single_rule("linear", weight=1.0)),
        (f"ties 0.2 {hostile}".strip(), "baselines", single_rule("ties", density=0.2)),
        (None, "greedy_soup", single_rule("linear", ["math"], weight=1.0)),
    ]
    for place in range(count):
        by_depth = [
            {"layers": (0, 1), "method": "ties", "parameters": {"weight": {"math": 0.1 * place, "code": -0.2}}},
            {"method": "ties", "parameters": {"weight": [0.5, 0.25], "density": 0.1 + 0.05 * place}},
        ]
        stated.append((None, "study", tuple(by_depth)))
    found = []
    for number, (name, strategy, rules) in enumerate(stated):
        recipe = config.recipe(rules) if name else config.model_copy().recipe(rules)
        failed = number == 7
        start = BEGUN + timedelta(minutes=3 * number)
        scored = {} if failed else _tasks(task, number)
        found.append(
            Trial(
                number=number,
                state=State.FAILED if failed else State.COMPLETE,
                strategy=strategy,
                name=name,
                recipe_data=recipe.dump(),
                recipe_id=recipe.id,
                scores=scored,
                error=f"made NaN {hostile}" if failed else None,
                merge_seconds=2.0,
                score_seconds=60.0 + number,
                learning_documents=30 if strategy == "greedy_soup" else 0,
                learning_seconds=20.0 if strategy == "greedy_soup" else None,
                machine={"device": "cpu", "torch": f"2.6 {hostile}"},
                worker="host-1",
                taken=start,
                settled_at=start + timedelta(minutes=2),
                begun_at=start,
                ended_at=start + timedelta(minutes=2),
                params={"ties.weight.math": 0.1 * number} if strategy == "study" else {},
            )
        )
    return found


def _tasks(task: str, number: int) -> dict[str, TaskScore]:
    quiz, bits = _values(number, 0)
    return {
        task: TaskScore(float(quiz.mean()), 0.05, DOCUMENTS, "acc"),
        "bits": TaskScore(float(bits.mean()), 0.04, DOCUMENTS, "loss", higher_is_better=False),
        "safe": TaskScore(0.3 if number == 6 else 0.6, 0.05, DOCUMENTS, "acc"),
    }


def _values(number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64([number, side]))
    quiz = (draw.random(DOCUMENTS) < 0.2 + 0.04 * number).astype(np.float64)
    return quiz, 2.0 - 0.05 * number + 0.1 * draw.random(DOCUMENTS)


def _scores(trial: Trial, side: int) -> Scores:
    quiz, bits = _values(trial.number, side)
    names = list(trial.scores)
    ids = list(range(DOCUMENTS))
    safe = np.full(DOCUMENTS, trial.scores["safe"].value)
    tasks = {
        names[0]: TaskScore(float(quiz.mean()), 0.05, DOCUMENTS, "acc"),
        "bits": TaskScore(float(bits.mean()), 0.04, DOCUMENTS, "loss", higher_is_better=False),
        "safe": TaskScore(float(safe.mean()), 0.0, DOCUMENTS, "acc"),
    }
    values = {names[0]: quiz, "bits": bits, "safe": safe}
    return Scores(tasks, {name: DocumentScores(ids, of, "mean") for name, of in values.items()})


def _report(run: Run, trials: Sequence[Trial], objective: Objective) -> Any:
    best = run.best()
    assert best is not None
    shown = [record for record in run.records if record.name or record.number == best.number]
    kept = HoldoutScores(run.folder.holdout)
    entries = []
    for record in shown:
        scores = _scores(trials[record.number], 1)
        kept.save(record, scores)
        entries.append(Entry(record, scores, objective.value(scores.tasks)))
    question = Question(
        run.config.name, best.number, {SINGLE: _number(run.records, "code"), AVERAGE: _number(run.records, "average")},
        objective.factors(best.scores), guards={"safe": (0, 0.1)},
    )  # fmt: skip
    return build(question, entries, draws=200)


def _number(records: Sequence[Record], name: str) -> int:
    return next(record.number for record in records if record.name == name)
