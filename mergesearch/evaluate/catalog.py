"""Finding lm-eval tasks by name, in the user's folders before lm-eval's own, and refusing what cannot work early."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import lm_eval.api.metrics
import lm_eval.tasks
import yaml
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import _Base, load_yaml

from mergesearch.errors import UserError, nearest, unknown
from mergesearch.evaluate.surroundings import sandbox_templates

_LEVELS = 1000
_LM_EVAL = Path(lm_eval.tasks.__file__).parent


def find(names: Sequence[str], include_path: Sequence[str], metadata: Mapping[str, Any] | None = None) -> TaskManager:
    """A TaskManager that knows every name: tasks, groups, tags, or YAML files.

    lm-eval's own tasks are indexed only where a name needs them: that takes more than ten seconds.

    Raises:
        UserError: a folder of `include_path` is not there, a name is unknown, or a task of the user's names a metric
            or an aggregation that lm-eval does not have.
    """
    sandbox_templates()
    folders = [*zoo_tasks(), *map(str, include_path)]
    missing = next((folder for folder in folders if not Path(folder).is_dir()), None)
    if missing is not None:
        raise UserError(f"include_path names {missing!r}, which is no folder: give the folder of the tasks' YAML files")
    for folder in folders:
        for path in Path(folder).glob("**/*.yaml"):
            _refuse_deep(path)
    for name in names:
        _refuse_deep(Path(name))
    manager = TaskManager(include_defaults=False, include_path=[*folders], metadata=dict(metadata or {}))
    if not all(_complete(manager.task_index, name) for name in names):
        manager = copy.copy(_with_lm_evals_own(tuple(folders), _stamps(folders)))
        manager.metadata = dict(metadata or {})
        manager._factory = TaskFactory(meta=manager.metadata)
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise _unknown_task(name, manager, folders)
        for leaf in _leaves(manager.task_index, name):
            _check_metrics(leaf)
    return manager


def entry(index: Mapping[str, Entry], name: Any) -> Entry | None:
    """What the index, or a YAML file, has under a name; None where neither has it, or it cannot be read."""
    if not isinstance(name, str) or name in index:
        return index.get(name) if isinstance(name, str) else None
    try:
        found = TaskIndex.entry_from_path(Path(name))
        return found and replace(found, cfg=load_yaml(Path(name), resolve_func=False))
    except Exception:  # loading it says what is wrong with it
        return None


def _refuse_deep(path: Path) -> None:
    """`UserError` for a YAML file that would end the process: lm-eval's parser recurses in C, without a limit."""
    if not path.is_file() or path.stat().st_size < 2 * _LEVELS:
        return
    level = 0
    with path.open("rb") as file, contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(file, Loader=_Base):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > _LEVELS:
                raise UserError(f"{path} goes more than {_LEVELS:,} levels deep: no task does, so take it away")


@functools.lru_cache(maxsize=1)
def _with_lm_evals_own(folders: tuple[str, ...], stamps: frozenset[tuple[str, int]]) -> TaskManager:
    """The index of all tasks, kept while none of the user's files changes: one command may ask for it several times."""
    return TaskManager(include_defaults=True, include_path=[*folders])


def _stamps(folders: Sequence[str]) -> frozenset[tuple[str, int]]:
    """When each task file of the user's was last written."""
    files = (path for folder in folders for path in Path(folder).glob("**/*.yaml"))
    return frozenset((str(path), path.lstat().st_mtime_ns) for path in files)


def zoo_tasks() -> list[str]:
    """The demo zoo's tasks, which need no include_path; nothing where the zoo is not installed."""
    try:
        from mergesearch import zoo

        folder = zoo.folder() / "tasks"
    except (ImportError, AttributeError):
        return []
    return [str(folder)] if folder.is_dir() else []


def members(entry: Entry | None) -> list[Any]:
    """The names that a group or a tag stands for, those in groups that are stated inside it among them."""
    if entry is not None and entry.kind is Kind.TAG:
        return sorted(entry.tags)
    return list(_named((entry.cfg or {}).get("task"))) if entry is not None and entry.kind is Kind.GROUP else []


def _named(stated: Any) -> Iterator[Any]:
    for member in stated if isinstance(stated, list) else ():
        if isinstance(member, dict) and "group" in member:
            yield member["group"]
            yield from _named(member.get("task"))
        else:
            yield member.get("task") if isinstance(member, dict) else member


def _complete(index: Mapping[str, Entry], name: Any) -> bool:
    """Whether a name, and for a group all its members, stand in the index; an inline member counts as absent."""
    if not isinstance(name, str) or name not in index:
        return isinstance(name, str) and Path(name).is_file()
    return all(_complete(index, member) for member in members(index[name]))


def _leaves(index: Mapping[str, Entry], name: Any) -> Iterator[Entry]:
    found = entry(index, name)
    if found is not None and found.kind in (Kind.TASK, Kind.PY_TASK):
        yield found
    for member in members(found):
        yield from _leaves(index, member)


def _check_metrics(entry: Entry) -> None:
    """lm-eval looks an unknown metric up on a hub and fails obscurely, and an unknown aggregation it calls at the end
    of the scoring; its own tasks are left to it."""
    config = entry.cfg or {}
    if entry.yaml_path is None or entry.yaml_path.is_relative_to(_LM_EVAL):
        return
    metrics = config.get("metric_list")
    for metric in metrics if isinstance(metrics, list) else []:
        if not isinstance(metric, dict):
            continue
        name, aggregation = metric.get("metric"), metric.get("aggregation")
        looked_up = not metric.get("hf_evaluate") and not config.get("process_results")
        if looked_up and _is_name(name) and name not in METRIC_REGISTRY:
            raise unknown("metric", name, METRIC_REGISTRY.keys(), str(entry.yaml_path))
        if _is_name(aggregation) and aggregation not in AGGREGATION_REGISTRY:
            raise unknown("aggregation", aggregation, AGGREGATION_REGISTRY.keys(), str(entry.yaml_path))


def _is_name(value: Any) -> TypeGuard[str]:
    """Whether lm-eval looks a value up in a registry: an absolute path stands for a function (!function)."""
    return isinstance(value, str) and not os.path.isabs(value)


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
