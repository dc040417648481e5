"""Which Python the user's tasks would run, read from their YAML files without running any of it.

lm-eval loads functions that a task's YAML names (`!function utils.score`): it imports the file beside it, or any module
that can be imported; `hf_evaluate: true` runs a metric's script, and data of the format `pandas` are pickles. lm-eval's
own tasks and the demo zoo's are code that is installed, and trusted as that. Templates are no door: see
`surroundings.sandbox_templates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import _Base

from mergesearch.errors import UserError
from mergesearch.evaluate import catalog
from mergesearch.evaluate.leaves import reason

_FUNCTION = "!function"
_LM_EVAL = Path(lm_eval.tasks.__file__).parent.resolve()


@dataclass(frozen=True)
class TaskCode:
    """Python that a task would run.

    Attributes:
        task: the task or group whose YAML names it.
        yaml: the file that names it, and `line` where, from 1.
        source: the Python file, or the name of a module that is no file beside the YAML.
        function: what of it is called.
    """

    task: str
    yaml: Path
    line: int
    source: str
    function: str


def code_of(names: Sequence[str], include_path: Sequence[str]) -> dict[str, list[TaskCode]]:
    """For each of the names that runs Python of the user's: what it runs.

    Raises:
        UserError: as `catalog.find`.
    """
    manager = catalog.find(names, include_path)
    found = {name: list(dict.fromkeys(_code_of(manager, name, set()))) for name in names}
    return {name: code for name, code in found.items() if code}


def refuse(found: Iterable[TaskCode]) -> None:
    """`UserError` for the first piece of code, with the file, the function and where it is named."""
    for code in found:
        raise UserError(
            f"task {code.task!r} runs Python, {code.function} of {code.source} ({code.yaml}, line {code.line}), and "
            "trust_tasks is false: read that code and set trust_tasks to true, or leave the task out"
        )


def words(found: Iterable[TaskCode]) -> str:
    """What is run, file by file: `/tasks/utils.py: load, score; os: getpid`."""
    functions: dict[str, dict[str, None]] = {}
    for code in found:
        functions.setdefault(code.source, {})[code.function] = None
    return "; ".join(f"{source}: {', '.join(names)}" for source, names in functions.items())


def _code_of(manager: TaskManager, name: Any, seen: set[str]) -> Iterator[TaskCode]:
    if not isinstance(name, str) or name in seen:
        return
    seen.add(name)
    entry = catalog.entry(manager.task_index, name)
    path = entry.yaml_path if entry is not None else Path(name)
    if path is not None and path.is_file():
        yield from _in_file(name, path, set())
    for member in catalog.members(entry):
        yield from _code_of(manager, member, seen)


def _is_installed(path: Path) -> bool:
    folders = [_LM_EVAL, *(Path(folder).resolve() for folder in catalog.zoo_tasks())]
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def _in_file(task: str, path: Path, seen: set[Path]) -> Iterator[TaskCode]:
    """The code that a YAML file names, and the files that it includes.

    It is read as lm-eval reads it, by the same parser from the same bytes: what one could read and the other not would
    hide code.
    """
    path = path.expanduser().resolve()
    if path in seen or _is_installed(path):
        return
    seen.add(path)
    try:
        with path.open("rb") as file:
            root = yaml.compose(file, Loader=_Base)
    except Exception as error:
        raise UserError(
            f"task {task!r}: {path} cannot be read ({reason(error)}): mend it, or leave the task out"
        ) from error
    included: list[str] = []
    for node in _nodes(root):
        if node.tag == _FUNCTION:
            source, function = _place(str(node.value), path.parent)
            yield TaskCode(task, path, node.start_mark.line + 1, source, function)
        keys = _keys(node)
        if str(getattr(keys.get("hf_evaluate"), "value", "")).lower() in ("true", "yes", "on"):
            metric = getattr(keys.get("metric"), "value", None)
            yield TaskCode(task, path, node.start_mark.line + 1, "evaluate", f"load({metric!r})")
        if getattr(keys.get("dataset_path"), "value", None) == "pandas":  # a pickle is a program
            yield TaskCode(task, path, node.start_mark.line + 1, "pandas", "read_pickle")
        included += _texts(keys.get("include"))
    for other in included:
        yield from _in_file(task, path.parent / other, seen)


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in reversed(node.value) for part in reversed(pair))
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(reversed(node.value))


def _keys(node: yaml.Node | None) -> dict[Any, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _texts(node: yaml.Node | None) -> list[str]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [each.value for each in nodes if isinstance(each, yaml.ScalarNode)]


def _place(spec: str, folder: Path) -> tuple[str, str]:
    """(file or module, function) as lm-eval finds what a `!function` names."""
    module, _, function = spec.rpartition(".")
    file = (folder / f"{module.replace('.', '/')}.py").resolve()
    return (str(file) if file.exists() else module), function
