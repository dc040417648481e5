"""A proxy before the storage: what it serves, and what becomes of a run whose proxy is gone for a while."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from support.postgres import PostgreSQL, postgres
from support.searches import Engine, Scorer, settings, start

from mergesearch.errors import UserError
from mergesearch.search import store
from mergesearch.search.proxy import serving
from mergesearch.search.storage import Patience, engine_of, proxied
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'mergesearch[proxy]'")
server = pytest.fixture(scope="module")(postgres)
TRIALS = 16


class Slow(Scorer):
    def score(self) -> Any:
        time.sleep(0.05)
        return super().score()


def search(folder: Path, changes: dict[str, Any]) -> Any:
    engine = Engine()
    patience = Patience(120, lambda text: None, sleep=lambda seconds: time.sleep(min(seconds, 0.3)))
    return start(folder, engine, Slow(engine), patience=patience, search={"trials": TRIALS}, **changes)


def test_workers_share_a_run_by_a_proxy_that_is_gone_for_a_while(tmp_path: Path, server: PostgreSQL) -> None:
    plain = settings(tmp_path / "run", storage=server.url)
    faults: list[BaseException] = []

    def work(mine: Any) -> None:
        try:
            mine.run()
        except BaseException as error:
            faults.append(error)

    with serving(plain, "127.0.0.1", 0) as port:
        changes = {"storage": server.url, "storage_proxy": f"127.0.0.1:{port}"}
        several = [search(tmp_path / "run", changes) for _ in range(3)]
        workers = [threading.Thread(target=work, args=(mine,)) for mine in several]
        for worker in workers:
            worker.start()
        while sum(trial.state.settled for trial in several[0].history().trials) < 8:
            time.sleep(0.05)
    time.sleep(0.3)
    with serving(plain, "127.0.0.1", port):
        for worker in workers:
            worker.join(timeout=120)
        found = several[0].history().trials
    assert faults == []
    assert [(trial.number, trial.error) for trial in found if trial.state is not State.COMPLETE] == []
    assert sum(trial.strategy == "study" and trial.same_as is None for trial in found) == TRIALS
    # the database holds what the proxy was told
    there = store.open_study(plain, RunFolder(tmp_path / "run"), create=False)
    assert [trial.number for trial in there.trials] == [trial.number for trial in found]


def test_a_trial_goes_on_by_a_proxy_that_was_started_anew(tmp_path: Path, server: PostgreSQL) -> None:
    plain = settings(tmp_path / "run", storage=server.url)
    with serving(plain, "127.0.0.1", 0) as port:
        storage = proxied(f"127.0.0.1:{port}")
        study = storage.create_new_study([StudyDirection.MAXIMIZE], f"begun before {tmp_path}")
        trial = storage.create_new_trial(study)
    with serving(plain, "127.0.0.1", port):
        storage = proxied(f"127.0.0.1:{port}")
        storage.set_trial_param(trial, "x", 0.25, FloatDistribution(0, 1))
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])
        found = storage.get_trial(trial)
    assert (found.params, found.value) == ({"x": 0.25}, 0.5)


def test_turns_are_taken_in_the_database(tmp_path: Path, server: PostgreSQL) -> None:
    with serving(settings(tmp_path / "run", storage=server.url), "127.0.0.1", 0) as port:
        read = settings(tmp_path / "run", storage=server.url, storage_proxy=f"127.0.0.1:{port}")
        engine = engine_of(store.open_storage(read, RunFolder(tmp_path / "run")))
    assert engine is not None and engine.dialect.name == "postgresql"


def test_what_is_refused(tmp_path: Path, server: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"storage_proxy.*'host' is no address of a proxy: write it as HOST:PORT"):
        settings(tmp_path / "run", storage=server.url, storage_proxy="host")
    for storage in (None, "sqlite:////shared/study.db"):
        with pytest.raises(UserError, match="it stands before a database on a server"):
            settings(tmp_path / "run", storage=storage, storage_proxy="host:13000")
        with pytest.raises(UserError, match="a proxy stands before a database on a server"):
            serving(settings(tmp_path / "run", storage=storage), "127.0.0.1", 0).__enter__()
    plain = settings(tmp_path / "run", storage=server.url)
    with serving(plain, "127.0.0.1", 0) as port, pytest.raises(UserError, match=f"--port {port} of .* cannot be had"):
        serving(plain, "127.0.0.1", port).__enter__()
    monkeypatch.setattr("mergesearch.search.storage.ANSWERS", 0.2)
    gone = settings(tmp_path / "run", storage=server.url, storage_proxy=f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"by the proxy 127.0.0.1:\d+ cannot be opened .*`mergesearch proxy` there"):
        store.open_storage(gone, RunFolder(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "grpc", None)
    for refused in (lambda: store.open_storage(gone, RunFolder(tmp_path)), serving(plain, "127.0.0.1", 0).__enter__):
        with pytest.raises(UserError, match=r"pip install 'mergesearch\[proxy\]'"):
            refused()


def test_the_verb_ends_in_order(tmp_path: Path, server: PostgreSQL) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(settings(tmp_path / "run", storage=server.url).to_yaml())
    command = [sys.executable, "-m", "mergesearch", "proxy", str(file), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("storage_proxy: 127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1
        assert "the proxy is closed" in process.stderr.read()
