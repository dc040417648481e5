"""A configuration that runs in seconds: a tiny base, two fine-tunes of it, and the tiny tasks."""

from __future__ import annotations

from pathlib import Path

import yaml

from support.evaluate_tiny import make_model, make_tokenizer, write_tasks
from support.tiny_models import fine_tune


def write_tiny_run(folder: Path, **changes: object) -> Path:
    """Writes models, tasks and the configuration into a folder; its file. It says nothing of tasks: `changes` do."""
    write_tasks(folder)
    for number, name in enumerate(("base", "one", "two")):
        model = make_model(0)
        (fine_tune(model, number, 0.05) if number else model).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    data = {
        "name": "tiny",
        "base_model": str(folder / "base"),
        "models": {name: str(folder / name) for name in ("one", "two")},
        "include_path": str(folder / "tasks"),
        "objective": {"scale": "raw"},
        "space": {"methods": ["linear"]},
        "search": {"strategy": "study", "sampler": "tpe", "defaults": False, "trials": 2},
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 6,
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return folder / "config.yaml"
