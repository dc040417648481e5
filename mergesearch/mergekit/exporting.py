"""A `Recipe` becomes a file that `mergekit-yaml` or, with several methods, `mergekit-multi` runs.

Layers that are merged alike are a slice, and what differs within a layer is told apart by filters. Arithmetic there is
float32, as here, with one rounding to the recipe's `out_dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mergesearch import methods
from mergesearch.errors import UserError
from mergesearch.mergekit import known
from mergesearch.mergekit.filters import conditions
from mergesearch.mergekit.placement import LayerRun, PlacedTensor, Placement
from mergesearch.recipe import BASE, Recipe, Rule

Values = Mapping[str, Mapping[str, Any]]


# beside its parameters, what a tensor is merged of
MODELS = "models"


@dataclass(frozen=True)
class DocumentHead:
    """What one mergekit document can state: one method and, by reference, the base it starts from.

    `models` tells groups apart that one document could not hold, since different models meet within a layer.
    """

    method: str
    base: str | None
    models: tuple[str, ...] | None = None


def write(recipe: Recipe, placement: Placement, references: Mapping[str, str]) -> str:
    """The recipe as mergekit's YAML.

    Args:
        recipe: what to write; its rules cover every tensor of `placement`.
        placement: the result's tensors (`placement.of` of the pool's).
        references: for `base` and every model what mergekit can load: an absolute folder.

    Raises:
        UserError: something in the recipe that mergekit cannot do, by name.
    """
    groups = _by_group(recipe, placement, references)
    documents = _documents(recipe, placement, groups, references)
    texts = [yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000) for document in documents]
    adapters = any("+" in reference for reference in references.values())
    return _head(recipe, placement, len(documents) > 1, adapters) + "---\n".join(texts)


def export(recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[str, list[str]]:
    """`write` and `limits`, with models found on disk (hub ids are fetched) and the placement read from the base."""
    from mergesearch.mergekit.placement import read, references

    placement = read(recipe, trust_remote_code)
    return write(recipe, placement, references(recipe)), limits(recipe, placement)


def limits(recipe: Recipe, placement: Placement) -> list[str]:
    """What mergekit cannot reproduce of a recipe, in sentences."""
    sentences = [
        "Arithmetic is float32 and the result is rounded once: off the ties, values differ by one unit at most."
    ]
    random = [name for name in recipe.methods if methods.get(name).random]
    if random:
        rescaled = {_rescale(rule.method, rule.parameters) for rule in recipe.rules if rule.method in random}
        rule = (
            " and scales what is kept to the task vector's L1 norm, not by 1/density" if "inverse" in rescaled else ""
        )
        sentences.append(f"{', '.join(random)}: mergekit draws masks from another generator{rule}, so tensors differ.")
    if placement.is_fused:
        sentences.append("Experts: mergekit cuts and measures those of a layer as one tensor, mergesearch one by one.")
    if recipe.tokenizer != BASE:
        sentences.append("Rows of tokens that a model lacks are filled by mergekit's rule.")
    return sentences


def _rescale(method: str, parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rescale", methods.get(method).parameters["rescale"].default)


def _head(recipe: Recipe, placement: Placement, several: bool, adapters: bool) -> str:
    command = "mergekit-multi FILE --intermediate-dir FOLDER --out-path OUT" if several else "mergekit-yaml FILE OUT"
    command += " --lora-merge-cache FOLDER" * adapters
    lines = [f"Written by mergesearch from recipe {recipe.id}. To run it: {command}", *limits(recipe, placement)]
    return "".join(f"# {line}\n" for line in lines)


# --- what merges each tensor --------------------------------------------------------------------------------------


def _by_group(recipe: Recipe, placement: Placement, references: Mapping[str, str]) -> dict[DocumentHead, Values]:
    """For each group of the recipe the parameters of its tensors, by name and by mergekit's keys."""
    groups: dict[DocumentHead, dict[str, dict[str, Any]]] = {}
    for tensor in placement.tensors:
        rule = recipe.rule_for(tensor.info)
        where = f"rules.{recipe.rules.index(rule)}"
        method = methods.get(rule.method, where)
        names, complete = _complete(method, rule, tensor, recipe, where)
        models = tuple(references[name] for name in names)
        group = _group(method, models, references.get(BASE), recipe)
        groups.setdefault(group, {})[tensor.info.name] = {MODELS: models, **_translated(method, complete, where)}
    return {group: values for whole in groups.items() for group, values in _parted(*whole, placement)}


