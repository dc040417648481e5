"""What a trial is, written to a study and read back."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.searches import settings

from mergesearch.errors import UserError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import single_rule
from mergesearch.search import store, trials
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import Kind, State

SCORES = {"quiz": TaskScore(0.5, 0.1, 10, "acc"), "bits": TaskScore(1.2, None, 8, "bits_per_byte", gold=0.3)}


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(direction="maximize")


def read(study: optuna.Study, number: int = 0) -> trials.Trial:
    return trials.read(study.get_trials()[number])


def test_what_was_written_is_read(study: optuna.Study, tmp_path: Path) -> None:
    recipe = settings(tmp_path).recipe(single_rule("linear", weight=0.5))
    taken = datetime(2026, 3, 1, 12, 30)
    values = {
        "strategy": "learned_soup",
        "kind": Kind.LEARNED,
        "key": {"per": "tensor", "start": None},
        "recipe_data": recipe.dump(),
        "recipe_id": recipe.id,
        "identity": "abc",
        "machine": {"device": "cpu"},
        "worker": "host-1",
        "taken": taken,
        "earlier": ((datetime(2026, 2, 28, 9), datetime(2026, 2, 28, 11, 5)),),
        "learning_documents": 7,
        "learning_seconds": 1.5,
        "settled_at": taken,
        "merge_seconds": 0.5,
        "score_seconds": 2.0,
        "scores": SCORES,
    }
    trials.enqueue(study, strategy="learned_soup", kind=Kind.LEARNED, key={"per": "tensor"})
    waiting = read(study)
    assert (waiting.state, waiting.kind, waiting.key) == (State.WAITING, Kind.LEARNED, {"per": "tensor"})
    with pytest.raises(LookupError, match="trial 0 has no recipe yet"):
        _ = waiting.recipe
    trials.write(study.ask(), **values)
    trial = read(study)
    assert {name: getattr(trial, name) for name in values} == values
    assert trial.recipe == recipe and trial.seconds == 2.5 and trial.documents == 7 + 18
    assert trial.state is State.SCORED and trial.state.settled and not trial.state.ended and trial.ended_at is None
    study.tell(0, 0.5)
    done = read(study)
    assert done.state is State.COMPLETE and done.taken == taken and done.ended_at is not None


def test_times_of_a_host_with_another_clock_are_read_in_local_time(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    noon = datetime(2026, 3, 1, 12)
    values: dict[str, Any] = {"taken": noon, "settled_at": noon + timedelta(hours=1), "earlier": [(noon, noon)]}
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "UTC-3")  # POSIX: three hours ahead
        time.tzset()
        trials.write(study.ask(), **values)
        assert {name: getattr(read(study), name) for name in ("taken", "settled_at")} == {
            "taken": noon,
            "settled_at": noon + timedelta(hours=1),
        }
        elsewhere.setenv("TZ", "UTC")
        time.tzset()
        found = read(study)
    time.tzset()
    assert found.taken == noon - timedelta(hours=3) and found.settled_at == noon - timedelta(hours=2)
    assert found.earlier == ((found.taken, found.taken),)


def test_times_of_a_version_that_noted_no_offset_are_local(study: optuna.Study) -> None:
    handle = study.ask()
    handle.set_user_attr("taken", "2026-03-01T12:00:00")
    assert read(study).taken == datetime(2026, 3, 1, 12)


def test_each_state_is_told_from_what_stands_in_the_study(study: optuna.Study) -> None:
    handle = study.ask()
    assert read(study).state is State.RUNNING
    trials.write(handle, partial=SCORES, blocks=2, stopped="after 18 of 40 documents")
    assert read(study).state is State.STOPPED and read(study).documents == 18
    handle.report(0.1, step=2)
    study.tell(handle, state=optuna.trial.TrialState.PRUNED)
    assert read(study).state is State.PRUNED
    failed = study.ask()
    trials.write(failed, error="NaN")
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    assert (read(study, 1).state, read(study, 1).error) == (State.FAILED, "NaN")


def test_an_equal_trial_costs_nothing_but_what_it_was_learned_with(study: optuna.Study) -> None:
    trials.write(study.ask(), same_as=0, learning_documents=5, scores=SCORES)
    assert read(study).documents == 5


def test_guards_are_constraints_of_the_study(study: optuna.Study) -> None:
    handle = study.ask()
    handle.set_constraint("bits", 0.2)
    assert read(study).excess == {"bits": 0.2} and not read(study).feasible


@pytest.mark.parametrize("name", ["scored", "number", "state"])
def test_what_is_no_field_is_refused(study: optuna.Study, name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}' is no field of a trial that can be written"):
        trials.write(study.ask(), **{name: 1})


def test_fields_are_written_in_the_order_given(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(optuna.Trial, "set_user_attr", lambda self, key, value: written.append(key))
    trials.write(study.ask(), score_seconds=1.0, merge_seconds=2.0, scores=SCORES)
    assert written == ["score_seconds", "merge_seconds", "scores"]


def test_a_run_of_version_0_1_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    folder = RunFolder.prepare(config)
    old = optuna.create_study(study_name=config.name, storage=f"sqlite:///{folder.database}", direction="maximize")
    old.set_user_attr("config", config.dump())
    for opened in (lambda: store.open_run(folder.path), lambda: store.begun(config)):
        with pytest.raises(UserError, match=r"holds a run of mergesearch 0\.1, whose trials this version") as caught:
            opened()
        assert "\n" not in str(caught.value)


def test_a_later_format_is_not_called_0_1(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    study = store.open_study(config, RunFolder.prepare(config))
    store.note(study, "format", 9)
    with pytest.raises(UserError, match=r"a run of another version of mergesearch \(format 9\)"):
        store.open_run(tmp_path / "run")


def test_a_run_in_another_storage_is_looked_at_before_its_folder_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    old = optuna.create_study(study_name="test", storage=url, direction="maximize")
    old.set_user_attr("config", {})
    with pytest.raises(UserError, match=r"mergesearch 0\.1"):
        store.begun(settings(tmp_path / "run", storage=url))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_a_run_folder_from_the_first_file_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "run")

    def killed(self: Path, *arguments: object, **options: object) -> None:
        if self.name == "scores":
            raise KeyboardInterrupt
        original(self, *arguments, **options)

    original = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.prepare(config)
    monkeypatch.undo()
    (tmp_path / "run" / "start.lock").touch()
    RunFolder.prepare(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "take.lock").touch()  # of a worker that begins at the same moment
    RunFolder.prepare(settings(tmp_path / "other"))


def test_a_run_folder_without_a_study_has_not_begun(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    assert store.begun(config) is None
    folder = RunFolder.prepare(config)
    assert store.begun(config) is None
    optuna.create_study(study_name="another", storage=f"sqlite:///{folder.database}")
    assert store.begun(config) is None
