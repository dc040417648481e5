"""Every search over the same pool and documents, for results/search.md: the best holdout score against the cost.

    pip install -e ".[bench]"
    python -m scripts.bench.search results/bench-search --seeds 0 1 2 3 4 --candidates 400 --jobs 8
    python -m scripts.bench.search results/bench-search --report

A unit is one search with one seed; the seed also splits the documents, so all searches of one seed see the same ones.
Units run side by side in --jobs processes, each with a live model of its own. Everything is recorded as it happens:
with --stop-after SECONDS the command ends in time, and the same command goes on. --set changes the
configuration for all searches (`--set batch_size=256`), --only chooses among them, --list names them. The pool is the
demo zoo of version 0.1 unless --config names another.

Cost is counted in document evaluations of the search documents; a backward pass counts as two more. The scores of the
base and the models, which fix the scale of the objective, are charged to mergesearch's runs, which score them as
trials, and not to the yardstick.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from mergesearch import config as configuration
from mergesearch.config import Config
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe
from mergesearch.search.trials import State, Trial
from scripts.bench import search_report
from scripts.bench.shared import zoo1
from scripts.bench.yardstick import (
    LAYER_GROUPS,
    STRATEGIES,
    Candidate,
    Ledger,
    Measures,
    OutOfTime,
    YardSpace,
    read_candidates,
)

# What a search of people's today is: (strategy, method).
YARDSTICKS: dict[str, tuple[str, str]] = {
    "cmaes": ("cmaes", "ties"),
    "random": ("random", "ties"),
    "tpe": ("tpe", "ties"),
    "cmaes task_arithmetic": ("cmaes", "task_arithmetic"),
}
THE_YARDSTICK = "cmaes"

# mergesearch's own searches: what each changes in the configuration. One more line is one more search.
RACING = ["racing={blocks: 16, error: 0.01}"]
GROUPS = ["space.layer_groups=3", "space.components=[attention, mlp, other]", "space.grow=true"]
DEFAULTS = ["search.sampler=auto", "search.defaults=true"]
AUTO = ["search.strategy=auto", *DEFAULTS, *GROUPS, *RACING]
RUNS: dict[str, list[str]] = {
    "auto": AUTO,
    "greedy_soup": ["search.strategy=[baselines, greedy_soup]", *DEFAULTS],
    "learned_soup": [
        "search.strategy=[baselines, learned_soup]",
        *DEFAULTS,
        *GROUPS,
        "search.learned_soup.per=[group]",
        "search.learned_soup.loss=[expected]",
    ],
    "auto with the expected loss alone": [*AUTO, "search.learned_soup.loss=[expected]"],
    "auto with a soup per group": [*AUTO, "search.learned_soup.per=[group]"],
    "auto with a soup per model": [*AUTO, "search.learned_soup.per=[recipe]"],
    "auto without warm starts": [*AUTO, "search.strategy=[baselines, study]"],
    "auto without learned soup": [*AUTO, "search.strategy=[baselines, greedy_soup, study]"],
    "auto without racing": [*AUTO, "racing=null"],
    "auto without groups": [*AUTO, "space.layer_groups=1", "space.components=[all]", "space.grow=false"],
    "auto with smooth tie-break": [*AUTO, "objective.tie_break=gold_prob"],
}


@dataclass(frozen=True)
class Unit:
    """One search with one seed, and where it is recorded.

    Attributes:
        search: its name.
        seed: of the search, and of the split of the documents.
        out: the folder of the whole comparison.
        config: the configuration's file.
        overrides: that change it.
        candidates: how many the yardstick may score; other searches get as many documents.
        deadline: `time.time()` when it has to end.
        threads: of torch.
    """

    search: str
    seed: int
    out: Path
    config: Path
    overrides: tuple[str, ...]
    candidates: int
    deadline: float
    threads: int

    @property
    def file(self) -> Path:
        """The candidates of a yardstick, or of a run what its trials amount to."""
        return self.out / "curves" / f"{slug(self.search)}-{self.seed}.jsonl"

    @property
    def done(self) -> bool:
        """Whether it has spent its budget, or a larger one."""
        return self.note.is_file() and int(self.note.read_text()) >= self.candidates

    @property
    def note(self) -> Path:
        """Says which budget was spent."""
        return self.file.with_suffix(".done")

    @property
    def run(self) -> Path:
        """The run folder of one of mergesearch's searches."""
        return self.out / "runs" / f"{slug(self.search)}-{self.seed}"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    if chosen.list:
        print("\n".join([*YARDSTICKS, *RUNS]))
        return 0
    if chosen.report:
        return search_report.write(read_all(chosen.out), THE_YARDSTICK, chosen.results, described(chosen))
    chosen.out.mkdir(parents=True, exist_ok=True)
    remember(chosen)
    left = run_all(units(chosen), chosen.jobs)
    print(f"{left} of {len(units(chosen))} searches are not finished" + (": the same command goes on" if left else ""))
    return 0


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/bench-search"))
    parser.add_argument("--config", type=Path, default=zoo1.SEARCH)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="key=value, for every search")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--candidates", type=int, default=400, help="of the yardstick; others get as many documents")
    parser.add_argument("--only", nargs="+", choices=[*YARDSTICKS, *RUNS], help="these searches alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--report", action="store_true", help="write the report and run nothing")
    parser.add_argument("--results", type=Path, default=Path("results/search"), help="the report's path, no ending")
    parser.add_argument("--list", action="store_true", help="name the searches")
    return parser.parse_args(arguments)


