"""Every search over the same pool and documents: runs what is missing, and prints results/search.md.

    pip install -e ".[bench]"
    python -m scripts.bench.search                                 # what is missing on all pools that are on disk
    python -m scripts.bench.search --list                          # names searches and pools, and what is missing
    python -m scripts.bench.search --pool real --only auto cmaes --seeds 6 7
    python -m scripts.bench.search --pool my/search.yaml --documents 25000
    python -m scripts.bench.search --report                        # runs nothing

A unit is one search with one seed on one pool; the seed also splits the documents, so all searches of one seed see the
same ones. What a finished unit came to are rows of results/search.csv, which is committed: a unit that stands there is
not run again, on any machine; `--pool real --again auto` takes its rows out and sets aside what was recorded of it, so
that it begins anew. What is not finished is recorded under --out as it goes: with --stop-after SECONDS the command ends
in time, and the same command goes on. Units run side by side in --jobs processes, each with a live model of its own.

Which searches belong to a pool, with which seeds and settings, says search_pools.py. --only and --seeds name others.
--set changes the configuration for all of them, which makes other searches of them, unless it is about one machine
alone: device, batch_size, and paths.

Several machines: give each its own seeds, searches or pools, and the same --scales, a folder with what fixes the
objective's scale for each pool and seed; the first that needs a scale writes it there, and the others take it from
there (copy it, where they share no disk). Their results/search.csv are put together by `git merge`, or by --take FILE,
which prints the page and runs nothing.

Judging pools (scripts/make_judging_pools.py) are for the last word alone: nothing is chosen by them. Whenever searches
run on one, the command first appends a row to results/judging.md, which is committed, and the page says how often.

Cost is counted in document evaluations of the search documents (a backward pass counts as two more), and in seconds of
building, learning and scoring. The scores of the base and the models, which fix the scale of the objective, are charged
to mergesearch's runs, which score them as trials, and not to the yardsticks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergesearch import config as configuration
from mergesearch.config import Config
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe
from mergesearch.schema import read_yaml
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import Trial
from scripts.bench import judging, search_report, search_rows
from scripts.bench.search_moments import documents_of, in_words, moments_of, seconds_of
from scripts.bench.search_pools import POOLS, REAL, RUNS, THE_YARDSTICK, YARDSTICKS, Pool
from scripts.bench.search_rows import Curve, Key, Point
from scripts.bench.yardstick import (
    LAYER_GROUPS,
    STRATEGIES,
    Ledger,
    Measures,
    OutOfTime,
    YardSpace,
    read_candidates,
)

# keys of a configuration that are about one machine, and not about what is measured
ELSEWHERE = {"base_model", "include_path", "output", "device", "batch_size", "name"}


@dataclass(frozen=True)
class Unit:
    """One search with one seed on one pool, and where it is recorded.

    Attributes:
        key: pool, search and seed; the seed is of the search, and of the split of the documents.
        out: the folder of what is not finished.
        config: the configuration's file.
        overrides: that change it.
        budget: document evaluations that it may spend.
        deadline: `time.time()` when it has to end.
        threads: of torch.
        scales: the folder with what fixes the objective.
        rows: the file of finished searches.
        commit: of the code that this command runs, asked once, when it began: what is imported then is what runs, in
            all its processes, whatever becomes of the files.
    """

    key: Key
    out: Path
    config: Path
    overrides: tuple[str, ...]
    budget: int
    deadline: float
    threads: int
    scales: Path
    rows: Path
    commit: str = ""

    @property
    def name(self) -> str:
        return f"{self.key.search} seed {self.key.seed} on {self.key.pool}"

    @property
    def file(self) -> Path:
        """The candidates of a yardstick."""
        return self.out / self.key.pool / "curves" / f"{slug(self.key.search)}-{self.key.seed}.jsonl"

    @property
    def run(self) -> Path:
        """The run folder of one of mergesearch's searches."""
        return self.out / self.key.pool / "runs" / f"{slug(self.key.search)}-{self.key.seed}"

    @property
    def commits(self) -> Path:
        """What code has run it so far, a line for each commit: one that is cut short may go on with another."""
        return self.out / self.key.pool / "commits" / f"{slug(self.key.search)}-{self.key.seed}.txt"

    def begin(self) -> str:
        """Notes the commit among those that ran it; returns them all, the first first."""
        known = self.commits.read_text(encoding="utf-8").split() if self.commits.is_file() else []
        if not known and (self.file.exists() or self.run.exists()):
            known = ["unknown"]  # begun by a version that did not note it
        ran = list(dict.fromkeys([*known, self.commit]))
        self.commits.parent.mkdir(parents=True, exist_ok=True)
        self.commits.write_text("".join(f"{commit}\n" for commit in ran), encoding="utf-8")
        return search_rows.THEN.join(ran)

    @property
    def scale(self) -> Path:
        """What fixes the objective for this pool and seed."""
        return self.scales / f"{self.key.pool}-{self.key.seed}.json"

    @property
    def settings(self) -> str:
        """Equal for equal searches, wherever they run: of what the files and the command say, not of what has become
        of that, so that a new key with a default changes nothing."""
        stated = {name: value for name, value in read_yaml(self.config).items() if name not in ELSEWHERE}
        stated["models"] = sorted(stated["models"])
        search = YARDSTICKS.get(self.key.search) or RUNS[self.key.search]
        changes = [each for each in self.overrides if each.split("=")[0] not in ELSEWHERE]
        return hashlib.sha256(json.dumps([stated, changes, search]).encode()).hexdigest()[:8]

    def set_aside(self) -> None:
        """Gives what was recorded of it other names, NAME.1 and so on, so that it begins anew; nothing is deleted."""
        for path in (self.file, self.run, self.commits):
            if path.exists():
                path.rename(next(new for n in count(1) if not (new := path.with_name(f"{path.name}.{n}")).exists()))

    def read(self) -> Config:
        """The configuration with this seed."""
        return configuration.read(self.config, [*self.overrides, f"search.seed={self.key.seed}"])


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    rows, failed = chosen.results.with_suffix(".csv"), []
    if chosen.list:
        print("searches:", *YARDSTICKS, *RUNS, "", "pools, and what is missing of their searches:", sep="\n")
        print(*(missing_in_words(name, chosen, rows) for name in chosen.pool or POOLS), sep="\n")
        return 0
    for file in chosen.take:
        for key, curve in search_rows.read(file).items():
            search_rows.add(rows, key, curve)
    if not (chosen.report or chosen.take):
        finished = search_rows.read(rows)
        wanted = without_past(units(chosen), chosen, finished)
        anew = [unit for unit in wanted if unit.key.search in chosen.again]
        for unit in wanted:
            if unit not in anew:
                is_done(unit, finished)  # which refuses, if so before anything is taken out
        search_rows.drop(rows, [unit.key for unit in anew])
        for unit in anew:
            unit.set_aside()
        left, failed = run_all(wanted, chosen.jobs)
        goes_on = ": the same command goes on" if left > len(failed) else ""
        print(f"{left} of {len(wanted)} searches are not finished{goes_on}")
        if failed:
            print("failed, for the reasons above, which may well come again:", *failed, sep="\n  ")
    looks = judging.looks()
    judged = {name: looks[name] for name, pool in POOLS.items() if pool.judging}
    search_report.write(search_rows.read(rows), THE_YARDSTICK, chosen.results, [*YARDSTICKS, *RUNS], judged)
    return 1 if failed else 0


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench-search"), help="for what is not finished")
    pools = f"of {', '.join(POOLS)}, or a configuration's file; default: all of these that are on disk"
    parser.add_argument("--pool", nargs="+", default=[], help=pools)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="key=value, for every search")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the pool's")
    parser.add_argument("--documents", type=int, help="evaluations of each search; default: what suits the pool")
    parser.add_argument("--only", nargs="+", choices=[*YARDSTICKS, *RUNS], help="default: the pool's searches")
    parser.add_argument("--again", nargs="+", choices=[*YARDSTICKS, *RUNS], default=[], help="anew; with --pool")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--scales", type=Path, help="the folder that fixes the objectives; default: OUT/scales")
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="adds rows of another machine; runs nothing")
    parser.add_argument("--report", action="store_true", help="print the page and run nothing")
    parser.add_argument("--results", type=Path, default=Path("results/search"), help="the page's path, no ending")
    parser.add_argument("--list", action="store_true", help="name searches, pools, what is missing")
    chosen = parser.parse_args(arguments)
    if chosen.again and not chosen.pool:
        parser.error("--again takes rows out of results/search.csv: say on which pools, with --pool")
    return chosen


