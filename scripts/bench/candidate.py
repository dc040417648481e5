"""One candidate from its recipe to its scores, in three ways: prints results/candidate.md.

    python -m scripts.bench.candidate --model models/smollm2         # needs mergesearch[parity]; see fetch_smollm2.py
    python -m scripts.bench.candidate --model models/smollm2 --device cuda --out results/candidate_cuda.md

The model and three siblings of it (the same weights with a little noise, which costs what real ones cost) are merged by
task arithmetic, and the candidate is scored on multiple choice and on generation. The ways: `mergesearch`, the live
model and token tries; (b) the same live model, asked by lm-eval's HFLM; (a) mergekit-yaml to disk, then the lm_eval
command on what it wrote. Each does the same documents; HFLM has the best of --batch-sizes. They take turns --repeats
times, each time with other weights, and medians count. Loading parents and building requests are paid once a run and
no part of a candidate: they are left out for `mergesearch` and for (b), and are part of (a), which does them each time.
Bookkeeping is what a search of several trials takes beside merging and scoring, by trial. Processor time is what others
at work on the machine disturb least. Nothing is printed of a way whose scores differ by more than the noise stated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergesearch import Engine, Pool, Recipe
from mergesearch import config as configuration
from mergesearch.commands import run as runs
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.surroundings import quiet
from mergesearch.evaluate.tasks import load
from mergesearch.mergekit.exporting import export
from mergesearch.search.machine import machine
from scripts.bench.scoring import TASKS, write_tasks
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

PAGE = Path(__file__).parents[2] / "results" / "candidate.md"
CHOICES = ("zero-shot", "few-shot, fixed")
GENERATION = ("generation, short, few-shot, fixed",)
# of a sum of log-likelihoods the dtype's own noise may turn a close choice: so many documents of a task may differ
TURNED = 1
PARTS = ("merge", "log-likelihood", "generation", "bookkeeping")
# the lm_eval command scores all tasks at once, so that it imports and loads once a candidate
BOTH = "log-likelihood and generation"

Seconds = dict[str, tuple[float, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=24, help="of each task")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32], help="of which HFLM takes its best")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12, help="of the search that bookkeeping is taken from")
    parser.add_argument("--out", type=Path, default=PAGE, help="a page for each device")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = measured(given, Path(place))
    text = "\n".join(page(given, rows))
    given.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


# --- the three ways ---------------------------------------------------------------------------------------------------


class Bench:
    """The pool, the tasks and the live model that `mergesearch` and (b) share."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder = given, folder
        self.base, self.siblings = siblings(given.model, folder)
        write_tasks(folder, given.documents)
        names = list(TASKS)
        self.labels = {task: f"bench_{names.index(task)}" for task in (*CHOICES, *GENERATION)}
        pool = Pool.load(self.base, self.siblings, device=given.device)
        self.engine = Engine(pool, given.dtype, compiled="now")
        self.engine.load(self.recipe(0.1))  # kernels are built once a machine
        self.scorers = {
            "log-likelihood": self._scorer(CHOICES, "auto", 64),
            "generation": self._scorer(GENERATION, "auto", 64),
        }
        self.plain: dict[str, Scorer] = {}
        # by batch size, seconds of HFLM on all tasks
        self.tried: dict[int, float] = dict.fromkeys(given.batch_sizes, 0.0)

    def recipe(self, weight: float) -> Recipe:
        """Task arithmetic of the siblings; another weight is another candidate."""
        data = {
            "base": self.base,
            "models": self.siblings,
            "out_dtype": self.given.dtype,
            "rules": [{"method": "task_arithmetic", "parameters": {"weight": weight}}],
        }
        return Recipe.from_data(data, "a candidate")

    def ours(self, weight: float) -> tuple[Seconds, dict[str, float]]:
        return self._live(weight, self.scorers)

    def hflm(self, weight: float) -> tuple[Seconds, dict[str, float]]:
        if not self.plain:
            self.plain = {kind: self._best(tasks) for kind, tasks in self._kinds()}
        return self._live(weight, self.plain)

    def on_disk(self, weight: float) -> tuple[Seconds, dict[str, float]]:
        """mergekit-yaml, then the lm_eval command; their seconds, loading included."""
        file, merged, out = self.folder / "merge.yaml", self.folder / "merged", self.folder / "lm_eval"
        text, _ = export(self.recipe(weight))
        file.write_text(text, encoding="utf-8")
        spent: Seconds = {}
        with timed(spent, "merge"):
            on_gpu = [] if self.given.device == "cpu" else ["--cuda"]
            command("mergekit-yaml", file, merged, "--no-lazy-unpickle", *on_gpu)
        labels = list(self.labels.values())
        model = f"pretrained={merged},dtype={self.given.dtype}"
        with timed(spent, BOTH):
            command(
                "lm_eval", "--model", "hf", "--model_args", model, "--tasks", ",".join(labels), "--device",
                self.given.device, "--batch_size", min(self.tried, key=self.tried.__getitem__),
                "--include_path", self.folder, "--output_path", out,
            )  # fmt: skip
        newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(newest.read_text())["results"]
        return spent, {label: figure(found[label]) for label in labels}

    def bookkeeping(self) -> tuple[float, float]:
        """Seconds on the wall and of the processor, by trial, that a search takes beside merging and scoring."""
        run = {
            "base_model": self.base,
            "models": self.siblings,
            "include_path": str(self.folder),
            "tasks": [{"task": label} for label in self.labels.values()],
            "search": {"strategy": "study", "sampler": "tpe", "trials": self.given.trials},
            "report": {"at_end": False},
            "dtype": self.given.dtype,
            "device": self.given.device,
            "output": str(self.folder / "run"),
        }
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(run), encoding="utf-8")
        limits = [f"tasks.{number}.limit=4" for number in range(len(self.labels))]
        session = runs.prepare(configuration.read(file, limits), say=lambda line: None)
        spent: Seconds = {}
        with timed(spent, "whole"):
            session.search.run()
        seconds = session.read().frame()["seconds"]
        work, trials = float(seconds.sum()), len(seconds)
        wall, cpu = spent["whole"]
        # merging and scoring are noted on the wall alone; the processor's share of the rest is taken to be the same
        return (wall - work) / trials, (wall - work) / trials * cpu / wall

    def _kinds(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield "log-likelihood", CHOICES
        yield "generation", GENERATION

    def _live(self, weight: float, scorers: Mapping[str, Scorer]) -> tuple[Seconds, dict[str, float]]:
        spent: Seconds = {}
        scores: dict[str, float] = {}
        with timed(spent, "merge"):
            self.engine.load(self.recipe(weight))
        for kind, scorer in scorers.items():
            with timed(spent, kind):
                found = scorer.score()
            scores |= {label: score.value for label, score in found.tasks.items()}
        return spent, scores

    def _scorer(self, tasks: Sequence[str], scoring: str, rows: int) -> Scorer:
        labels = [self.labels[task] for task in tasks]
        loaded = load([configuration.TaskConfig(task=label) for label in labels], [str(self.folder)])
        documents = {task.label: range(task.size) for task in loaded}
        return Scorer(
            self.engine.model, self.engine.pool.tokenizer, loaded, documents, batch_size=rows, scoring=scoring
        )

    def _best(self, tasks: Sequence[str]) -> Scorer:
        """lm-eval's own model at its best batch size."""
        tried = []
        for rows in self.given.batch_sizes:
            scorer, spent = self._scorer(tasks, "lm_eval", rows), {}
            with timed(spent, "all"):
                scorer.score()
            tried.append((spent["all"][0], rows, scorer))
            self.tried[rows] += spent["all"][0]
        return min(tried, key=lambda each: each[:2])[2]


def siblings(model: Path, folder: Path) -> tuple[str, dict[str, str]]:
    """The base, and three models near it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = {}
    for number in range(3):
        live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for tensor in live.parameters():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * tensor.std() * 0.01)
        where = folder / f"sibling{number}"
        live.save_pretrained(where)
        tokenizer.save_pretrained(where)
        names[where.name] = str(where)
    return str(model.resolve()), names


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Seconds]:
    """Medians by way and part; every way's scores are held to the first one's."""
    bench = Bench(given, folder)
    ways: dict[str, Callable[[float], tuple[Seconds, dict[str, float]]]] = {
        "mergesearch": bench.ours,
        "(b) HFLM on the live model": bench.hflm,
        "(a) mergekit-yaml and lm_eval": bench.on_disk,
    }
    taken: dict[str, list[Seconds]] = {way: [] for way in ways}
    for turn in range(given.repeats):
        weight = 0.2 + 0.1 * turn
        wanted: dict[str, float] = {}
        for way, run in ways.items():
            spent, scores = run(weight)
            wanted = wanted or scores
            for label, score in scores.items():
                if abs(score - wanted[label]) > TURNED / given.documents + 1e-9:
                    raise SystemExit(f"{way}: {label} has {score} where mergesearch has {wanted[label]}")
            taken[way].append(spent)
    medians = {
        way: {part: tuple(statistics.median(s[part][clock] for s in all_) for clock in (0, 1)) for part in all_[0]}
        for way, all_ in taken.items()
    }
    medians["mergesearch"]["bookkeeping"] = bench.bookkeeping()
    return medians  # type: ignore[return-value]


# --- clocks and words -------------------------------------------------------------------------------------------------


@contextmanager
def timed(spent: Seconds, part: str) -> Iterator[None]:
    """Notes the seconds on the wall and of the processor, those of processes that were started and ended included."""
    wall, cpu = time.perf_counter(), _processor()
    with quiet():
        yield
    spent[part] = time.perf_counter() - wall, _processor() - cpu


def _processor() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def command(name: str, *arguments: object) -> None:
    """Runs a command of this environment.

    Raises:
        SystemExit: it failed, with what it said.
    """
    file = Path(sys.executable).parent / name
    done = subprocess.run([str(file), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")


def figure(found: Mapping[str, Any]) -> float:
    """A task's metric, as lm-eval writes it."""
    return next(found[key] for key in ("acc,none", "exact_match,none") if key in found)


SHOWN = ("model", "device", "dtype", "documents", "repeats", "trials")


def page(given: argparse.Namespace, rows: Mapping[str, Seconds]) -> Iterator[str]:
    options = " ".join(f"--{key} {getattr(given, key)}" for key in SHOWN)
    versions = ", ".join(f"{name} {number}" for name, number in machine(given.device).items())
    ours = [sum(part[clock] for part in rows["mergesearch"].values()) for clock in (0, 1)]
    many = ", ".join((*CHOICES, *GENERATION))
    yield f"""# One candidate, from its recipe to its scores

    python -m scripts.bench.candidate {options}

{date.today()}; {versions}; mergekit {version("mergekit")}; {os.cpu_count()} cores.

Tasks of {given.documents} documents each: {many} (scripts/bench/scoring.py). Seconds on the wall / of the processor,
medians of turns; all ways score alike, but for one document a task at most.
"""
    table = []
    for way, parts in rows.items():
        whole = [sum(part[clock] for part in parts.values()) for clock in (0, 1)]
        cells = [f"{parts[p][0]:.2f} / {parts[p][1]:.2f}" if p in parts else "-" for p in PARTS]
        if BOTH in parts:
            cells[PARTS.index("log-likelihood")] = f"{parts[BOTH][0]:.2f} / {parts[BOTH][1]:.2f}, with generation"
        times = [f"{whole[clock] / ours[clock]:.1f}" for clock in (0, 1)]
        table.append([way, *cells, f"{whole[0]:.2f} / {whole[1]:.2f}", *times])
    yield from tables.table(("way", *PARTS, "all", "times mergesearch's, wall", "processor"), table)
    if given.device == "cpu":
        yield from ["", "On an H100, with the shapes of Qwen2.5-1.5B and 7B: not measured."]
    yield from notes_of(given.out)


if __name__ == "__main__":
    sys.exit(main())
