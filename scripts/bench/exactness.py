"""Token tries and lm-eval's way in bfloat16, each measured from float32: is the packed pass as exact as the plain one?

    python -m scripts.bench.exactness --real models/smollm2 --emulate      # results/exactness.md; see fetch_smollm2.py

Requests are multiple choice, some zero-shot and some behind a fixed prompt. The plain pass is a sequence alone, its
log-likelihood the sum of lm-eval's log-softmax in the model's dtype. The packed pass is what `scoring: auto` computes.
Both are compared with the plain pass in float32 from the same weights: logits as a share of their spread, summed
log-likelihoods in nats. `--emulate` computes bfloat16's linear maps as units for it do, exact products summed in
float32 and rounded once: a CPU without such units is a hundred times slower in bfloat16, and not more exact.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mergesearch.evaluate.tries.memory import pack_length
from mergesearch.evaluate.tries.probe import Distances, distances, packing
from mergesearch.evaluate.tries.trie import Query
from scripts.bench.scoring import plain_words, random_llama
from scripts.bench.shared import tables

AT_ONCE = 24
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES = {"qwen3": {}, "gemma2": {"sliding_window": 24}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="the folder of a real model")
    parser.add_argument("--requests", type=int, default=216)
    parser.add_argument("--emulate", action="store_true", help="linear maps of bfloat16 by way of float32")
    parser.add_argument("--out", type=Path, default=Path("results/exactness.md"))
    arguments = parser.parse_args()
    rows = []
    with emulated() if arguments.emulate else nullcontext():
        for name, model, tokenizer in subjects(arguments.real):
            rows.append(measure(name, model.to(torch.bfloat16).eval(), tokenizer, arguments.requests))
            print(rows[-1], flush=True)
    arguments.out.write_text(page(rows, arguments.emulate))
    return 0


def subjects(real: Path | None) -> Iterator[tuple[str, Any, Any]]:
    if real is not None:
        yield real.name, AutoModelForCausalLM.from_pretrained(real), AutoTokenizer.from_pretrained(real)
    llama, tokenizer = random_llama()
    yield "random Llama, 6.6 M", llama, tokenizer
    for name, more in ARCHITECTURES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **more))
        window = f", window of {more['sliding_window']}" if more else ""
        yield f"random {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M{window}", model, tokenizer


@contextmanager
def emulated() -> Iterator[None]:
    """Linear maps of bfloat16 with exact products, summed in float32 and rounded once."""
    plain = functional.linear

    def linear(inputs: Any, weight: Any, bias: Any = None) -> Any:
        if weight.dtype != torch.bfloat16 or inputs.dtype != torch.bfloat16:
            return plain(inputs, weight, bias)
        return plain(inputs.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)

    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = plain


def queries(tokenizer: Any, count: int) -> list[Query]:
    """Questions with four choices: every second one behind three fixed examples."""
    rng = random.Random(11)
    words = plain_words()

    def some(low: int, high: int) -> str:
        at = rng.randrange(len(words) - high)
        return " ".join(words[at : at + rng.randint(low, high)])

    shots = "".join(f"Passage: {some(6, 9)}\nNext: {some(2, 4)}\n\n" for _ in range(2))
    asked: list[Query] = []
    while len(asked) < count:
        prompt = f"{shots if len(asked) % 8 else ''}Passage: {some(8, 14)}\nNext:"
        for _ in range(4):
            context, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {some(2, 6)}")
            targets = whole[len(context) :] or whole[-1:]
            asked.append(Query(np.array(whole[:-1], dtype=np.int32), np.array(targets, dtype=np.int32)))
    return asked[:count]


def measure(name: str, model: Any, tokenizer: Any, count: int) -> list[str]:
    asked, limit = queries(tokenizer, count), pack_length(model)
    found = packing(model, asked, limit)
    parts = [asked[begin : begin + AT_ONCE] for begin in range(0, count, AT_ONCE)]
    found_in_parts = []
    for part in parts:
        found_in_parts.append(distances(model, part, limit))
        print(f"{name}: {AT_ONCE * len(found_in_parts)} of {count}", file=sys.stderr, flush=True)
    ours, heads, theirs = ([three[which] for three in found_in_parts] for which in range(3))
    verdict = "refused: " + found.fault if found.fault else "taken" + ", head in float32" * found.wide_head
    return [name, str(count), logits(ours), logits(theirs), sums(ours), sums(heads), sums(theirs), verdict]


def logits(parts: Sequence[Distances]) -> str:
    return f"{np.concatenate([p.logits for p in parts]).mean():.4f}, {max(p.furthest for p in parts):.3f}"


def sums(parts: Sequence[Distances]) -> str:
    every = np.concatenate([part.sums for part in parts])
    return f"{every.mean():.4f}, {every.max():.3f}"


def page(rows: Sequence[Sequence[str]], emulate: bool) -> str:
    titles = ["model", "requests", "logits packed", "logits plain", "nats packed", "nats packed, head in float32"]
    titles += ["nats plain (lm-eval)", "the check at the start"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    head = [
        "# Token tries in bfloat16: how far from float32",
        "",
        f"    python -m scripts.bench.exactness {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"{datetime.date.today()}, {versions}, CPU; bfloat16{' emulated: exact products, sums in float32' * emulate}.",
        "",
        "Each cell: mean, largest. Logits: the distance of a row from that of the plain pass in float32, as a share of "
        "that row's spread. Nats: of the summed log-likelihood of a request. The packed pass is measured twice, once "
        "side by side and once on cached beginnings.",
        "",
    ]
    return "\n".join([*head, *tables.table(titles, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
