"""Shows what merging does in the demo zoo, and that the quickstart finds it with any seed: prints results/zoo.md.

    python -m scripts.bench.zoo                     # runs what is not there yet, then prints
    python -m scripts.bench.zoo --seeds 10 --runs results/zoo

Two things are run: configs/zoo.yaml, a longer search, and configs/quickstart.yaml once for each seed from 0, each with
its report. A seed also decides which documents are held out. All that is printed is measured on holdout documents,
which the run never saw. Differences are paired, document by document; the mean over the tasks is on the scale where the
base is 0 and the best single model 1 (the objective of the run, fixed on its search documents), the tasks taken as
independent. Exit status 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mergesearch.commands.score import score_recipes
from mergesearch.config import Config
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.statistics import Difference, difference
from mergesearch.recipe import AVERAGE, BASE, single_rule
from mergesearch.results.loading import load_run
from mergesearch.results.record import ranked
from mergesearch.results.report.holdout import HoldoutScores
from mergesearch.search.objective import Objective, signed
from mergesearch.search.strategies.baselines import baselines
from mergesearch.search.worker import machine
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

BEST = "best merge found"
TIMES = 2.0  # standard errors that count as clear
KEPT = 0.8  # of a specialist's gain
# one weight for all, beside the published defaults: would a user who tries a few do as well?
UNIFORM = {f"task_arithmetic {weight}": weight for weight in (0.6, 0.8, 1.0)}


@dataclass(frozen=True)
class Outcome:
    """One finished run and its candidates' scores on its holdout documents."""

    config: Config
    objective: Objective
    scores: Mapping[str, Scores]
    winner: str
    searched: float
    improvement: bool
    minutes: float
    report_minutes: float

    def task(self, ours: str, theirs: str, task: str) -> Difference:
        """The paired difference, turned so that more is better for ours."""
        a, b = self.scores[ours].documents[task], self.scores[theirs].documents[task]
        found = difference(a.values, b.values, a.aggregation)
        sign = 1.0 if self.scores[ours].tasks[task].higher_is_better else -1.0
        return Difference(sign * found.value, found.stderr, found.documents)

    def mean(self, ours: str, theirs: str) -> Difference:
        """The paired difference of the objective."""
        total, value, variance = sum(self.objective.weights.values()), 0.0, 0.0
        for task, weight in self.objective.weights.items():
            part, factor = self.task(ours, theirs, task), weight / total / self.objective.scales[task].unit
            value += part.value * factor
            variance += (part.stderr * factor) ** 2
        return Difference(value, math.sqrt(variance), len(self.objective.weights))

    def kept(self, model: str) -> float:
        """The share of a specialist's gain over the base, on its own task, that the best merge has."""
        task = f"zoo_{model}"
        return self.task(BEST, BASE, task).value / self.task(model, BASE, task).value

    def best_of(self, names: list[str]) -> str:
        return max(names, key=lambda name: self.objective.value(self.scores[name].tasks))

    @property
    def parents(self) -> list[str]:
        return [BASE, *self.config.models]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("results/zoo"), help="where the run folders are")
    parser.add_argument("--out", type=Path, default=Path("results/zoo.md"))
    parser.add_argument("--search", default="configs/zoo.yaml", help="the longer search")
    arguments = parser.parse_args()

    longer = outcome(run(arguments.search, arguments.runs / "longer", 0), whole=True)
    seeds = [
        outcome(run("configs/quickstart.yaml", arguments.runs / f"seed-{seed}", seed))
        for seed in range(arguments.seeds)
    ]
    claims = claims_of(longer)
    versions = ", ".join(f"{name} {version}" for name, version in machine("cpu").items() if name != "device")
    sure = sum(one.improvement for one in seeds)
    text = "\n".join(
        [
            "# The demo zoo as a search problem",
            "",
            f"`python -m scripts.bench.zoo --seeds {arguments.seeds}`; {date.today()}; CPU, 2 cores; {versions}.",
            "",
            "All figures are of holdout documents, which the run that found the merge never saw. ± is one standard",
            "error. The mean is on the scale where the base is 0 and the best single model of each task 1, fixed on",
            "the search documents; on zoo_both no single model has both skills, so a merge can be above 1.",
            "",
            f"## The best merge of a longer search (`{arguments.search}`, {longer.minutes:.0f} minutes)",
            "",
            f"It is a {longer.winner}; on the search documents its objective was {longer.searched:.3f}. Holdout: "
            + ", ".join(f"{score.documents} of {task}" for task, score in longer.scores[BEST].tasks.items()) + ".",
            "",
            *scores_table(longer),
            "",
            *tables.table(
                ("claim", "difference", "standard errors", "holds"),
                [(name, cell, times, "yes" if holds else "no") for name, cell, times, holds in claims],
            ),
            "",
            f"## The quickstart with {len(seeds)} seeds",
            "",
            f"The report claims an improvement over the best single model and the plain average with {sure} of "
            f"{len(seeds)} seeds. Every run was counted. A seed also decides which documents are held out.",
            "",
            *seeds_table(seeds),
            *notes_of(arguments.out),
            "",
        ]
    )  # fmt: skip
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(holds for *_, holds in claims) and sure >= 0.9 * len(seeds) else 1


