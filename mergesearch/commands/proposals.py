"""What `mergesearch init` proposes where it can know: names of models, their base, documents, a dtype, paths."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergesearch import zoo
from mergesearch.checkpoints import Source, choose_device, load_tokenizer, locate
from mergesearch.checkpoints.checks import configurations
from mergesearch.checkpoints.files import read_config, read_headers, read_json
from mergesearch.checkpoints.loading import probe
from mergesearch.checkpoints.lora import check_adapter
from mergesearch.commands.inputs import scorer_of
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.evaluate.tasks import Task
from mergesearch.paths import absolute
from mergesearch.recipe import AVERAGE, BASE

# last parts of a path that say nothing of what the model is good at
_EMPTY = re.compile(r"(checkpoint|epoch|step)[-_]?\d*|final|best|last|model|merged|adapter|lora|hf|output|\d+", re.I)
# how many documents a task is scored on, for a person: fewer are noise, more are rarely worth their time
_LIMITS = (20, 30, 50, 75, 100, 150, 200)
# how long a candidate may take, for a run of some fifty candidates that ends within the hour
_SECONDS = 60.0
# floating-point operations a second that scoring reaches, of one processor thread and of a GPU, as an order of
# magnitude; and seconds a document takes however small the model is
_PER_THREAD, _PER_GPU, _PER_DOCUMENT = 15e9, 4e13, 0.005
_SAMPLE = 16


@dataclass(frozen=True)
class Parent:
    """A base or a model as far as its files' headers tell.

    Attributes:
        reference: as it was typed.
        source: what that names.
        config: its config.json; empty for an adapter over the base.
        trained_on: what an adapter says is its base, or None.
    """

    reference: str
    source: Source
    config: dict[str, Any]
    trained_on: str | None = None


def look(reference: str, where: str) -> Parent:
    """What a reference names, once its files are known to be what can be merged.

    Raises:
        UserError: there is no such checkpoint, or its weights are pickled, quantised, incomplete or corrupt.
    """
    source, config, trained_on = locate(reference, where), {}, None
    if source.folder is not None:
        config = read_config(source.folder, where)
        read_headers(source.folder, where)
    if source.adapter is not None:
        check_adapter(source.adapter, where)
        trained_on = read_json(source.adapter / "adapter_config.json", where).get("base_model_name_or_path")
    return Parent(reference, source, config, trained_on)


def compare(base: Parent, model: Parent, where: str) -> None:
    """Raises `UserError` where a model cannot be a fine-tune of the base: the base itself, or of another architecture
    or size."""
    if base.source.folder is None:
        hint = f", it says {base.trained_on}" if base.trained_on else ""
        raise UserError(
            f"base_model: {base.reference} is an adapter, not a model: name the checkpoint it was trained on{hint}"
        )
    if model.source.path.resolve() == base.source.path.resolve():
        raise UserError(f"{where}: {model.reference} is the base itself: name what was fine-tuned from it")
    if model.source.folder is not None:
        configurations(base.config, model.config, model.source.folder, where)


def base_of(models: Iterable[Parent]) -> str | None:
    """The base that the models' adapters name, or that all of the demo zoo have; None where they leave it open."""
    models = list(models)
    if models and all(model.reference.startswith("zoo:") for model in models):
        return f"zoo:{zoo.names()[0]}"
    named = {model.trained_on for model in models if model.trained_on and model.source.folder is None}
    return named.pop() if len(named) == 1 else None


def differs(model: Parent, base: Parent) -> bool:
    """Whether an adapter names another base than this one, as far as names tell."""
    named = _parts(model.trained_on) if model.trained_on else []
    return bool(named) and named[-1:] not in (_parts(base.reference)[-1:], [base.source.path.name])


