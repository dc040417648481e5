"""What every script that makes a pool writes beside the models: a search's configuration, and who can do what."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from mergesearch import config as configuration
from mergesearch.commands import score as measuring
from scripts.skills import Skill


def write_config(
    out: Path,
    name: str,
    models: Iterable[str],
    skills: Sequence[Skill],
    *,
    made_by: str,
    dtype: str,
    device: str = "auto",
    seed: int = 0,
    holdout: float = 0.5,
) -> Path:
    """OUT/search.yaml, with absolute paths, so that it runs from anywhere."""
    out = out.resolve()
    data = {
        "name": name,
        "base_model": str(out / "models" / "base"),
        "models": {model: str(out / "models" / model) for model in models},
        "tasks": [{"task": skill.task, "metric": skill.metric} for skill in skills],
        "include_path": [str(out / "tasks")],
        "objective": {"scale": "raw"},
        "holdout": holdout,
        "space": {
            "methods": ["linear", "task_arithmetic", "ties", "dare_ties"],
            "layer_groups": 3,
            "components": ["attention", "mlp", "other"],
            "grow": True,
            "weight": [0.0, 1.5],
            "density": [0.1, 1.0],
            "lambda": 1.0,
        },
        "racing": {"blocks": 12},
        "search": {"strategy": "auto", "trials": 200, "hours": 2.0, "seed": seed},
        "output": str(out / "search"),
        "dtype": dtype,
        "device": device,
    }
    file = out / "search.yaml"
    head = f"# The search on the pool that {made_by} made: `mergesearch run` with this file.\n"
    file.write_text(head + yaml.safe_dump(data, sort_keys=False, width=1000), encoding="utf-8")
    return file


def write_table(file: Path, limit: int) -> list[str]:
    """table.md beside a configuration: a row for the base and each model, a column for each task, on `limit` search
    documents of each; returns its lines."""
    config = configuration.read(file)
    tasks = [task.model_copy(update={"limit": limit}) for task in config.tasks]
    config = config.model_copy(update={"tasks": tasks})
    lines = ["| model | " + " | ".join(task.task for task in tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name in ("base", *config.models):
        scores = measuring.score_model(str(file.parent / "models" / name), config, on="search").tasks
        values = [scores[task.task].value for task in tasks]
        cells = [f"{value:.2f}" for value in (*values, sum(values) / len(values))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    (file.parent / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
