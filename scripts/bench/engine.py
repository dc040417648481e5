"""How fast candidates are made, beside the machine's own copy bandwidth and beside mergekit.

    python -m scripts.bench.engine                  the table of results/engine.md
    python -m scripts.bench.engine --mergekit       the same, and mergekit on the same tensors (needs the extra parity)
    python -m scripts.bench.engine --scaling        how the figures change with the number of models and of parameters
    python -m scripts.bench.engine --device cuda    all of it on a CUDA device, about 3 G parameters, in 10 minutes
    python -m scripts.bench.engine --streamed       parents in pinned host memory, the candidate on the CUDA device
    python -m scripts.bench.engine --matrices       the methods that decompose matrices, four models of SmolLM2's shape
    python -m scripts.bench.engine --quick          a small model, for trying the script itself

Before a method is timed its candidate is compared with the plain definition, every tensor of it or as many as
`--check` seconds allow, one of each shape first; where they differ by more than one unit in the last place nothing is
timed and the exit status is 1. Each method's rounds alternate with copies of as much memory, so that a busy machine
slows both. Rows of a run replace those of the same device and part in results/engine.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesearch import memory, methods
from mergesearch.engine import kernels
from mergesearch.engine.kernels.exact import exact_division
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

RESULTS = Path(__file__).parents[2] / "results"
COLUMNS = (
    "part", "method", "device", "engine", "parameters", "models", "seconds", "GB/s", "copy GB/s", "share of copy",
    "first seconds", "cpu seconds", "first cpu seconds", "layers",
    "new density seconds", "kept MiB", "peak share", "first peak share", "equal", "load", "threads",
    "torch", "python", "machine", "date",
)  # fmt: skip
# seconds a candidate with statistics known that are promised of methods of matrices, on two cores; None: none is
SECONDS: dict[str, float | None] = {
    **dict.fromkeys(("tsv", "star", "knots", "knots_dare", "resmerge", "regmean_free"), 3.0),
    **dict.fromkeys(("iso", "iso_cts", "task_arithmetic+svc")),
}
# share of the copy bandwidth that issue and README promise: CPU, H100
TARGETS = {
    **dict.fromkeys(("linear", "task_arithmetic"), (0.70, 0.85)),
    **dict.fromkeys(("slerp", "model_stock"), (0.60, 0.80)),
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram"), (0.40, 0.80)),
    **dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"), (0.20, 0.70)),
}
AGAINST = {"linear": 20.0, "task_arithmetic": 8.0, "ties": 400.0, "dare_ties": 30.0}
# what mergekit calls the methods that it has under other names; None: it has none
MERGEKIT = {"uniform_soup": "linear", "della_linear": "della_linear", "ram": "ram", "ramplus_tl": "ramplus_tl"}


@dataclass
class Bench:
    """A base and models of one shape list, and the candidate that they are merged into."""

    base: dict[str, Tensor]
    models: list[dict[str, Tensor]]
    live: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.base.values())

    def merges(self, method: methods.Method, count: int) -> list[kernels.TensorMerge]:
        names = [f"m{i}" for i in range(count)]
        return [
            kernels.TensorMerge(
                kernels.Operands(
                    base=start if method.base != "unused" else None,
                    models=tuple(model[name] for model in self.models[:count]),
                    names=tuple((parent, name) for parent in ("base", *names)),
                    masks=tuple(methods.mask_key(0, m, name) for m in names) if method.random else (),
                ),
                self.live[name],
                name,
            )
            for name, start in self.base.items()
        ]


def shapes(
    layers: int, hidden: int, inner: int, vocabulary: int, keys: int | None = None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama with tied embeddings; `keys`: rows of its keys and values, where they are fewer."""
    yield "embed", (vocabulary, hidden)
    for layer in range(layers):
        for part in "qkvo":
            yield f"{layer}.{part}", (keys or hidden if part in "kv" else hidden, hidden)
        yield f"{layer}.gate", (inner, hidden)
        yield f"{layer}.up", (inner, hidden)
        yield f"{layer}.down", (hidden, inner)
        yield f"{layer}.norm1", (hidden,)
        yield f"{layer}.norm2", (hidden,)
    yield "norm", (hidden,)


