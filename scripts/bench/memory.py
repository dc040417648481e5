"""The peak of memory that a search's parts take, beside the peak that `check` states: prints results/memory.md.

    python -m scripts.bench.memory > results/memory.md

A pool of random models is made, and in a process of its own for each way to hold it everything is done that a run does
with memory: the parents are read, candidates of several methods are made, each is scored on a task's documents. What
the process holds is sampled each two milliseconds, above what it held once every library was there and a small model
had been asked. On the CPU pages of files that are mapped into memory count where the plan counts them (`device`), and
not where it does not (`mapped`): the system takes them back when it needs them. On a CUDA device torch's own count of
the device is taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mergesearch.search.worker import machine
from scripts.bench.shared import pools, tables

TITLES = (
    *("parents", "device", "parents, MiB", "candidate", "scoring", "batch size", "stated", "kept", "measured"),
    "share",
)
# parameters of methods that are tried: one without statistics, one that trims, one that draws, one that ranks
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
}
# (models, width, layers)
SIZES = {"small": (3, 512, 4), "large": (4, 1024, 8)}
# what may be measured above what was stated
ALLOWED = 1.05


@dataclass
class Peak:
    """The most bytes that were held above what was held at the start."""

    most: int = 0


@contextmanager
def watched(mode: str, device: torch.device) -> Iterator[Peak]:
    """Samples what this process holds: of memory of its own, and of files where `mode` keeps these in memory."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.most = torch.cuda.max_memory_allocated(device) - before
        return
    start, going = held(mode), True

    def watch() -> None:
        while going:
            peak.most = max(peak.most, held(mode) - start)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        going = False
        thread.join()


def held(mode: str) -> int:
    """Bytes of this process's memory; files among them only where a mode holds parents in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kinds = ("RssAnon", "RssFile", "RssShmem") if mode == "device" else ("RssAnon", "RssShmem")
    return sum(int(lines[kind].split()[0]) * 1024 for kind in kinds)


def one(folder: Path, mode: str, device: str) -> dict[str, Any]:
    """What was stated and what was measured of one way to hold the pool."""
    from mergesearch import config as configuration
    from mergesearch.commands import holding as holdings
    from mergesearch.commands.inputs import load_tasks, scorer_of, splits
    from mergesearch.recipe import single_rule

    given = configuration.read(folder / "run.yaml", [f"memory={mode}", f"device={device}", "trust_tasks=true"])
    _warm(device)
    tasks = load_tasks(given)
    searched = {label: part.search for label, part in splits(given, tasks).items()}
    with watched(mode, torch.device(device)) as peak:
        survey = holdings.survey_of(given)
        held_so = holdings.holding_of(given, survey, holdings.length_of(given, survey, tasks, searched))
        pool = holdings.load_pool(given, survey, held_so)
        engine = holdings.engine_of(pool, given.dtype, held_so)
        scorer = scorer_of(given, engine.model, pool.tokenizer, tasks, searched)
        holdings.settled_with(given, scorer, held_so, {})
        for method, parameters in METHODS.items():
            engine.load(given.recipe(single_rule(method, **parameters)))
            scorer.score()
    kept = engine.runner.statistics.nbytes
    return {
        "mode": held_so.mode, "stated": held_so.device_bytes, "scoring": held_so.scoring, "kept": kept,
        "measured": peak.most, "rows": scorer.batch_size, "parents": held_so.needs.parents,
        "candidate": held_so.needs.candidate,
    }  # fmt: skip


def _warm(device: str) -> None:
    """Everything that libraries make once: threads, buffers, code that is built."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=300,
                                 num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(small).to(device)
    with torch.no_grad():
        model(torch.zeros((8, 16), dtype=torch.long, device=device)).logits.log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "MODE", "DEVICE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, mode, device = given.one
        print(json.dumps(one(Path(folder), mode, device)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        models, width, layers = SIZES[given.size]
        pools.make(Path(folder), models, width, layers)
        found = {case: _measured(folder, *case) for case in _cases()}
    print(_page(found, given.size))
    worst = max(each["measured"] / (each["stated"] + each["kept"]) for each in found.values() if each)
    return 0 if worst <= ALLOWED else 1


def _cases() -> list[tuple[str, str]]:
    on_gpu = [(mode, "cuda") for mode in ("device", "pinned", "mapped")]
    return [("device", "cpu"), ("mapped", "cpu"), *on_gpu]


def _measured(folder: str, mode: str, device: str) -> dict[str, Any] | None:
    if device == "cuda" and not torch.cuda.is_available():
        return None
    command = [sys.executable, "-m", "scripts.bench.memory", "--one", folder, mode, device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _page(found: dict[tuple[str, str], dict[str, Any] | None], size: str) -> str:
    models, width, layers = SIZES[size]
    lines = [
        "# Memory: stated and measured",
        "",
        f"`python -m scripts.bench.memory --size {size}`, {date.today().isoformat()}; "
        + ", ".join(f"{name} {version}" for name, version in machine("cpu").items()),
        "",
        f"A base and {models} models of {layers} layers, {width} wide, float32. *Stated* is the peak that `check` "
        "prints before a weight is read, with what scoring may take. *Kept* are statistics of the parents that were "
        "held between candidates, which are stated beside it. *Measured* is the most that was held while the parents "
        f"were read and candidates by {', '.join(METHODS)} were made and scored. It may be {ALLOWED - 1:.0%} above at "
        "most.",
        "",
    ]
    rows = []
    for (mode, device), each in found.items():
        if each is None:
            rows.append([mode, device, "not measured", *[""] * (len(TITLES) - 3)])
            continue
        sizes = {key: f"{each[key] / 2**20:.0f}" for key in ("parents", "candidate", "scoring", "stated", "kept")}
        share = each["measured"] / (each["stated"] + each["kept"])
        before = [sizes["parents"], sizes["candidate"], sizes["scoring"], each["rows"], sizes["stated"], sizes["kept"]]
        rows.append([mode, device, *before, f"{each['measured'] / 2**20:.0f}", f"{share:.2f}"])
    lines += [
        *tables.table(TITLES, rows),
        "",
        "A candidate that is split over several GPUs was not measured: no machine with several was at hand. That it "
        "becomes the same tensors and logits is tested with two devices that are one CPU (tests/test_survey.py).",
        "A pool larger than what a process may hold runs from mapped files: tests/test_holding.py, with a limit of the "
        "system.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
