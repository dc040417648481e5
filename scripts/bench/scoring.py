"""Scoring by token tries against lm-eval's own model: parity first, then speed. Writes results/scoring.md and .csv.

    python -m scripts.bench.scoring                       # a random Llama of 6.6 M parameters, and a demo zoo's base
    python -m scripts.bench.scoring --real models/smollm2 # and a real model, see scripts/fetch_smollm2.py
    python -m scripts.bench.scoring --only shapes --shapes 1.5B 7B --device cuda --batch-sizes 32 128 512 \\
        --out results/scoring_cuda                        # on a GPU: random weights in real shapes

Every task is answered by both on the same live model. lm-eval's side keeps its tokenized requests too, so it is a
little faster here than the `lm_eval` command, and it gets the best of several batch sizes. Parity is checked before
anything is timed; the two sides then take turns, and medians count. Times are those of Scorer.score: everything from
the weights to the figure. Texts are the standard library's documentation topics.

Set OMP_NUM_THREADS=1 where the machine is shared: processor time then says what wall-clock time would without others.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import datetime
import gc
import json
import os
import platform
import pydoc_data.topics
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mergesearch.config import TaskConfig
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load
from scripts.bench import rank_correlation
from scripts.bench.shared import tables, zoo1

BATCH_SIZES = (8, 32)
SUBJECTS = ("random", "zoo", "real", "shapes")
# of Qwen2.5: width, inner width, heads, heads of keys and values, vocabulary; random weights
SHAPES = {"1.5B": (1536, 8960, 12, 2, 151936), "7B": (3584, 18944, 28, 4, 152064)}
_LAYERS = 28
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
CONTINUE = {**CHOICE, "data": "passages", "doc_to_text": "Passage: {{text}}\nNext:"}
LETTERS = {
    **CHOICE,
    "data": "passages",
    "doc_to_text": "Passage: {{text}}\nWhich words come next?\n"
    "{% for c in choices %}{{ 'ABCD'[loop.index0] }}. {{ c }}\n{% endfor %}Answer:",
    "doc_to_choice": ["A", "B", "C", "D"],
}
WRITE = {
    "data": "passages",
    "output_type": "generate_until",
    "doc_to_text": "Passage: {{text}}\nNext:",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
FIRST = {"sampler": "first_n"}
TASKS: dict[str, dict[str, Any]] = {
    "few-shot, fixed": {**CONTINUE, "num_fewshot": 5, "fewshot_config": FIRST},
    "zero-shot": {**CONTINUE, "num_fewshot": 0},
    "zero-shot, short questions": {**CONTINUE, "num_fewshot": 0, "doc_to_text": "{{text.split()[:7] | join(' ')}}"},
    "few-shot, fresh draws": {**CONTINUE, "num_fewshot": 5},
    "single tokens, zero-shot": {**LETTERS, "num_fewshot": 0},
    "single tokens, few-shot, fixed": {**LETTERS, "num_fewshot": 3, "fewshot_config": FIRST},
    "single tokens, few-shot, fresh": {**LETTERS, "num_fewshot": 3},
    "generation, short, few-shot, fixed": {
        **WRITE,
        "num_fewshot": 5,
        "fewshot_config": FIRST,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    },
    "generation, long, zero-shot": {
        **WRITE,
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 96, "do_sample": False},
    },
    "rolling": {
        "data": "passages",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{whole}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
ZOO = ("zoo_names", "zoo_code", "zoo_strings", "zoo_prose")  # of version 0.1


@dataclass
class Row:
    model: str
    dtype: str
    task: str
    documents: int
    requests: int
    tokens: str
    batch_size: int
    lm_eval_s: float
    tries_s: float
    speed_up: float
    cpu_speed_up: float
    lm_eval_mib: float | None
    tries_mib: float | None
    parity: str
    load: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="the folder of a real model")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the real model and the shapes"
    )
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--real-documents", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=(), help="of Qwen2.5, random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, help="of which lm-eval has its best")
    parser.add_argument("--tasks", nargs="+", help="these tasks alone")
    parser.add_argument("--out", type=Path, default=Path("results/scoring"), help="without .md and .csv")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), max(arguments.documents, arguments.real_documents))
        for name, model, tokenizer, tasks, documents in subjects(arguments):
            model = model.to(arguments.device)
            chosen = [task for task in tasks if not arguments.tasks or task in arguments.tasks]
            for task in chosen:
                rows.append(measure(name, model, tokenizer, task, documents, Path(folder), arguments))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                report(arguments.out, rows, arguments)
    return 0


def subjects(arguments: argparse.Namespace) -> Any:
    if "random" in arguments.only:
        yield ("random Llama, 6.6 M", *random_llama(), list(TASKS), arguments.documents)
    if "zoo" in arguments.only:
        yield ("demo zoo, base", *pretrained(zoo1.BASE, torch.float32), list(ZOO), 2 * arguments.documents)
    if "real" in arguments.only and arguments.real:
        name = arguments.real.name
        dtype = getattr(torch, arguments.dtype)
        yield (name, *pretrained(arguments.real, dtype), list(TASKS), arguments.real_documents)
    for shape in arguments.shapes if "shapes" in arguments.only else ():
        model = random_qwen(shape, getattr(torch, arguments.dtype), arguments.device)
        yield (f"Qwen2.5-{shape}'s shape", model, random_llama()[1], list(TASKS), arguments.documents)


def pretrained(folder: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def random_llama() -> tuple[Any, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    end = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end)


def random_qwen(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A model in one of `SHAPES`, made where it will be; a tokenizer of fewer tokens will do for it."""
    width, inner, heads, pairs, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "1.5B",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def device_name(device: str) -> str:
    """As a page names it: `CPU`, or a GPU's name."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def plain_words() -> list[str]:
    """The words of Python's own help, in their order."""
    return re.sub(r"[^\w\s.,;:'()-]", "", " ".join(pydoc_data.topics.topics.values())).split()


