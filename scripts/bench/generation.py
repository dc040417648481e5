"""Ways to generate answers: lm-eval's own, batches that finished answers leave, transformers' continuous batching.

    python -m scripts.bench.generation                        # results/generation.md, a random Llama of 6.6 M
    python -m scripts.bench.generation --real models/smollm2  # and a real model
    python -m scripts.bench.generation --ways batches         # without continuous batching, which is slow on a CPU
    python -m scripts.bench.generation --shapes 1.5B --device cuda --dtype bfloat16 --batch-sizes 32 128 --documents 200

Greedy answers behind a fixed few-shot prompt, of varying length: a stop text that is rare ends them, and the page says
how long they were. Every way answers the same prompts in turns; medians count. Texts in float32 have to be the same.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from mergesearch.evaluate.model import CONTINUOUS, TRIES, RememberingLM
from mergesearch.evaluate.tries import TrieLM
from scripts.bench.scoring import SHAPES, device_name, plain_words, pretrained, random_llama, random_qwen
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

WAYS = ("lm-eval", "batches", "continuous batching")
KINDS = {"batches": TRIES, "continuous batching": CONTINUOUS}
BATCH_SIZES = (8, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="the folder of a real model")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--most", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--stop", default="x", help="the text that ends an answer: a common one ends it at once")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="beside lm-eval's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=(), help="of Qwen2.5, random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, help="of which lm-eval has its best")
    parser.add_argument("--out", type=Path, default=Path("results/generation.md"))
    arguments = parser.parse_args()
    lines: list[list[str]] = []
    for name, model, tokenizer in subjects(arguments):
        model = model.to(arguments.device, getattr(torch, arguments.dtype))
        for shots in (0, arguments.shots):
            lines += measure(name, model, tokenizer, arguments, shots)
            arguments.out.write_text(page(lines, arguments))
            print(lines[-1 - len(arguments.ways) :], flush=True)
    return 0


def subjects(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    yield "random Llama, 6.6 M", *random_llama()
    if arguments.real is not None:
        yield arguments.real.name, *pretrained(arguments.real, torch.float32)
    for shape in arguments.shapes:
        model = random_qwen(shape, getattr(torch, arguments.dtype), arguments.device)
        yield f"Qwen2.5-{shape}'s shape", model, random_llama()[1]


def prompts(documents: int, shots: int, most: int, stop: str) -> list[Instance]:
    rng = random.Random(5)
    words = plain_words()

    def some(low: int, high: int) -> str:
        at = rng.randrange(len(words) - high)
        return " ".join(words[at : at + rng.randint(low, high)])

    shown = "".join(f"Passage: {some(20, 30)}\nNext: {some(5, 9)}\n\n" for _ in range(shots))
    options = {"until": [stop], "max_gen_toks": most, "do_sample": False}
    return [
        Instance("generate_until", {}, (f"{shown}Passage: {some(15, 40)}\nNext:", options), 0, ("task", number, 1))
        for number in range(documents)
    ]


def measure(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace, shots: int) -> list[list[str]]:
    asked = prompts(arguments.documents, shots, arguments.most, arguments.stop)
    asking: dict[str, tuple[Any, Callable[[], list[str]]]] = {}
    theirs = {size: RememberingLM(model, tokenizer, size) for size in arguments.batch_sizes}
    for each in theirs.values():
        each.tokenize({"generate_until": asked})
    taken = {size: timed(lambda lm=each: lm.generate_until(asked, True))[0] for size, each in theirs.items()}
    best = theirs[min(taken, key=taken.__getitem__)]
    asking["lm-eval"] = best, lambda: best.generate_until(asked, True)
    for way in arguments.ways:
        kind = KINDS[way]
        lm = TrieLM(model, tokenizer, 8)
        lm.tokenize({"generate_until": asked})
        lm.settle({"generate_until": kind})
        asking[way] = lm, lambda lm=lm: lm.generate_until(asked, True)
    texts = {way: ask() for way, (_, ask) in asking.items()}
    for lm, _ in asking.values():
        lm.pace.tokens, lm.pace.seconds, lm.pace.prefill = 0, 0.0, 0.0
    seconds: dict[str, list[float]] = {way: [] for way in asking}
    for _ in range(arguments.repeats):
        for way, (_, ask) in asking.items():
            seconds[way].append(timed(ask)[1])
    median = {way: statistics.median(each) for way, each in seconds.items()}
    rows = []
    for way, (lm, _) in asking.items():
        same = sum(a == b for a, b in zip(texts[way], texts["lm-eval"], strict=True))
        size = f", batch size {best.batch_size}" if way == "lm-eval" else ""
        speed = f"{median[way]:.2f}", f"{median['lm-eval'] / median[way]:.2f}"
        texts_alike = f"{same} of {len(asked)}"
        rows.append([name, str(shots), way + size, *speed, str(lm.pace), lengths(lm, asked), texts_alike])
    return rows


def lengths(lm: RememberingLM, asked: Sequence[Instance]) -> str:
    """Of the answers, in tokens: `31, 4 to 256`."""
    each = [lm.length_of(request) or 0 for request in asked]
    return f"{statistics.median(each):.0f}, {min(each):.0f} to {max(each):.0f}"


def timed(ask: Callable[[], Any]) -> tuple[float, float]:
    """(seconds on the wall, seconds of the processor)."""
    wall, cpu = time.perf_counter(), time.process_time()
    ask()
    return time.perf_counter() - wall, time.process_time() - cpu


def page(lines: Sequence[Sequence[str]], arguments: argparse.Namespace) -> str:
    titles = [
        "model",
        "shots",
        "way",
        "processor seconds",
        "times lm-eval's speed",
        "pace on the wall",
        "tokens of an answer: median, range",
        "texts as lm-eval's",
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    head = [
        "# Generating answers on the live model",
        "",
        f"    python -m scripts.bench.generation {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"{datetime.date.today()}, {versions}, {device_name(arguments.device)}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} used; "
        f"{arguments.dtype}; {arguments.documents} documents, up to {arguments.most} tokens, "
        f"{arguments.stop!r} ends them.",
        "",
        "Processor time, medians of runs that take turns: others at work disturb it less than the clock on the wall. "
        f"lm-eval at the best of the batch sizes {', '.join(map(str, arguments.batch_sizes))}.",
        "",
    ]
    return "\n".join([*head, *tables.table(titles, lines), *notes_of(arguments.out)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