def name_of(reference: str, base: str, taken: Iterable[str]) -> str:
    """A name for a model: the last part of its reference that says something, without what the base's has too.

    It is a valid key of `models` that none of `taken` is.
    """
    shared = {word.lower() for part in _parts(base)[-1:] for word in _words(part)}
    told = [part for part in _parts(reference) if not _EMPTY.fullmatch(part)] or _parts(reference)
    words = [word for word in _words(told[-1]) if word.lower() not in shared] or _words(told[-1])
    plain = re.sub(r"[^a-z0-9_-]+", "-", "-".join(words).lower()).strip("-_") or "model"
    used = {*taken, BASE, AVERAGE}
    return next(n for n in (plain, *(f"{plain}-{k}" for k in range(2, len(used) + 3))) if n not in used)


def _parts(reference: str) -> list[str]:
    """The parts of a path or of a hub id without its revision; of `MODEL+ADAPTER` the adapter's."""
    last = reference.rpartition("+")[2].removeprefix("zoo:")
    path = last if os.path.exists(last) else last.partition("@")[0]
    return [part for part in Path(path).expanduser().parts if part.strip("./\\~")]


def _words(part: str) -> list[str]:
    return [word for word in re.split(r"[-_\s]+", part) if word]


def written(reference: str, folder: Path) -> str:
    """A reference as a file in `folder` has to state it: paths that were typed from the caller's folder from there.

    Absolute ones, those from the user's home, hub ids and the zoo's stay as they are.
    """
    model, plus, adapter = reference.rpartition("+")
    if plus and model and adapter and not os.path.exists(reference):
        return f"{written(model, folder)}+{written(adapter, folder)}"
    if reference.startswith(("zoo:", "/", "~")) or not os.path.exists(reference):
        return reference
    target, start = absolute(reference, Path.cwd()), folder.absolute()
    if target.is_relative_to(start):
        inside = target.relative_to(start).as_posix()
        return inside if inside == "." else f"./{inside}"
    # where `..` leads from a linked folder only the real path tells
    return Path(os.path.relpath(target, start.resolve())).as_posix()


def dtype_for(device: str) -> str:
    """`bfloat16` where the device computes in it, else `float32`, which is many times faster there."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    told = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if told else "float32"


def seconds_of(config: Config, tasks: Sequence[Task], base: Source) -> dict[str, float]:
    """About how long one document of each task takes here, by label: an order of magnitude, from the base's size and
    the tokens of a few documents.

    Raises:
        UserError: the base has no tokenizer, or transformers cannot build it.
    """
    folder, device = base.folder or base.path, choose_device(config.device)
    headers = read_headers(folder, "base_model")
    blank = probe(folder, headers, "base_model", config.trust_remote_code)
    tokenizer = load_tokenizer(folder, "base_model", config.trust_remote_code)
    if tokenizer is None:
        raise UserError(f"base_model: {folder} has no tokenizer that transformers can load: add the tokenizer's files")
    operations = 2 * sum(math.prod(header.shape) for header in headers.values())
    speed = _PER_GPU if device.type == "cuda" else _PER_THREAD * torch.get_num_threads()
    plain = config.by_lm_eval
    seconds = {}
    for task in tasks:
        sample = list(range(min(_SAMPLE, task.size)))
        asked = scorer_of(plain, blank, tokenizer, [task], {task.label: sample}).prompt_tokens / len(sample)
        seconds[task.label] = (asked + _generated(task)) * operations / speed + _PER_DOCUMENT
    return seconds


def _generated(task: Task) -> int:
    """The most tokens that an answer to a document may have, where answers are generated."""
    told = [
        (leaf.config.generation_kwargs or {}).get("max_gen_toks", 256)
        for leaf in task.leaves.values()
        if leaf.OUTPUT_TYPE == "generate_until"
    ]
    return max(told, default=0)


def limit_for(seconds: Mapping[str, float], there: Mapping[str, int]) -> tuple[int | None, float]:
    """How many documents of each task to score a candidate on, so that it takes about a minute, and how long it takes.

    A round number, 20 at least; None where that is all that there are.

    Args:
        seconds: of one document of each task.
        there: the search documents of each task.
    """
    takes = {limit: sum(seconds[task] * min(limit, there[task]) for task in there) for limit in _LIMITS}
    limit = max((limit for limit, total in takes.items() if total <= _SECONDS), default=_LIMITS[0])
    return (limit if limit < max(there.values()) else None), takes[limit]
