"""What scoring one candidate gives: a figure for each task, and the values of every document; numpy only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch import leftovers


@dataclass(frozen=True)
class TaskScore:
    """One task's figure for one candidate.

    Attributes:
        value: the metric as lm-eval aggregates it.
        stderr: its standard error over documents; None where it has none.
        documents: how many documents it was measured on.
        metric: the metric's lm-eval name, `acc`.
        filter: the lm-eval filter it was taken after, mostly `none`.
        higher_is_better: whether more is better.
        truncated: the share of its prompts that lost their beginning, being longer than the model's context.
        cut: the share of its generated answers that ended at the token limit.
        gold: how probable what is right is, in [0, 1]: the mean probability of the right choice among the choices; of
            a task without choices the geometric mean of its targets' probabilities; None where its answers are texts.
        length: tokens that were generated for a document, the mean; None where no answer is generated.
    """

    value: float
    stderr: float | None
    documents: int
    metric: str
    filter: str = "none"
    higher_is_better: bool = True
    truncated: float = 0.0
    cut: float = 0.0
    gold: float | None = None
    length: float | None = None

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """One task's values, document by document.

    Attributes:
        ids: the documents, ascending; those that gave this metric.
        values: float64, [n], or [n, 2] (numerator, denominator) for ratios of sums such as bits_per_byte's
            (log-likelihood in nats, bytes).
        aggregation: how they become the figure, one of `statistics.AGGREGATIONS`.
        gold: float64, [n], the log-probability (nats) of what is right: of the right choice among the choices, or of
            the target text; NaN where it is not known; None where the answers are texts.
        length: float64, [n], the tokens that were generated for each, up to what ended the answer and with it; None
            where no answer is generated.
    """

    ids: list[int]
    values: np.ndarray
    aggregation: str
    gold: np.ndarray | None = None
    length: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one candidate, by task label; `seconds` is the wall-clock time that scoring took.

    >>> from mergesearch import load_run, score
    >>> scores = score("zoo:order", load_run("tiny").config)
    >>> scores.tasks["zoo_letters"].metric, len(scores.documents["zoo_letters"].ids)
    ('acc', 4)
    """

    tasks: Mapping[str, TaskScore]
    documents: Mapping[str, DocumentScores] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data; the documents go to a file of their own, see `save_documents`."""
        return {"tasks": {label: asdict(score) for label, score in self.tasks.items()}, "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], documents: Mapping[str, DocumentScores] | None = None) -> Scores:
        """What `to_json` gave, with the documents where they were loaded."""
        tasks = {label: TaskScore(**score) for label, score in data["tasks"].items()}
        return cls(tasks=tasks, documents=documents or {}, seconds=data["seconds"])

    def save_documents(self, path: str | Path) -> None:
        """Write the documents to one compressed .npz: the whole file or, when stopped in between, none.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        arrays: dict[str, np.ndarray] = {}
        for number, scores in enumerate(self.documents.values()):
            arrays[f"ids{number}"] = np.asarray(scores.ids, dtype=np.int64)
            arrays[f"values{number}"] = scores.values
            if scores.gold is not None:
                arrays[f"gold{number}"] = scores.gold
            if scores.length is not None:
                arrays[f"length{number}"] = scores.length
        contents = [[label, scores.aggregation] for label, scores in self.documents.items()]
        arrays["contents"] = np.array(json.dumps(contents))
        _write_atomically(Path(path), arrays)


def load_documents(path: str | Path) -> dict[str, DocumentScores]:
    """What `Scores.save_documents` wrote.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: the file is not one of ours, or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            contents = json.loads(str(arrays["contents"]))
            found = {
                label: DocumentScores(
                    arrays[f"ids{n}"].tolist(),
                    arrays[f"values{n}"],
                    aggregation,
                    arrays.get(f"gold{n}"),
                    arrays.get(f"length{n}"),
                )
                for n, (label, aggregation) in enumerate(contents)
            }
    except OSError:
        raise
    except Exception as error:  # zip, zlib, numpy and json each have errors of their own for what is damaged
        raise ValueError(f"{path} holds no document scores ({type(error).__name__})") from error
    if any(len(scores.ids) != len(scores.values) for scores in found.values()):
        raise ValueError(f"{path} holds no document scores (there are not as many values as documents)")
    return found


def _write_atomically(path: Path, arrays: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with leftovers.writing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
