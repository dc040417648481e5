"""Configurations of other programs that search for merges, as ours: mergekit-evolve and mergenetic.

What they say was read from mergekit 0.1.5 and from the files that mergenetic 0.1.1 publishes. Nothing is dropped in
silence: what has no counterpart here, or means something else, is said.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergesearch import config as configuration
from mergesearch import leftovers
from mergesearch.checkpoints import locate
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.schema import read_yaml

log: logging.Logger = logging.getLogger(__name__)

EVOLVE, MERGENETIC = "mergekit-evolve", "mergenetic"
# how often mergekit-evolve scores a candidate where its command line does not say
EVOLVE_TRIALS = 100
# its filters that are components here
_COMPONENTS = {
    "self_attn": "attention", "attn": "attention", "attention": "attention", "mlp": "mlp", "embed_tokens": "embedding",
    "lm_head": "head", "norm": "norm", "layernorm": "norm", "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
}  # fmt: skip


@dataclass
class Converted:
    """A configuration made from another program's.

    Attributes:
        program: whose file it was.
        data: ours, as plain data.
        notes: what differs, a sentence each.
    """

    program: str
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_yaml(self) -> str:
        """The file, with what differs as comments on top."""
        comments = "".join(f"# {line}\n" for line in (f"Converted from {self.program}.", *self.notes))
        return comments + yaml.safe_dump(self.data, sort_keys=False, allow_unicode=True, width=1000)


def program_of(data: Any) -> str | None:
    """Whose configuration it is; None where it is ours, or nobody's that is known."""
    if not isinstance(data, Mapping):
        return None
    if isinstance(data.get("genome"), Mapping):
        return EVOLVE
    return MERGENETIC if "n_iter" in data and "pop_size" in data else None


def read_config(path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = log.warning) -> Config:
    """The configuration in a file, ours or another program's; of the latter what differs is said.

    Raises:
        UserError: what is wrong with the file or an override, in one sentence.
    """
    data = read_yaml(path)
    if program_of(data) is None:
        return configuration.read(path, overrides)
    converted = convert(path)
    say(f"note: {path} is a configuration of {converted.program}")
    for note in converted.notes:
        say(f"note: {note}")
    # both programs take paths from where they are started
    return configuration.from_data(converted.data, Path.cwd() / Path(path).name, overrides)


def convert(path: str | Path) -> Converted:
    """Our configuration of what another program's says.

    Raises:
        UserError: it is no configuration of theirs, or lacks what a search needs.
    """
    data = read_yaml(path)
    program = program_of(data)
    if program is None:
        raise UserError(
            f"{path} is no configuration of {EVOLVE} (it has no genome) and none of {MERGENETIC} (it has no n_iter and "
            "pop_size): `mergesearch run` reads ours as they are, `mergesearch merge` mergekit's merges"
        )
    return _evolve(data, str(path)) if program == EVOLVE else _mergenetic(data, str(path))


