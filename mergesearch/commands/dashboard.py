"""`mergesearch dashboard RUN`: a run in optuna-dashboard, with names, notes, parameters and artifacts."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from mergesearch import methods
from mergesearch.commands.winner import sentence
from mergesearch.errors import StorageError, UserError
from mergesearch.results.loading import Run, recipe_of, run_of
from mergesearch.results.markdown import block, plain, table
from mergesearch.results.parameters import SEVERAL, parameters_of
from mergesearch.results.record import Record
from mergesearch.results.states import COMPLETE, ENDED, INFEASIBLE
from mergesearch.search.history import History, settled_at
from mergesearch.search.mirror import Mirror, Shown
from mergesearch.search.store import RunFolder, open_run
from mergesearch.search.trials import Trial


class Dashboard:
    """A run as optuna-dashboard shows it; `refresh` reads what has come since.

    Args:
        path: the run folder.
        artifacts: where recipes and documents' scores are laid for the dashboard.

    Raises:
        UserError: it is no run folder, its storage cannot be read, or optuna-dashboard is not installed.
    """

    def __init__(self, path: str | Path, artifacts: Path):
        self.path = Path(path)
        config, self._study = open_run(self.path)
        self._config = config
        history = History(self._study, config)
        run = run_of(history, RunFolder(self.path))
        metrics = [task.task for task in config.tasks] if config.objective.pareto else ["objective"]
        choices = {"method": [*methods.names(), SEVERAL]}
        self._mirror = Mirror(config.name, metrics, choices, artifacts)
        self._add(history, run)

    @property
    def mirror(self) -> Mirror:
        """The copy of the study that is shown."""
        return self._mirror

    def refresh(self) -> None:
        """Adds the trials that have ended since, and says anew how the run stands."""
        history = History(self._study, self._config)
        self._add(history, run_of(history, RunFolder(self.path)))

    def _add(self, history: History, run: Run) -> None:
        trials = {trial.number: trial for trial in history.trials}
        ended = [record for record in run.records if record.state in ENDED]
        self._mirror.add([_shown(run, record, trials[record.number]) for record in ended])
        self._mirror.describe(_note_of_run(run))


@contextmanager
def serving(path: str | Path, host: str = "127.0.0.1", port: int = 8080, every: float = 10.0) -> Iterator[WSGIServer]:
    """A context in which a run can be served: `server.serve_forever()` does, `server.server_port` says where.

    Args:
        path: the run folder.
        host, port: where; port 0 takes a free one.
        every: seconds from one look at the run to the next.

    Raises:
        UserError: as for `Dashboard`, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="mergesearch-") as folder:
        shown = Dashboard(path, Path(folder))
        try:
            server = make_server(host, port, shown.mirror.application(), handler_class=_Quiet)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): name another --port") from None
        over = threading.Event()
        looking = threading.Thread(target=look, args=(shown.refresh, over, every), daemon=True)
        looking.start()
        try:
            yield server
        finally:
            over.set()
            server.server_close()
            looking.join()


def look(refresh: Callable[[], None], over: threading.Event, every: float) -> None:
    """Refreshes every so many seconds until it is over; a look that fails is tried again at the next."""
    while not over.wait(every):
        with suppress(UserError, StorageError):
            refresh()


class _Quiet(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


# --- what is shown of a trial -----------------------------------------------------------------------------------------


def _shown(run: Run, record: Record, trial: Trial) -> Shown:
    state = record.state if record.objective is not None or record.state != COMPLETE else "failed"
    values: tuple[float, ...] = ()
    if state == COMPLETE and run.objective is not None and record.objective is not None:
        several = run.config.objective.pareto
        values = tuple(run.objective.values(record.scores)) if several else (record.objective,)
    numbers, words = parameters_of(record)
    return Shown(
        number=record.number,
        state=state,
        values=values,
        numbers=numbers,
        words=words,
        attributes=_attributes(record),
        begun=trial.taken or trial.begun_at,
        ended=settled_at(trial) or trial.ended_at,
        note=_note(record),
        files=_files(run, record),
        excess=trial.excess,
    )


def _attributes(record: Record) -> dict[str, Any]:
    attributes: dict[str, Any] = {"name": record.name or record.method, "strategy": record.strategy or ""}
    attributes |= {f"{task} {score.metric}": score.value for task, score in record.scores.items()}
    for key, value in (("infeasible", record.infeasible), ("stopped", record.stopped), ("error", record.error),
                       ("recipe", record.recipe_id)):  # fmt: skip
        if value:
            attributes[key] = value
    return attributes


def _note(record: Record) -> str:
    parts = [f"## {plain(record.name or f'trial {record.number}: {record.method}')}"]
    state = INFEASIBLE if record.infeasible else record.state
    objective = f", objective {record.objective:.4f}" if record.objective is not None else ""
    parts.append(f"{plain(record.strategy or '')}, {state}{objective}".lstrip(", "))
    parts += [plain(why) for why in (record.error, record.stopped, record.infeasible) if why]
    if record.scores:
        rows = [[plain(t), plain(s.metric), _figure(s), str(s.documents)] for t, s in record.scores.items()]
        parts.append(table(["task", "metric", "score", "documents"], rows))
    if record.recipe is not None:
        try:
            parts.append(block(recipe_of(record).to_yaml().strip(), "yaml"))
        except UserError:
            parts.append("Its recipe is of another version.")
    return "\n\n".join(parts)


def _figure(score: Any) -> str:
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def _note_of_run(run: Run) -> str:
    winner = run.best()
    lines = [sentence(run, winner)] if winner is not None else []
    return "\n\n".join([f"# {plain(run.config.name)}", *(plain(line) for line in (*lines, *run.words))])


def _files(run: Run, record: Record) -> Mapping[str, bytes]:
    files = {}
    if record.recipe is not None:
        with suppress(UserError):
            files["recipe.yaml"] = recipe_of(record).to_yaml().encode()
    with suppress(OSError):
        files["documents.npz"] = run.folder.documents(record.number).read_bytes()
    return files
