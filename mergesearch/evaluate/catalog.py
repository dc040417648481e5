"""Finding lm-eval tasks by name, in the user's folders before lm-eval's own, and refusing what cannot work early."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import lm_eval.tasks
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from mergesearch.errors import UserError, nearest, unknown

_LM_EVAL = Path(lm_eval.tasks.__file__).parent


def find(names: Sequence[str], include_path: Sequence[str], metadata: Mapping[str, Any] | None = None) -> TaskManager:
    """A TaskManager that knows every name: tasks, groups, tags, or YAML files.

    lm-eval's own tasks are indexed only where a name needs them: that takes more than ten seconds.

    Raises:
        UserError: a folder of `include_path` is not there, a name is unknown, or a task of the user's names a metric
            that lm-eval does not have.
    """
    folders = [*_zoo_tasks(), *map(str, include_path)]
    missing = next((folder for folder in folders if not Path(folder).is_dir()), None)
    if missing is not None:
        raise UserError(f"include_path names {missing!r}, which is no folder: give the folder of the tasks' YAML files")
    manager = TaskManager(include_defaults=False, include_path=[*folders], metadata=dict(metadata or {}))
    if not all(_complete(manager.task_index, name) for name in names):
        manager = _with_lm_evals_own(tuple(folders), tuple((metadata or {}).items()), _stamps(folders))
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise _unknown_task(name, manager, folders)
        for entry in _leaves(manager.task_index, name):
            _check_metrics(entry)
    return manager


@functools.lru_cache(maxsize=1)
def _with_lm_evals_own(
    folders: tuple[str, ...], metadata: tuple[tuple[str, Any], ...], stamps: frozenset[tuple[str, int]]
) -> TaskManager:
    """The index of all tasks, kept while none of the user's files changes: one command may ask for it several times."""
    return TaskManager(include_defaults=True, include_path=[*folders], metadata=dict(metadata))


def _stamps(folders: Sequence[str]) -> frozenset[tuple[str, int]]:
    """When each task file of the user's was last written."""
    files = (path for folder in folders for path in Path(folder).glob("**/*.yaml"))
    return frozenset((str(path), path.lstat().st_mtime_ns) for path in files)


def _zoo_tasks() -> list[str]:
    """The demo zoo's tasks, which need no include_path; nothing where the zoo is not installed."""
    try:
        from mergesearch import zoo

        folder = zoo.folder() / "tasks"
    except (ImportError, AttributeError):
        return []
    return [str(folder)] if folder.is_dir() else []


def _members(entry: Entry | None) -> list[Any]:
    members = (entry.cfg or {}).get("task") if entry is not None and entry.kind is Kind.GROUP else None
    if entry is not None and entry.kind is Kind.TAG:
        return sorted(entry.tags)
    return [m.get("task", m.get("group")) if isinstance(m, dict) else m for m in members or []]


def _complete(index: Mapping[str, Entry], name: Any) -> bool:
    """Whether a name, and for a group all its members, stand in the index; an inline member counts as absent."""
    if not isinstance(name, str) or name not in index:
        return isinstance(name, str) and Path(name).is_file()
    return all(_complete(index, member) for member in _members(index[name]))


def _leaves(index: Mapping[str, Entry], name: Any) -> Iterator[Entry]:
    entry = index.get(name) if isinstance(name, str) else None
    if entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK):
        yield entry
    for member in _members(entry):
        yield from _leaves(index, member)


def _check_metrics(entry: Entry) -> None:
    """lm-eval looks an unknown metric up on a hub and fails obscurely; its own tasks are left to it."""
    config = entry.cfg or {}
    if entry.yaml_path is None or entry.yaml_path.is_relative_to(_LM_EVAL) or config.get("process_results"):
        return
    for metric in config.get("metric_list") or []:
        name = metric.get("metric")
        # an absolute path stands for a function (!function)
        ours = isinstance(name, str) and not metric.get("hf_evaluate") and not os.path.isabs(name)
        if ours and name not in METRIC_REGISTRY:
            raise unknown("metric", name, METRIC_REGISTRY.keys(), str(entry.yaml_path))


def _unknown_task(name: str, manager: TaskManager, folders: Sequence[str]) -> UserError:
    close = nearest(name, manager.all_tasks)
    hint = f": did you mean {close!r}?" if close else ""
    broken = _broken_yaml(folders)
    also = f"; {broken} could not be read" if broken else ""
    return UserError(
        f"unknown task {name!r}{hint} (searched lm-eval's own tasks and {', '.join(folders) or 'no include_path'}; "
        f"`lm_eval ls tasks` lists what lm-eval has{also})"
    )


def _broken_yaml(folders: Sequence[str]) -> str | None:
    """The first task file that lm-eval's index skipped in silence, with the reason in short."""
    for path in (path for folder in folders for path in sorted(Path(folder).glob("**/*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            return f"{path} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None
