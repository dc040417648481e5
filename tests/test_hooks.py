"""`on_best`, `on_end` and `search.trial_timeout`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from support.searches import Engine, start
from typer.testing import CliRunner

from mergesearch.cli import app
from mergesearch.commands.crew import LEASH
from mergesearch.commands.hooks import BestHook, told_at_end
from mergesearch.errors import UserError
from mergesearch.results.record import Record
from mergesearch.search.trials import State
from mergesearch.search.watchdog import Watchdog
from mergesearch.search.worker import Search


def record(number: int, objective: float | None, **given: Any) -> Record:
    return Record(number, given.pop("name", None), "complete", objective, method="ties", **given)


def test_the_best_of_all_workers_is_told(tmp_path: Path) -> None:
    told = tmp_path / "told"
    config = start(tmp_path / "run", on_best=f'echo "$MERGESEARCH_TRIAL $MERGESEARCH_VERDICT" >> {told}').config
    best, said = [record(4, 0.5)], []
    hook = BestHook(config, lambda: best[0], said.append)
    hook.finished(record(3, 0.4))  # another worker has a better one
    hook.finished(record(2, 0.9, name="average"))
    hook.finished(record(4, 0.5))
    hook.wait()
    assert told.read_text() == "4 trial 4 (ties) has 0.5000 on the search documents\n" and said == []


def test_a_command_that_fails_is_said_and_not_repeated(tmp_path: Path) -> None:
    config = start(tmp_path / "run", on_best="echo no such host secret >&2; exit 7").config
    said: list[str] = []
    hook = BestHook(config, lambda: record(1, 0.5), said.append)
    hook.finished(record(1, 0.5))
    hook.wait()
    assert said == ["note: on_best ended with status 7 (no such host secret)"]


@pytest.mark.parametrize(
    ("error", "status", "verdict"),
    [(None, "0", "it won"), (UserError("no such file"), "2", "no such file"), (ValueError("odd"), "1", "odd")],
)
def test_the_end_is_told_however_it_comes(tmp_path: Path, error: Any, status: str, verdict: str) -> None:
    told = tmp_path / "told"
    line = f'echo "$MERGESEARCH_STATUS|$MERGESEARCH_VERDICT|$MERGESEARCH_TRIAL" > {told}'
    config = start(tmp_path / "run", on_end=line).config

    def work() -> None:
        with told_at_end(config, lambda: (record(6, 0.7), "it won"), print):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert told.read_text() == f"{status}|{verdict}|{'6' if error is None else ''}\n"


def test_of_workers_the_last_one_tells_the_end_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mergesearch worker` three times: while another is at a trial, when none is any more, and once more."""
    told = tmp_path / "told"
    config = start(tmp_path / "run", search={"trials": 1}, on_end=f'echo "$MERGESEARCH_TRIAL" >> {told}').config
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml())

    def worker(search: Search, **environment: str) -> bool:
        monkeypatch.setattr("mergesearch.cli._search", lambda *_, **options: search)
        done = CliRunner().invoke(app, ["worker", str(path)], env=environment, catch_exceptions=False)
        assert done.exit_code == 0
        return told.exists()

    search = start(tmp_path / "run", search={"trials": 1}, on_end=config.on_end)
    search.run()
    search.study.enqueue_trial({})
    assert not worker(search)
    other = search.study.ask()
    assert not worker(search)
    search.study.tell(other, state=TrialState.FAIL)
    with monkeypatch.context() as held:
        held.setattr("mergesearch.commands.crew.hold_leash", lambda _: None)
        assert not worker(search, **{LEASH: "1"})  # its `run` does
    assert worker(search) and worker(search)
    best = search.history().complete()[0].number
    assert told.read_text() == f"{best}\n"
    start(tmp_path / "run", search={"trials": 3}, on_end=config.on_end).run()  # a larger budget has an end of its own
    assert worker(search) and len(told.read_text().splitlines()) == 2


def test_a_trial_that_takes_too_long_is_given_up_by_another_thread(tmp_path: Path) -> None:
    """The one that is at it is stuck until the test lets it go, as it would be in a library for ever."""
    freed, said = threading.Event(), []

    class Stuck(Engine):
        def load(self, recipe: Any) -> float:
            if len(self.loaded) == 6:
                self.loaded.append(recipe)
                assert freed.wait(60)
                return 0.25
            return super().load(recipe)

    search = start(tmp_path / "run", Stuck(), search={"trials": 4, "trial_timeout": 0.5})

    def hung(reason: str) -> None:
        said.append(reason)
        freed.set()

    search._hung = hung
    search.run()
    assert said == ["trial 6 was given up: it took more than 0.5 s (search.trial_timeout)"]
    found = search.history().trials
    assert found[6].state is State.FAILED and not found[6].scores
    assert all(trial.state is State.COMPLETE for trial in found if trial.number != 6)


def test_without_a_limit_nobody_watches() -> None:
    gone: list[int] = []
    watchdog = Watchdog(None, gone.append)
    with watchdog.watching(1):
        watchdog.further()
    assert gone == [] and watchdog._thread is None
