"""What many workers wait for each other and for the storage: prints results/workers.md.

    python -m scripts.bench.workers --workers 1 4 16 32 --seconds 30 --each 8 --out results/workers.md
    python -m scripts.bench.workers --storage sqlite postgresql://me@127.0.0.1/runs proxy:postgresql://me@127.0.0.1/runs

The workers are processes of this host with the real study, storage and sampler; what they build and score is a sleep,
of the durations that trials have (log-normal around `--seconds`, a spread of a third). A worker's time falls into five:
asleep (the work), its own CPU (history, sampler), idle (until the base and the models are scored there is nothing to
propose, so who comes later waits, once a run), waiting for its turn, and waiting for the storage and the machine, which
is all the rest. Shares are of a worker's whole time from its first trial to its last. For more workers than were
run, the wait for a turn is computed from how long a turn lasts, as a queue with one server (Pollaczek and Khinchine,
constant service), and is said to be. Many workers know less when they propose than one does, so what a search of so
many finds in equally many trials is printed too: the score without noise of the proposal that scored best.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from mergesearch.config import Config
from mergesearch.errors import without_passwords
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.schema import validate
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.machine import machine
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

LAYERS = 4
INFOS = [TensorInfo(f"layers.{layer}.mlp", layer, "mlp", (2, 2)) for layer in range(LAYERS)]
MODELS = ("a", "b", "c", "d")
# the weight at which each model does most
BEST = dict(zip(MODELS, (0.2, 0.4, 0.6, 0.8), strict=True))
SPREAD = 0.33  # of the logarithm of a trial's seconds
COMPUTED = (64, 256)
PROXY = "proxy:"
QUALITY = 0.5  # seconds of a trial where only what is found counts
TITLES = (
    "workers", "trials", "trials an hour", "idle", "turn", "storage and machine", "own CPU", "waiting in all",
    "a turn lasts", "CPU a trial",
)  # fmt: skip
FORK = multiprocessing.get_context("fork")


class Sleeps:
    """An engine and a scorer that sleep; the scores are a smooth function of the recipe with a little noise."""

    def __init__(self, seconds: float):
        self.seconds, self.slept, self.recipe = seconds, 0.0, ""
        self.value = 0.0

    def load(self, recipe: Recipe) -> float:
        self.recipe = recipe.id
        self.value = true_score(recipe)
        return 0.0

    def identity(self, recipe: Recipe) -> str:
        return recipe.id

    def score(self) -> Any:
        drawn = random.Random(self.recipe)
        seconds = self.seconds * drawn.lognormvariate(0.0, SPREAD)
        begun = time.monotonic()
        time.sleep(seconds)
        self.slept += time.monotonic() - begun
        value = self.value + drawn.gauss(0, 0.01)
        return _Scores({"quiz": TaskScore(value, 0.01, 100, "acc")})


def true_score(recipe: Recipe) -> float:
    """What a recipe scores without noise: by how far each model's weight is from its own best one, over all rules."""
    far = [(_weight(rule.parameters, model) - best) ** 2 for rule in recipe.rules for model, best in BEST.items()]
    return 1 / (1 + len(BEST) * statistics.fmean(far))


def _weight(parameters: Mapping[str, Any], model: str) -> float:
    weight = parameters.get("weight", 1.0)
    return float(weight[model] if isinstance(weight, Mapping) else weight)


class _Scores:
    def __init__(self, tasks: dict[str, TaskScore]):
        self.tasks, self.seconds = tasks, 0.0

    def save_documents(self, path: Path) -> None:
        path.write_bytes(b"")


@dataclass(frozen=True)
class Storage:
    """Where the workers' study is.

    Attributes:
        url: None for SQLite in the run folder.
        proxy: HOST:PORT of the proxy before it, if there is one.
    """

    url: str | None = None
    proxy: str | None = None


