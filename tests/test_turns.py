"""Turns: one worker of a run at a time, by a file or by the storage; and workers over a PostgreSQL server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import sqlalchemy
from support.mariadb import mariadb
from support.postgres import PostgreSQL, postgres
from support.searches import Engine, Scorer, start

from mergesearch.search import store, trials
from mergesearch.search.storage import Patience
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.base import Wait
from mergesearch.search.trials import State
from mergesearch.search.turns import Turns
from mergesearch.search.worker import Search

server = pytest.fixture(scope="module")(postgres)
maria = pytest.fixture(scope="module")(mariadb)


@pytest.fixture(params=["file", "server", "maria"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "file" else request.getfixturevalue(request.param).url


def turns(folder: Path, url: str | None, name: str, patience: Patience | None = None) -> Turns:
    config = start(folder).config.model_copy(update={"storage": url})
    run = RunFolder(folder)
    return Turns(store.open_storage(config, run, patience), run, name)


def test_one_is_in_at_a_time(tmp_path: Path, url: str | None) -> None:
    inside, most, entered = [], [0], [0]

    def work(mine: Turns) -> None:
        for _ in range(5):
            with mine.turn("take"):
                inside.append(1)
                most[0], entered[0] = max(most[0], len(inside)), entered[0] + 1
                time.sleep(0.002)
                inside.pop()

    workers = [threading.Thread(target=work, args=(turns(tmp_path / "run", url, "one"),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (most[0], entered[0]) == (1, 20)


def test_other_things_and_other_runs_have_turns_of_their_own(tmp_path: Path, url: str | None) -> None:
    one, other = turns(tmp_path / "one", url, "one"), turns(tmp_path / "other", url, "other")
    order: list[str] = []

    def work() -> None:
        with one.turn("take"):
            order.append("again")

    waiting = threading.Thread(target=work)
    with one.turn("take"), one.turn("stage"), other.turn("take"):
        waiting.start()
        waiting.join(0.3)
        order.append("inside")
    waiting.join()
    assert order == ["inside", "again"]  # the same turn of the same run alone is waited for


def test_a_turn_ends_with_an_error_in_it(tmp_path: Path, url: str | None) -> None:
    mine = turns(tmp_path / "run", url, "failing")
    with pytest.raises(KeyError), mine.turn("take"):
        raise KeyError
    with turns(tmp_path / "run", url, "failing").turn("take"):
        pass


def test_a_turn_is_gone_with_its_connection_and_the_server_is_waited_for(tmp_path: Path, server: PostgreSQL) -> None:
    said: list[str] = []
    patience = Patience(60, said.append, sleep=lambda seconds: time.sleep(min(seconds, 0.2)))
    mine, other = (turns(tmp_path / "run", server.url, "gone", patience) for _ in range(2))
    with mine.turn("take"):
        server.stop()
        threading.Timer(0.5, server.start).start()
        with other.turn("take"):
            pass
    assert any("does not answer" in line for line in said) and any("answers again" in line for line in said)


def test_workers_share_a_run_over_a_server_that_restarts(tmp_path: Path, server: PostgreSQL) -> None:
    """Four workers, each as in a process of its own but for the process; nothing is lost, nothing is there twice."""
    trials, folder = 24, tmp_path / "run"

    class Slow(Scorer):
        def score(self):
            time.sleep(0.05)
            return super().score()

    def search() -> Search:
        engine = Engine()
        patience = Patience(120, lambda text: None, sleep=lambda seconds: time.sleep(min(seconds, 0.3)))
        changes = {"storage": server.url, "search": {"trials": trials}}
        return start(folder, engine, Slow(engine), patience=patience, **changes)

    first = search()
    faults: list[BaseException] = []

    def work(mine: Search) -> None:
        with noting(faults):
            mine.run()

    workers = [threading.Thread(target=work, args=(mine,)) for mine in (first, *(search() for _ in range(3)))]
    for worker in workers:
        worker.start()
    while sum(t.state.settled for t in first.history().trials) < 8:
        time.sleep(0.05)
    server.stop()
    server.start()
    for worker in workers:
        worker.join(timeout=300)
    assert faults == []
    found = first.history().trials
    assert sum(trial.strategy == "study" and trial.same_as is None for trial in found) == trials
    assert {trial.state for trial in found} == {State.COMPLETE}
    assert len({trial.worker for trial in found}) == 4
    names = [trial.name for trial in found if trial.name]
    assert sorted(names) == sorted(set(names))


def test_what_is_proposed_in_a_turn_that_was_lost_is_not_added(
    tmp_path: Path, server: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server restarts while one worker decides; another decides the same and is faster."""
    patience = Patience(60, lambda text: None, sleep=lambda seconds: time.sleep(min(seconds, 0.2)))
    changes = {"storage": server.url, "search": {"trials": 2}, "name": "lost"}
    mine, other = (start(tmp_path / "run", patience=patience, **changes) for _ in range(2))
    put, lost = Search._enqueue, []

    def put_late(self: Search, strategy: str, proposal: Any) -> None:
        if self is mine and not lost:
            lost.append(proposal)
            server.stop()
            server.start()
            other.run()
        put(self, strategy, proposal)

    monkeypatch.setattr(Search, "_enqueue", put_late)
    mine.run()
    found = mine.history().trials
    assert lost and sorted(trial.name for trial in found if trial.name) == ["a", "average", "b", "base"]
    assert {trial.state for trial in found} == {State.COMPLETE}
    assert sum(trial.strategy == "study" for trial in found) == 2


@pytest.mark.parametrize(("owner", "name"), [(Search, "_enqueue"), (trials, "assign")], ids=["meanwhile", "at last"])
def test_what_another_worker_took_leaves_no_trial_of_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    engine = Engine()
    mine = start(tmp_path / "run", engine, Scorer(engine), search={"trials": 2})
    step = getattr(owner, name)

    def step_and_lose(*given: Any) -> None:
        step(*given)
        mine.study.ask()

    monkeypatch.setattr(owner, name, step_and_lose)
    monkeypatch.setattr(mine, "_presence", SimpleNamespace(id="mine"))
    assert isinstance(mine._ask(mine.history()), Wait)
    assert [bool(trial.strategy) for trial in mine.history().trials] == [True]


def test_a_trial_that_another_worker_ended_meanwhile_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    mine = start(tmp_path / "run", engine, Scorer(engine), search={"trials": 2})
    write, refused = trials.write, []

    def late(handle: optuna.Trial, **values: Any) -> None:
        if "taken" in values and handle.number == 4:
            refused.append(handle.number)
            mine.study.tell(handle.number, state=optuna.trial.TrialState.FAIL)
        write(handle, **values)

    monkeypatch.setattr(trials, "write", late)
    mine.run()
    found = mine.history().trials
    assert refused == [4] and [trial.number for trial in found if trial.state is State.FAILED] == [4]
    assert {trial.state for trial in found if trial.number != 4} == {State.COMPLETE}


@contextmanager
def noting(faults: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except (BaseException, sqlalchemy.exc.SQLAlchemyError) as error:
        faults.append(error)