def write_tasks(folder: Path, documents: int) -> None:
    """Passages of about forty words with four ways to go on, one of them the true one."""
    rng, words = random.Random(0), plain_words()
    data = [_passage(words, rng) for _ in range(documents + 40)]
    for name, part in (("passages", data[40:]), ("shown", data[:40])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))
    for number, config in enumerate(TASKS.values()):
        files = {"test": str(folder / f"{config['data']}.jsonl"), "train": str(folder / "shown.jsonl")}
        source = {
            "task": f"bench_{number}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "training_split": "train",
            "fewshot_split": "train",
        }
        options = {key: value for key, value in config.items() if key != "data"}
        (folder / f"bench_{number}.yaml").write_text(yaml.safe_dump({**source, **options}))


def _passage(words: list[str], rng: random.Random) -> dict[str, Any]:
    at, size = rng.randrange(len(words) - 400), rng.randint(30, 50)
    choices = [" ".join(words[at + size : at + size + 6])]
    for _ in range(3):
        elsewhere = rng.randrange(len(words) - 10)
        choices.append(" ".join(words[elsewhere : elsewhere + rng.randint(4, 8)]))
    answer = rng.randrange(4)
    choices[0], choices[answer] = choices[answer], choices[0]
    whole = " ".join(words[at : at + rng.randint(60, 300)])
    return {"text": " ".join(words[at : at + size]), "choices": choices, "answer": answer, "whole": whole}


def measure(
    name: str, model: Any, tokenizer: Any, task: str, documents: int, folder: Path, arguments: argparse.Namespace
) -> Row:
    label = task if task in ZOO else f"bench_{list(TASKS).index(task)}"
    loaded = load([TaskConfig(task=label)], [str(folder), str(zoo1.TASKS)])
    chosen = {label: range(min(documents, loaded[0].size))}
    scorer = lambda scoring, size: Scorer(model, tokenizer, loaded, chosen, batch_size=size, scoring=scoring)  # noqa: E731
    theirs = {size: scorer("lm_eval", size) for size in arguments.batch_sizes}
    times = {size: timed(each)[1] for size, each in theirs.items()}
    best = min(times, key=times.__getitem__)
    ours, reference = scorer("auto", best), theirs[best]
    agreement = parity(model, tokenizer, loaded, chosen, ours, reference)
    before = os.getloadavg()[0]
    taken = [(timed(reference), timed(ours)) for _ in range(arguments.repeats)]
    (wall, cpu), (our_wall, our_cpu) = (
        [statistics.median(pair[side][clock] for pair in taken) for clock in (0, 1)] for side in (0, 1)
    )
    requests = sum(len(each) for each in ours.requests.values())
    work = f"{ours.tokens[1]:,} to {ours.tokens[0]:,}" if ours.tokens else ""
    return Row(
        name,
        str(model.dtype).removeprefix("torch."),
        task,
        len(chosen[label]),
        requests,
        work,
        best,
        round(wall, 3),
        round(our_wall, 3),
        round(wall / our_wall, 2),
        round(cpu / our_cpu, 2),
        peak(reference, model),
        peak(ours, model),
        agreement,
        f"{before:.1f} to {os.getloadavg()[0]:.1f}",
    )


def timed(scorer: Scorer) -> tuple[float, float]:
    """(seconds on the wall, seconds of the processor) to score the model once."""
    wall, cpu = time.perf_counter(), time.process_time()
    scorer.score()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(scorer: Scorer, model: Any) -> float | None:
    """MiB that scoring the model once takes beside what is there before; None where the system does not tell."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scorer.score()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left free goes back, so that this one's peak is seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here, see proc(5)
        before = _status("VmRSS")
        scorer.score()
        return round((_status("VmHWM") - before) / 1024, 1)
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    """KiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


MOST = 1e-4  # of a summed log-likelihood, in nats