SIZES = {
    "quick": (2, 256, 640, 8000),
    "10M": (4, 256, 640, 24000),
    "40M": (8, 512, 1376, 28000),
    "smollm2": (30, 576, 1536, 49152, 192),
    "158M": (18, 768, 2048, 40000),
    "400M": (22, 1152, 3072, 50000),
    "1G": (18, 2048, 5632, 32000),
    "3G": (28, 3072, 8192, 32000),
}


def make(size: str, models: int, device: torch.device, pinned: bool = False) -> Bench:
    """Random weights as a fine-tune has them: the base of standard deviation 0.02, task vectors a tenth of that.

    `pinned`: base and models are in pinned host memory.
    """
    generator = torch.Generator(device).manual_seed(0)

    def noise(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    base = {name: noise(shape, 0.02).bfloat16() for name, shape in shapes(*SIZES[size])}
    made = [{name: t.float().add_(noise(t.shape, 0.002)).bfloat16() for name, t in base.items()} for _ in range(models)]
    live = {name: torch.ones_like(t) for name, t in base.items()}
    if pinned:
        base, *made = ({name: t.cpu().pin_memory() for name, t in held.items()} for held in (base, *made))
    return Bench(base, made, live)


# --- measuring ----------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Copy:
    """The machine's copy bandwidth, bytes read plus bytes written, for memory of one model's size."""

    def __init__(self, parameters: int, device: torch.device):
        self.source = torch.zeros(min(parameters, 2**30), dtype=torch.bfloat16, device=device).add_(1)
        self.target = torch.zeros_like(self.source)
        self.device, self.moved = device, 2 * self.source.nbytes

    def once(self) -> float:
        return self.moved / timed(lambda: self.target.copy_(self.source, non_blocking=True), self.device) / 1e9


class Upload(Copy):
    """The bandwidth from pinned host memory to the device, bytes that go over."""

    def __init__(self, device: torch.device):
        self.source = torch.ones(2**29, dtype=torch.bfloat16).pin_memory()
        self.target = torch.empty_like(self.source, device=device)
        self.device, self.moved = device, self.source.nbytes


class Peak:
    """The most memory that this process held above what it held at the start, in bytes; sampled each millisecond."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> Peak:
        self.most = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.start, self.going = held(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.going:
            self.most = max(self.most, held() - self.start)
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self.going = False
        self.thread.join()


def held() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- equality -----------------------------------------------------------------------------------------------------


def differs(
    merges: Sequence[kernels.TensorMerge], method: methods.Method, parameters: Mapping[str, Any], limit: float
) -> str:
    """How much of the candidate was compared with the definition; raises SystemExit where it is not the same."""
    last = {tuple(merge.out.shape): merge for merge in merges}
    order = [*last.values(), *(merge for merge in merges if last[tuple(merge.out.shape)] is not merge)]
    end, done = time.perf_counter() + limit, 0
    for merge in order:
        if done >= len(last) and time.perf_counter() > end:
            break
        steps = _steps(merge, method, parameters)
        if steps > 1:
            sys.exit(f"{method.name}: {merge.label} differs by {steps} units in the last place: not timed")
        done += 1
    return f"{done} of {len(order)} tensors"


def _steps(merge: kernels.TensorMerge, method: methods.Method, parameters: Mapping[str, Any]) -> int:
    base, device = merge.operands.base, merge.out.device
    with exact_division(device):
        wanted = method(
            None if base is None else base.to(device).float(), [m.to(device).float() for m in merge.operands.models],
            parameters, list(merge.operands.masks),
        ).to(merge.out.dtype)  # fmt: skip
    found = [t.view(torch.int16).int() for t in (merge.out, wanted)]
    # one unit from the least positive to the least negative number, too
    ordered = [torch.where(t < 0, -32768 - t, t) for t in found]
    return int((ordered[0] - ordered[1]).abs().max())


# --- one method ---------------------------------------------------------------------------------------------------


def given(method: methods.Method, count: int, number: int = 0) -> dict[str, Any]:
    """The parameters of a round: defaults, half of the elements where there is a density, new weights each time."""
    found: dict[str, Any] = {"density": 0.5} if "density" in method.parameters else {}
    if "weight" in method.parameters:
        found["weight"] = [0.3 + 0.1 * i + 0.001 * number for i in range(count)]
    if method.name in ("slerp", "nearswap"):
        found["t"] = (0.5 if method.name == "slerp" else 0.001) * (1 + 0.01 * number)
    return found


def measure(
    bench: Bench, name: str, count: int, device: torch.device, args: argparse.Namespace, copy: Copy, part: str,
    kept: kernels.Statistics | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row; raises SystemExit where the result is wrong. `kept`: statistics that other methods left."""
    method = methods.get(name)
    count = max(method.min_models, min(count, method.max_models or count))
    labels = [f"m{i}" for i in range(count)]

    def recipe(**other: Any) -> kernels.MethodCall:
        number = other.pop("number", 0)
        return kernels.MethodCall(method, method.complete({**given(method, count, number), **other}, labels, "the run"))

    statistics_ = kept or kernels.Statistics(2**30, 2**35)
    run = kernels.Runner(statistics_, kernels.Compiler("now"))
    merges = bench.merges(method, count)
    merge_set = kernels.MergeSet(merges)
    with Peak(device) as first_peak:
        first = timed(lambda: run.run(recipe(), merge_set), device)
    held_now = 2 * bench.parameters * (len(bench.models) + 2)
    kept_bytes = statistics_.nbytes
    equal = differs(merges, method, recipe().parameters, args.check)
    seconds, copies = [], []
    with Peak(device) as peak:
        for number in range(args.rounds + 1):
            copies.append(copy.once())
            how = recipe(number=number + 1)
            seconds.append(timed(lambda how=how: run.run(how, merge_set), device))
    seconds, copies = seconds[1:], copies[1:]
    moved = 2 * bench.parameters * (count + 1 + (method.base != "unused"))
    if isinstance(copy, Upload):
        moved = 2 * bench.parameters * (count + (method.base != "unused"))
    median, speed = statistics.median(seconds), statistics.median(copies)
    row = {
        "part": part, "method": name, "device": label(device), "engine": "mergesearch", "parameters": bench.parameters,
        "models": count, "seconds": median, "GB/s": moved / median / 1e9, "copy GB/s": speed,
        "share of copy": statistics.median(moved / s / 1e9 / c for s, c in zip(seconds, copies, strict=True)),
        "first seconds": first, "kept MiB": kept_bytes / 2**20, "peak share": peak.most / held_now,
        "first peak share": max(0, first_peak.most - kept_bytes) / held_now, "equal": equal, **surroundings(),
    }  # fmt: skip
    if "density" in method.parameters:
        row["new density seconds"] = timed(lambda: run.run(recipe(density=0.37), merge_set), device)
    return row


def against(bench: Bench, name: str, count: int, rounds: int, part: str) -> dict[str, Any] | None:
    """mergekit's `merge_state_dicts` on the same tensors; None where it has no such method or refuses."""
    from mergekit.merge_methods import merge_state_dicts

    method = methods.get(name)
    count = max(method.min_models, min(count, method.max_models or count))
    models: dict[Any, Any] = {f"m{i}": model for i, model in enumerate(bench.models[:count])}
    parameters: dict[str, Any] = {k: v for k, v in given(method, count).items() if k == "density"}
    parameters |= {"weight": 0.5} if "weight" in method.parameters or name == "uniform_soup" else {}
    parameters |= {"t": 0.5} if name in ("slerp", "nearswap") else {}
    first_is_base = name in ("slerp", "nearswap", "arcee_fusion")
    if method.base != "unused":
        models = {"base": bench.base, **models}
    base = "base" if method.base != "unused" else "m0" if first_is_base else None
    seconds = []
    try:
        for _ in range(rounds):
            call = functools.partial(
                merge_state_dicts, models, MERGEKIT.get(name, name), parameters=parameters, base=base
            )
            seconds.append(timed(call, torch.device("cpu")))
            if seconds[-1] > 3:
                break
    except Exception as error:
        print(f"  mergekit {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None
    return {
        "part": part, "method": name, "device": "cpu", "engine": "mergekit 0.1.5", "parameters": bench.parameters,
        "models": count, "seconds": statistics.median(seconds), **surroundings(),
    }  # fmt: skip


def label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def machine() -> str:
    """The processor's name, of how many cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def surroundings() -> dict[str, Any]:
    return {
        "load": f"{os.getloadavg()[0]:.2f}", "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "machine": machine(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


# --- the parts ----------------------------------------------------------------------------------------------------


# methods whose statistics are the same are timed one after another and share them
ORDER = ("linear", "task_arithmetic", "slerp", "model_stock", "ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram",
         "dare_linear", "dare_ties", "della", "della_linear", "uniform_soup", "passthrough", "nuslerp", "multislerp",
         "karcher", "nearswap", "ramplus_tl", "arcee_fusion")  # fmt: skip
SHARED = {"breadcrumbs": "ties", "breadcrumbs_ties": "ties", "della_linear": "della"}


def table(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    bench = make(args.size, 3, device, args.streamed)
    copy = Upload(device) if args.streamed else Copy(bench.parameters, device)
    part = "streamed" if args.streamed else "methods"
    rows: list[dict[str, Any]] = []
    kept: dict[str, kernels.Statistics] = {}
    wanted = args.methods or (["linear", "ties", "dare_ties"] if args.streamed else _split())
    for name in sorted(wanted, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
        family = SHARED.get(name, name)
        if family not in kept:
            kept = {family: kernels.Statistics(2**30, 2**35)}
        rows.append(measure(bench, name, 3, device, args, copy, part, kept[family]))
        say(rows[-1])
        write(args, rows)
        if args.mergekit and device.type == "cpu":
            other = against(bench, name, 3, 3, "methods")
            rows += [other] if other else []
            if other:
                times = other["seconds"] / rows[-2]["seconds"]
                print(f"{'':18s} mergekit {other['seconds']:8.3f} s, {times:.0f}x", flush=True)
                write(args, rows)
    return rows


def _split() -> list[str]:
    """The methods that do not decompose matrices."""
    return [name for name in methods.names() if not methods.get(name).matrices]


def matrices(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Methods that decompose matrices: the first candidate, and those after it, whose weights are others each time."""
    size = "quick" if args.quick else "smollm2"
    whole, *rest_of_shape = SIZES[size]
    layers = min(args.layers or whole, whole)
    SIZES[size] = (layers, *rest_of_shape)  # type: ignore[assignment]
    bench = make(size, 4, device)
    rows: list[dict[str, Any]] = []
    for name in args.methods or SECONDS:
        method, labels = methods.get(name), [f"m{i}" for i in range(4)]
        run = kernels.Runner(kernels.Statistics(2**30, 2**35), kernels.Compiler("now"))
        run.decompositions.held.limit = memory.free_on_host() // 2
        merges = [merge for merge in bench.merges(method, 4) if merge.label != "embed"]
        rest = [merge for merge in bench.merges(method, 4) if merge.label == "embed"]
        merge_sets = kernels.MergeSet(merges), kernels.MergeSet(rest)

        spent: list[float] = []

        def candidate(
            number: int,
            method: Any = method,
            run: Any = run,
            merge_sets: Any = merge_sets,
            labels: Any = labels,
            spent: Any = spent,
        ) -> None:
            complete = method.complete({**given(method, 4, number), "lambda": 0.9}, labels, "the run")
            begun = time.process_time()
            run.run(kernels.MethodCall(method, complete), merge_sets[0])
            between = time.process_time()
            aside = kernels.MethodCall(methods.get(method.aside), method.complete_aside(complete))
            run.run(aside, merge_sets[1])
            # the embedding is there once, however many layers are measured
            spent.append((between - begun) * whole / layers + time.process_time() - between)

        first = timed(lambda: candidate(0), device)
        seconds = [timed(lambda n=n: candidate(n), device) for n in range(1, 1 + min(3, args.rounds))]
        rows.append({
            "part": "matrices", "method": name, "device": label(device), "engine": "mergesearch", "models": 4,
            "parameters": bench.parameters, "seconds": statistics.median(seconds), "first seconds": first,
            "first cpu seconds": spent[0], "cpu seconds": statistics.median(spent[1:]), "layers": layers,
            "kept MiB": run.decompositions.held.nbytes / 2**20 * whole / layers, **surroundings(),
        })  # fmt: skip
        print(
            f"{name:20s} {rows[-1]['seconds']:8.2f} s, first {first:.1f} s; of the processor "
            f"{statistics.median(spent[1:]):.2f} s, first {spent[0]:.1f} s; kept {rows[-1]['kept MiB']:.0f} MiB",
            flush=True,
        )
        write(args, rows)
    return rows


def scaling(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    wanted = args.methods or ["linear", "ties", "dare_ties"]

    def add(bench: Bench, count: int, copy: Copy, part: str) -> None:
        for name in wanted:
            rows.append(measure(bench, name, count, device, args, copy, part))
            say(rows[-1])
            write(args, rows)

    for size in ("10M", "40M", "158M", "400M", "1G"):
        if memory.free(device) < 2 * 5 * 10**9 and size == "1G":
            print("1G: not enough memory", flush=True)
            continue
        bench = make(size, 3, device)
        add(bench, 3, Copy(bench.parameters, device), "parameters")
    del bench
    bench = make("158M" if device.type == "cuda" else "40M", 12, device)
    copy = Copy(bench.parameters, device)
    for count in (2, 3, 4, 6, 8, 12):
        add(bench, count, copy, "models")
    return rows


def say(row: dict[str, Any]) -> None:
    density = f", new density {row['new density seconds']:.2f} s" if "new density seconds" in row else ""
    print(
        f"{row['method']:18s} {row['models']:2d} x {row['parameters'] / 1e6:6.0f} M {row['seconds']:8.4f} s "
        f"{row['GB/s']:7.1f} GB/s, {row['share of copy']:4.0%} of copy ({row['copy GB/s']:.1f}), "
        f"first {row['first seconds']:.1f} s{density}, kept {row['kept MiB']:.0f} MiB, peak {row['peak share']:+.1%} "
        f"first {row['first peak share']:+.1%}, equal in {row['equal']}",
        flush=True,
    )


# --- writing ------------------------------------------------------------------------------------------------------


def save(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Puts rows into the long table; those of the same part, method, machine, device, engine and size are replaced."""
    old = list(csv.DictReader(path.open())) if path.is_file() else []
    identity = ("part", "method", "device", "machine", "engine", "parameters", "models")
    new = [{c: _cell(row.get(c, "")) for c in COLUMNS} for row in rows]
    old = [{c: row.get(c, "") for c in COLUMNS} for row in old]
    replaced = {tuple(row[c] for c in identity) for row in new}
    kept = [row for row in old if tuple(row[c] for c in identity) not in replaced]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows(kept + new)
    return kept + new


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(rows: Sequence[dict[str, str]]) -> str:
    """results/engine.md from the long table."""
    parts = ["# How fast candidates are made", _words(rows), *_tables(rows), _matrices(rows), *_scaling(rows)]
    if not any(r["part"] == "streamed" for r in rows):
        parts.append("Streamed from pinned memory: not measured.")
    return "\n".join(["\n\n".join(parts), *notes_of(RESULTS / "engine.md"), ""])


def _matrices(rows: Sequence[dict[str, str]]) -> str:
    """The table of methods that decompose matrices, or that none was timed."""
    words = [
        "## Methods that decompose matrices", "",
        "Four bf16 models of SmolLM2's shape; a candidate with statistics known, other weights each time (iso, "
        "iso_cts and +svc decompose each anew); `first`: with the statistics. Time of the processor, all threads, of "
        "the layers that were measured times 30 over their number: what it was busy with, whatever else the machine "
        "did then; half of it is what two idle cores take at least, and the goal is held against that. `as "
        "measured`: by the clock, of these layers alone.", "",
    ]  # fmt: skip
    head = ("method", "device", "layers", "two cores, s", "goal", "first, s", "share of first", "as measured, s",
            "kept, MiB")  # fmt: skip
    body = []
    found = [row for row in rows if row["part"] == "matrices"]
    for row in found:
        most = SECONDS.get(row["method"])
        each, first = float(row["cpu seconds"]) / 2, float(row["first cpu seconds"]) / 2
        goal = "-" if most is None else f"{most:g} s {'met' if each <= most else 'missed'}"
        figures = f"{each:.2f}", goal, f"{first:.1f}", f"{each / first:.1%}"
        body.append([row["method"], row["device"], row["layers"], *figures, row["seconds"], row["kept MiB"]])
    return "\n".join([*words, *tables.table(head, body)]) if found else "Methods that decompose matrices: not measured."


def _words(rows: Sequence[dict[str, str]]) -> str:
    dates = sorted({r["date"] for r in rows})
    return (
        "Medians, bf16 parents and candidate, statistics of the parents known. A share is of the copy bandwidth "
        "measured in the same rounds; bytes count each parent read once and the candidate written once, and nothing "
        "else that is read (DELLA's ranks). `first`: the first candidate, which computes the statistics and builds "
        "the kernel or finds it on disk (breadcrumbs and della_linear find the statistics of ties and della). `new "
        "density`: a candidate with a density not seen before. `kept`: statistics kept between candidates. `peak`: the "
        "most memory above pool, candidate and what is kept while candidates were made, as a share of pool and "
        "candidate; `first peak` while the first was. `equal`: of how many tensors the first candidate was compared "
        "with the plain definition and found within one unit in the last place. Medians of 7 rounds; "
        f"{dates[0]} to {dates[-1]}. Long form: engine.csv. Reproduce with `python -m scripts.bench.engine "
        "--mergekit`, `--scaling`, `--device cuda`, `--device cuda --scaling` and `--streamed`."
    )


def _tables(rows: Sequence[dict[str, str]]) -> list[str]:
    """One table for each machine, part and device that methods were timed on."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["part"] in ("methods", "streamed"):
            found.setdefault((row["part"], row["device"].partition(",")[0], row["machine"]), []).append(row)
    parts = [_table(part, machine, alike) for (part, _, machine), alike in found.items()]
    if not any(r["part"] == "methods" and not r["device"].startswith("cpu") for r in rows):
        parts.append("CUDA: not measured.")
    return parts


def _table(part: str, machine: str, rows: Sequence[dict[str, str]]) -> str:
    theirs = {r["method"]: float(r["seconds"]) for r in rows if r["engine"].startswith("mergekit")}
    ours = [r for r in rows if r["engine"] == "mergesearch"]
    if not ours:
        return ""
    one = ours[0]
    title = "Parents in pinned host memory" if part == "streamed" else "Methods"
    ceiling = "host-to-device bandwidth" if part == "streamed" else "copy bandwidth"
    speed = statistics.median(float(r["copy GB/s"]) for r in ours)
    loads = sorted(float(r["load"]) for r in ours if r["load"])
    words = (
        f"## {title}: {one['device']}\n\n{int(one['parameters']) / 1e6:.0f} M parameters, 3 models (fewer where a "
        f"method takes fewer); {machine}; {ceiling} {speed:.1f} GB/s; torch {one['torch']}, python {one['python']}; "
        f"1-minute load {f'{loads[0]:.1f} to {loads[-1]:.1f}' if loads else 'not noted'}."
    )
    head = ("method", "s", "GB/s", "share", "goal", "mergekit 0.1.5, s", "times", "goal", "first, s", "new density, s",
            "kept, MiB", "peak", "first peak", "equal")  # fmt: skip
    body = [_line(r, theirs) for r in sorted(ours, key=lambda r: r["method"])]
    return "\n".join([words, "", *tables.table(head, body)])


def _line(r: dict[str, str], theirs: dict[str, float]) -> list[str]:
    name, cpu = r["method"], r["device"].startswith("cpu")
    goal = TARGETS[name][0 if cpu else 1] if name in TARGETS else None
    goal = 0.80 if r["part"] == "streamed" else goal
    other = theirs.get(name)
    times = other / float(r["seconds"]) if other else None
    return [
        name, f"{float(r['seconds']):.4f}", f"{float(r['GB/s']):.1f}", f"{float(r['share of copy']):.0%}",
        _goal(float(r["share of copy"]), goal, "{:.0%}"),
        f"{other:.2f}" if other else "not measured", f"{times:.1f}x" if times else "-",
        _goal(times, AGAINST.get(name, 1.0), "{:.0f}x") if times else "-",
        f"{float(r['first seconds']):.1f}",
        f"{float(r['new density seconds']):.2f}" if r["new density seconds"] else "-",
        f"{float(r['kept MiB']):.0f}", f"{float(r['peak share']):.1%}",
        f"{float(r['first peak share']):.1%}" if r["first peak share"] else "-", r["equal"],
    ]  # fmt: skip


def _goal(value: float, goal: float | None, form: str) -> str:
    return "-" if goal is None else f"{form.format(goal)} {'met' if value >= goal else 'missed'}"


def _scaling(rows: Sequence[dict[str, str]]) -> list[str]:
    parts = []
    for part, title in (("models", "Number of models"), ("parameters", "Number of parameters")):
        chosen = [r for r in rows if r["part"] == part]
        for machine, device in sorted({(r["machine"], r["device"]) for r in chosen}):
            alike = [r for r in chosen if (r["machine"], r["device"]) == (machine, device)]
            body = [
                [r["method"], r["models"], f"{int(r['parameters']) / 1e6:.0f} M", f"{float(r['seconds']):.4f}",
                 f"{float(r['GB/s']):.1f}", f"{float(r['share of copy']):.0%}", f"{float(r['first seconds']):.1f}"]
                for r in sorted(alike, key=lambda r: (r["method"], int(r["models"]), int(r["parameters"])))
            ]  # fmt: skip
            head = ("method", "models", "parameters", "s", "GB/s", "share of copy", "first, s")
            parts.append("\n".join([f"## {title}: {device}\n\n{machine}.\n", *tables.table(head, body)]))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--check", type=float, default=60.0, help="seconds for each method's comparison")
    parser.add_argument("--mergekit", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--matrices", action="store_true")
    parser.add_argument("--layers", type=int, help="of --matrices: that many of the 30 layers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if args.streamed else args.device)
    usual = "1G" if args.streamed else "158M" if device.type == "cpu" else "3G"
    args.size = args.size or ("quick" if args.quick else usual)
    part = matrices if args.matrices else scaling if args.scaling else table
    rows = part(args, device)
    write(args, rows)


def write(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Brings results/engine.csv and engine.md up to date; a trial run leaves them alone."""
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "engine.md").write_text(report(save(rows, args.out / "engine.csv")))


if __name__ == "__main__":
    main()
