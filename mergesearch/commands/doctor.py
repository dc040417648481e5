"""`mergesearch doctor`: what this machine has, and what is missing for which feature."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mergesearch import __version__, disks, memory

# what decides figures, and what a fault report should name
LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "lm_eval", "datasets", "optuna", "peft", "numpy", "pandas",
    "plotly", "huggingface_hub",
)  # fmt: skip


@dataclass(frozen=True)
class Feature:
    """Something that needs a package which may be missing.

    Attributes:
        what: it is for.
        modules: that have to be there.
        install: what brings them.
    """

    what: str
    modules: tuple[str, ...]
    install: str

    @property
    def missing(self) -> list[str]:
        return [module for module in self.modules if not _there(module)]


_EXTRA = "pip install 'mergesearch[{}]'"
FEATURES = (
    Feature("dashboard: a run in optuna-dashboard", ("optuna_dashboard",), _EXTRA.format("dashboard")),
    Feature("storage: postgresql://", ("psycopg",), _EXTRA.format("postgres")),
    Feature("storage: mysql+pymysql://", ("pymysql",), _EXTRA.format("mysql")),
    Feature("storage_proxy: many hosts, few connections", ("grpc", "google.protobuf"), _EXTRA.format("proxy")),
    Feature("artifacts: s3://", ("boto3",), _EXTRA.format("s3")),
    Feature("artifacts: gs://", ("google.cloud.storage",), _EXTRA.format("gcs")),
    Feature("run --ray: workers on a Ray cluster", ("ray",), _EXTRA.format("ray")),
    Feature("score_as: int8, int4, fp8", ("torchao",), _EXTRA.format("torchao")),
    Feature("score_as: gguf:TYPE", ("gguf", "llama_cpp"), _EXTRA.format("gguf")),
    Feature("track: mlflow", ("mlflow",), _EXTRA.format("mlflow")),
    Feature("track: tensorboard", ("tensorboard",), _EXTRA.format("tensorboard")),
    Feature("track: wandb", ("wandb",), _EXTRA.format("wandb")),
)


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def report(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """What there is, a label and a text each; nothing is changed, and nothing outside this machine is asked.

    Args:
        folder: where runs would be written; None for the current folder.
    """
    folder = folder or Path.cwd()
    yield "mergesearch", f"{__version__}, Python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    yield "libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    yield from _devices()
    yield "memory", f"{memory.free_on_host() / 2**30:.1f} GiB free, {os.cpu_count()} processors"
    yield "storage", _storage(folder)
    yield "models", _hub()
    yield "compiler", _compiler()
    for feature in FEATURES:
        missing = feature.missing
        yield feature.what, f"missing ({feature.install})" if missing else "ready"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "threads", f"{torch.get_num_threads()} of torch on the CPU"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "devices", f"cpu alone; {built}"
        return
    for device in memory.accelerators():
        free, total = memory.of_device(device)
        yield str(device), f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _storage(folder: Path) -> str:
    there = disks.existing(folder)
    free = disks.free(there) / 2**30
    writable = "" if os.access(there, os.W_OK) else ", and it cannot be written: set output to another folder"
    return f"{free:.1f} GiB free in {there}{writable}; SQLite {sqlite3.sqlite_version}"


def _hub() -> str:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    mode = "HF_HUB_OFFLINE is set: only what is there is used" if offline else "the hub is asked for what is not there"
    return f"cache {home}{'' if home.exists() else ' (empty)'}; {mode}"


def _compiler() -> str:
    """As engine/kernels/native.py looks for one."""
    chosen = os.environ.get("CXX")
    found = chosen or next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    triton = "" if find_spec("triton") is None else "; triton for a GPU"
    slower = "none: merging on the CPU is slower and gives the same (to have one: apt-get install g++)"
    return f"{found or slower}{triton}"
