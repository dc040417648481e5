"""What each merge method is worth on a pool: at its default, and searched; results/methods.md.

    python -m scripts.bench.methods                       the methods that are not done yet, over the zoo of version 0.1
    python -m scripts.bench.methods --methods tsv ties+svc of these alone
    python -m scripts.bench.methods --page                 the page again, from what is done

Each method is a run of its own with that method alone in its space: the base, the models and their plain average,
which a run before scores once for all, then so many trials proposed by TPE on the search documents. The best of them by
its search documents, and the method's default with every weight 1, are scored on the holdout, each beside the plain
average, document by document. What is done is kept in --folder, run by run; what is not is said to be `not run`.
Nothing was chosen by looking at the holdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from scripts.bench.shared import tables, zoo1
from scripts.bench.shared.notes import notes_of

AVERAGE = "plain average"
DEFAULT, SEARCHED = "default", "searched"
RESULTS = Path(__file__).parents[2] / "results"
USUAL = ("linear", "task_arithmetic", "ties", "dare_ties")
NEWER = (
    *("tsv", "iso", "iso_cts", "regmean_free", "consensus", "star", "knots", "knots_dare", "resmerge"),
    *("task_arithmetic+lines", "task_arithmetic+svc", "ties+svc"),
)


def main() -> None:
    """Run what is not done, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=zoo1.QUICKSTART)
    parser.add_argument("--folder", type=Path, default=RESULTS / "methods")
    parser.add_argument("--methods", nargs="+", default=[*NEWER, *USUAL])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--documents", type=int, default=100, help="of each task, half of them held out")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    for name in [] if args.page else args.methods:
        if not (args.folder / f"{name}.json").exists():
            done = measured(name, args)
            args.folder.mkdir(parents=True, exist_ok=True)
            (args.folder / f"{name}.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            print(*row(name, done), sep=" | ", flush=True)
    (RESULTS / "methods.md").write_text(page(args.folder), encoding="utf-8")


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method's run and what came out of it, as plain data."""
    # here, so that the page is printed without them
    import torch

    from mergesearch import config as configuration
    from mergesearch.commands.run import prepare
    from mergesearch.commands.score import HOLDOUT, score_recipes
    from mergesearch.recipe import Recipe, single_rule
    from mergesearch.results.loading import Run, load_run
    from mergesearch.results.record import ranked
    from mergesearch.results.report import Entry, Question, build

    def run(folder: str, more: dict[str, str]) -> tuple[configuration.Config, Run]:
        settings = {
            "name": f"methods-{folder.replace('+', '-')}", "search.defaults": "false", "dtype": "float32",
            "report.at_end": "false", "output": args.folder / folder, **more,
        }  # fmt: skip
        read = configuration.read(args.config, [f"{key}={value}" for key, value in settings.items()])
        tasks = [task.model_copy(update={"limit": args.documents}) for task in read.tasks]
        config = read.model_copy(update={"tasks": tasks})
        prepare(config).search.run()
        return config, load_run(args.folder / folder)

    run("parents", {"search.strategy": "[baselines]", "search.trials": "0", "space.methods": "[linear]"})
    start = time.perf_counter()
    study = {"search.strategy": "[baselines, study]", "search.sampler": "tpe", "search.trials": str(args.trials)}
    config, found = run(name, {"space.methods": f"[{name}]", "search.fork": str(args.folder / "parents"), **study})
    searched = time.perf_counter() - start
    average = next(record for record in found.records if record.name == "average")
    best = next(record for record in ranked(found.records) if record.name is None)
    default = dataclasses.replace(average, number=len(found.records), name=None, method=name)
    recipes = {
        AVERAGE: config.recipe(single_rule("linear")),
        DEFAULT: config.recipe(single_rule(name)),
        SEARCHED: Recipe.model_validate(dict(best.recipe)),
    }
    scores = score_recipes(recipes, config, HOLDOUT)
    objective = found.objective
    assert objective is not None
    rows = {}
    for label, record in ((DEFAULT, default), (SEARCHED, best)):
        entries = [
            Entry(record, scores[label], objective.value(scores[label].tasks)),
            Entry(average, scores[AVERAGE], objective.value(scores[AVERAGE].tasks)),
        ]
        factors = objective.factors(scores[AVERAGE].tasks)
        section = build(Question(config.name, record.number, {AVERAGE: average.number}, factors), entries).sections[0]
        rows[label] = _figures(next(row for row in section.rows if row.trial == record.number))
    return {
        "method": name, "trials": args.trials, "documents": args.documents, "config": str(args.config.name),
        "seconds": searched, **rows, "winner": best.recipe_id, "search": best.objective,
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }  # fmt: skip


def _figures(row: Any) -> dict[str, Any]:
    """The holdout's objective, and its difference to the plain average with interval and verdict."""
    against = next((c for c in row.compared if c.reference == AVERAGE), None)
    return {
        "holdout": dataclasses.asdict(row.holdout) if row.holdout else None,
        "difference": dataclasses.asdict(against.difference) if against else None,
        "verdict": against.verdict if against else None,
    }


# --- the page -------------------------------------------------------------------------------------------------------

ABOUT = """# What each merge method is worth

    python -m scripts.bench.methods

Each row is a search of its own by TPE with one method in its space, in float32. `holdout`: the objective on documents
that no trial saw (more is better). `over the average`: the difference to the plain average of the models, paired
document by document, with its 95 % interval. `default`: every weight 1 and all else at the method's default. `seconds`:
of the whole search, scoring included, without the parents, which were scored once for all; what a method itself takes
stands in [engine.md](engine.md).
"""


def page(folder: Path) -> str:
    """The page from what is done."""
    rows = []
    settings, dates = set[str](), set[str]()
    for name in (*NEWER, *USUAL):
        file = folder / f"{name}.json"
        done = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        rows.append(row(name, done))
        if done:
            settings.add(
                f"{done['config']} of tests/data/zoo1 (4 fine-tunes of a small base), {done['trials']} trials, "
                f"{done['documents']} documents a task, half of them held out; {done['machine']}"
            )
            dates.add(done["date"])
    titles = ("method", "default, holdout", "over the average", "searched, holdout", "over the average", "seconds")
    table = "\n".join(tables.table(titles, rows))
    where = f"{'; '.join(sorted(settings))}; {' and '.join(sorted(dates))}." if settings else "Nothing was run yet."
    return "\n".join([ABOUT, where, "", table, *notes_of(RESULTS / "methods.md"), ""])


def row(name: str, done: dict[str, Any] | None) -> list[str]:
    """A row of the table."""
    if done is None:
        return [name, *["not run"] * 5]
    cells = [text for part in ("default", "searched") for text in _cells(done[part])]
    return [name, *cells, f"{done['seconds']:.0f}"]


def _cells(part: dict[str, Any]) -> list[str]:
    if not part["holdout"]:
        return ["not scored", ""]
    if not part["difference"]:  # the winner is the average itself
        return [f"{part['holdout']['value']:.3f}", "is the average"]
    d = part["difference"]
    between = f" [{d['low']:+.3f}, {d['high']:+.3f}]" if d["low"] is not None else ""
    return [f"{part['holdout']['value']:.3f}", f"{d['value']:+.3f}{between} {part['verdict']}"]


if __name__ == "__main__":
    main()