def units(chosen: argparse.Namespace) -> list[Unit]:
    """Seed by seed, so that a comparison cut short has whole seeds."""
    deadline = time.time() + chosen.stop_after
    names = chosen.only or [*YARDSTICKS, *RUNS]
    return [
        Unit(
            name, seed, chosen.out, chosen.config, tuple(chosen.overrides), chosen.candidates, deadline, chosen.threads
        )
        for seed in chosen.seeds
        for name in names
    ]


def remember(chosen: argparse.Namespace) -> None:
    """Notes what the comparison is made with, and what each search is; refuses to mix it with another."""
    told = {"config": chosen.config.read_text(encoding="utf-8"), "overrides": chosen.overrides}
    searches = {name: RUNS[name] for name in chosen.only or RUNS if name in RUNS}
    file = chosen.out / "settings.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    noted = there.pop("searches", {})
    if there and there != told:
        raise SystemExit(f"{chosen.out} holds a comparison with another --config or --set: name another folder")
    changed = next((name for name in searches if noted.get(name, searches[name]) != searches[name]), None)
    if changed:
        raise SystemExit(f"{chosen.out} holds {changed!r} as it was before it changed: name another folder")
    file.write_text(json.dumps({**told, "searches": {**noted, **searches}}), encoding="utf-8")


def described(chosen: argparse.Namespace) -> str:
    """The configuration of a comparison in words, for the report."""
    told = json.loads((chosen.out / "settings.json").read_text(encoding="utf-8"))
    name = yaml.safe_load(told["config"]).get("name", "run")
    changes = ", ".join(told["overrides"])
    return f"configuration `{name}`" + (f" with {changes}" if changes else "")


# --- units side by side ---


def run_all(chosen: Sequence[Unit], jobs: int) -> int:
    """Runs the units in so many processes; returns how many are not finished."""
    waiting = [unit for unit in chosen if not unit.done]
    if jobs == 1 or len(waiting) < 2:
        for unit in waiting:
            print(run_unit(unit), flush=True)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=settle, initargs=(chosen[0].threads,)) as pool:
            for future in as_completed([pool.submit(run_unit, unit) for unit in waiting]):
                error = future.exception()  # of a process that was killed, say for memory
                print(f"a process ended: {error}" if error else future.result(), flush=True)
    return sum(not unit.done for unit in chosen)


