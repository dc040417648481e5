"""What racing saves and what it costs, over recorded scores: prints results/racing.md.

    mergesearch run tests/data/zoo1/quickstart.yaml  # without racing: every document of every trial
    python -m scripts.bench.record_matrix results/quickstart tests/data/raced.npz
    python -m scripts.bench.record_matrix tests/data/zoo1/quickstart.yaml tests/data/zoo_matrix.npz \\
        --random 40 --tpe 30 --set tasks.0.limit=null tasks.1.limit=null tasks.2.limit=null tasks.3.limit=null
    python -m scripts.bench.racing
    python -m scripts.bench.racing --orders --searches 2  # that section of the page alone

Every simulated search takes the baselines first and draws blocks of its own.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mergesearch.evaluate import statistics
from scripts.bench.shared import tables
from scripts.bench.shared.orders import ORDERS, race_in_order
from scripts.bench.shared.replay import Matrix, Raced, race_all

DATA = Path(__file__).parents[2] / "tests" / "data"
# (blocks, error, whether tasks that decide come first, whether finished trials help to predict)
SETTINGS = [
    (16, 0.01 / 15, False, False),
    (16, 0.002, False, False),
    (16, 0.002, True, False),
    (8, 0.002, True, True),
    (16, 0.002, True, True),
    (32, 0.002, True, True),
    (16, 0.005, True, True),
    (16, 0.01, True, True),
]
INTRODUCTION = """\
# Racing over recorded scores

`python -m scripts.bench.racing --searches {searches}`, {searches} simulated searches a row; {about}.

*Saving*: document evaluations without racing / with it, on the proposals and, in brackets, for the whole search, whose
baselines are never stopped here (in a run the published defaults and the slerp of the two best race too). *Wrongly
stopped*: of those that were stopped, the ones whose full score would have made them the best; *of contenders*: the
same, of all whose full score makes them the best. *Same winner*: searches that end with the candidate that scoring
everything finds. *Shares*: equal, the same fraction of every task's documents in each block; by spread, first the
documents of the tasks on which the parents differ most. *Predicted*: from the best finished trial alone, or by a
regression on all finished ones (`racing:` works by spread and regression).
Error: the predicted chance to win at which a candidate is stopped; 0.00067 is 0.01 shared out over the looks of 16
blocks, Bonferroni's rule, which is what a confidence sequence costs. The default, 0.002, was chosen by these tables:
late in a TPE search most proposals are about as good as the best one, and there the chance is predicted too small.
"""

BY_INFORMATION = "## Orders by information"
ABOUT_ORDERS = """\
`python -m scripts.bench.racing --orders --searches {searches}`; {about}. zoo_matrix.npz, all proposals in TPE's order,
16 blocks, by regression, Student's quantile. Once four proposals are finished, the order of the documents is made anew
for each trial, from the latest twelve of them. Asked was a saving of 4 at 1 % wrongly stopped.
"""
WHY_NOT = """\

None of them gets there, and none is much better than what there is, so that stays. What limits the saving is not which
documents come first: late in a TPE search the proposals lie within a few standard errors of the best one on all
documents (see the quartiles of each table), so that most of the documents are needed whichever they are. Between tasks,
the parents' differences allot the documents about as the proposals' own do. Within a task, whoever takes first the
documents on which proposals differ has to learn all the same that the others are alike, from a few of them, and the
guard against a rare document that is not pays for it.
"""
CLOSING = """\
## Student's quantile before and after

