"""The tasks that `mergesearch init` writes down: each loaded at once, as the run will load it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergesearch import zoo
from mergesearch.commands.given import Given
from mergesearch.commands.questions import Questions
from mergesearch.config import TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate import catalog, task_code
from mergesearch.evaluate.leaves import aggregations, filters
from mergesearch.evaluate.surroundings import lm_eval_seeds, quiet
from mergesearch.evaluate.tasks import Task, load


def include_path_of(given: Given, questions: Questions | None) -> list[str]:
    """The folders of the user's tasks, as they were typed; `UserError` for one that is not there."""

    def check(typed: str) -> list[str]:
        folders = [typed] if typed else []
        gone = next((folder for folder in folders if not Path(folder).expanduser().is_dir()), None)
        if gone is not None:
            raise UserError(f"no folder {gone!r}: give the folder of your tasks' YAML files, or nothing")
        return folders

    if given.include_path or given.tasks or questions is None:
        return [folder for typed in given.include_path for folder in check(typed)]
    if (given.base or "").startswith("zoo:"):
        return []
    return questions.text("\nA folder with lm-eval tasks of your own (empty: none)", check)


class ChosenTasks:
    """Tasks by the names that were typed, each loaded as the run will load it."""

    def __init__(
        self,
        include_path: Sequence[str],
        tokenizer: str,
        questions: Questions | None,
        say: Callable[[str], None],
    ):
        self.include_path: list[str] = [str(Path(folder).expanduser().absolute()) for folder in include_path]
        self.tokenizer: str = tokenizer
        self.questions: Questions | None = questions
        self.say: Callable[[str], None] = say
        self.found: list[Task] = []
        # what is known without lm-eval's own tasks
        self.light: Any = catalog.find([], self.include_path)
        self._indexed: bool = False

    def choose(self, given: Given, base: str) -> list[Task]:
        """Those that were given; else those that are proposed or answered, for a base of that reference."""
        for typed in given.tasks:
            self.add(typed)
        here = [] if self.found else self._here(base)
        if here and (self.questions is None or self.questions.yes(f"\nScore candidates on {', '.join(here)}?")):
            for name in here:
                self.add(name)
        if not self.found and self.questions is not None:
            self._ask(here)
        return self.found

    def _ask(self, here: Sequence[str]) -> None:
        assert self.questions is not None
        also = f", or of these: {', '.join(here)}" if here else ""
        self.questions.say(
            f"\nThe tasks that a merge shall be good at, one by one: a name that lm-eval knows (gsm8k, hellaswag, "
            f"...){also}. Their mean counts. An empty line ends the list."
        )

        def one(typed: str) -> bool:
            if not typed and not self.found:
                raise UserError("one task at least: `lm_eval ls tasks` lists what lm-eval has")
            if typed:
                self.add(typed)
            return bool(typed)

        while self.questions.text(f"  task {len(self.found) + 1}", one):
            pass

    def _here(self, base: str) -> list[str]:
        """The tasks in the user's folders, and the zoo's for a base of the zoo."""
        folders = [Path(folder).resolve() for folder in self.include_path]
        if base.startswith("zoo:"):
            folders.append(zoo.folder() / "tasks")
        paths = {name: self.light.task_index[name].yaml_path for name in self.light.all_subtasks}
        return [
            name
            for name, path in sorted(paths.items())
            if path is not None and any(path.resolve().is_relative_to(folder) for folder in folders)
        ]

    def add(self, typed: str) -> None:
        """Loads a task, asking for its metric where it has several; `UserError` where that cannot be."""
        name, metric = self._parsed(typed)
        if any(task.label == name for task in self.found):
            raise UserError(f"task {name!r} is there already: list each task once")
        slow = not self._indexed and name not in self.light.task_index and not Path(name).is_file()
        self._indexed = self._indexed or slow
        self.say(f"loading {name}{', after the index of lm-eval: half a minute, once' if slow else ''}")
        for code in task_code.code_of([name], self.include_path).values():
            self.say(f"note: {name} runs Python of its own, {task_code.words(code)}")
        try:
            self.found = self._load(name, metric)
        except UserError as error:
            choices = [] if metric else self._metrics(name)
            if len(choices) < 2:
                raise
            if self.questions is None:
                raise UserError(f"{error} (--task {name}:{choices[0]})") from None
            self.found = self._load(name, self.questions.one_of(f"    which metric of {name} counts?", choices))

    def _parsed(self, typed: str) -> tuple[str, str | None]:
        name, colon, metric = (part.strip() for part in typed.rpartition(":"))
        if not colon or Path(typed).is_file():
            name, metric = typed.strip(), ""
        # where a run is started from is not known, and a task's own file is looked for from there
        return (str(Path(name).absolute()) if Path(name).is_file() else name), metric or None

    def _load(self, name: str, metric: str | None) -> list[Task]:
        config = TaskConfig(task=name, metric=metric)
        return load([*(task.config for task in self.found), config], self.include_path, tokenizer=self.tokenizer)

    def _metrics(self, name: str) -> list[str]:
        """What the task may be counted by, as `metric` states it; nothing where it cannot be loaded."""
        try:
            with quiet(), lm_eval_seeds():
                metadata = {"pretrained": self.tokenizer, "tokenizer": self.tokenizer}
                manager = catalog.find([name], self.include_path, metadata)
                leaf = next(iter(manager.load([name])["tasks"].values()))
            several = filters(leaf)
            return [f"{m},{f}" if len(several) > 1 else m for m in aggregations(leaf) for f in several]
        except Exception:
            return []
