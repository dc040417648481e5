"""Whether a run's models and documents are still those that it was scored with: what `run`, `export`, `report` and
`score` ask before they go by its scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.checkpoints import Source, digests, locate
from mergesearch.checkpoints.digests import Digest, Memory, Stamps
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.evaluate.digests import document_digests
from mergesearch.evaluate.tasks import Task
from mergesearch.search.store import RunFolder

log: logging.Logger = logging.getLogger(__name__)

# the option that lets a run go on with what was changed
ALLOW = "--allow-changed"
# in the study's note
PARENTS, TASKS = "parents", "tasks"
# in the run folder: digests by what the file system says of the files
MEMORY = "digests.json"


@dataclass
class Originals:
    """The models and documents that a configuration names, beside what a run noted of those that it was scored with.

    Attributes:
        config: the configuration.
        noted: what the run noted, as `note` gives it; empty for one that has not begun, or is older than such notes.
        allowed: whether what was changed is only warned of.
        say: told what was changed, where that is allowed.
    """

    config: Config
    noted: Mapping[str, Any]
    allowed: bool = False
    say: Callable[[str], None] = log.warning

    def __post_init__(self) -> None:
        self._memory = Memory(Path(self.config.folder) / MEMORY)
        self._seen: dict[str, Stamps] = {}

    def check(self, tasks: Sequence[Task] = (), parents: Iterable[str] | None = None) -> tuple[str, ...]:
        """What was changed, a sentence each.

        Args:
            tasks: loaded; those that the run knows are compared.
            parents: `base_model`, `models.NAME`; None for all of the configuration.

        Raises:
            UserError: something was changed, and that is not allowed.
        """
        found = (*self._parents(parents), *self._tasks(tasks))
        if found and not self.allowed:
            folder = RunFolder(self.config.folder).path
            raise UserError(
                f"{found[0]} the run in {folder} was scored with: put the old ones back, set output and name to new "
                f"ones to begin again, or say {ALLOW}"
            )
        sentences = tuple(f"{sentence} the run was scored with before" for sentence in found)
        for sentence in sentences:
            self.say(f"warning: {sentence}")
        return sentences

    def note(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What is to be noted of a run that is going to be scored with these: what was noted already stays."""
        noted = self.noted.get(PARENTS, {})
        fresh = {w: s for w, s in self._sources().items() if w not in noted}
        parents = {where: digests.digest(source, where, self._memory).to_data() for where, source in fresh.items()}
        known = self.noted.get(TASKS, {})
        documents = document_digests([task for task in tasks if task.label not in known])
        return {PARENTS: {**parents, **noted}, TASKS: {**documents, **known}}

    def watch(self) -> None:
        """Remembers the state of the files before they are loaded."""
        self._seen = {where: digests.stamps(source, where) for where, source in self._sources().items()}

    def watched(self) -> None:
        """`UserError` where a file was written since `watch`: nobody knows then which weights were loaded."""
        for where, source in self._sources().items():
            if digests.stamps(source, where) != self._seen[where]:
                raise UserError(
                    f"{where}: the weights in {source.path} were written while they were loaded: start again"
                )

    def named(self, references: Iterable[str]) -> list[str]:
        """Which parents of the run are among references, however these are written."""
        asked = {_identity(locate(reference, "MODEL")) for reference in references}
        return [where for where, source in self._sources().items() if _identity(source) in asked]

    def _sources(self) -> dict[str, Source]:
        models = {f"models.{name}": reference for name, reference in self.config.models.items()}
        references = {"base_model": self.config.base_model, **models}
        return {where: locate(reference, where) for where, reference in references.items()}

    def _parents(self, asked: Iterable[str] | None) -> list[str]:
        noted, sources = self.noted.get(PARENTS, {}), self._sources()
        changed = []
        for where in sources if asked is None else asked:
            if where not in noted:
                continue
            how = digests.difference(sources[where], where, Digest.from_data(noted[where]), self._memory)
            if how:
                changed.append(
                    f"{where}: the weights in {sources[where].path} were changed ({how}) and are not those that"
                )
        return changed

    def _tasks(self, tasks: Sequence[Task]) -> list[str]:
        noted = self.noted.get(TASKS, {})
        found = document_digests([task for task in tasks if task.label in noted])
        return [
            f"task {label!r}: its documents were changed ({_how(noted[label], now)}) and are not those that"
            for label, now in found.items()
            if now != noted[label]
        ]


def _how(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["documents"] != now["documents"]:
        return f"{now['documents']} instead of {before['documents']}"
    return "as many with other fields"


def _identity(source: Source) -> tuple[str, ...]:
    return tuple(str(folder.resolve()) if folder else "" for folder in (source.folder, source.adapter))
