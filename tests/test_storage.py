"""Where a study is kept: what is refused before anything is written, and what its faults do to a run."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from support.mariadb import MariaDB, mariadb
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch.config.storage import PASSWORD, expanded
from mergesearch.errors import StorageError, UserError, without_passwords
from mergesearch.results.loading import load_run
from mergesearch.search import store, trials
from mergesearch.search.storage import Location, Patience, checked, failed, reason
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

SECRET = "hunter2"
TRIALS = 3


def dropped() -> Exception:
    """What Optuna makes of a connection that was dropped."""
    lost = sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
    error = optuna.exceptions.StorageInternalError("An exception is raised during the commit. This typically ...")
    error.__cause__ = lost
    return error


class Faulty(optuna.storages.InMemoryStorage):
    """A storage that raises at chosen calls: before it has done what it was asked for, or after, the answer lost."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.fails: Callable[[int], bool] = lambda call: False
        self.error: Callable[[], BaseException] = dropped
        self.after = False
        self._inside = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        asked = name.startswith(("get_", "set_", "create_")) and callable(found)
        return self._watched(name, found) if asked and not self._inside else found

    def _watched(self, name: str, method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            bad, self._inside = self.fails(len(self.calls) - 1), True
            try:
                if bad and not self.after:
                    raise self.error()
                answer = method(*arguments, **options)
                if bad:
                    raise self.error()
                return answer
            finally:
                self._inside = False

        return call


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.said = 0.0, []
        self.patience = Patience(600, self.said.append, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def start(folder: Path, clock: Clock | None = None, scorer: Scorer | None = None, **changes: Any) -> Search:
    read = settings(folder, **{"search": {"trials": TRIALS}, **changes})
    scorer = scorer or Scorer(Engine())
    space = SearchSpace(read, INFOS, 2)
    patience = (clock or Clock()).patience
    return Search(read, RunFolder.prepare(read), space, scorer.engine, scorer, patience=patience)


def found(search: Search) -> list[tuple[Any, ...]]:
    """What a run came to, trial for trial."""
    return [(t.number, t.state, t.name, t.recipe_id, t.scores, t.params, t.error) for t in search.history().trials]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    there = Faulty()
    monkeypatch.setattr(store, "_local_storage", lambda url: there)
    # the stand-in has no file
    monkeypatch.setattr(store, "_has_content", lambda file: bool(there.calls))
    return there


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What a run comes to that nothing disturbed."""
    search = start(tmp_path_factory.mktemp("whole") / "run")
    search.run()
    return found(search)


# --- a storage that fails for a while ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_storage_that_fails_for_a_while_changes_nothing(
    tmp_path: Path, storage: Faulty, whole: list[tuple[Any, ...]], after: bool
) -> None:
    clock = Clock()
    search = start(tmp_path / "run", clock)
    begun, storage.after = len(storage.calls), after
    failed: set[str] = set()

    def fails(call: int) -> bool:
        """Every fifth call, and each kind of call at least once."""
        name = storage.calls[call]
        bad = call > begun and (call % 5 == 0 or name not in failed)
        failed.update([name] if bad else [])
        return bad

    storage.fails = fails
    search.run()
    storage.fails = lambda call: False
    assert found(search) == whole
    assert {"create_new_trial", "set_trial_state_values"} <= failed
    assert any("server closed the connection unexpectedly" in text and "asking again" in text for text in clock.said)
    assert any(text.endswith("answers again") for text in clock.said) and clock.now > 0


def test_every_call_may_be_the_one_that_fails(
    tmp_path: Path, storage: Faulty, whole: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_local_storage", lambda url: held[-1])
    held = [Faulty()]
    start(tmp_path / "counted").run()
    for at in range(20, len(held[0].calls), 23):
        held.append(Faulty())
        held[-1].fails, held[-1].after = (lambda call, at=at: call == at), bool(at % 2)
        search = start(tmp_path / f"run{at}")
        search.run()
        assert found(search) == whole, f"{held[0].calls[at]}, call {at}"


def test_after_ten_minutes_the_run_ends_and_the_next_start_goes_on(
    tmp_path: Path, storage: Faulty, whole: list[tuple[Any, ...]]
) -> None:
    clock = Clock()
    scorer = Scorer(Engine())
    search = start(tmp_path / "run", clock, scorer)
    scored = scorer.score

    def score() -> Any:
        if len(scorer.scored) == 5:
            storage.fails = lambda call: True
        return scored()

    scorer.score = score  # type: ignore[method-assign]
    with pytest.raises(StorageError) as caught:
        search.run()
    assert clock.now == 600.0 and "\n" not in str(caught.value)
    assert "has not answered for 10 minutes (server closed the connection unexpectedly)" in str(caught.value)
    assert "the same command goes on" in str(caught.value)
    storage.fails = lambda call: False
    assert all(trial.error is None for trial in search.history().trials)
    again = start(tmp_path / "run")
    again.run()
    assert found(again) == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("database or disk is full", "is full: free some space"),
        ("database disk image is malformed", "is damaged (database disk image is malformed): put a copy of it back"),
        ("attempt to write a readonly database", "may not be written"),
    ],
)
def test_what_does_not_pass_by_itself_is_not_waited_for(tmp_path: Path, storage: Faulty, words: str, said: str) -> None:
    clock = Clock()
    search = start(tmp_path / "run", clock)
    storage.error = lambda: sqlalchemy.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError(words))
    storage.fails = lambda call: True
    with pytest.raises(StorageError) as caught:
        search.run()
    assert said in str(caught.value) and str(tmp_path / "run" / "study.db") in str(caught.value)
    assert clock.now == 0 and "commit" not in str(caught.value).lower()


def test_a_watcher_that_meets_the_fault_lets_it_through(tmp_path: Path, storage: Faulty) -> None:
    """The progress reads the study while a candidate is scored, where a candidate's faults are caught."""
    scorer = Scorer(Engine())
    search = start(tmp_path / "run", scorer=scorer)

    def score() -> Any:
        storage.fails = lambda call: True
        try:
            search.history()
        except Exception as error:
            raise AssertionError("taken for a candidate's") from error

    scorer.score = score  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        search.run()


def test_a_full_disk_of_a_named_storage_is_said(tmp_path: Path) -> None:
    place = Location(f"postgresql://me:{SECRET}@host/runs")
    error = sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("could not extend file: No space left on device"))
    assert str(failed(place, error)).startswith("the disk of storage postgresql://me:***@host/runs is full")


# --- what can be no storage -----------------------------------------------------------------------------------------

NO_STORAGES = {
    "sqlite:///:memory:": "is SQLite in memory",
    "sqlite://": "is SQLite in memory",
    "sqlite:///": "is SQLite in memory",
    "sqlite:///file:runs?mode=memory&uri=true": "is SQLite in memory",
    "": "is no URL of a database",
    "nonsense": "is no URL of a database",
    "study.db": "is no URL of a database",
    "sqlite:////nowhere/at/all.db": "there is no folder /nowhere/at",
    "sqlite:////": "is a folder",
    "redis://localhost": "redis is no database that SQLAlchemy knows",
    "postgres://me@host/runs": "postgres is no database that SQLAlchemy knows",
    "postgresql://me@host:port/runs": "it is no URL of a database",
    "postgresql+psycopg2://me@host/runs": "run `pip install 'psycopg2-binary'`",
    "mysql://nobody@localhost/none": "run `pip install 'mysqlclient'`",
    "mysql+pymysql://nobody@localhost/none": "run `pip install 'PyMySQL'`",
    "postgresql+asyncpg://me@host/runs": "works asynchronously",
    "mysql://me:${NOT_SET_ANYWHERE}@host/runs": "the environment has no NOT_SET_ANYWHERE",
}


@pytest.mark.parametrize("url", NO_STORAGES)
def test_what_can_be_no_storage_is_refused_before_anything_is_written(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)  # as where it is not installed
    with pytest.raises(UserError) as caught:
        store.begun(settings(tmp_path / "run", storage=url))
    assert NO_STORAGES[url] in str(caught.value) and "storage" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_storage_does_not_make_its_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    assert store.begun(settings(tmp_path / "run", storage=url)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_study_names_its_file_and_no_url(tmp_path: Path) -> None:
    start(tmp_path / "run")
    file = tmp_path / "run" / "study.db"
    file.write_bytes(b"not a database at all" * 100)
    for opened in (lambda: load_run(tmp_path / "run"), lambda: store.begun(settings(tmp_path / "run"))):
        with pytest.raises(UserError, match="is damaged") as caught:
            opened()
        assert str(file) in str(caught.value) and "URL" not in str(caught.value) and "\n" not in str(caught.value)
        assert "best/" not in str(caught.value)
    (tmp_path / "run" / "best").mkdir()
    with pytest.raises(UserError, match="the winner in best/ beside it is no part of it"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("left", ["empty", "gone", "another"])
def test_a_study_that_is_lost_is_not_begun_again(tmp_path: Path, left: str) -> None:
    search = start(tmp_path / "run")
    search.run()
    file = tmp_path / "run" / "study.db"
    for part in (file, file.with_name("study.db-wal"), file.with_name("study.db-shm")):
        part.unlink(missing_ok=True)
    if left == "empty":
        file.touch()
    elif left == "another":
        optuna.create_study(study_name="another", storage=f"sqlite:///{file}")
    with pytest.raises(UserError, match=r"has the scores of 7 trials: put a copy of the study back") as caught:
        store.begun(settings(tmp_path / "run", search={"trials": TRIALS}))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="study"):
        load_run(tmp_path / "run")


def test_a_run_that_has_scored_nothing_begins_over_an_empty_file(tmp_path: Path) -> None:
    RunFolder.prepare(settings(tmp_path / "run", search={"trials": TRIALS})).database.touch()
    start(tmp_path / "run").run()
    assert len(load_run(tmp_path / "run").records) == 4 + TRIALS


# --- MySQL ------------------------------------------------------------------------------------------------------------

maria = pytest.fixture(scope="module")(mariadb)


def test_a_recipe_for_each_tensor_of_a_large_model_has_room_in_mysql(tmp_path: Path, maria: MariaDB) -> None:
    """80 kB; Optuna's own columns hold 64 KiB. Also in tables that were there before."""
    recipe = {"rules": [{"match": f"model.layers.{i}.weight", "weights": [0.125] * 8} for i in range(1000)]}
    assert len(json.dumps(recipe)) > 80_000
    optuna.create_study(study_name="earlier", storage=maria.url)
    search = start(tmp_path / "run", storage=maria.url)
    trials.enqueue(search.study, recipe_data=recipe)
    store.note(search.study, "taken_over", recipe)
    again = start(tmp_path / "run", storage=maria.url)
    assert again.history().trials[0].recipe_data == recipe == store.noted(again.study, "taken_over")


# --- passwords --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Stands for a database on a server: the URLs that it was opened with."""
    opened: list[str] = []
    make = optuna.storages.get_storage

    def get(storage: Any) -> Any:
        if not isinstance(storage, str):
            return make(storage)
        opened.append(storage)
        return optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'server.db'}")

    monkeypatch.setattr(optuna.storages, "get_storage", get)
    monkeypatch.setattr("sqlalchemy.dialects.postgresql.psycopg.PGDialect_psycopg.import_dbapi", lambda: None)
    yield opened


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_password_is_in_no_file_and_no_message(
    tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://me:{SECRET}@host/runs"
    search = start(tmp_path / "run", storage=url)
    search.run()
    assert server[-1] == url
    assert SECRET.encode() not in everything(tmp_path)
    assert SECRET not in repr(search.config) and SECRET not in str(search.config.dump())
    with pytest.raises(UserError) as caught:
        store.begun(settings(tmp_path / "run", storage=url.replace("host", "elsewhere"), search={"trials": TRIALS}))
    assert "postgresql://me:***@elsewhere/runs" in str(caught.value) and SECRET not in str(caught.value)
    # whoever reads the run brings the password
    monkeypatch.setenv(PASSWORD, "a/b")
    assert len(load_run(tmp_path / "run").records) == 4 + TRIALS
    assert server[-1] == "postgresql://me:a%2Fb@host/runs"
    monkeypatch.delenv(PASSWORD)
    load_run(tmp_path / "run")
    assert server[-1] == "postgresql://me@host/runs"


@pytest.mark.parametrize("other", ["me:changed@", "me@", "me:${PGPASSWORD}@"])
def test_another_password_is_no_other_configuration(
    tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("PGPASSWORD", "new")
    start(tmp_path / "run", storage=f"postgresql://me:{SECRET}@host/runs")
    start(tmp_path / "run", storage=f"postgresql://{other}host/runs")
    assert SECRET.encode() not in everything(tmp_path)


def test_a_study_that_kept_a_password_loses_it(tmp_path: Path, server: list[str]) -> None:
    url = f"postgresql://me:{SECRET}@host/runs"
    search = start(tmp_path / "run", storage=url)
    store.note(search.study, "config", search.config.dump() | {"storage": url})
    again = start(tmp_path / "run", storage=url)
    assert SECRET not in str(again.study.user_attrs)


def test_the_environment_may_hold_a_part_of_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "p@ss/word")
    assert expanded("postgresql://me:${WORD}@host/runs") == "postgresql://me:p%40ss%2Fword@host/runs"
    monkeypatch.setenv("WHOLE", f"sqlite:///{os.getcwd()}/runs.db")
    assert checked("${WHOLE}") == f"sqlite:///{os.getcwd()}/runs.db"
    monkeypatch.setenv("WHOLE", "sqlite:///:memory:")
    with pytest.raises(UserError, match="is SQLite in memory"):
        checked("${WHOLE}")


def test_passwords_are_hidden_in_any_text() -> None:
    for text in (
        f"--set storage=postgresql://me:{SECRET}@host/runs",
        f"storage: ['postgresql://me:{SECRET}@host/runs']",
        f"mysql://host/runs?password={SECRET}&charset=utf8",
        f"mysql+pymysql://me:{SECRET}@wo/rd@host:3306/runs",
    ):
        assert SECRET not in without_passwords(text) and "***" in without_passwords(text)
    assert without_passwords("postgresql://me:${PGPASSWORD}@host/runs") == "postgresql://me:${PGPASSWORD}@host/runs"
    assert without_passwords("see https://example.org/a:b and me@host") == "see https://example.org/a:b and me@host"
    error = sqlalchemy.exc.OperationalError(
        "x", {}, Exception(f"cannot reach postgresql://me:{SECRET}@host/runs.\nmore")
    )
    assert reason(error) == "cannot reach postgresql://me:***@host/runs"