def settle(threads: int) -> None:
    """Makes this process one of several beside each other."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)


def run_unit(unit: Unit) -> str:
    """Runs or goes on with one search; returns a line that says how far it came."""
    if time.time() > unit.deadline:
        return f"{unit.search} seed {unit.seed}: no time left"
    began = time.perf_counter()
    try:
        (run_yardstick if unit.search in YARDSTICKS else run_own)(unit)
        unit.note.write_text(str(unit.candidates))
    except OutOfTime:
        pass
    except Exception as error:
        return f"{unit.search} seed {unit.seed}: FAILED, {type(error).__name__}: {error}"
    return f"{unit.search} seed {unit.seed}: {summary(read_candidates(unit.file))}, {time.perf_counter() - began:.0f} s"


def summary(found: Sequence[Candidate]) -> str:
    best = max((c.value for c in found if c.value is not None), default=math.nan)
    return f"{len(found)} candidates, {sum(c.documents for c in found)} documents, best {best:.4f}"


# --- what people use today ---


def run_yardstick(unit: Unit) -> None:
    strategy, method = YARDSTICKS[unit.search]
    bench = Bench(configuration.read(unit.config, [*unit.overrides, f"search.seed={unit.seed}"]), unit.out)
    ledger = Ledger(unit.file, bench.measures(), unit.deadline)
    STRATEGIES[strategy](bench.space(method), unit.seed, unit.candidates, ledger)


class Bench:
    """A pool, its tasks and a live model, and the measures that all searches of one seed share.

    Args:
        config: the configuration; its seed splits the documents.
        out: where the scale of the objective is kept for the other processes.
    """

    def __init__(self, config: Config, out: Path):
        from mergesearch.commands import inputs as materials
        from mergesearch.commands.holding import load_pool
        from mergesearch.engine.live import Engine

        self.config, self.out = config, out
        tasks = materials.load_tasks(config)
        parts = materials.splits(config, tasks)
        self.pool = load_pool(config)
        self.engine = Engine(self.pool, config.dtype)
        self.scorers = {
            side: materials.scorer_of(
                config,
                self.engine.model,
                self.pool.tokenizer,
                tasks,
                {label: getattr(part, side) for label, part in parts.items()},
            )
            for side in ("search", "holdout")
        }
        self.documents = sum(len(part.search) for part in parts.values())

    def score(self, recipe: Recipe, side: str) -> Mapping[str, TaskScore]:
        self.engine.load(recipe)
        return self.scorers[side].score().tasks

    def measures(self) -> Measures:
        objective = self.objective()

        def search(recipe: Recipe) -> tuple[float, int]:
            scores = self.score(recipe, "search")
            return objective.value(scores), sum(score.documents for score in scores.values())

        def holdout(recipe: Recipe) -> float:
            return objective.value(self.score(recipe, "holdout"))

        return Measures(search, holdout, self.documents)

    def objective(self) -> Any:
        """The objective with the scale that the parents' scores on the search documents fix, as in a run."""
        from mergesearch.search.objective import Objective, parents, raw

        if self.config.objective.scale == "raw":
            return raw(self.config.tasks)
        file = self.out / "scales" / f"{self.config.search.seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                scores = {name: self.score(recipe, "search") for name, recipe in self.parents().items()}
                found = parents(self.config.tasks, scores.pop("base"), scores)
                file.write_text(json.dumps(found.to_data()), encoding="utf-8")
        return Objective.from_data(json.loads(file.read_text(encoding="utf-8")))

    def parents(self) -> dict[str, Recipe]:
        from mergesearch.search.strategies.baselines import baselines

        found = baselines(self.config)
        return {name: found[name] for name in self.config.parents}

    def space(self, method: str) -> YardSpace:
        """One method's weights and densities, group by group."""
        from mergesearch.space import SearchSpace

        data = self.config.dump() | {"space": {"methods": [method], "layer_groups": LAYER_GROUPS}}
        cut = SearchSpace(Config.model_validate(data), self.pool.infos, self.pool.layers)
        return YardSpace(tuple(self.config.models), cut.groups, cut.recipe, method)