Until 2026-11-25 the rule took the first term of an expansion for Student's quantile, which is far too small for few
degrees of freedom (error 0.002: 9.6 at 1, 6.2 at 2, 4.5 at 4, 3.7 at 8; Student's are 159, 15.8, 5.95, 3.99). The
saving with it, and with the quantile itself, 12 searches a row, 16 blocks, error 0.002, by spread and regression:

| recorded scores | before | after |
|---|---|---|
| raced.npz, random order | 2.19 (1.89) | 2.18 (1.89) |
| raced.npz, TPE's order | 2.10 (1.83) | 2.09 (1.83) |
| zoo_matrix.npz, at random | 4.54 (3.11) | 4.53 (3.10) |
| zoo_matrix.npz, TPE's order | 2.55 (2.27) | 2.54 (2.27) |
| zoo_matrix.npz, at random, gold_prob | 6.42 (3.76) | 6.38 (3.75) |
| zoo_matrix.npz, TPE's order, gold_prob | 3.10 (2.66) | 3.10 (2.66) |

Of the 48 rows of this page none lost more than 0.04 of its saving, and no other figure moved: neither which trials were
stopped wrongly nor who won. A first block leaves 8 to 18 degrees of freedom over raced.npz and 18 to 31 over
zoo_matrix.npz (one search each, 16 blocks), where the expansion was at most 8 % short. It was several times too small
where a block has two or three documents of a task, which these recordings do not show.

## Tried and left out

Measured once while the rule was made, on proposals of raced.npz in a random order, 16 blocks, error 0.01, by spread,
from the best trial alone (saving 1.84, of those stopped 0 of 859 wrongly):

- Within a task, first the documents on which the parents disagree (strata with Neyman's allocation): 1.59. The merges
  also differ on documents on which all parents agree, and few of them are then seen.
- A normal prior for a candidate's distance from the best one, from the candidates before it: 1.89.
- No guard against extreme documents that have not come up yet: 2.45, and 58 of 911 wrongly stopped.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, nargs="*", default=[DATA / "raced.npz", DATA / "zoo_matrix.npz"])
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--orders", action="store_true", help="the section on orders by information alone")
    parser.add_argument("--out", type=Path, default=Path("results/racing.md"))
    arguments = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mergesearch", "numpy", "scipy"))
    about = f"{datetime.date.today()}, python {platform.python_version()}, {libraries}"
    if arguments.orders:
        arguments.out.write_text(_with_orders(arguments.out, arguments.searches, about), encoding="utf-8")
        return
    lines = [INTRODUCTION.format(searches=arguments.searches, about=about)]
    for path in arguments.matrix:
        lines += _of_matrix(Matrix.read(path), path.name, arguments.searches)
    before = _orders_in(arguments.out)
    arguments.out.write_text("\n".join([*lines, *([before] if before else []), CLOSING]), encoding="utf-8")


def _orders_in(page: Path) -> str:
    """The section on orders in a page; empty where there is none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin = text.find(BY_INFORMATION)
    return text[begin : text.find("\n## ", begin) + 1] if begin >= 0 else ""


def _with_orders(page: Path, searches: int, about: str) -> str:
    """The page with that section made anew, before the one on Student's quantile."""
    rows = []
    matrix = Matrix.read(DATA / "zoo_matrix.npz")
    for metric, recorded in (("the tasks'", matrix), ("gold_prob", matrix.smooth())):
        for error in (0.002, 0.01):
            for name, order in ORDERS.items():
                found = [race_in_order(recorded, order, 16, error, seed) for seed in range(searches)]
                saving, stopped, wrong, _, same = _cells(recorded, found)
                rows.append([metric, name, error, saving, stopped, wrong, same])
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    titles = ("metric", "order by", "error", "saving", "stopped", "wrongly stopped", "same winner")
    words = ABOUT_ORDERS.format(searches=searches, about=about)
    lines = [BY_INFORMATION, "", words, *tables.table(titles, rows), WHY_NOT, ""]
    text, there = page.read_text(encoding="utf-8"), _orders_in(page)
    text = text.replace(there, "") if there else text
    place = text.index(CLOSING.splitlines()[0])
    return text[:place] + "\n".join(lines) + text[place:]


def _of_matrix(matrix: Matrix, name: str, searches: int) -> list[str]:
    orders = [("all proposals, in the order in which TPE made them", matrix, False)]
    if matrix.random:
        orders.insert(0, ("proposals at random, in a random order", matrix.first(matrix.random), True))
    else:
        orders.insert(0, ("the same proposals, in a random order", matrix, True))
    if matrix.gold:
        smooth = "; metric gold_prob where a task has it"
        orders += [(f"{title}{smooth}", part.smooth(), shuffle) for title, part, shuffle in orders]
    lines = []
    for title, part, shuffle in orders:
        lines += head(part, f"{name}: {title}")
        rows = []
        for setting in SETTINGS:
            blocks, error, *ways = setting
            found = [race_all(part, blocks, error, seed, shuffle, *ways) for seed in range(searches)]
            rows.append(_row(part, setting, found))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        lines += [*tables.table(TITLES, rows), ""]
    return lines


def head(matrix: Matrix, title: str) -> list[str]:
    """All but the rows of one table."""
    sizes = ", ".join(f"{size} of {task}" for task, size in matrix.sizes().items())
    low, middle, high = np.quantile(distances(matrix), [0.25, 0.5, 0.75])
    return [
        f"## {title}",
        "",
        f"{matrix.trials - matrix.baselines} proposals after {matrix.baselines} baselines; documents: {sizes}. On all",
        f"documents the proposals lie {low:.1f}, {middle:.1f} and {high:.1f} standard errors of the paired difference",
        "(quartiles) behind the best one: what lies within two or so cannot be told from it before nearly all",
        "documents are scored.",
        "",
    ]


TITLES = (
    *("blocks", "error", "shares", "predicted", "saving", "stopped", "wrongly stopped", "of contenders"),
    "same winner",
)


def distances(matrix: Matrix) -> list[float]:
    """Of each proposal from the best one, in standard errors of their paired difference on all documents."""
    proposals = range(matrix.baselines, matrix.trials)
    best = max(proposals, key=matrix.objective)
    found = []
    for trial in proposals:
        parts = [
            factor * (statistics.difference(values[best], values[trial], matrix.aggregations[task]).stderr or 0.0)
            for task, factor in matrix.factors.items()
            for values in [matrix.values[task]]
        ]
        stderr = math.sqrt(sum(part**2 for part in parts))
        if trial != best and stderr:
            found.append((matrix.objective(best) - matrix.objective(trial)) / stderr)
    return found


def _row(matrix: Matrix, setting: tuple[int, float, bool, bool], found: list[Raced]) -> list[str]:
    blocks, error, by_spread, learn = setting
    ways = ["by spread" if by_spread else "equal", "regression" if learn else "the best"]
    return [str(blocks), f"{error:.2g}", *ways, *_cells(matrix, found)]


def _cells(matrix: Matrix, found: list[Raced]) -> tuple[str, str, str, str, str]:
    """Saving, stopped, wrongly stopped, of contenders, same winner."""
    stopped, wrong, contenders = (sum(getattr(r, name) for r in found) for name in ("stopped", "wrong", "contenders"))
    proposals = len(found) * (matrix.trials - matrix.baselines)
    same = sum(r.same_winner for r in found) / len(found)
    wrongly, of_contenders = wrong / max(1, stopped), wrong / max(1, contenders)
    return _saving(matrix, found), f"{stopped / proposals:.1%}", f"{wrongly:.2%}", f"{of_contenders:.2%}", f"{same:.1%}"


def _saving(matrix: Matrix, found: list[Raced]) -> str:
    """On the proposals, and in brackets for the whole search."""
    full, spent = sum(r.full for r in found), sum(r.evaluations for r in found)
    fixed = len(found) * matrix.baselines * sum(matrix.sizes().values())
    return f"{(full - fixed) / (spent - fixed):.2f} ({full / spent:.2f})"


if __name__ == "__main__":
    main()
