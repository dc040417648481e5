"""What scripts/bench/search.py compares: searches, and the pools that they run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.shared import zoo1

# What a search of people's today is: (strategy, method).
YARDSTICKS: dict[str, tuple[str, str]] = {
    "cmaes": ("cmaes", "ties"),
    "genetic": ("genetic", "ties"),
    "random": ("random", "ties"),
    "tpe": ("tpe", "ties"),
    "cmaes task_arithmetic": ("cmaes", "task_arithmetic"),
}
THE_YARDSTICK = "cmaes"

# mergesearch's own searches, and those that it has the parts for: what each changes in the configuration. One more line
# is one more search.
RACING = ["racing={blocks: 16, error: 0.01}"]
GROUPS = ["space.layer_groups=3", "space.components=[attention, mlp, other]", "space.grow=true"]
DEFAULTS = ["search.sampler=auto", "search.defaults=true"]
# AdaMerging as published: weights begin at 0.3, Adam with 0.001, the last weights count. Steps and documents fit a
# search's budget
ENTROPY_SOUP = "{per: [tensor], loss: [entropy], start: 0.3, learning_rate: 0.001, steps: 300, patience: 1000}"
AUTO = ["search.strategy=auto", *DEFAULTS, *GROUPS, *RACING]
RUNS: dict[str, list[str]] = {
    "auto": AUTO,
    "published defaults": ["search.strategy=[baselines]", *DEFAULTS],
    "greedy_soup": ["search.strategy=[baselines, greedy_soup]", *DEFAULTS],
    "entropy_soup": [
        "search.strategy=[baselines, learned_soup]",
        "search.defaults=false",
        f"search.learned_soup={ENTROPY_SOUP}",
    ],
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
class Pool:
    """What searches are compared on.

    Attributes:
        config: the configuration's file.
        yardstick: document evaluations that a yardstick may spend.
        own: those of mergesearch's own searches.
        make: the command that makes it; None where it is in the repository.
        judging: whether it is one that nothing may be chosen by: each look at it is counted (judging.py).
        overrides: that change the configuration for all searches on it.
        seeds: those that are run where none are named.
        searches: likewise; empty: all that there are.
        past: settings of rows that no command gives any more, and why, in words; such rows are left as they are.
    """

    config: Path
    yardstick: int
    own: int
    make: str | None = None
    judging: bool = False
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    searches: tuple[str, ...] = ()
    past: Mapping[str, str] = field(default_factory=dict)


REAL, FEW = 25_000, 17_500
_FEW = ("holdout=0.667", *(f"tasks.{number}.limit=150" for number in range(4)))
_MAKE = "python -m scripts.make_real_pool --base models/smollm2 --out models/real"
_FEW_PAST = {
    "1899d629": "soups by default over a search.yaml that stated others, which scripts/make_real_pool.py writes no more"
}
# on real weights a search takes up to an hour, so few more than these two
_TWO = ("auto", "published defaults")
_SOUPS = ("greedy_soup", "learned_soup")
_PARTS = (
    "auto with the expected loss alone",
    "auto with a soup per group",
    "auto without warm starts",
    "auto without learned soup",
    "auto without racing",
    "auto without groups",
)
_RIVALS = ("cmaes", "genetic", "entropy_soup")


def _judging(name: str, seeds: tuple[int, ...], searches: tuple[str, ...]) -> Pool:
    file, make = Path(f"models/judging/{name}/search.yaml"), f"python -m scripts.make_judging_pools --only {name}"
    return Pool(file, REAL, REAL, make, judging=True, seeds=seeds, searches=searches)


POOLS: dict[str, Pool] = {
    # 400 and 40 candidates on 1,526 documents. Its rows of mergesearch's own searches are version 0.1's and stay: what
    # a seed of them gives today is on another scale (see the notes of results/search.md)
    "zoo1": Pool(zoo1.SEARCH, 610_400, 61_040, searches=("cmaes", "random", "tpe", "cmaes task_arithmetic")),
    "real": Pool(Path("models/real/search.yaml"), REAL, REAL, _MAKE, seeds=(5,), searches=_TWO),
    # the same with 50 search and 100 holdout documents of each task: what many bring
    "real_few": Pool(
        Path("models/real/search.yaml"),
        FEW,
        FEW,
        _MAKE,
        overrides=_FEW,
        seeds=(5,),
        searches=("auto",),
        past=_FEW_PAST,
    ),
    # the same as zoo1 with seeds that had no part in making anything: a page or a picture of its own, since seeds
    # differ; in float32, which a CPU is faster at. `scoring` has no other default any more, but the rows were told so
    "zoo1_fresh": Pool(
        zoo1.SEARCH,
        610_400,
        61_040,
        overrides=("dtype=float32", "scoring=auto"),
        seeds=(5, 6, 7, 8, 9),
        searches=("cmaes", *_TWO, *_SOUPS, *_PARTS),
    ),
    **{
        name: _judging(name, (112, 113, 114, 115, 116), (*_TWO, *_SOUPS, *_RIVALS))
        for name in ("judge_zoo_a", "judge_zoo_b")
    },
    "judge_real_adapters": _judging("judge_real_adapters", (102,), (*_TWO, "learned_soup")),
    "judge_real_seven": _judging("judge_real_seven", (102,), _TWO),
}