def write(converted: Converted, out: Path) -> None:
    """Writes our configuration, once it is known to be valid.

    Raises:
        UserError: the file exists or cannot be written, or the configuration is not valid.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name a new file")
    configuration.from_data(json.loads(json.dumps(converted.data)), out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with leftovers.writing(out) as partial:
            partial.write_text(converted.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file") from None


# --- mergekit-evolve --------------------------------------------------------------------------------------------------


def _evolve(data: Mapping[str, Any], where: str) -> Converted:
    genome = dict(data["genome"])
    result = Converted(EVOLVE, {"name": _run_name(where)})
    method = genome.get("merge_method")
    _known(genome, ("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
                    "allow_negative_weights", "filters", "smooth"), f"{where}: genome", result)  # fmt: skip
    _known(data, ("genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template",
                  "fewshot_as_multiturn"), where, result)  # fmt: skip
    if not isinstance(method, str):
        raise UserError(f"{where}: genome names no merge_method: give one, as ties")
    base = genome.get("base_model")
    if base is None:
        raise UserError(
            f"{where}: genome has no base_model, which {method} needs not and a search here does (its parents fix the "
            "objective's scale): add what the models were fine-tuned from"
        )
    result.data |= {"base_model": _reference(base, where), "models": _models(genome.get("models"), base, where, result)}
    result.data["tasks"] = _evolve_tasks(data, where)
    result.data["objective"] = {"scale": "raw"}
    result.data["space"] = _evolve_space(genome, method, result)
    result.data["search"] = {"strategy": "study", "sampler": "cmaes", "trials": EVOLVE_TRIALS}
    if (tokenizer := genome.get("tokenizer_source")) is not None:
        _tokenizer(str(tokenizer), result)
    # both are on there unless the file says otherwise
    chat = data.get("apply_chat_template", True)
    result.data["apply_chat_template"] = chat
    result.data["fewshot_as_multiturn"] = bool(chat and data.get("fewshot_as_multiturn", True))
    if "apply_chat_template" not in data:
        result.notes.append(
            f"apply_chat_template is on, as {EVOLVE} has it; a base without a chat template needs false"
        )
    result.notes += [
        f"trials: {EVOLVE_TRIALS} is {EVOLVE}'s default of --max-fevals, which its file does not say; "
        "greedy and learned soups come with strategy: auto",
        "half of each task's documents are held out for the report (holdout); there the search sees all of them",
    ]
    if data.get("random_init"):
        result.notes.append("random_init has no counterpart: the study begins with what the baselines found")
    if data.get("shuffle"):
        result.notes.append("shuffle: documents are always drawn at random here, by search.seed")
    return result


def _evolve_tasks(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    tasks = data.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        raise UserError(f"{where}: it has no tasks: list at least one")
    shared = {key: data[key] for key in ("num_fewshot", "limit") if data.get(key) is not None}
    found = []
    for task in tasks:
        given = {"name": task} if isinstance(task, str) else dict(task)
        metric = str(given.get("metric", "acc,none")).removesuffix(",none")
        weight = {"weight": float(given["weight"])} if "weight" in given else {}
        found.append({"task": given.get("name"), "metric": metric, **weight, **shared})
    return found


def _evolve_space(genome: Mapping[str, Any], method: str, result: Converted) -> dict[str, Any]:
    space: dict[str, Any] = {"methods": [method]}
    granularity = int(genome.get("layer_granularity") or 0)
    if granularity > 0:
        layers = _layers(result.data["base_model"])
        if layers is None:
            result.notes.append(
                f"layer_granularity {granularity}: the base is not at hand to count its layers; set space.layer_groups "
                f"to their number divided by {granularity}"
            )
        elif genome.get("smooth"):
            space |= {"depth": "control_points", "control_points": max(2, layers // granularity)}
        else:
            space["layer_groups"] = max(1, layers // granularity)
    components, unknown = [], []
    for name in genome.get("filters") or []:
        (components if name in _COMPONENTS else unknown).append(_COMPONENTS.get(name, name))
    if components:
        space["components"] = [*dict.fromkeys(components), "other"]
    if unknown:
        result.notes.append(f"filters {', '.join(map(str, unknown))} have no component here and are left out")
    if genome.get("allow_negative_weights") and method != "slerp":
        space["weight"] = [-1.0, 1.0]
    if genome.get("normalize") is not None:
        result.notes.append(
            f"normalize: {str(genome['normalize']).lower()} is no part of a space here: the study uses {method}'s own "
            "default, and a recipe that is merged by hand may set it"
        )
    return space


# --- mergenetic -------------------------------------------------------------------------------------------------------


def _mergenetic(data: Mapping[str, Any], where: str) -> Converted:
    result = Converted(MERGENETIC, {"name": _plain(str(data.get("run_id") or _run_name(where)))})
    base = data.get("base_model")
    if base is None:
        raise UserError(f"{where}: it has no base_model: add what the models were fine-tuned from")
    result.data |= {"base_model": _reference(base, where), "models": _models(data.get("models"), base, where, result)}
    search, test = _mergenetic_tasks(data.get("tasks"), where)
    metric = {"metric": data["metric"]} if data.get("metric") else {}
    limit = {"limit": int(data["n_samples"])} if data.get("n_samples") else {}
    result.data["tasks"] = [{"task": task, **metric, **limit} for task in search]
    if own := [task for task in test if task not in search]:
        result.data["report"] = {"tasks": [{"task": task, **metric} for task in own]}
    folder = data.get("additional_templates_folder")
    result.data |= {"include_path": [str(folder)]} if folder else {}
    result.data["objective"] = {"scale": "raw"}
    result.data["space"] = {"methods": ["ties", "dare_ties"]}
    trials = int(data["n_iter"]) * int(data["pop_size"])
    seed = {"seed": int(data["seed"])} if data.get("seed") is not None else {}
    result.data["search"] = {"strategy": "study", "trials": trials, **seed}
    for theirs, ours in (("dtype", "dtype"), ("device", "device"), ("eval_batch_size", "batch_size")):
        if data.get(theirs) is not None:
            result.data[ours] = data[theirs]
    result.notes += [
        f"trials: {trials} is {data['n_iter']} generations of {data['pop_size']}; the study is TPE, no population",
        f"the merge method stands in {MERGENETIC}'s scripts and not in its file: space.methods has ties and dare_ties",
        "half of each task's documents are held out for the report (holdout)",
    ]
    if data.get("mode") not in (None, "random"):
        result.notes.append(
            f"mode {data['mode']} estimates scores from few documents: here each candidate is scored on n_samples, and "
            "`racing: {}` stops early what cannot win"
        )
    if data.get("load_in_4bit") or data.get("load_in_8bit"):
        result.notes.append(
            "models are loaded in dtype and never quantised: a merge of quantised weights is another model"
        )
    if data.get("datasets"):
        result.notes.append("datasets are left out: documents come from lm-eval's tasks alone")
    _known(data, ("run_id", "n_iter", "pop_size", "base_model", "models", "tasks", "metric", "n_samples",
                  "additional_templates_folder", "seed", "dtype", "device", "eval_batch_size", "mode", "load_in_4bit",
                  "load_in_8bit", "datasets", "path_to_store_config", "path_to_store_merged_model", "langs", "bench",
                  "task_type"), where, result)  # fmt: skip
    return result


def _mergenetic_tasks(tasks: Any, where: str) -> tuple[list[str], list[str]]:
    def names(given: Any) -> list[str]:
        values = given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else []
        return list(dict.fromkeys(str(value) for value in values))

    search, test = (tasks.get("search"), tasks.get("test")) if isinstance(tasks, Mapping) else (tasks, None)
    found = names(search)
    if not found:
        raise UserError(f"{where}: it has no tasks to search on: list at least one")
    return found, names(test)


# --- both -------------------------------------------------------------------------------------------------------------


def _models(given: Any, base: Any, where: str, result: Converted) -> dict[str, str]:
    """The models by name; the base among them is no model here."""
    if isinstance(given, Mapping):
        pairs: Iterable[tuple[str, Any]] = given.items()
    elif isinstance(given, list):
        pairs = (("", reference) for reference in given)
    else:
        raise UserError(f"{where}: it has no models: list them")
    models: dict[str, str] = {}
    for name, given_reference in pairs:
        reference = _reference(given_reference, where)
        if reference == _reference(base, where):
            result.notes.append(f"{reference} is the base and also listed as a model: it takes part as the base alone")
            continue
        stem = _model_name(str(name) or re.split(r"[/@+]", reference.rstrip("/"))[-1])
        free, number = stem, 2
        while free in models:
            free, number = f"{stem}-{number}", number + 1
        models[free] = reference
    if not models:
        raise UserError(f"{where}: it has no models beside the base: list them")
    return models


def _reference(given: Any, where: str) -> str:
    """A model as a text: mergekit also writes `{model: PATH, lora: PATH}`."""
    if isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        model = given.get("model")
        path = model.get("path") if isinstance(model, Mapping) else model
        lora = given.get("lora")
        lora = lora.get("path") if isinstance(lora, Mapping) else lora
        if isinstance(path, str):
            return f"{path}+{lora}" if lora else path
    raise UserError(f"{where}: {given!r} names no model: give a folder or a hub id")


def _model_name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_") or "model"
    return f"{name}-model" if name in ("base", "average") else name


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"


def _run_name(where: str) -> str:
    return _plain(Path(where).stem)


def _tokenizer(source: str, result: Converted) -> None:
    models: dict[str, str] = result.data["models"]
    by_reference = {reference: name for name, reference in models.items()}
    if source in ("base", "union"):
        result.data["tokenizer"] = source
    elif source in by_reference:
        result.data["tokenizer"] = by_reference[source]
    elif source != result.data["base_model"]:
        result.notes.append(f"tokenizer_source {source} is none of the models: the base's tokenizer is used")


def _layers(base: str) -> int | None:
    """How many layers the base has; None where it is not at hand."""
    try:
        source = locate(base, "base_model")
        data = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        return int(data["num_hidden_layers"])
    except (UserError, OSError, ValueError, LookupError, TypeError):
        return None


def _known(data: Mapping[str, Any], keys: Iterable[str], where: str, result: Converted) -> None:
    """Notes keys that are not understood."""
    strange = [str(key) for key in data if key not in set(keys)]
    if strange:
        result.notes.append(f"{where}: {', '.join(strange)} mean nothing here and are left out")
