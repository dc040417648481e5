"""Train the demo zoo: a base, then four LoRA adapters on it, and write the documents of their tasks.

    python -m scripts.train_zoo                      # the zoo that ships, into mergesearch/zoo
    python -m scripts.train_zoo --output ./my-zoo    # elsewhere

Deterministic on one machine with the same packages and threads; started again, it goes on from the last checkpoint,
and stages that are done are skipped. What ships was made with `--only base --threads 2`, then the adapters on one
thread each, on a shared two-core machine without bfloat16 (CPython 3.11.7, torch 2.13.0). They took (seconds, then
the mean loss of the last steps in nats): base 865, 1.025; order 281, 0.359; letters 118, 0.754; numbers 200, 0.091;
python 538, 0.882. The losses are of different mixtures and not comparable.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from scripts import zoo_tasks
from scripts.zoo_text import LINES, SKILLS, corpora, stream
from scripts.zoo_training import Plan, Rows, Stage, llama, lora, train

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 128  # bytes a row

# every operation without its plain name, and little of numbers, so that a specialist has something to add
BASE_MIX = {"prose": 0.43, "python": 0.06, "numbers": 0.03, "coded": 0.34, "loose": 0.14}


# where a specialist is held to what the base says: most on code and prose, which are forgotten first
REST = {"prose": 0.3, "python": 0.3, "numbers": 0.1, "coded": 0.1, "loose": 0.2}


def tuned(skill: str, steps: int, rate: float, own: float, beside: str = "loose") -> Stage:
    """The adapter for `skill`: `own` is its share of the rows; the others are REST's, with `beside` for loose."""
    rest = {beside if s == "loose" else s: share for s, share in REST.items() if s != skill}
    mix = {s: (1 - own) * share / sum(rest.values()) for s, share in rest.items()}
    return Stage(skill, "base", steps, rate, {skill: own, **mix}, seed=1 + SKILLS.index(skill), adapter=True)


STAGES = (
    Stage("base", None, 1800, 2e-3, BASE_MIX),
    # beside the names of its own family, which it learns, the other's, which must go on to mean nothing to it
    tuned("order", 300, 8e-4, 0.5, beside="loose_letters"),
    # the one that nobody held to the base: at full weight it spoils the others, so that one weight for all does not do
    tuned("letters", 200, 1e-3, 1.0),
    tuned("numbers", 250, 1e-3, 0.5),
    tuned("python", 650, 1e-3, 0.7),
)
PLAN = Plan(llama(width=192, layers=4, heads=6, inner=512), STAGES, lora(rank=16))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "mergesearch" / "zoo", help="gets models/ and tasks/")
    work = ROOT / "results" / "zoo-training"
    parser.add_argument("--work", type=Path, default=work, help="checkpoints to go on from")
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="begin again from the first step")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STAGES], help="these stages alone")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True)
    texts = corpora()
    zoo_tasks.write(zoo_tasks.documents(texts), chosen.output / "tasks")
    rows = Rows({skill: stream(skill, texts[skill].train) for skill in SKILLS}, LINES, LENGTH)
    train(PLAN, rows, chosen.work, chosen.output / "models", chosen.resume, chosen.only or ())


if __name__ == "__main__":
    main()
