"""Where the tensors of a result stand as mergekit sees it: layers row upon row, names as the files have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.checkpoints.files import locate, read_headers, resolve
from mergesearch.recipe import Recipe, TensorInfo


@dataclass(frozen=True)
class Slot:
    """A tensor of the result.

    Attributes:
        info: its place, and its name in the checkpoint's files.
        there: its name in mergekit, which its filters look at: several experts that a model fuses share one.
        inside: its name within its layer, None for one outside the layers.
        models: in a stack the models of its row, else None.
    """

    info: TensorInfo
    there: str
    inside: str | None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Row:
    """Layers `first` to `last` of the result, with their tensors and, if they are the outermost, those outside."""

    first: int
    last: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Layout:
    """All tensors of a result.

    Attributes:
        slots: its tensors.
        layers: how many decoder layers it has.
        rows: for a stack, row upon row, the result's first layer and each source's, by reference.
    """

    slots: tuple[Slot, ...]
    layers: int
    rows: tuple[tuple[int, Mapping[str, int]], ...] = ((0, {}),)

    @property
    def is_fused(self) -> bool:
        """Whether the live model, and mergekit, hold several of the files' tensors as one."""
        return len({slot.there for slot in self.slots}) < len(self.slots)

    @property
    def is_flat(self) -> bool:
        return not self.rows[0][1]

    def flat(self) -> Layout:
        """The same tensors as those of one model."""
        return dataclasses.replace(self, rows=((0, {}),))

    def first_of(self, reference: str, run: Row) -> int:
        """The layer of a source that becomes the first of a run."""
        start, sources = next(row for row in reversed(self.rows) if row[0] <= run.first)
        if not sources:
            return run.first
        # a source of other rows, whose tensors nobody takes from this one
        return sources[reference] + run.first - start if reference in sources else 0

    def runs(self, values: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        """The longest runs of layers whose tensors of equal name have equal values; what has none fits everything."""
        edges = [start for start, _ in self.rows]
        runs: list[tuple[int, int, dict[str, Any]]] = []
        for layer in range(self.layers):
            mine = {s.inside: values.get(s.info.name) for s in self._inside(layer)}
            if runs and layer not in edges and _agree(runs[-1][2], mine):
                first, _, before = runs.pop()
                mine = {k: v if v is not None else before.get(k) for k, v in {**before, **mine}.items()}
                runs.append((first, layer, mine))
            else:
                runs.append((layer, layer, mine))
        return [self._row(first, last) for first, last, _ in runs]

    def _inside(self, layer: int) -> Iterable[Slot]:
        return (slot for slot in self.slots if slot.inside is not None and slot.info.layer == layer)

    def _row(self, first: int, last: int) -> Row:
        def belongs(slot: Slot) -> bool:
            if slot.inside is not None:
                return first <= slot.info.layer <= last
            return first == 0 if slot.info.component == "embedding" else last == self.layers - 1

        return Row(first, last, tuple(slot for slot in self.slots if belongs(slot)))


def _agree(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return all(left.get(k) is None or right[k] is None or left[k] == right[k] for k in right)


def of(
    infos: Sequence[TensorInfo],
    layers: int,
    recipe: Recipe,
    references: Mapping[str, str],
    live: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of a recipe's result.

    Args:
        infos: the tensors of each parent.
        layers: the number of decoder layers of each parent.
        references: what the base (`base`) and the models are called in the file.
        live: the tensors' names in the live model, where they differ from those in the files.
    """
    slots = [Slot(info, (live or {}).get(info.name, info.name), _inside(info)) for info in infos]
    return Layout(tuple(slots), layers) if recipe.stack is None else _stacked(slots, recipe, references)


def _inside(info: TensorInfo) -> str | None:
    _, mark, rest = info.name.partition(f".{info.layer}.")
    return rest if mark else None


def _stacked(slots: Sequence[Slot], recipe: Recipe, references: Mapping[str, str]) -> Layout:
    """The layout of layers row upon row; what stands outside them belongs to the first and the last row."""
    found: list[Slot] = []
    rows: list[tuple[int, Mapping[str, int]]] = []
    start = 0
    for number, row in enumerate(recipe.stack or ()):
        models = tuple(name for name in row if name != "base") or ("base",)
        first, last = next(iter(row.values()))
        ends = {"embedding": number == 0, "other": number == len(recipe.stack or ()) - 1}
        for slot in slots:
            if slot.inside is not None and first <= slot.info.layer <= last:
                found.append(_moved(slot, start + slot.info.layer - first, models))
            elif slot.inside is None and ends["embedding" if slot.info.component == "embedding" else "other"]:
                layer = 0 if slot.info.component == "embedding" else start + last - first
                found.append(dataclasses.replace(slot, info=dataclasses.replace(slot.info, layer=layer), models=models))
        sources = {references[name]: where[0] for name, where in row.items()}
        if recipe.base is not None:
            sources.setdefault(references["base"], first)
        rows.append((start, sources))
        start += last - first + 1
    return Layout(tuple(found), start, tuple(rows))


def _moved(slot: Slot, layer: int, models: tuple[str, ...]) -> Slot:
    def renamed(name: str) -> str:
        return name.replace(f".{slot.info.layer}.", f".{layer}.", 1)

    info = dataclasses.replace(slot.info, name=renamed(slot.info.name), layer=layer)
    return Slot(info, renamed(slot.there), slot.inside, models)


def references(recipe: Recipe) -> dict[str, str]:
    """The absolute folder of the base (under `base`) and of every model, as mergekit loads it offline."""
    base = str(locate(recipe.base, "base").path.resolve()) if recipe.base is not None else None
    found = {name: _absolute(reference, f"models.{name}", base) for name, reference in recipe.models.items()}
    return {**found, **({"base": base} if base else {})}


def _absolute(reference: str, where: str, base: str | None) -> str:
    source = locate(reference, where)
    folder = base if source.folder is None else str(source.folder.resolve())
    return "+".join(str(part) for part in (folder, source.adapter and source.adapter.resolve()) if part)


def read(recipe: Recipe, trust_remote_code: bool = False) -> Layout:
    """The layout of a recipe's result, from the base's configuration and the headers of its files alone."""
    from mergesearch.checkpoints.layout import Layout as Pieces
    from mergesearch.checkpoints.loading import probe

    folder = resolve(recipe.base or next(iter(recipe.models.values())), "base")
    found = Pieces.of(probe(folder, read_headers(folder, "base"), "base", trust_remote_code))
    live = {piece.name: piece.live for piece in found.pieces}
    return of(found.infos, found.layers, recipe, references(recipe), live)
