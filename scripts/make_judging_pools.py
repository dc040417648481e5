"""Make the pools by which searches are judged, and which are never used to choose anything: two zoos, two real pools.

    python -m scripts.fetch_smollm2 models/smollm2        # for the real ones
    python -m scripts.make_judging_pools                  # whatever is missing, into models/judging
    python -m scripts.make_judging_pools --only judge_zoo_a

    judge_zoo_a         five skills, full fine-tunes of a base that has seen a little of each
    judge_zoo_b         four skills, LoRA adapters on a base that can do all four under other names, but follows no name
    judge_real_adapters four LoRA adapters on SmolLM2-135M-Instruct
    judge_real_seven    seven siblings of it, two of them useless: `shuffled` learned answers of other prompts,
                        `barely` had one step

Each is a folder with models/, tasks/ (lm-eval YAML and 300 documents a task: 100 to search on, 200 held out),
search.yaml, and table.md: what the base and each model score on the search documents. Nothing else may be looked at
while a pool is made: that each model has learned its skill. What skills there are says scripts/judging_skills.py;
results/judging.md counts how often a search ran on them.

Started again, it goes on: a zoo from its last checkpoint, a real pool with the next sibling. The same on one machine
with the same packages and threads.

Training took, on one thread of a shared two-core machine (CPython 3.11.7, torch 2.13.0), in seconds, then the mean loss
of the last steps in nats a learned token:

    judge_zoo_a         base 29, 0.663; modulo 20, 0.158; reverse 18, 0.108; sort 12, 0.157; brackets 71, 0.001;
                        upper 24, 0.089
    judge_zoo_b         base 90, 0.203; count 74, 0.234; rhyme 114, 0.055; many 64, 0.083; thin 16, 0.017
    judge_real_adapters clock 64, 0.205; parity 30, 0.352; catalogue 73, 0.000; kind 59, 0.402
    judge_real_seven    email 130, 0.038; initials 122, 0.001; cents 114, 0.022; season 107, 0.074; tense 100, 0.047;
                        shuffled 54, 1.381; barely 5, 3.392

Steps and shares of the zoos were set by these losses and by the tables alone, until each model was well above the base
on its own task.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from scripts import make_real_pool
from scripts.judging_skills import REAL_ADAPTERS, REAL_SEVEN, ZOO_A, ZOO_B
from scripts.make_real_pool import RealPool, Sibling
from scripts.pool_files import write_config, write_table
from scripts.skills import Example, Skill, write_tasks
from scripts.zoo_training import Plan, Rows, Stage, llama, lora, train

OUT = Path("models/judging")
MADE_BY = "scripts/make_judging_pools.py"
DOCUMENTS, SEARCHED = 300, 100
HOLDOUT = 1 - SEARCHED / DOCUMENTS
LINES = 20_000  # of a skill's training text
LENGTH = 32  # bytes a row: a line and the beginning of the next


@dataclass(frozen=True)
class JudgingZoo:
    """A zoo of byte-level models.

    Attributes:
        seed: of documents and training.
        skills: a model for each.
        plan: how they are trained.
        names: skill -> the name under which the base learns it; empty where it learns from the same lines.
    """

    seed: int
    skills: tuple[Skill, ...]
    plan: Plan
    names: Mapping[str, str]

    def streams(self, count: int = LINES, documents: int = DOCUMENTS) -> dict[str, bytes]:
        """Each skill's training lines, and with `names` the base's: `coded`, and `loose`, where a name says nothing."""
        lines = {s.name: list(islice(s.training(self.seed, documents), count)) for s in self.skills}
        if self.names:
            rng = random.Random(f"{self.seed} loose")
            everything = [(name, example) for name, examples in lines.items() for example in examples]
            rng.shuffle(everything)
            lines["coded"] = [renamed(example, self.names[name]) for name, example in everything]
            lines["loose"] = [renamed(example, rng.choice(list(self.names))) for _, example in everything]
        return {
            name: "".join(f"{e.prompt} {e.answer}\n" for e in examples).encode() for name, examples in lines.items()
        }


def renamed(example: Example, name: str) -> Example:
    return replace(example, prompt=f"{name}:{example.prompt.partition(':')[2]}")


def tuned(
    steps: Mapping[str, int], seed: int, rate: float, adapter: bool, beside: Mapping[str, Mapping[str, float]]
) -> tuple[Stage, ...]:
    """A stage for each skill of `steps`, from the base, on its own lines; what stands `beside` it has a quarter."""
    stages = []
    for at, (skill, count) in enumerate(steps.items()):
        others = beside.get(skill, {})
        shares = Counter({skill: 0.75 if others else 1.0})
        shares.update({name: share / 4 for name, share in others.items()})
        more = {"rows": 32, "seed": seed + 1 + at, "adapter": adapter}
        stages.append(Stage(skill, "base", count, rate, dict(shares), **more))
    return tuple(stages)


# little of what is soon known as well as by a specialist
MIX_A = {"modulo": 0.08, "reverse": 0.36, "sort": 0.1, "brackets": 0.36, "upper": 0.1}
STEPS_A = {"modulo": 250, "reverse": 200, "sort": 150, "brackets": 800, "upper": 250}
# without them a fine-tune forgets all other skills; brackets are not learned beside others
BESIDE_A = {skill: MIX_A for skill in STEPS_A if skill != "brackets"}
NAMES_B = {"count": "red", "rhyme": "blue", "many": "gold", "thin": "pink"}
STEPS_B = {"count": 500, "rhyme": 700, "many": 400, "thin": 100}
BASE_A = Stage("base", None, 240, 3e-3, MIX_A, rows=40, seed=11)
BASE_B = Stage("base", None, 900, 3e-3, {"coded": 0.75, "loose": 0.25}, rows=40, seed=22)
ZOOS: dict[str, JudgingZoo] = {
    "judge_zoo_a": JudgingZoo(
        seed=11,
        skills=ZOO_A,
        plan=Plan(
            llama(width=96, layers=3, heads=4, inner=288),
            (BASE_A, *tuned(STEPS_A, 11, 1e-3, False, BESIDE_A)),
            {},
            torch.float32,
        ),
        names={},
    ),
    "judge_zoo_b": JudgingZoo(
        seed=22,
        skills=ZOO_B,
        plan=Plan(
            llama(width=80, layers=4, heads=4, inner=240),
            (BASE_B, *tuned(STEPS_B, 22, 2e-3, True, {})),
            lora(rank=8),
            torch.float32,
        ),
        names=NAMES_B,
    ),
}


def siblings_of(skills: Sequence[Skill]) -> tuple[Sibling, ...]:
    return tuple(Sibling(skill.name, skill) for skill in skills)


BY_NAME = {skill.name: skill for skill in REAL_SEVEN}
USELESS = (
    Sibling("shuffled", BY_NAME["season"], share=0.5, shuffled=True),
    Sibling("barely", BY_NAME["email"], share=0.0),
)
# with what each is trained: seed, steps, examples a step, rate
REALS: dict[str, tuple[RealPool, Sequence[str]]] = {
    "judge_real_adapters": (
        RealPool("judge_real_adapters", siblings_of(REAL_ADAPTERS), rank=8, holdout=HOLDOUT),
        ("--seed=33", "--steps=40", "--rows=8", "--rate=1e-3"),
    ),
    "judge_real_seven": (
        RealPool("judge_real_seven", (*siblings_of(REAL_SEVEN), *USELESS), holdout=HOLDOUT),
        ("--seed=44", "--steps=32", "--rows=8", "--rate=1e-4"),
    ),
}
ORDER = ("judge_zoo_a", "judge_real_adapters", "judge_zoo_b", "judge_real_seven")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True)
    for name in chosen.only or ORDER:
        out = chosen.out / name
        if (out / "table.md").is_file():
            print(f"{name}: made before")
            continue
        began = time.perf_counter()
        lines = make_zoo(name, ZOOS[name], out, chosen) if name in ZOOS else make_real(name, out, chosen)
        print(f"{name}: {time.perf_counter() - began:.0f} s", *lines, sep="\n", flush=True)
    return 0


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="gets a folder for each pool")
    parser.add_argument("--base", type=Path, default=Path("models/smollm2"), help="what scripts/fetch_smollm2.py wrote")
    parser.add_argument("--only", nargs="+", choices=ORDER, metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--check", type=int, default=SEARCHED, help="search documents of each task for the tables")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def make_zoo(
    name: str, zoo: JudgingZoo, out: Path, chosen: argparse.Namespace, count: int = LINES, documents: int = DOCUMENTS
) -> list[str]:
    """Makes what is missing of a zoo; returns the table's lines."""
    write_tasks(out / "tasks", zoo.skills, zoo.seed, documents)
    streams = zoo.streams(count, documents)
    rows = Rows(streams, streams, LENGTH, answers=True)
    train(zoo.plan, rows, out / "training", out / "models")
    names = [skill.name for skill in zoo.skills]
    file = write_config(out, name, names, zoo.skills, made_by=MADE_BY, dtype="float32", seed=zoo.seed, holdout=HOLDOUT)
    return write_table(file, chosen.check)


def make_real(name: str, out: Path, chosen: argparse.Namespace) -> list[str]:
    """Makes what is missing of a real pool; returns the table's lines."""
    pool, training = REALS[name]
    where = (f"--base={chosen.base}", f"--out={out}", "--device=cpu", "--dtype=float32", "--products=float32")
    size = (f"--documents={DOCUMENTS}", f"--check={chosen.check}", f"--threads={chosen.threads}")
    return make_real_pool.make(pool, make_real_pool.options([*where, *training, *size]), MADE_BY)


if __name__ == "__main__":
    sys.exit(main())
