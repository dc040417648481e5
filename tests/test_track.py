"""`track:`: each tracker offline, by what its own reader finds, and when it is told what."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mergesearch import Config, run_search
from mergesearch.commands import track
from mergesearch.commands.track import TOLD, Tracking, check_trackers, row_of, tell_verdict
from mergesearch.config.track import TRACKERS, TrackConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.record import Record
from mergesearch.results.trackers import TrackedRow, tracker_of
from mergesearch.search.store import RunFolder

GIVEN: dict[str, Any] = {
    "name": "tiny",
    "base_model": "zoo:base",
    "models": {"order": "zoo:order", "letters": "zoo:letters"},
    "tasks": [{"task": "zoo_letters", "metric": "acc", "limit": 4}],
    "dtype": "float32",
    "scoring": "lm_eval",
    "search": {"strategy": "random", "trials": 0, "defaults": False},
}
ROWS = [
    TrackedRow(0, "base", "complete", {"objective": 0.0, "quiz acc": 0.25}, {}, {"strategy": "baselines"}),
    TrackedRow(1, "ties", "complete", {"objective": 0.5, "quiz acc": 0.75}, {"weight a": 0.4, "method": "ties"}, {}),
    TrackedRow(2, "ties", "failed", {}, {"weight a": 9.0, "method": "ties"}, {"error": "not finite"}),
]


def _record(number: int, state: str = "complete", **known: Any) -> Record:
    rules = [{"method": "task_arithmetic", "parameters": {"weight": {"a": 0.2, "b": 0.4}, "lambda": 1.5}}]
    recipe = {"base": "base", "models": {"a": "a", "b": "b"}, "rules": rules}
    scores = {"quiz": TaskScore(0.5, 0.1, 4, "acc")}
    return Record(number, None, state, 0.25, scores=scores, recipe=recipe, method="task_arithmetic", **known)


# --- the trackers -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_a_row_for_each_trial(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'mergesearch[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = tracker_of(TrackConfig(to="tensorboard"), "tiny", tmp_path)
    for row in ROWS:
        kept.add(row)
    kept.verdict("It is better.")
    folders = sorted(path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["trial-0", "trial-1", "trial-2"]
    read = EventAccumulator(str(folders[1])).Reload()
    assert [event.value for event in read.Scalars("objective")] == [0.5]
    assert [event.value for event in read.Scalars("quiz acc")] == [0.75]
    data = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"weight a" in data and b"ties" in data
    top = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (said,) = top.Tensors("verdict/text_summary")
    assert said.tensor_proto.string_val[0] == b"It is better."


def test_mlflow_has_a_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'mergesearch[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    kept = tracker_of(TrackConfig(to="mlflow", project="merges"), "tiny", tmp_path)
    for row in ROWS:
        kept.add(row)
    kept.verdict("It is better.")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("merges")
    assert experiment is not None and experiment.tags["mlflow.note.content"] == "It is better."
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: int(run.data.tags["trial"]))
    assert [run.info.run_name for run in runs] == ["trial 0: base", "trial 1: ties", "trial 2: ties"]
    assert runs[1].data.metrics == {"objective": 0.5, "quiz acc": 0.75}
    assert runs[1].data.params == {"weight a": "0.4", "method": "ties"}
    assert (runs[2].info.status, runs[2].data.tags["error"]) == ("FAILED", "not finite")


def test_wandb_has_a_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'mergesearch[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    kept = tracker_of(TrackConfig(to="wandb", where=str(tmp_path / "there")), "tiny", tmp_path)
    kept.add(ROWS[1])
    kept.verdict("It is better.")
    words = (b"trial 1: ties", b"weight a", b"quiz acc", b"It is better.")
    until, told = time.monotonic() + 60, b""
    while not all(word in told for word in words) and time.monotonic() < until:  # its own process writes the files
        time.sleep(0.1)
        files = sorted((tmp_path / "there" / "wandb").glob("offline-run-*/*.wandb"))
        told = b"".join(file.read_bytes() for file in files)
    assert len(files) == 2
    for word in words:
        assert word in told


def test_what_is_not_installed_is_said_before_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in TRACKERS else find(name))
    for name in TRACKERS:
        with pytest.raises(UserError, match=rf"mergesearch\[{name}\]"):
            run_search(Config(**GIVEN, output=str(tmp_path / "run"), track=[name]))
    assert not (tmp_path / "run").exists()


def test_trackers_are_named_once() -> None:
    config = Config(**GIVEN, track=["tensorboard", {"to": "tensorboard", "where": "there"}])
    with pytest.raises(UserError, match="twice"):
        check_trackers(config)


# --- what they are told -----------------------------------------------------------------------------------------------


class Fake:
    """A tracker that may be out of reach."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.said: list[str] = []
        self.broken = False

    def add(self, row: TrackedRow) -> None:
        if self.broken:
            raise ConnectionError("nobody there")
        self.rows.append(row.number)

    def verdict(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(track, "tracker_of", lambda *_: made)
    return made


def test_a_row_has_objective_tasks_and_parameters() -> None:
    row = row_of(_record(3, strategy="study", recipe_id="abc", infeasible="a guard"))
    assert row.title == "trial 3: task_arithmetic"
    assert row.figures == {"objective": 0.25, "quiz acc": 0.5}
    assert row.parameters == {"weight a": 0.2, "weight b": 0.4, "lambda": 1.5, "method": "task_arithmetic"}
    assert row.words == {"strategy": "study", "recipe": "abc", "infeasible": "a guard"}


def test_each_trial_is_told_once_by_whoever_tells(tmp_path: Path, fake: Fake) -> None:
    config, said = Config(**GIVEN, track=["mlflow"]), []
    first = Tracking(config, RunFolder(tmp_path), said.append)
    first.finished(_record(0))
    first.finished(_record(1, "failed"))
    first.wait()
    Tracking(config, RunFolder(tmp_path), said.append).tell(
        [_record(n) for n in range(3)] + [_record(3, "running")], "So."
    )
    assert (fake.rows, fake.said, said) == ([0, 1, 2], ["So."], [])
    assert json.loads((tmp_path / TOLD).read_text(encoding="utf-8")) == {"mlflow": [0, 1, 2]}


def test_a_tracker_out_of_reach_is_said_once_and_gets_what_it_missed(tmp_path: Path, fake: Fake) -> None:
    config, said = Config(**GIVEN, track=["mlflow"]), []
    fake.broken = True
    tracking = Tracking(config, RunFolder(tmp_path), said.append)
    for number in range(3):
        tracking.finished(_record(number))
    tracking.wait()
    assert len(said) == 1 and "mlflow was not told (ConnectionError: nobody there)" in said[0]
    fake.broken = False
    Tracking(config, RunFolder(tmp_path), said.append).tell([_record(number) for number in range(3)])
    assert fake.rows == [0, 1, 2] and len(said) == 1


def test_a_search_tells_its_trials_and_its_verdict(tmp_path: Path, fake: Fake) -> None:
    config = Config(**GIVEN, output=str(tmp_path / "run"), track=["tensorboard"])
    run = run_search(config)
    assert sorted(fake.rows) == [record.number for record in run.records] and len(fake.rows) >= 4
    (verdict,) = fake.said
    assert "on the search documents" in verdict
    tell_verdict(config, "Again.", lambda _: None)
    assert fake.said[1:] == ["Again."] and len(fake.rows) == len(run.records)
