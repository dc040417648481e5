"""Reads the tasks' documents from the files beside this one, so that the working directory does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import datasets


def load(test: str, fewshot: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """Split name -> documents, of the JSON lines files named `test` and `fewshot` in this folder.

    lm-eval also passes the task's metadata, which is of no use here.
    """
    files = {"test": test, "fewshot": fewshot}
    return {split: read(name) for split, name in files.items() if name}


def read(name: str) -> datasets.Dataset:
    lines = (Path(__file__).resolve().parent / name).read_text(encoding="utf-8").splitlines()
    return datasets.Dataset.from_list([json.loads(line) for line in lines])