def _parted(group: DocumentHead, values: Values, placement: Placement) -> Iterator[tuple[DocumentHead, Values]]:
    """One group, or where different models meet within a layer, one for each list of models."""
    meeting = [
        {values[s.info.name][MODELS] for s in run.tensors if s.info.name in values} for run in placement.runs(values)
    ]
    # mergekit merges the head of no more sources than the first slice has
    widths = [len(models) for run in (meeting[0], meeting[-1]) for models in run]
    if all(len(models) <= 1 for models in meeting) and widths == sorted(widths, reverse=True):
        yield group, values
        return
    for models in dict.fromkeys(given[MODELS] for given in values.values()):
        chosen = {name: given for name, given in values.items() if given[MODELS] == models}
        yield dataclasses.replace(group, models=models), chosen


def _complete(
    method: methods.Method, rule: Rule, tensor: PlacedTensor, recipe: Recipe, where: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The models that a rule merges in a row of a stack, or everywhere, and their parameters."""
    everyone = rule.models or tuple(recipe.models)
    names = everyone
    if tensor.models is not None:
        names = tuple(name for name in everyone if name in tensor.models) if rule.models else tensor.models
    given = {
        key: _for_models(value, names, everyone)
        if key in method.parameters and method.parameters[key].per_model
        else value
        for key, value in rule.parameters.items()
    }
    return names, method.complete(given, names, where, has_base=recipe.base is not None)


def _for_models(value: Any, names: tuple[str, ...], everyone: tuple[str, ...]) -> Any:
    """One value for each of `everyone`, as one for each of those who take part."""
    if isinstance(value, Mapping):
        return {name: v for name, v in value.items() if name in names or name not in everyone}
    if isinstance(value, list | tuple) and len(value) == len(everyone) and set(names) <= set(everyone):
        return [value[everyone.index(name)] for name in names]
    return value


def _group(method: methods.Method, models: tuple[str, ...], base: str | None, recipe: Recipe) -> DocumentHead:
    if method.name in known.FIRST_IS_BASE:
        return DocumentHead(method.name, models[0])
    uses_base = method.base != "unused" and recipe.base is not None
    name = "linear" if method.name == "uniform_soup" else method.name
    inputs = [*models, *([base] if uses_base else [])]
    if len(set(inputs)) < len(inputs):
        twice = next(reference for reference in inputs if inputs.count(reference) > 1)
        raise UserError(f"{twice} takes part twice in a merge, which mergekit refuses: export the checkpoint itself")
    return DocumentHead(name, base if uses_base else None)


def _translated(method: methods.Method, complete: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Complete parameters of ours in mergekit's terms; per-model ones stay lists."""
    if method.name == "uniform_soup":
        return {"weight": 1.0}
    if method.name not in known.METHODS:
        raise UserError(f"{method.name} in {where} cannot be written for mergekit, which has no such method")
    for key in (*known.OURS_ALONE.get(method.name, ()), *known.OURS_EVERYWHERE):
        if key in complete and not _is_default(method, key, complete[key]):
            raise UserError(
                f"{key} {complete[key]} of {method.name} in {where} cannot be written for mergekit, which has none: "
                "export the checkpoint itself"
            )
    keys = {theirs: ours for theirs, ours in known.keys_of(method).items() if ours not in _alone(method)}
    return {theirs: _value(ours, complete[ours]) for theirs, ours in keys.items() if _matters(method, ours, complete)}


def _alone(method: methods.Method) -> Collection[str]:
    return known.OURS_ALONE.get(method.name, ())


def _value(key: str, value: Any) -> Any:
    if key == "rescale":
        return value != "none"
    return tuple(value) if isinstance(value, list) else value


def _matters(method: methods.Method, key: str, complete: Mapping[str, Any]) -> bool:
    """Whether a parameter must be written: it is required, or it is not what mergekit takes by default."""
    if key == "rescale":
        return (complete[key] != "none") != (method.name in known.RANDOM_RESCALE)
    return known.is_required(method, key) or not _is_default(method, key, complete[key])


def _is_default(method: methods.Method, key: str, value: Any) -> bool:
    return all(v == method.parameters[key].default for v in (value if isinstance(value, list) else [value]))


# --- documents ----------------------------------------------------------------------------------------------------


def _documents(
    recipe: Recipe, placement: Placement, groups: Mapping[DocumentHead, Values], references: Mapping[str, str]
) -> list[dict[str, Any]]:
    tokens = _tokenizer(recipe, references)
    if len(groups) == 1:
        [(group, values)] = groups.items()
        return [{**_document(group, values, placement), **_dtypes(recipe.out_dtype), **tokens}]
    parts, membership = [], {}
    for number, (group, values) in enumerate(groups.items(), 1):
        document = {"name": f"group-{number}", **_document(group, values, placement), **_dtypes("float32"), **tokens}
        parts.append(document)
        membership.update(dict.fromkeys(values, number - 1))
    names = tuple(part["name"] for part in parts)
    return [*parts, {**_assembly(names, membership, placement.flat()), **_dtypes(recipe.out_dtype)}]


def _dtypes(out: str) -> dict[str, str]:
    return {"dtype": "float32", "out_dtype": out}


def _tokenizer(recipe: Recipe, references: Mapping[str, str]) -> dict[str, str]:
    if recipe.tokenizer == BASE:
        return {}
    return {"tokenizer_source": references.get(recipe.tokenizer, recipe.tokenizer)}


def _assembly(names: tuple[str, ...], membership: Mapping[str, int], placement: Placement) -> dict[str, Any]:
    """The document that takes each tensor from the group it belongs to.

    passthrough takes a whole slice from one model. Where groups meet within a layer, linear with weights of 1 and 0,
    which is exact, chooses tensor by tensor.
    """
    runs = placement.runs({name: {"from": number} for name, number in membership.items()})
    if all(len({membership[s.info.name] for s in run.tensors}) == 1 for run in runs):
        sources = [(names[membership[run.tensors[0].info.name]], run) for run in runs]
        slices = [{"sources": [{"model": n, "layer_range": [r.first, r.last + 1]}]} for n, r in sources]
        return {"merge_method": "passthrough", "slices": slices}
    weights = {
        name: {MODELS: names, "weight": tuple(float(n == number) for n in range(len(names))), "normalize": False}
        for name, number in membership.items()
    }
    return _document(DocumentHead("linear", None), weights, placement)


def _document(group: DocumentHead, values: Values, placement: Placement) -> dict[str, Any]:
    runs = placement.runs(values)
    head: dict[str, Any] = {"merge_method": group.method}
    if group.base is not None:
        head["base_model"] = group.base
    shared, parts = _lift([_run(group, values, run, placement) for run in runs])
    tail = {"parameters": shared} if shared else {}
    if len(runs) == 1 and placement.is_flat:
        models = [{k: v for k, v in source.items() if k != "layer_range"} for source in parts[0]["sources"]]
        return {**head, "models": models, **tail}
    return {**head, "slices": parts, **tail}


def _lift(parts: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all slices say alike, and the slices without it."""
    first = parts[0].get("parameters", {})
    shared = {k: v for k, v in first.items() if all(p.get("parameters", {}).get(k) == v for p in parts)}
    rest = []
    for part in parts:
        own = {k: v for k, v in part.get("parameters", {}).items() if k not in shared}
        rest.append({"sources": part["sources"], **({"parameters": own} if own else {})})
    return shared, rest


def _run(group: DocumentHead, values: Values, run: LayerRun, placement: Placement) -> dict[str, Any]:
    """A slice: its sources with their layers and parameters, and the parameters of them all."""
    here = _here(values, run)
    models = next(iter(here.values()))[MODELS]
    keys = [key for key in dict.fromkeys(key for given in values.values() for key in given) if key != MODELS]
    method = methods.get(group.method)
    value_of = functools.partial(_conditions, here, method)
    per_source = [key for key in keys if known.from_source(method, known.keys_of(method)[key])]
    sources = []
    for reference in [*([group.base] if group.base not in (None, *models) else []), *models]:
        first = placement.first_of(reference, run)
        source: dict[str, Any] = {"model": reference, "layer_range": [first, first + run.last - run.first + 1]}
        if reference in models and per_source:
            position = models.index(reference)
            source["parameters"] = {key: value_of(key, position) for key in per_source}
        sources.append(source)
    shared = {key: value_of(key, None) for key in keys if key not in per_source}
    return {"sources": sources, **({"parameters": shared} if shared else {})}


def _here(values: Values, run: LayerRun) -> dict[str, Mapping[str, Any]]:
    """The parameters of a slice's tensors, by mergekit's names.

    A slice without a tensor of this group still needs some: it takes those of any tensor of the group, as nobody uses
    what comes out.
    """
    given: dict[str, Mapping[str, Any]] = {}
    for tensor in (tensor for tensor in run.tensors if tensor.info.name in values):
        mine = values[tensor.info.name]
        if given.setdefault(tensor.there, mine) != mine:
            raise UserError(
                f"{tensor.info.name} cannot be written for mergekit, which sees it as a part of {tensor.there} and "
                "merges that alike: export the checkpoint itself"
            )
    return given or {run.tensors[0].there: next(iter(values.values()))}


def _conditions(here: Values, method: methods.Method, key: str, position: int | None) -> Any:
    default = method.parameters[known.keys_of(method)[key]].default
    chosen = {}
    for name, given in here.items():
        value = given.get(key, _not_stated(method, key, default))
        chosen[name] = value[position] if isinstance(value, tuple) and position is not None else value
    return conditions(chosen, f"{key} of {method.name}")


def _not_stated(method: methods.Method, key: str, default: Any) -> Any:
    """What mergekit takes for a parameter that is not given."""
    return method.name in known.RANDOM_RESCALE if key == "rescale" else default