def units(chosen: argparse.Namespace) -> list[Unit]:
    """What is chosen, pool by pool and seed by seed, so that a comparison cut short has whole seeds."""
    deadline, commit = time.time() + chosen.stop_after, judging.commit()
    scales, rows = chosen.scales or chosen.out / "scales", chosen.results.with_suffix(".csv")
    found = []
    for given in chosen.pool or there():
        name, pool = pool_of(given)
        overrides = (*pool.overrides, *chosen.overrides)
        searches = dict.fromkeys([*(chosen.only or pool.searches or [*YARDSTICKS, *RUNS]), *chosen.again])
        for seed in chosen.seeds or pool.seeds:
            for search in searches:
                budget = chosen.documents or (pool.yardstick if search in YARDSTICKS else pool.own)
                place = (chosen.out, pool.config, overrides, budget, deadline, chosen.threads, scales, rows, commit)
                found.append(Unit(Key(name, search, seed), *place))
    return found


def there() -> list[str]:
    """The pools that are on disk; says of the others how to make them."""
    for name, pool in POOLS.items():
        if not pool.config.is_file():
            print(f"left out: {name}, which is not on disk: `{pool.make}` makes it", file=sys.stderr)
    return [name for name, pool in POOLS.items() if pool.config.is_file()]


def without_past(wanted: Sequence[Unit], chosen: argparse.Namespace, finished: search_rows.Curves) -> list[Unit]:
    """All units but those whose rows are of settings that are gone, which are left as they are unless they are named;
    says which these are."""
    named = [*(chosen.only or []), *chosen.again]
    past = [unit for unit in wanted if unit.key in finished and finished[unit.key].settings in past_of(unit)]
    gone = [unit for unit in past if unit.key.search not in named]
    for unit in gone:
        print(f"left as it is: {unit.name}, run with {past_of(unit)[finished[unit.key].settings]}")
    return [unit for unit in wanted if unit not in gone]