@contextlib.contextmanager
def storage_of(given: str) -> Iterator[Storage]:
    """A storage as --storage names it, with a proxy before it if that is wanted."""
    if given == "sqlite":
        yield Storage()
        return
    if not given.startswith(PROXY):
        yield Storage(given)
        return
    url = given.removeprefix(PROXY)
    with tempfile.TemporaryDirectory(prefix="mergesearch-workers-") as folder:
        file = Path(folder) / "search.yaml"
        file.write_text(yaml.safe_dump({**settings(Path(folder), "proxy", 1, Storage(url)).dump(), "storage": url}))
        command = [sys.executable, "-m", "mergesearch", "proxy", str(file), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield Storage(url, process.stdout.readline().split()[1])
            finally:
                process.terminate()


@dataclass(frozen=True)
class Spent:
    """Of one worker, in seconds, over so many trials."""

    trials: int
    whole: float
    asleep: float
    cpu: float
    turns: float
    lasted: float  # all of its turns together
    taken: int  # turns
    idle: float = 0.0  # until the base and the models are scored

    @property
    def rest(self) -> float:
        return max(0.0, self.whole - self.asleep - self.cpu - self.turns - self.idle)


def settings(folder: Path, name: str, trials: int, storage: Storage, seed: int = 0) -> Config:
    data = {
        "name": name,
        "base_model": "base",
        "models": {model: model for model in MODELS},
        "tasks": [{"task": "quiz"}],
        "space": {"methods": ["task_arithmetic", "ties", "dare_ties"], "layer_groups": 2},
        "search": {"strategy": "study", "trials": trials, "seed": seed, "defaults": False},
        "output": str(folder),
        "storage": storage.url,
        "storage_proxy": storage.proxy,
    }
    return validate(Config, data, "workers")


def work(folder: Path, name: str, trials: int, storage: Storage, seed: int, seconds: float, told: Any) -> None:
    """One worker, in a process of its own; on a host of its own where the storage is a server, as its name says."""
    if storage.url is not None:  # others then go by its signs of life, and not by its lock
        socket.gethostname = lambda: f"host{os.getpid()}"
    config, stand_in = settings(folder, name, trials, storage, seed), Sleeps(seconds)
    turns = {"waited": 0.0, "lasted": 0.0, "taken": 0, "idle": 0.0}

    def turn(what: str, waited: float, lasted: float) -> None:
        if what == "take":
            turns["waited"] += waited
            turns["lasted"] += lasted
            turns["taken"] += 1
        elif what == "idle":
            turns["idle"] += waited

    ended: list[int] = []
    space = SearchSpace(config, INFOS, LAYERS)
    search = Search(
        config, RunFolder.prepare(config), space, stand_in, stand_in, infos=INFOS, layers=LAYERS, turn=turn,
        say=lambda text: None, finished=lambda trial: ended.append(trial.number),
    )  # fmt: skip
    begun, cpu = time.monotonic(), time.process_time()
    search.run()
    whole, cpu = time.monotonic() - begun, time.process_time() - cpu
    of_turns = turns["waited"], turns["lasted"], int(turns["taken"])
    told.put(Spent(len(ended), whole, stand_in.slept, cpu, *of_turns, turns["idle"]))


def measured(workers: int, each: int, seconds: float, storage: Storage, seed: int = 0) -> tuple[list[Spent], float]:
    """What so many workers spent, about `each` trials apiece, and what they found."""
    place = Path(tempfile.mkdtemp(prefix="mergesearch-workers-"))
    name, told = f"workers-{workers}-{time.time_ns()}", FORK.Queue()
    given = (place / "run", name, workers * each, storage, seed, seconds, told)
    processes = [FORK.Process(target=work, args=given) for _ in range(workers)]
    for process in processes:
        process.start()
    spent: list[Spent] = []
    while len(spent) < workers:
        try:
            spent.append(told.get(timeout=1.0))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("a worker failed, see above") from None
    for process in processes:
        process.join()
    best = found(place / "run", name, storage, seed)
    shutil.rmtree(place)
    return spent, best


def found(folder: Path, name: str, storage: Storage, seed: int) -> float:
    """The score without noise of the proposal that scored best; baselines are the same for any number of workers."""
    config = settings(folder, name, 1, storage, seed)
    history = History(store.open_study(config, RunFolder(folder), create=False), config)
    return true_score(next(trial.recipe for trial in history.complete() if trial.strategy == "study"))


def quality(workers: int, given: argparse.Namespace, storage: Storage) -> list[str]:
    """What searches of so many workers find in equally many trials, over seeds."""
    values = [measured(workers, given.trials // workers, QUALITY, storage, seed)[1] for seed in range(given.seeds)]
    half = 2.0 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [str(workers), str(given.trials), str(len(values)), f"{statistics.fmean(values):.4f} ± {half:.4f}"]


def row(workers: int, spent: list[Spent]) -> list[str]:
    whole = sum(one.whole for one in spent)
    trials = max(1, sum(one.trials for one in spent))
    share = [sum(getattr(one, key) for one in spent) / whole for key in ("turns", "rest", "cpu", "idle")]
    hour = trials / max(one.whole for one in spent) * 3600
    lasted = sum(one.lasted for one in spent) / max(1, sum(one.taken for one in spent))
    return [
        str(workers), str(trials), f"{hour:.0f}", f"{share[3]:.2%}", *(f"{x:.2%}" for x in share[:3]),
        f"{share[0] + share[1]:.2%}", f"{lasted * 1000:.0f} ms",
        f"{statistics.median(one.cpu / max(1, one.trials) for one in spent):.2f} s",
    ]  # fmt: skip


def computed(workers: int, lasted: float, seconds: float) -> list[str]:
    """The wait for a turn of so many workers, each of which comes once in `seconds`."""
    busy = min(workers * lasted / seconds, 1.0)
    wait = busy * lasted / (2 * (1 - busy)) if busy < 1 else float("inf")
    said = "the turns are used up" if busy >= 1 else f"{wait * 1000:.0f} ms, {wait / seconds:.2%}"
    return [str(workers), f"{busy:.0%}", said]


def _shown(storage: str) -> str:
    """A storage as --storage names it, without its password."""
    url = storage.removeprefix(PROXY)
    return storage[: len(storage) - len(url)] + without_passwords(url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="of a trial, at the median")
    parser.add_argument("--each", type=int, default=8, help="trials of a worker, about")
    parser.add_argument("--storage", nargs="+", default=["sqlite"], help="sqlite, the URL of a server, or proxy:URL")
    parser.add_argument("--trials", type=int, default=64, help="of a search whose finding is compared")
    parser.add_argument("--seeds", type=int, default=5, help="of these searches")
    parser.add_argument("--out", type=Path, default=Path("results/workers.md"))
    given = parser.parse_args()
    versions = ", ".join(f"{key} {value}" for key, value in machine("cpu").items() if key in ("python", "optuna"))
    lines = [
        "# Many workers: what they wait for", "",
        f"`python -m scripts.bench.workers --workers {' '.join(map(str, given.workers))} --seconds {given.seconds:g} "
        f"--each {given.each} --storage {' '.join(map(_shown, given.storage))} --trials {given.trials} "
        f"--seeds {given.seeds}`; {date.today()}; all on one host of 2 cores; {versions}.", "",
        "Where the storage is a server, each worker has a host name of its own, so that they go by signs of life.", "",
        "Shares of a worker's time, from its first trial to its last. *Idle*: nothing to propose until the base and",
        "the models are scored, once a run. *Turn*: until it might take a trial. *Storage and machine*: all else that",
        "is neither sleep nor CPU, so also what 2 cores cannot do at once. *Waiting in all*: these two.", "",
    ]  # fmt: skip
    for storage in given.storage:
        shown = _shown(storage).partition("://")[0]
        lines += [f"## {shown}", ""]
        rows, lasted = [], 0.0
        with storage_of(storage) as there:
            for workers in given.workers:
                spent, _ = measured(workers, given.each, given.seconds, there)
                lasted = sum(one.lasted for one in spent) / max(1, sum(one.taken for one in spent))
                rows.append(row(workers, spent))
                print(*rows[-1], sep=" | ", flush=True)
        lines += [
            *tables.table(TITLES, rows), "",
            f"Computed, not run, from the last row's turn of {lasted * 1000:.0f} ms:", "",
            *tables.table(
                ("workers", "turns in use", "wait for a turn"),
                [computed(workers, lasted, given.seconds) for workers in COMPUTED],
            ), "",
        ]  # fmt: skip
    lines += [
        "## What they find", "",
        f"Trials of {QUALITY:g} s at the median, on SQLite; ± is two standard errors over seeds.", "",
    ]  # fmt: skip
    rows = []
    for workers in given.workers:
        rows.append(quality(workers, given, Storage()))
        print(*rows[-1], sep=" | ", flush=True)
    titles = ("workers", "trials", "seeds", "score without noise of the best proposal")
    lines += [*tables.table(titles, rows), "", *notes_of(given.out)]
    given.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