# --- mergesearch's own searches ---


def run_own(unit: Unit) -> None:
    """One of mergesearch's searches as an ordinary run, and its trials as a curve."""
    from mergesearch.commands import run as actions

    plain = configuration.read(unit.config, [*unit.overrides, f"search.seed={unit.seed}"])
    documents = unit.candidates * searched_documents(plain)
    config = own_config(unit, documents)

    def finished(_: object) -> None:
        if time.time() > unit.deadline:
            raise OutOfTime

    session = actions.prepare(config, finished=finished)
    try:
        session.search.run()
    finally:
        trials = session.search.history().trials
        del session
        write_curve(unit, plain, trials)


def own_config(unit: Unit, documents: int) -> Config:
    budget = ["search.trials=1000000", "search.hours=null", f"search.documents={documents}"]
    given = [*unit.overrides, *RUNS[unit.search], *budget, f"search.seed={unit.seed}", f"output={unit.run}"]
    return configuration.read(unit.config, given)


def searched_documents(config: Config) -> int:
    from mergesearch.commands import inputs as materials

    return sum(len(part.search) for part in materials.splits(config, materials.load_tasks(config)).values())


def write_curve(unit: Unit, config: Config, trials: Sequence[Trial]) -> None:
    """The trials as candidates in the order in which they were finished, on the scale that the seed's searches share;
    holdout scores that are known are kept."""
    known = {c.id: c.holdout for c in read_candidates(unit.file) if c.holdout is not None}
    bench = Bench(config, unit.out)
    objective, measures = bench.objective(), bench.measures()
    found = curve_of(trials, lambda trial: objective.value(trial.scores))
    wanted = {c.id: Recipe.from_data(recipe, c.id) for c, recipe in best_so_far(found) if c.id not in known}
    known |= {name: measures.holdout(recipe) for name, recipe in wanted.items()}
    best = {c.id for c, _ in best_so_far(found)}
    lines = [{**vars(c), "holdout": known[c.id] if c.id in best else None} for c, _ in found]
    unit.file.parent.mkdir(parents=True, exist_ok=True)
    part = unit.file.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.replace(unit.file)


Measured = tuple[Candidate, Mapping[str, Any]]


def curve_of(trials: Sequence[Trial], value_of: Callable[[Trial], float]) -> list[Measured]:
    """(candidate, recipe) of each trial that has ended, by the time it ended. A trial that was stopped early has no
    value and costs what it was scored on."""
    ended = [(trial.ended_at, trial) for trial in trials if trial.ended_at and (trial.recipe_data or trial.documents)]
    curve = []
    for _, trial in sorted(ended, key=lambda pair: (pair[0], pair[1].number)):
        value = value_of(trial) if trial.state is State.COMPLETE else None
        name = trial.recipe_id or f"trial {trial.number}"
        candidate = Candidate(name, value, trial.documents, None, trial.seconds, trial.error)
        curve.append((candidate, trial.recipe_data or {}))
    return curve


def best_so_far(found: Sequence[Measured]) -> list[Measured]:
    """The candidates that were the best when they ended."""
    best, chosen = -math.inf, []
    for candidate, recipe in found:
        if candidate.value is not None and candidate.value > best:
            best = candidate.value
            chosen.append((candidate, recipe))
    return chosen


# --- the report ---


def read_all(out: Path) -> dict[str, dict[int, list[Candidate]]]:
    """Search -> seed -> candidates, of the searches that have any."""
    found: dict[str, dict[int, list[Candidate]]] = {}
    for name in [*YARDSTICKS, *RUNS]:
        for file in sorted((out / "curves").glob(f"{slug(name)}-*.jsonl")):
            seed = file.stem.removeprefix(f"{slug(name)}-")
            if seed.isdigit():
                found.setdefault(name, {})[int(seed)] = read_candidates(file)
    return found


if __name__ == "__main__":
    settle(options().threads)
    sys.exit(main())
