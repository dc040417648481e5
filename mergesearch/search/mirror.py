"""A copy of a run's study as optuna-dashboard shows it best; the run's own study is only read.

The run's study is made for workers: parents are told when all of them are scored, soups have no parameters, scores
stand in attributes. The copy has what a person looks for: names, parameters of every recipe, true times, notes and
artifacts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from mergesearch.errors import UserError

# beyond what any parameter is
_FAR = 1e6


@dataclass(frozen=True)
class Shown:
    """One trial for the dashboard.

    Attributes:
        number: in the run's study.
        state: `complete`, `pruned` or `failed`.
        values: what is maximised; empty unless it is complete.
        numbers, words: its parameters.
        attributes: what is shown beside them.
        begun, ended: when a worker took it, and when it was settled.
        note: Markdown.
        files: name -> content, its artifacts.
        excess: how far each guard is broken; 0 or less keeps it.
    """

    number: int
    state: str
    values: tuple[float, ...]
    numbers: Mapping[str, float]
    words: Mapping[str, str]
    attributes: Mapping[str, Any]
    begun: datetime | None
    ended: datetime | None
    note: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    excess: Mapping[str, float] = field(default_factory=dict)


_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Mirror:
    """The copy, in memory, with artifacts in a folder.

    Args:
        name: of the study.
        metrics: the names of what is maximised.
        choices: parameter -> all words that it may be.
        artifacts: the folder.

    Raises:
        UserError: optuna-dashboard is not installed.
    """

    def __init__(self, name: str, metrics: Sequence[str], choices: Mapping[str, Sequence[str]], artifacts: Path):
        try:
            import optuna_dashboard
        except ImportError:
            raise UserError("optuna-dashboard is not installed: pip install 'mergesearch[dashboard]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._dashboard = optuna_dashboard
        self._choices = choices
        self.artifacts: FileSystemArtifactStore = FileSystemArtifactStore(artifacts)
        self.storage: optuna.storages.InMemoryStorage = optuna.storages.InMemoryStorage()
        directions: list[optuna.study.StudyDirection] = [optuna.study.StudyDirection.MAXIMIZE] * len(metrics)
        self.study: optuna.Study = optuna.create_study(study_name=name, storage=self.storage, directions=directions)
        self.study.set_metric_names(list(metrics))
        self._there: set[int] = set()
        self._note = ""

    def add(self, shown: Sequence[Shown]) -> None:
        """Adds trials; those that are there already stay as they are."""
        for each in shown:
            if each.number not in self._there:
                self._there.add(each.number)
                self._add(each)

    def describe(self, note: str) -> None:
        """Says something of the whole run, in Markdown; in place of what was said before."""
        if note != self._note:
            self._note = note
            self._dashboard.save_note(self.study, note)

    def application(self) -> Any:
        """The dashboard as a WSGI application."""
        return self._dashboard.wsgi(self.storage, self.artifacts)

    def _add(self, shown: Shown) -> None:
        params: dict[str, Any] = {**shown.numbers}
        distributions: dict[str, BaseDistribution] = {name: FloatDistribution(-_FAR, _FAR) for name in shown.numbers}
        for name, word in shown.words.items():
            if word in self._choices.get(name, ()):
                params[name], distributions[name] = word, CategoricalDistribution(list(self._choices[name]))
        complete = shown.state == "complete"
        trial = optuna.trial.create_trial(
            state=_STATES[shown.state],
            values=list(shown.values) if complete else None,
            params=params,
            distributions=distributions,
            user_attrs={"trial": shown.number, **shown.attributes},
            system_attrs=self._uploaded(shown.files),
            constraints=dict(shown.excess) or None,
        )
        # what Optuna sets itself is when the copy was made
        trial.datetime_start = shown.begun or shown.ended or datetime.now()
        trial.datetime_complete = shown.ended or trial.datetime_start
        self.study.add_trial(trial)
        last = self.study.get_trials(deepcopy=False)[-1]
        self._dashboard.save_note(optuna.Trial(self.study, last._trial_id), shown.note)

    def _uploaded(self, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Stores files, and returns what a trial notes of them: what Optuna notes in a trial that is under way."""
        if not files:
            return {}
        study = optuna.create_study()
        trial = study.ask()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.write_bytes(content)
                upload_artifact(artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial)
        return dict(study.get_trials(deepcopy=False)[-1].system_attrs)