def past_of(unit: Unit) -> Mapping[str, str]:
    return POOLS[unit.key.pool].past if unit.key.pool in POOLS else {}


def missing_in_words(name: str, chosen: argparse.Namespace, rows: Path) -> str:
    """A pool's line of --list."""
    if name in POOLS and not POOLS[name].config.is_file():
        return f"{name}: not on disk: `{POOLS[name].make}` makes it"
    finished, missing = search_rows.read(rows), {}
    chosen = argparse.Namespace(**{**vars(chosen), "pool": [name]})
    wanted = without_past(units(chosen), chosen, finished)
    for unit in wanted:
        if not is_done(unit, finished):
            missing.setdefault(unit.key.search, []).append(str(unit.key.seed))
    words = [f"{search} (seeds {' '.join(seeds)})" for search, seeds in missing.items()]
    return f"{name}: " + (", ".join(words) or "nothing")


def pool_of(given: str) -> tuple[str, Pool]:
    """A pool by its name or by its configuration's file; the latter is called what the file says."""
    if given in POOLS:
        pool, name = POOLS[given], given
    else:
        pool = Pool(Path(given), REAL, REAL)
        name = str(read_yaml(pool.config).get("name", pool.config.stem)) if pool.config.is_file() else given
    if not pool.config.is_file():
        hint = f"make it with `{pool.make}`" if pool.make else f"name one of {', '.join(POOLS)}, or a file"
        raise SystemExit(f"--pool {given}: there is no {pool.config}: {hint}")
    return name, pool


def is_done(unit: Unit, finished: search_rows.Curves) -> bool:
    """Whether its rows are there, of the same search and with as large a budget.

    Raises:
        SystemExit: there are rows of another search under its name.
    """
    curve = finished.get(unit.key)
    if curve is None:
        return False
    if curve.settings != unit.settings:
        raise SystemExit(refusal(unit, curve))
    return curve.budget >= unit.budget


def refusal(unit: Unit, curve: Curve) -> str:
    """Why a unit is neither done nor run, and what to do."""
    key, past = unit.key, past_of(unit).get(curve.settings)
    if past:
        why = f"run with {past}: no command gives these settings again"
    else:
        why = (
            f"run with other settings ({curve.settings}) than this command gives it ({unit.settings}): with another "
            "--set, which to give again, or before the pool's file or the search was changed"
        )
    pool = key.pool if key.pool in POOLS else unit.config
    anew = f'--pool {pool} --seeds {key.seed} --only "{key.search}" --again "{key.search}"'
    return (
        f"{unit.rows} holds {unit.name}, {why}. `{anew}`, with the --set and --documents wanted, takes these rows out "
        "for good and runs it anew; --results names another file, in which it has no rows yet"
    )


# --- units side by side ---