def parity(model: Any, tokenizer: Any, tasks: Any, chosen: Any, ours: Scorer, theirs: Scorer) -> str:
    """Both sides' answers compared; an AssertionError where they are further apart than the goal allows.

    In float32 that is `MOST`; where lm-eval's own are further from float64 than that, ours have to be within it.
    """
    scores = {"ours": ours.score(), "theirs": theirs.score()}
    figures = [next(iter(each.tasks.values())).value for each in scores.values()]
    (kind, requests), others = next(iter(ours.requests.items())), next(iter(theirs.requests.values()))
    found, wanted = ([request.resps[0] for request in each] for each in (requests, others))
    if kind == "generate_until":
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        assert model.dtype != torch.float32 or same == len(found), "generated texts differ in float32"
        return f"{same} of {len(found)} texts equal"
    if kind == "loglikelihood_rolling":
        assert found == wanted
        return "equal"
    difference = np.abs(_values(found) - _values(wanted))
    if model.dtype == torch.float32:
        assert figures[0] == figures[1], figures
        if difference.max() <= MOST:
            return f"max {difference.max():.1e}; acc equal"
        true = _plain(model, torch.float64, tokenizer, tasks, chosen)
        own, noise = np.abs(_values(found) - true), np.abs(_values(wanted) - true)
        assert own.max() <= min(MOST, noise.max()), f"from float64 {own.max():.1e}, lm-eval {noise.max():.1e}"
        return f"max {difference.max():.1e}; from float64 max {own.max():.1e} (lm-eval {noise.max():.1e}); acc equal"
    return _half(model, tokenizer, tasks, chosen, requests, _values(found), _values(wanted), scores, figures)


def _half(
    model: Any,
    tokenizer: Any,
    tasks: Any,
    chosen: Any,
    requests: Any,
    found: Any,
    wanted: Any,
    scores: Any,
    figures: Any,
) -> str:
    """Both sides' distance from the float32 value; which documents the rounding decides."""
    true = _plain(model, torch.float32, tokenizer, tasks, chosen)
    noise, own = np.abs(wanted - true), np.abs(found - true)
    assert own.mean() <= noise.mean(), f"further from float32 than lm-eval: {own.mean():.3f}, {noise.mean():.3f}"
    documents = [request.doc_id for request in requests]
    close = 0
    for document in set(documents):
        at = [number for number, each in enumerate(documents) if each == document]
        first, second = sorted(true[at])[-1:-3:-1]
        close += first - second <= 2 * noise[at].max()
    (a, b) = (next(iter(each.documents.values())).values for each in scores.values())
    differ = int((a != b).sum())
    assert differ <= close, f"{differ} documents differ, {close} are as close as the rounding"
    return (
        f"from float32: mean {own.mean():.3f}, max {own.max():.2f} (lm-eval {noise.mean():.3f}, {noise.max():.2f}); "
        f"acc {figures[0]:.3f} ({figures[1]:.3f}), {differ} documents differ, {close} within the noise"
    )


def _plain(model: Any, dtype: torch.dtype, tokenizer: Any, tasks: Any, chosen: Any) -> np.ndarray:
    """The answers that lm-eval's own model gives in a wider dtype."""
    exact = Scorer(copy.deepcopy(model).to(dtype), tokenizer, tasks, chosen, batch_size=8, scoring="lm_eval")
    exact.score()
    return _values([request.resps[0] for request in next(iter(exact.requests.values()))])


def _values(answers: Any) -> np.ndarray:
    return np.array([answer[0] for answer in answers])


def report(out: Path, rows: list[Row], arguments: argparse.Namespace) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    head = [
        "# Scoring: token tries against lm-eval's own model",
        "",
        f"    python -m scripts.bench.scoring {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}; "
        f"{device_name(arguments.device)}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} of them used.",
        "",
        "Seconds are medians of runs that take turns; lm-eval at the best of the batch sizes "
        f"{', '.join(map(str, arguments.batch_sizes))}. Tokens: of one sequence for each distinct request, to what is "
        "computed.",
        "cpu_speed_up compares processor time, which others at work on the machine disturb less than the clock on the "
        "wall.",
        "lm_eval_mib, tries_mib: how far memory rises while the model is scored once, beside weights and requests; on "
        "a CPU the process's peak resident set after what was free had gone back to the system.",
        "Load: the machine's one-minute load average before and after; above the cores used, others were at work.",
        "",
        "",
    ]
    # once is enough, on the page of the usual pools
    whole = out.name == "scoring" and rank_correlation.MATRIX.is_file()
    ranks = f"\n\n{rank_correlation.section(rank_correlation.MATRIX)}\n" if whole else "\n"
    out.with_suffix(".md").write_text("\n".join(head) + markdown(rows) + ranks)


def markdown(rows: list[Row]) -> str:
    return "\n".join(tables.table(list(asdict(rows[0])), [list(asdict(row).values()) for row in rows]))


if __name__ == "__main__":
    sys.exit(main())