def run(config: str, folder: Path, seed: int) -> Path:
    """The folder of a finished search with its report, and in `minutes.json` beside them how long each took."""
    minutes = folder.with_suffix(".json")
    if not minutes.is_file():
        sets = [f"--set=search.seed={seed}", f"--set=output={folder}"]
        took = {"run": timed("run", config, *sets), "report": timed("report", str(folder))}
        minutes.write_text(json.dumps(took), encoding="utf-8")
    return folder


def timed(*command: str) -> float:
    """Runs one of the verbs and returns its minutes. A search that was killed goes on, and is timed from there."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "mergesearch", *command], check=True, stdout=subprocess.DEVNULL)
    return (time.monotonic() - began) / 60


def outcome(folder: Path, whole: bool = False) -> Outcome:
    """A run's winner and baselines on the documents of its report; `whole`: one weight for all as well."""
    found = load_run(folder)
    config, objective, winner = found.config, found.objective, ranked(found.records)[0]
    assert objective is not None, f"{folder} has not scored its baselines"
    held = HoldoutScores(found.folder.holdout)
    kept = {record.name: held.load(record, most=0) for record in found.records if record.name}
    scores = {name: one for name, one in {**kept, BEST: held.load(winner, most=0)}.items() if one is not None}
    if whole:
        uniform = {name: config.recipe(single_rule("task_arithmetic", weight=w)) for name, w in UNIFORM.items()}
        scores |= score_recipes(uniform, config, "holdout")
    report = json.loads((folder / "holdout" / "report.json").read_text(encoding="utf-8"))
    took = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    return Outcome(
        config, objective, scores, winner.method, winner.objective or math.nan,
        report["improvement"], took["run"], took["report"],
    )  # fmt: skip


def claims_of(found: Outcome) -> list[tuple[str, str, str, bool]]:
    """What the zoo is there to show: claim, difference, standard errors, whether it holds."""
    lines = []
    for model in found.config.models:
        task, gain = f"zoo_{model}", found.task(model, BASE, f"zoo_{model}")
        lines.append((f"{model} before the base on {task}", *said(gain)))
        share = found.kept(model)
        lines.append((f"the merge keeps {KEPT:.0%} of that", f"{share:.0%}", "", share >= KEPT))
    defaults = [name for name in baselines(found.config) if name not in (*found.parents, AVERAGE)]
    rivals = {"the best single model": list(found.config.models), "the plain average": [AVERAGE]}
    rivals |= {"the best published default": defaults, "the best of one weight for all": list(UNIFORM)}
    for words, names in rivals.items():
        rival = found.best_of(names)
        lines.append((f"best merge before {words} ({rival}), mean", *said(found.mean(BEST, rival))))
    both = max(found.parents, key=lambda name: signed(found.scores[name].tasks["zoo_both"]))
    lines.append((f"best merge before the best parent ({both}) on zoo_both", *said(found.task(BEST, both, "zoo_both"))))
    return lines


def said(found: Difference) -> tuple[str, str, bool]:
    return (
        f"{found.value:+.4f} ± {found.stderr:.4f}", f"{found.value / found.stderr:+.1f}",
        found.value > TIMES * found.stderr,
    )  # fmt: skip


def scores_table(found: Outcome) -> list[str]:
    tasks = found.scores[BEST].tasks
    titles = [f"{t} {s.metric}{'' if s.higher_is_better else ' ↓'}" for t, s in tasks.items()]
    rows = []
    for name, scores in found.scores.items():
        cells = [f"{found.objective.value(scores.tasks):.3f}"]
        for task in tasks:
            score = scores.tasks[task]
            cell = f"{score.value:.3f} ± {score.stderr or 0.0:.3f}"
            cells.append(f"**{cell}**" if task == f"zoo_{name}" or name == BEST else cell)
        rows.append([name, *cells])
    return tables.table(["candidate", "mean", *titles], rows)


def seeds_table(seeds: list[Outcome]) -> list[str]:
    models = list(seeds[0].config.models)
    titles = ["seed", "minutes", "report", "winner", "mean", "over the best single model", "over the average"]
    titles += [f"{model} kept" for model in models] + ["zoo_both, best parent's", "claimed"]
    rows = []
    for seed, one in enumerate(seeds):
        single = one.best_of(list(one.config.models))
        best_parent = max(one.scores[name].tasks["zoo_both"].value for name in one.parents)
        cells = [
            str(seed),
            f"{one.minutes:.1f}",
            f"{one.report_minutes:.1f}",
            one.winner,
            f"{one.objective.value(one.scores[BEST].tasks):.3f}",
        ]
        cells += [said(one.mean(BEST, rival))[0] for rival in (single, AVERAGE)]
        cells += [f"{one.kept(model):.0%}" for model in models]
        cells += [f"{one.scores[BEST].tasks['zoo_both'].value:.3f}, {best_parent:.3f}"]
        rows.append([*cells, "yes" if one.improvement else "no"])
    return tables.table(titles, rows)


if __name__ == "__main__":
    sys.exit(main())
