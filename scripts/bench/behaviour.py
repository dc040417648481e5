"""What the searches do, recorded to the last bit, so that two versions of the code can be compared.

    python scripts/bench/behaviour.py record before.json          # with the version that is installed
    python scripts/bench/behaviour.py compare before.json after.json > results/behaviour.md

Recorded are the quickstart of version 0.1, every file of configs/search in small and every recipe of configs/recipes,
all over the demo zoo of version 0.1, which every version reads: each trial with its parameters, recipe, state, scores
and the value that the study got, and the hashes of the exported files' tensors.
Everything goes through the command, so any version that has one can be recorded: PYTHONPATH chooses it. Seconds and
texts are not compared. Two machines may differ in the last bits of a score: record both versions on one.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# scripts.bench.shared.zoo1 has these too: it is out of reach where PYTHONPATH chooses the version
ZOO1 = ROOT / "tests" / "data" / "zoo1"
BASE = f"base_model={ZOO1 / 'models' / 'base'}"
INCLUDE = f"include_path=[{ZOO1 / 'tasks'}]"
SMALL = [
    BASE,
    INCLUDE,
    f"models={{code: {ZOO1 / 'models' / 'code'}, names: {ZOO1 / 'models' / 'names'}}}",
    "tasks=[{task: zoo_code, metric: acc, limit: 4}, {task: zoo_names, metric: acc, limit: 4}]",
    "dtype=float32",
    "device=cpu",
    "search.defaults=false",
    "search.learned_soup.steps=2",
    "search.learned_soup.documents=1",
    "search.learned_soup.validation_documents=2",
    "search.learned_soup.candidates=4",
]
# enough for each file to reach its last stage
TRIALS = {"auto": 8, "grow": 6, "greedy_soup": 6, "study-cmaes": 6, "study-auto": 8, "random_control": 3, "racing": 6}
MORE = {
    "guard": ["guard.0.task=zoo_code", "guard.0.metric=null", "guard.0.limit=null", "guard.0.max_drop=0.0"],
    "documents": ["search.documents=80", "search.strategy=[greedy_soup, study]"],
}
COLUMNS = ("trial", "state", "objective", "objective_stderr", "method", "strategy", "recipe", "rank", "front")


def command(*arguments: object) -> str:
    """The output of `mergesearch ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-m", "mergesearch", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mergesearch {' '.join(map(str, arguments))}: status {done.returncode}: {done.stderr}")
    return done.stdout


def tensors(folder: Path) -> dict[str, str]:
    """A hash of each tensor's bytes, by name; what else a file's header holds is left out."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                bits = data[8 + size + start : 8 + size + end]
                found[name] = hashlib.sha256(repr((entry["dtype"], entry["shape"])).encode() + bits).hexdigest()[:16]
    return found


def studied(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the study itself holds of each trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
    return [{"params": t.params, "values": t.values, "state": t.state.name} for t in study.get_trials()]


def merge(file: Path, folder: Path) -> dict[str, Any]:
    """One recipe's tensors."""
    copy = folder.with_suffix(".yaml")
    copy.write_text(over_zoo1(file.read_text(encoding="utf-8")), encoding="utf-8")
    command("merge", copy, folder)
    return {"tensors": tensors(folder)}


def over_zoo1(text: str) -> str:
    """A recipe over the package's zoo as one over that of version 0.1, whose models take the places in turn."""
    text = re.sub(r"zoo:base\+(?=zoo:)", "", text)  # those are no adapters
    named = sorted({name for name in re.findall(r"\bzoo:(\w+)", text) if name != "base"})
    places = {**dict(zip(named, ("code", "prose", "names", "strings"), strict=False)), "base": "base"}
    return re.sub(r"\bzoo:(\w+)", lambda found: str(ZOO1 / "models" / places[found[1]]), text)


def search(file: Path, folder: Path, sets: list[str]) -> dict[str, Any]:
    """One search, its table, its study and its winner."""
    command("run", file, *(f"--set={item}" for item in [*sets, f"output={folder}"]))
    rows = json.loads(command("table", folder, "--format", "json"))
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    tasks = [task["task"] for task in config["tasks"]]
    scored = [*tasks, *(f"{task}_stderr" for task in tasks)]
    kept = [{key: row[key] for key in (*COLUMNS, *scored) if key in row} for row in rows]
    best = folder / "best"
    return {
        "table": sorted(kept, key=lambda row: row["trial"]),
        "study": studied(folder, config["name"]),
        "documents": json.loads((folder / "documents.json").read_text(encoding="utf-8")),
        "best": {"recipe": (best / "recipe.yaml").read_text(encoding="utf-8"), "tensors": tensors(best)},
    }


def recordings(scratch: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What there is to record, by name."""
    for file in sorted((ROOT / "configs" / "recipes").glob("*.yaml")):
        yield f"recipe {file.stem}", partial(merge, file, scratch / file.stem)
    for file in sorted((ROOT / "configs" / "search").glob("*.yaml")):
        sets = [*SMALL, f"search.trials={TRIALS.get(file.stem, 4)}", *MORE.get(file.stem, [])]
        yield f"search {file.stem}", partial(search, file, scratch / f"search-{file.stem}", sets)
    models = ", ".join(f"{name}: {ZOO1 / 'models' / name}" for name in ("code", "prose", "names", "strings"))
    sets = [BASE, INCLUDE, f"models={{{models}}}"]
    yield "quickstart", partial(search, ZOO1 / "quickstart.yaml", scratch / "quickstart", sets)


def record(out: Path, only: str) -> None:
    """Writes each recording whose name holds `only` as soon as it is made; what the file has is not made again."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm_eval", "optuna"))
    about = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {libraries}"
    data = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"about": about, "found": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in recordings(Path(scratch)):
            if only in name and name not in data["found"]:
                data["found"][name] = make()
                out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                print(name, file=sys.stderr, flush=True)


def first_difference(before: Any, after: Any, place: str = "") -> str | None:
    """Where two recordings part, in words; None where they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            found = first_difference(before.get(key), after.get(key), f"{place}.{key}")
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return next(filter(None, (first_difference(a, b, f"{place}.{n}") for n, (a, b) in pairs)), None)
    same = before == after and type(before) is type(after)
    return None if same else f"{place.lstrip('.')}: {str(before)[:80]} before, {str(after)[:80]} after"


def compare(before: Path, after: Path) -> int:
    """Prints a row for each recording; the number of those that differ."""
    ours, theirs = (json.loads(file.read_text(encoding="utf-8")) for file in (before, after))
    print("# Behaviour before and after\n")
    print("`python scripts/bench/behaviour.py record FILE` with each version, then `compare BEFORE AFTER`.\n")
    for label, data in (("before", ours), ("after", theirs)):
        print(f"- {label}: {data['about']}")
    print("\n| recorded | trials | tensors | equal |\n|---|---|---|---|")
    different = 0
    for name in {**ours["found"], **theirs["found"]}:
        one, other = ours["found"].get(name), theirs["found"].get(name)
        difference = first_difference(one, other) if one and other else "recorded once"
        different += difference is not None
        shown = one or other
        count = len((shown.get("best") or shown)["tensors"])
        print(f"| {name} | {len(shown.get('table', []))} | {count} | {difference or 'yes'} |")
    print(f"\n{different} of {len({**ours['found'], **theirs['found']})} differ.")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record")
    one.add_argument("out", type=Path)
    one.add_argument("--only", default="", help="what to record: names that hold this")
    two = verbs.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.verb == "compare":
        sys.exit(bool(compare(options.before, options.after)))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    record(options.out, options.only)


if __name__ == "__main__":
    main()
