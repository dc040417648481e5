"""What every ending is held to, whatever went wrong before it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults.server import HUNG, Ended

STATUSES = (0, 1, 2, 130)
# files that are there while a worker lives, or differ in name from one start to the next; and what spares reading files
# again that were left alone for a minute
_PASSING = re.compile(r"(\.lock|-wal|-shm|-journal)$|^workers/|^digests\.json$")
_UNKNOWN = re.compile(r"^error: \w+(\.\w+)*: .*MERGESEARCH_DEBUG|^error: [A-Z]\w+(Error|Exception)\b")


def said(ended: Ended, statuses: Iterable[int] = STATUSES) -> list[str]:
    """What is wrong with how a command ended and what it said."""
    if ended.status == HUNG:
        return ["it hangs"]
    printed, wrong = ended.out + ended.err, []
    if ended.status not in statuses:
        wrong.append(f"status {ended.status}")
    if "Traceback (most recent call last)" in printed or "Exception ignored" in printed:
        wrong.append(f"a traceback: {_last(printed)}")
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.status in (1, 2, 130) and not errors and "interrupted" not in printed:
        wrong.append(f"it ends with {ended.status} and no word: {_last(printed)}")
    if len(errors) > 1:
        wrong.append("more than one error")
    if errors and errors[-1] != errors[-1].rstrip():
        wrong.append(f"the sentence breaks off: {errors[-1]}")
    elif errors and ended.err.rstrip().splitlines()[-1] != errors[-1]:
        wrong.append(f"more than one line: {_last(ended.err)}")
    if any(_UNKNOWN.search(line) for line in errors):
        wrong.append(f"an exception's name: {errors[0]}")
    return wrong


def left(folder: Path) -> list[str]:
    """Partial files below `folder`."""
    hidden = [path for path in sorted(folder.rglob("*")) if path.name.startswith(".") or path.suffix == ".tmp"]
    return [f"left behind: {path.relative_to(folder)}" for path in hidden]


def state_of(folder: Path) -> dict[str, Any]:
    """All that a run came to: its trials, their documents' values, the winner's bytes, the names of its files."""
    from mergesearch.evaluate.scores import load_documents
    from mergesearch.results.loading import load_run

    try:
        found: dict[str, Any] = {"trials": [], "documents": {}, "best": None}
        for record in load_run(folder).records:
            scores = {label: score.value for label, score in record.scores.items()}
            found["trials"].append(
                [record.number, record.name, record.strategy, record.state, record.objective, record.recipe_id, scores]
            )
            if record.error:
                found.setdefault("errors", []).append(f"trial {record.number}: {record.error}")
        for file in sorted((folder / "scores").glob("*.npz")):
            try:
                values = {label: list(map(float, part.values)) for label, part in load_documents(file).items()}
            except Exception:
                values = {"unreadable": []}
            found["documents"][file.stem] = values
        best = folder / "best"
        if best.is_dir():
            found["best"] = {
                name: hashlib.sha256((best / name).read_bytes()).hexdigest()
                for name in ("model.safetensors", "recipe.yaml", "config.json", "tokenizer.json")
            }
        found["split"] = json.loads((folder / "documents.json").read_text())
        names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        found["files"] = sorted(name for name in names if not _PASSING.search(name))
        return json.loads(json.dumps(found))
    except Exception as error:
        return {"unreadable": f"{type(error).__name__}: {error}"}


def different(
    state: dict[str, Any] | None, expected: dict[str, Any], tasks_only: bool = False, but: str = ""
) -> list[str]:
    """Where a run differs from an undisturbed one.

    Args:
        tasks_only: whether a candidate may have failed by its own fault: then the objective and the winner may be
            others, and what was scored still equals.
        but: a trial whose documents may be lost.
    """
    if state is None:
        return ["no state"]
    if "unreadable" in state:
        return [f"the run cannot be read: {state['unreadable']}"]
    if tasks_only:
        theirs = {trial[0]: trial for trial in expected["trials"]}
        scored = [trial for trial in state["trials"] if trial[3] == "complete" and trial[0] in theirs]
        return [
            f"trial {trial[0]} differs: {trial[5:]}, else {theirs[trial[0]][5:]}"
            for trial in scored
            if trial[1] == theirs[trial[0]][1] and trial[5] == theirs[trial[0]][5] and trial[6] != theirs[trial[0]][6]
        ]
    wrong = [f"{error}" for error in state.get("errors", ())]
    if len(state["trials"]) != len(expected["trials"]):
        wrong.append(f"{len(state['trials'])} trials, else {len(expected['trials'])}")
    for ours, theirs in zip(state["trials"], expected["trials"], strict=False):
        if ours != theirs:
            wrong.append(f"trial {ours[0]} differs: {ours[1:]}, else {theirs[1:]}")
            break
    if set(expected["files"]) != set(state["files"]):
        wrong.append(f"other files: {sorted(set(expected['files']) ^ set(state['files']))[:5]}")
    wrong.extend(f"{key} differs" for key in ("best", "split") if state[key] != expected[key])
    ours, theirs = ({n: d for n, d in s["documents"].items() if n != but} for s in (state, expected))
    return wrong if ours == theirs else [*wrong, "documents differ"]


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]
