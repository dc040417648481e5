"""Shows that the demo zoo is a real search problem: prints results/zoo.md from a finished run.

    mergesearch run configs/zoo.yaml
    python -m scripts.bench.zoo_table results/zoo-search

Whatever the search could have chosen is measured on the holdout documents, which the run never saw. That each model is
best on its own task involves no choice, so it is measured on all documents. Differences are paired, document by
document; the mean over the tasks is on the scale where the base is 0 and the best single model 1 (the objective of the
run, fixed on its search documents), the tasks taken as independent. The script fails when the zoo is none.
"""

from __future__ import annotations

import argparse
import math
import sys
from datetime import date
from pathlib import Path

from mergesearch.commands.score import score_recipes
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.statistics import Difference, difference
from mergesearch.recipe import AVERAGE, BASE, Recipe
from mergesearch.results.loading import load_run
from mergesearch.results.record import ranked
from mergesearch.search.objective import Objective, signed
from mergesearch.search.strategies.baselines import baselines
from mergesearch.search.worker import machine

BEST = "best merge found"
TIMES = 2.0  # standard errors that count as clear


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("results/zoo-search"))
    parser.add_argument("--out", type=Path, default=Path("results/zoo.md"))
    arguments = parser.parse_args()

    run = load_run(arguments.run)
    config, records, objective = run.config, list(run.records), run.objective
    assert objective is not None, "the run has not scored its baselines yet"
    winner = ranked(records)[0]
    proposed = sum(record.name is None and record.state == "complete" for record in records)
    plain = {name: recipe for name, recipe in baselines(config).items() if name in (*config.parents, AVERAGE)}
    candidates = {**plain, BEST: Recipe.from_data(dict(winner.recipe or {}), "winner")}
    scores = score_recipes(candidates, config, "holdout")
    singles = {name: recipe for name, recipe in candidates.items() if name not in (AVERAGE, BEST)}
    everywhere = score_recipes(singles, config, "all")
    own = {task: task.removeprefix("zoo_") for task in objective.weights}
    claims = [*_own_task(everywhere, own), *_best_merge(scores, objective)]
    versions = ", ".join(f"{name} {version}" for name, version in machine("cpu").items() if name != "device")
    text = "\n".join(
        [
            "# The demo zoo as a search problem",
            "",
            f"`mergesearch run configs/zoo.yaml` ({proposed} proposals), then `python -m scripts.bench.zoo_table`; "
            f"{date.today()}; CPU, 2 cores; {versions}.",
            "",
            f"Holdout documents, which the search never saw: {_counts(scores)}. ± is one standard error. The mean is",
            "on the scale where the base is 0 and the best single model of each task 1, fixed on the search documents.",
            "",
            *_scores_table(scores, objective, own),
            "",
            f"The best merge found is trial {winner.number} ({winner.method}); on the search documents its objective "
            f"was {winner.objective:.4f}.",
            "",
            "| claim | difference | standard errors | holds |",
            "|---|---|---|---|",
            *(
                f"| {name} | {d.value:+.4f} ± {d.stderr:.4f} | {d.value / d.stderr:+.1f} | {_holds(d)} |"
                for name, d in claims
            ),
            "",
        ]
    )
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(_holds(d) == "yes" for _, d in claims) else 1


def _own_task(scores: dict[str, Scores], own: dict[str, str]) -> list[tuple[str, Difference]]:
    """Each task's own model before the best of the others, on all documents."""
    found = []
    for task, mine in own.items():
        rival = max((name for name in scores if name != mine), key=lambda name: signed(scores[name].tasks[task]))
        found.append((f"{mine} before {rival} on {task} (all documents)", _on_task(scores, mine, rival, task)))
    return found


def _best_merge(scores: dict[str, Scores], objective: Objective) -> list[tuple[str, Difference]]:
    """The best merge before the best single model and the plain average, in the mean, on the holdout documents."""
    singles = [name for name in scores if name not in (BASE, AVERAGE, BEST)]
    single = max(singles, key=lambda name: objective.value(scores[name].tasks))
    return [
        (f"best merge before the best single model ({single}), mean", _mean(scores, BEST, single, objective)),
        ("best merge before the plain average, mean", _mean(scores, BEST, AVERAGE, objective)),
    ]


def _on_task(scores: dict[str, Scores], ours: str, theirs: str, task: str) -> Difference:
    """The paired difference, turned so that more is better for ours."""
    a, b = scores[ours].documents[task], scores[theirs].documents[task]
    found = difference(a.values, b.values, a.aggregation)
    sign = 1.0 if scores[ours].tasks[task].higher_is_better else -1.0
    return Difference(sign * found.value, found.stderr, found.documents)


def _mean(scores: dict[str, Scores], ours: str, theirs: str, objective: Objective) -> Difference:
    total = sum(objective.weights.values())
    value, variance = 0.0, 0.0
    for task, weight in objective.weights.items():
        part, factor = _on_task(scores, ours, theirs, task), weight / total / objective.scales[task].unit
        value += part.value * factor
        variance += (part.stderr * factor) ** 2
    return Difference(value, math.sqrt(variance), len(objective.weights))


def _holds(found: Difference) -> str:
    return "yes" if found.value > TIMES * found.stderr else "no"


def _counts(scores: dict[str, Scores]) -> str:
    return ", ".join(f"{score.documents} of {task}" for task, score in scores[BEST].tasks.items())


def _scores_table(scores: dict[str, Scores], objective: Objective, own: dict[str, str]) -> list[str]:
    tasks = scores[BEST].tasks
    titles = [f"{t} {s.metric}{'' if s.higher_is_better else ' ↓'}" for t, s in tasks.items()]
    lines = ["| candidate | mean | " + " | ".join(titles) + " |", "|---" * (len(tasks) + 2) + "|"]
    for name, found in scores.items():
        cells = [f"{objective.value(found.tasks):.3f} ± {objective.stderr(found.tasks) or 0.0:.3f}"]
        for task in tasks:
            score = found.tasks[task]
            cell = f"{score.value:.3f} ± {score.stderr or 0.0:.3f}"
            cells.append(f"**{cell}**" if own[task] == name else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
