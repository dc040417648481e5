"""The models of a mergekit file: their names here, the part the base plays, and the layers they lend."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch.checkpoints.files import locate, read_config, read_headers
from mergesearch.errors import UserError
from mergesearch.mergekit import known, settings
from mergesearch.mergekit.file import File, Slice, SliceSource
from mergesearch.recipe import BASE, DTYPES, UNION

RESERVED = (BASE, UNION)


def complete(file: File) -> File:
    """The file with its base in every slice, and with the number of layers where a gradient asks for it.

    Raises:
        UserError: a slice that lacks the base, or a method that needs one.
    """
    if file.base is None and (file.method.base == "required" or file.method.name in known.FIRST_IS_BASE):
        raise UserError(f"{file.where}: {file.method.name} needs base_model: name the model to start from")
    file = dataclasses.replace(file, slices=tuple(_with_base(file, part) for part in file.slices))
    if file.slices[0].count is not None or not settings.has_gradient(file.settings()):
        return file
    return dataclasses.replace(file, slices=(dataclasses.replace(file.slices[0], count=_count(file)),))


def _with_base(file: File, part: Slice) -> Slice:
    bases = [source for source in part.sources if source.reference == file.base]
    others = [source for source in part.sources if source.reference != file.base]
    if file.base is None or (bases and file.method.name not in known.FIRST_IS_BASE):
        return part
    if bases:
        return dataclasses.replace(part, sources=(bases[0], *others))
    if part.count is None:
        return dataclasses.replace(part, sources=(SliceSource(file.base, None, {}, part.where), *others))
    if file.method.base == "unused" and file.method.name not in known.FIRST_IS_BASE:
        return part
    raise UserError(f"{part.where}: base_model {file.base} is not among the sources: list it with its layer_range")


def inputs(file: File, part: Slice) -> list[SliceSource]:
    """The sources that are merged: all of them, or all but the base that task vectors are taken from."""
    if file.base is None or file.method.name in known.BASE_IS_INPUT:
        return list(part.sources)
    return [source for source in part.sources if source.reference != file.base]


def behind(file: File) -> Slice:
    """The last slice as mergekit sees it for the final norm and the head: cut to as many sources as the first has.

    Raises:
        UserError: that leaves the base out.
    """
    first, last = file.slices[0], file.slices[-1]
    cut = last.sources[: len(first.sources)]
    lost = [source.reference for source in last.sources[len(cut) :]]
    if file.base in lost:
        raise UserError(
            f"{last.where}: base_model {file.base} stands behind the {len(cut)} sources mergekit takes the head from, "
            "as many as the first slice has: list it first"
        )
    return dataclasses.replace(last, sources=cut)


def names(file: File) -> dict[str, str]:
    """For each model that is merged, by reference, a short unique name made of it."""
    called: dict[str, str] = {}
    for part in file.slices:
        for source in inputs(file, part):
            if source.reference not in called:
                called[source.reference] = _unique(_short(source.reference), [*RESERVED, *called.values()])
    if not called:
        raise UserError(f"{file.where}: no model beside base_model is named: there is nothing to merge")
    return called


def _short(reference: str) -> str:
    path, _, lora = reference.partition("+")
    words = [part.split("@")[0].rstrip("/").split("/")[-1].removeprefix("zoo:") for part in (path, lora)]
    return re.sub(r"[^\w.+-]+", "-", "+".join(filter(None, words))) or "model"


def _unique(name: str, taken: Sequence[str]) -> str:
    name = f"{name}-model" if name in RESERVED else name
    options = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(option for option in options if option not in taken)


def stack(file: File, called: Mapping[str, str]) -> tuple[list[dict[str, list[int]]] | None, int | None]:
    """`Recipe.stack`, None where layers stay where they are; the number of layers, None where it does not matter."""
    if any(source.layers is None for source in file.slices[0].sources):
        return None, file.slices[0].count
    layers = file.slices[-1].first + (file.slices[-1].count or 0)
    in_place = all(s.layers == (p.first, p.first + (p.count or 0)) for p in file.slices for s in p.sources)
    if in_place and layers == _count(file):
        return None, layers
    return [_row(file, part, called) for part in file.slices], layers


def _row(file: File, part: Slice, called: Mapping[str, str]) -> dict[str, list[int]]:
    row = {}
    for source in part.sources:
        taken = [called.get(source.reference)] if source in inputs(file, part) else [BASE]
        row.update({name: [source.layers[0], source.layers[1] - 1] for name in taken if source.layers})
    return row


def check_filters(filters: Sequence[str], stacked: object, where: str) -> None:
    """`UserError` for a filter that names a layer where layers move: mergekit takes their old numbers."""
    for pattern in filters if stacked else ():
        if re.search(r"(^|\.)\d", pattern):
            raise UserError(
                f"{where}: filter {pattern!r} names a layer, which is not supported with stacked layers: use slices"
            )


def tensor_names(file: File) -> Collection[str]:
    """The names of the first model's tensors."""
    source = file.slices[0].sources[0]
    return read_headers(_folder(file, source), source.where).keys()


def _folder(file: File, source: SliceSource) -> Path:
    """Where the configuration of a source is: an adapter has that of the model it lies over."""
    own = locate(source.reference, source.where)
    over = own.folder or (locate(file.base, file.where).folder if file.base else None)
    return over or own.path


def _configuration(file: File, source: SliceSource) -> dict[str, Any]:
    data = read_config(_folder(file, source), source.where)
    return {**data, **(data.get("text_config") or {})}


def _count(file: File) -> int:
    """How many decoder layers the first model has."""
    source = file.slices[0].sources[0]
    data = _configuration(file, source)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(data.get(key), int):
            return data[key]
    raise UserError(
        f"{source.where}: config.json of {source.reference} does not say how many layers it has: use slices"
    )


def common_dtype(file: File) -> str:
    """The dtype that holds every model's, as mergekit promotes them."""
    dtypes = {_dtype(file, source) for part in file.slices for source in part.sources}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _dtype(file: File, source: SliceSource) -> str:
    data = _configuration(file, source)
    dtype = data.get("dtype") or data.get("torch_dtype")
    if dtype not in DTYPES:
        raise UserError(f"{source.where}: config.json of {source.reference} states dtype {dtype!r}: give out_dtype")
    return dtype
