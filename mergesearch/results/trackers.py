"""Weights & Biases, MLflow and TensorBoard, each by its own client: one run of theirs for each trial."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mergesearch.config.track import TrackConfig
from mergesearch.errors import UserError

# MLflow takes no longer values of parameters
_LONGEST = 500


@dataclass(frozen=True)
class TrackedRow:
    """One trial as a tracker keeps it.

    Attributes:
        number: the trial's.
        name: what it is called: a baseline's name, else its methods.
        state: how it ended.
        figures: `objective` and each task's figure, as far as there are any.
        parameters: numbers and words of its recipe.
        words: what else is said of it: strategy, recipe id, why it failed.
    """

    number: int
    name: str
    state: str
    figures: Mapping[str, float]
    parameters: Mapping[str, float | str]
    words: Mapping[str, str]

    @property
    def title(self) -> str:
        """Its number and its name."""
        return f"trial {self.number}: {self.name}"


class Tracker(Protocol):
    """Where trials are told to."""

    def add(self, row: TrackedRow) -> None:
        """Keeps a trial that has ended."""

    def verdict(self, sentence: str) -> None:
        """Keeps what the run came to."""


def check_installed(config: TrackConfig) -> None:
    """`UserError` where the tracker's client is not installed."""
    if importlib.util.find_spec(config.to) is None:
        raise UserError(f"track names {config.to}, which is not installed: pip install 'mergesearch[{config.to}]'")


def tracker_of(config: TrackConfig, run: str, folder: Path) -> Tracker:
    """The tracker that a configuration names.

    Args:
        run: the run's name.
        folder: the run folder, where trackers that keep files have theirs unless `where` names another place.

    Raises:
        UserError: its client is not installed.
    """
    check_installed(config)
    kinds: dict[str, Callable[[TrackConfig, str, Path], Tracker]] = {
        "wandb": _Wandb, "mlflow": _Mlflow, "tensorboard": _TensorBoard
    }  # fmt: skip
    return kinds[config.to](config, run, folder)


class _Wandb:
    """A run of W&B for each trial, grouped by the search; the verdict is one more."""

    def __init__(self, config: TrackConfig, run: str, folder: Path):
        self._project, self._group = config.project or run, run
        self._folder = Path(config.where) if config.where else folder

    def add(self, row: TrackedRow) -> None:
        """A run with the parameters as its configuration and the figures as its summary."""
        settings = {**row.parameters, **row.words, "trial": row.number, "state": row.state}
        self._keep(row.title, row.words.get("strategy") or row.state, settings, row.figures)

    def verdict(self, sentence: str) -> None:
        """A run named `verdict`."""
        self._keep("verdict", "verdict", {}, {"verdict": sentence})

    def _keep(self, name: str, kind: str, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project, group=self._group, name=name, job_type=kind, config=dict(settings),
            dir=str(self._folder), reinit="create_new", settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        run.summary.update(dict(summary))
        run.finish()


class _Mlflow:
    """A run of MLflow for each trial, in an experiment for the search; the verdict is the experiment's note."""

    def __init__(self, config: TrackConfig, run: str, folder: Path):
        from mlflow import MlflowClient

        own = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=config.where or os.environ.get("MLFLOW_TRACKING_URI") or own)
        self._name, self._artifacts = config.project or run, (folder / "mlartifacts").absolute().as_uri()
        self._id: str | None = None

    def add(self, row: TrackedRow) -> None:
        """A run with parameters, metrics and tags."""
        from mlflow.entities import Metric, Param, RunTag

        run = self._client.create_run(self._experiment(), run_name=row.title)
        parameters = [Param(_key(name), str(value)[:_LONGEST]) for name, value in row.parameters.items()]
        metrics = [Metric(_key(name), value, run.info.start_time, row.number) for name, value in row.figures.items()]
        tags = {**row.words, "trial": str(row.number), "state": row.state}
        kept = [RunTag(_key(name), value) for name, value in tags.items()]
        self._client.log_batch(run.info.run_id, metrics, parameters, kept)
        self._client.set_terminated(run.info.run_id, "FAILED" if row.state == "failed" else "FINISHED")

    def verdict(self, sentence: str) -> None:
        """The note at the head of the experiment."""
        self._client.set_experiment_tag(self._experiment(), "mlflow.note.content", sentence)

    def _experiment(self) -> str:
        if self._id is None:
            there = self._client.get_experiment_by_name(self._name)
            self._id = there.experiment_id if there is not None else self._client.create_experiment(self._name)
        return self._id


def _key(name: str) -> str:
    """A name as MLflow takes it."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


class _TensorBoard:
    """A folder for each trial, with figures and the table of parameters; the verdict is a text."""

    def __init__(self, config: TrackConfig, run: str, folder: Path):
        self._folder = Path(config.where) if config.where else folder / "tensorboard"

    def add(self, row: TrackedRow) -> None:
        """The row of TensorBoard's table of parameters, and each figure over the trials' numbers."""
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(self._folder)) as writer:
            parameters = {**row.parameters, "state": row.state, "name": row.name}
            writer.add_hparams(parameters, dict(row.figures), run_name=f"trial-{row.number}", global_step=row.number)
            if row.words:
                text = "\n\n".join(f"{name}: {value}" for name, value in row.words.items())
                writer.add_text(f"trial {row.number}", text, row.number)

    def verdict(self, sentence: str) -> None:
        """A text named `verdict`."""
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(self._folder)) as writer:
            writer.add_text("verdict", sentence)