def run_all(chosen: Sequence[Unit], jobs: int) -> tuple[int, list[str]]:
    """Runs what is missing in so many processes; returns how many are not finished, and which of these failed."""
    finished = search_rows.read(chosen[0].rows) if chosen else {}
    waiting = [unit for unit in chosen if not is_done(unit, finished)]
    looks = [unit for unit in waiting if unit.key.pool in POOLS and POOLS[unit.key.pool].judging]
    judging.note([unit.key for unit in looks], looks[0].commit if looks else "")
    failed: list[str] = []

    def tell(unit: Unit, said: Said) -> None:
        print(said.line, flush=True)
        if said.error:
            print(said.error, file=sys.stderr, flush=True)
            failed.append(unit.name)

    if jobs == 1 or len(waiting) < 2:
        for unit in waiting:
            tell(unit, run_unit(unit))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=settle, initargs=(chosen[0].threads,)) as pool:
            units = {pool.submit(run_unit, unit): unit for unit in waiting}
            for future in as_completed(units):
                error = future.exception()  # of a process that was killed, say for memory
                why = "".join(traceback.format_exception(error))
                lost = Said(f"{units[future].name}: FAILED, a process ended", why)
                tell(units[future], lost if error else future.result())
    finished = search_rows.read(chosen[0].rows) if chosen else {}
    return sum(not is_done(unit, finished) for unit in chosen), failed


def settle(threads: int) -> None:
    """Makes this process one of several beside each other."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)


@dataclass(frozen=True)
class Said:
    """How far a search came, in a line, and the traceback of what it failed by."""

    line: str
    error: str = ""


def run_unit(unit: Unit) -> Said:
    """Runs or goes on with one search."""
    if time.time() > unit.deadline:
        return Said(f"{unit.name}: no time left")
    began, commit = time.perf_counter(), unit.begin()
    try:
        curve = (run_yardstick if unit.key.search in YARDSTICKS else run_own)(unit)
    except OutOfTime:
        return Said(f"{unit.name}: not finished, {time.perf_counter() - began:.0f} s")
    except Exception as error:
        return Said(f"{unit.name}: FAILED, {type(error).__name__}: {error}", traceback.format_exc())
    search_rows.add(unit.rows, unit.key, replace(curve, commit=commit))
    highest, holdout = curve.at(math.inf)
    return Said(f"{unit.name}: {curve.documents} documents, {highest:.4f}, {holdout:.4f} on the holdout")


# --- what people use today ---


def run_yardstick(unit: Unit) -> Curve:
    strategy, method = YARDSTICKS[unit.key.search]
    bench = Bench(unit.read(), unit.scale)
    ledger = Ledger(unit.file, bench.measures(), unit.deadline)
    STRATEGIES[strategy](bench.space(method), unit.key.seed, max(1, unit.budget // bench.documents), ledger)
    return search_rows.curve_of(read_candidates(unit.file), unit.settings, unit.budget)


class Bench:
    """A pool, its tasks and a live model, and the measures that all searches of one seed share.

    Args:
        config: the configuration; its seed splits the documents.
        scale: the file that keeps the scale of the objective for other processes and machines.
    """

    def __init__(self, config: Config, scale: Path):
        from mergesearch.commands import inputs as materials
        from mergesearch.commands.holding import load_pool
        from mergesearch.engine.live import Engine

        self.config, self.scale = config, scale
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
        file = self.scale
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


def run_own(unit: Unit) -> Curve:
    """One of mergesearch's searches as an ordinary run, and its trials as a curve."""
    from mergesearch.commands import run as actions

    plain = unit.read()
    config = own_config(unit)

    def finished(_: object) -> None:
        if time.time() > unit.deadline:
            raise OutOfTime

    session = actions.prepare(config, finished=finished)
    session.search.run()
    trials = session.search.history().trials
    del session
    return measured(unit, plain, trials)


def own_config(unit: Unit) -> Config:
    budget = ["search.trials=1000000", "search.hours=null", f"search.documents={unit.budget}"]
    given = [*unit.overrides, *RUNS[unit.key.search], *budget, f"search.seed={unit.key.seed}", f"output={unit.run}"]
    return configuration.read(unit.config, given)


def measured(unit: Unit, config: Config, trials: Sequence[Trial]) -> Curve:
    """The trials in the order in which they ended, on the scale that all searches of the seed share; the holdout is of
    whom the run would have given at each moment, who has the highest expectation."""
    bench = Bench(config, unit.scale)
    objective, measures, known = bench.objective(), bench.measures(), {}
    documents = documents_of(trials, RunFolder(unit.run))
    moments = moments_of(trials, lambda trial: objective.value(trial.scores), documents, objective.factors)
    for moment in moments:
        if moment.given.recipe_id not in known:
            known[moment.given.recipe_id] = measures.holdout(moment.given.recipe)
    points = [Point(m.documents, m.seconds, m.highest, known[m.given.recipe_id]) for m in moments]
    spent = sum(trial.documents for trial in trials), sum(seconds_of(trial) for trial in trials)
    best = in_words(moments[-1].given, config.models) if moments else ""
    return Curve(points, *spent, unit.settings, unit.budget, best=best)


if __name__ == "__main__":
    settle(options().threads)
    sys.exit(main())
