"""Documents of the holdout on which the winner and the best single model differ, with both answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.commands.holdout import Asker
from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores, Scores
from mergesearch.evaluate.telling import answered, asked
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.record import Record
from mergesearch.results.report.finalists import Finalists
from mergesearch.results.report.holdout import HoldoutScores
from mergesearch.schema import read_json
from mergesearch.search.store import RunFolder, write_atomically

_DAMAGED = "remove it, and `mergesearch report` makes it again"


def kept_examples(folder: RunFolder) -> list[dict[str, Any]]:
    """What the last report kept; nothing where it kept none.

    Raises:
        UserError: the file is damaged.
    """
    file = _file(folder)
    return list(read_json(file, _DAMAGED)["examples"]) if file.is_file() else []


def keep_examples(run: Run, chosen: Finalists, count: int, most: int | None, asker: Asker) -> None:
    """Asks the winner and the best single model again about documents on which they differ, and keeps both answers in
    `holdout/examples.json`. Nothing is asked where that was done before.

    Args:
        run: the run.
        chosen: its finalists, scored on the holdout.
        count: how many documents; 0 keeps what is there.
        most: documents of each task that the report goes by; None for all.
        asker: loads what is needed, once.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: one of the two cannot be built or asked any more.
    """
    winner, single = chosen.winner, chosen.single
    if not count or single is None or winner.number == single.number:
        return
    scored = HoldoutScores(run.folder.holdout)
    ours, theirs = scored.load(winner, "", most), scored.load(single, "", most)
    if ours is None or theirs is None:
        return
    about = {"winner": winner.recipe_id, "single": single.recipe_id, "count": count, "most": most}
    file = _file(run.folder)
    if file.is_file() and read_json(file, _DAMAGED)["about"] == about:
        return
    picked = pick(ours, theirs, count)
    if not picked:
        write_atomically(file, json.dumps({"about": about, "examples": []}) + "\n")
        return
    asker.say(f"asking again about {len(picked)} documents on which the winner and {single.name} differ")
    answers = [_answers(record, picked, asker) for record in (winner, single)]
    examples = [
        {
            "task": task,
            "document": document,
            "prompt": answers[0][task, document]["prompt"],
            "target": answers[0][task, document]["target"],
            "against": single.name or "",
            "ours": _side(ours, task, document, answers[0]),
            "theirs": _side(theirs, task, document, answers[1]),
        }
        for task, document in picked
        if (task, document) in answers[0] and (task, document) in answers[1]
    ]
    write_atomically(file, json.dumps({"about": about, "examples": examples}, indent=1) + "\n")


def pick(ours: Scores, theirs: Scores, count: int) -> list[tuple[str, int]]:
    """(task, document) of those that differ most, one task after another in turns, and in each task in turns one that
    the winner has better and one that it has worse.

    Tasks whose documents have no values of their own are left out.
    """
    queues = []
    for task, documents in ours.documents.items():
        if task not in theirs.documents:
            continue
        sign = 1.0 if ours.tasks[task].higher_is_better else -1.0
        differences = {n: sign * d for n, d in _differences(documents, theirs.documents[task]).items() if d}
        better = sorted((n for n, d in differences.items() if d > 0), key=lambda n: (-differences[n], n))
        worse = sorted((n for n, d in differences.items() if d < 0), key=lambda n: (differences[n], n))
        queues.append([(task, n) for n in _in_turns([better, worse])])
    return _in_turns(queues)[:count]


def _in_turns(queues: Sequence[Sequence[Any]]) -> list[Any]:
    longest = max(map(len, queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


def _differences(ours: DocumentScores, theirs: DocumentScores) -> dict[int, float]:
    """Document -> ours minus theirs."""
    if ours.aggregation == statistics.JACKKNIFE:
        return {}
    other = dict(zip(theirs.ids, _each(theirs), strict=True))
    return {n: float(v - other[n]) for n, v in zip(ours.ids, _each(ours), strict=True) if n in other}


def _each(scores: DocumentScores) -> np.ndarray:
    """One number for each document: of a ratio, the document's own in the metric's direction."""
    values = np.asarray(scores.values, dtype=np.float64)
    if values.ndim == 1:
        return values
    ratios = values[:, 0] / np.where(values[:, 1] == 0, 1, values[:, 1])
    return np.array([float(statistics.from_ratio(ratio, scores.aggregation)) for ratio in ratios])


def _side(
    scores: Scores, task: str, document: int, answers: Mapping[tuple[str, int], Mapping[str, str]]
) -> dict[str, str]:
    documents = scores.documents[task]
    value = _each(documents)[documents.ids.index(document)]
    return {"value": f"{value:.4g}", "answer": answers[task, document]["answer"]}


def _answers(record: Record, picked: Sequence[tuple[str, int]], asker: Asker) -> dict[tuple[str, int], dict[str, str]]:
    engine, scorer = asker.engine, asker.first
    wanted: dict[str, list[int]] = {label: [] for label in asker.holdout}
    for task, document in picked:
        wanted[task].append(document)
    engine.rebuild(recipe_of(record))
    part = scorer.only(wanted)
    part.answer()
    found = {}
    for document in part.documents():
        asking = asked(document)
        told = {"prompt": asking.prompt, "target": asking.target, "answer": answered(document)}
        found[document.task.label, document.number] = told
    return found


def _file(folder: RunFolder) -> Path:
    return folder.holdout / "examples.json"
