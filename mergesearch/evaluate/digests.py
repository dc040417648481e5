"""What tells a task's documents from others: their fields, and the examples that are shown before them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergesearch.evaluate.tasks import Task


def document_digests(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """Of each task, by its label: how many documents it has, and a digest of all of them, as plain data."""
    return {task.label: {"documents": task.size, "digest": _digest(task)} for task in tasks}


def _digest(task: Task) -> str:
    hashed = hashlib.sha256()
    for name, leaf in task.leaves.items():
        hashed.update(f"{name}\n".encode())
        _update(hashed, leaf.eval_docs)
        sampler = getattr(leaf, "sampler", None)
        if leaf.get_config("num_fewshot") and sampler is not None:
            hashed.update(b"examples\n")
            _update(hashed, sampler.df)
    return hashed.hexdigest()


def _update(hashed: Any, documents: Iterable[Any]) -> None:
    for document in documents:
        hashed.update(json.dumps(_plain(document), sort_keys=True, default=str).encode() + b"\n")


def _plain(value: Any) -> Any:
    """Equal for equal values in every process; of what has no such form, only the type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return type(value).__name__
