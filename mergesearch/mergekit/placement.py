"""Where the tensors of a result stand as mergekit sees it: layers row upon row, names as the files have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.checkpoints.files import locate, read_headers, resolve
from mergesearch.checkpoints.layout import Layout
from mergesearch.checkpoints.loading import probe
from mergesearch.recipe import BASE, Recipe, TensorInfo


@dataclass(frozen=True)
class PlacedTensor:
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
class LayerRun:
    """Layers `first` to `last` of the result, with their tensors and, if they are the outermost, those outside."""

    first: int
    last: int
    tensors: tuple[PlacedTensor, ...]


@dataclass(frozen=True)
class Placement:
    """All tensors of a result.

    Attributes:
        tensors: its tensors.
        layers: how many decoder layers it has.
        rows: for a stack, row upon row, the result's first layer and each source's, by reference.
    """

    tensors: tuple[PlacedTensor, ...]
    layers: int
    rows: tuple[tuple[int, Mapping[str, int]], ...] = ((0, {}),)

    @property
    def is_fused(self) -> bool:
        """Whether the live model, and mergekit, hold several of the files' tensors as one."""
        return len({tensor.there for tensor in self.tensors}) < len(self.tensors)

    @property
    def is_flat(self) -> bool:
        return not self.rows[0][1]

    def flat(self) -> Placement:
        """The same tensors as those of one model."""
        return dataclasses.replace(self, rows=((0, {}),))

    def first_of(self, reference: str, run: LayerRun) -> int:
        """The layer of a source that becomes the first of a run."""
        start, sources = next(row for row in reversed(self.rows) if row[0] <= run.first)
        if not sources:
            return run.first
        # a source of other rows, whose tensors nobody takes from this one
        return sources[reference] + run.first - start if reference in sources else 0

    def runs(self, values: Mapping[str, Mapping[str, Any]]) -> list[LayerRun]:
        """The longest runs of layers whose tensors of equal name have equal values; what has none fits everything."""
        edges = [start for start, _ in self.rows]
        runs: list[tuple[int, int, dict[str, Mapping[str, Any] | None]]] = []
        for layer in range(self.layers):
            mine = {inside: values.get(name) for inside, name in self._inside(layer)}
            if runs and layer not in edges and _agree(runs[-1][2], mine):
                first, _, before = runs.pop()
                mine = {k: v if v is not None else before.get(k) for k, v in {**before, **mine}.items()}
                runs.append((first, layer, mine))
            else:
                runs.append((layer, layer, mine))
        return [self._row(first, last) for first, last, _ in runs]

    def _inside(self, layer: int) -> Iterable[tuple[str, str]]:
        """(name within the layer, name) of a layer's tensors."""
        return ((t.inside, t.info.name) for t in self.tensors if t.inside is not None and t.info.layer == layer)

    def _row(self, first: int, last: int) -> LayerRun:
        def belongs(tensor: PlacedTensor) -> bool:
            if tensor.inside is not None:
                return first <= tensor.info.layer <= last
            return first == 0 if tensor.info.component == "embedding" else last == self.layers - 1

        return LayerRun(first, last, tuple(tensor for tensor in self.tensors if belongs(tensor)))


def _agree(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return all(left.get(k) is None or right[k] is None or left[k] == right[k] for k in right)


def of(
    infos: Sequence[TensorInfo],
    layers: int,
    recipe: Recipe,
    references: Mapping[str, str],
    live: Mapping[str, str] | None = None,
) -> Placement:
    """The placement of a recipe's result.

    Args:
        infos: the tensors of each parent.
        layers: the number of decoder layers of each parent.
        references: what the base (`base`) and the models are called in the file.
        live: the tensors' names in the live model, where they differ from those in the files.
    """
    tensors = [PlacedTensor(info, (live or {}).get(info.name, info.name), _inside(info)) for info in infos]
    return Placement(tuple(tensors), layers) if recipe.stack is None else _stacked(tensors, recipe, references)


def _inside(info: TensorInfo) -> str | None:
    _, mark, rest = info.name.partition(f".{info.layer}.")
    return rest if mark else None


def _stacked(tensors: Sequence[PlacedTensor], recipe: Recipe, references: Mapping[str, str]) -> Placement:
    """The placement of layers row upon row; what stands outside them belongs to the first and the last row."""
    placed: list[PlacedTensor] = []
    rows: list[tuple[int, Mapping[str, int]]] = []
    start = 0
    for number, row in enumerate(recipe.stack or ()):
        models = tuple(name for name in row if name != BASE) or (BASE,)
        first, last = next(iter(row.values()))
        ends = {"embedding": number == 0, "other": number == len(recipe.stack or ()) - 1}
        for tensor in tensors:
            if tensor.inside is not None and first <= tensor.info.layer <= last:
                placed.append(_moved(tensor, start + tensor.info.layer - first, models))
            elif tensor.inside is None and ends["embedding" if tensor.info.component == "embedding" else "other"]:
                layer = 0 if tensor.info.component == "embedding" else start + last - first
                placed.append(
                    dataclasses.replace(tensor, info=dataclasses.replace(tensor.info, layer=layer), models=models)
                )
        sources = {references[name]: where[0] for name, where in row.items()}
        if recipe.base is not None:
            sources.setdefault(references[BASE], first)
        rows.append((start, sources))
        start += last - first + 1
    return Placement(tuple(placed), start, tuple(rows))


def _moved(tensor: PlacedTensor, layer: int, models: tuple[str, ...]) -> PlacedTensor:
    def renamed(name: str) -> str:
        return name.replace(f".{tensor.info.layer}.", f".{layer}.", 1)

    info = dataclasses.replace(tensor.info, name=renamed(tensor.info.name), layer=layer)
    return PlacedTensor(info, renamed(tensor.there), tensor.inside, models)


def references(recipe: Recipe) -> dict[str, str]:
    """The absolute folder of the base (under `base`) and of every model, as mergekit loads it offline."""
    base = str(locate(recipe.base, BASE).path.resolve()) if recipe.base is not None else None
    folders = {name: _absolute(reference, f"models.{name}", base) for name, reference in recipe.models.items()}
    return {**folders, **({BASE: base} if base else {})}


def _absolute(reference: str, where: str, base: str | None) -> str:
    source = locate(reference, where)
    folder = base if source.folder is None else str(source.folder.resolve())
    return "+".join(str(part) for part in (folder, source.adapter and source.adapter.resolve()) if part)


def read(recipe: Recipe, trust_remote_code: bool = False) -> Placement:
    """The placement of a recipe's result, from the base's configuration and the headers of its files alone."""
    folder = resolve(recipe.base or next(iter(recipe.models.values())), BASE)
    layout = Layout.of(probe(folder, read_headers(folder, BASE), BASE, trust_remote_code))
    live = {piece.name: piece.live for piece in layout.pieces}
    return of(layout.infos, layout.layers, recipe, references(recipe), live)
