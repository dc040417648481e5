"""Statistics of models on documents, as files that a recipe names: written once, and never other bytes afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergesearch import leftovers
from mergesearch.checkpoints.digests import file_digest
from mergesearch.errors import UserError
from mergesearch.recipe import Measured

INDEX = "index.json"
_FORMAT = 1
# of a file's tensors, held until they are written
_MOST_BYTES = 2 << 30


class MeasuredWriter:
    """Writes statistics to a folder: a safetensors file for some tensors at a time, and an index with their hashes.

    Args:
        folder: an empty folder.
        kind: `inputs` or `squares`.
        documents: for each model the documents of each task that it was measured on.
        most_bytes: of tensors that are held before they are written.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        documents: Mapping[str, Mapping[str, Sequence[int]]],
        most_bytes: int = _MOST_BYTES,
    ):
        self.folder, self.kind, self.documents, self.most = folder, kind, documents, most_bytes
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        self._places: dict[str, dict[str, tuple[str, str]]] = {model: {} for model in documents}

    def add(self, model: str, names: Sequence[str], tensor: Tensor) -> None:
        """One statistic of a model, for the tensors of these names alike (layers with the same inputs)."""
        key = str(sum(map(len, self._places.values())))
        self._held[key] = tensor.detach().to("cpu", torch.float32).contiguous()
        for name in names:
            self._places[model][name] = (f"{len(self._files)}.safetensors", key)
        if sum(t.nbytes for t in self._held.values()) >= self.most:
            self._write()

    def close(self) -> str:
        """Writes what is left; the index's hash."""
        self._write()
        told = {
            "format": _FORMAT,
            "kind": self.kind,
            "documents": {m: {t: sorted(ids) for t, ids in of.items()} for m, of in self.documents.items()},
            "files": self._files,
            "tensors": self._places,
        }
        index = self.folder / INDEX
        index.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return file_digest(index)

    def _write(self) -> None:
        if self._held:
            file = self.folder / f"{len(self._files)}.safetensors"
            save_file(self._held, file)
            self._files[file.name] = file_digest(file)
            self._held = {}


def write_measured(
    out: Path,
    kind: Literal["inputs", "squares"],
    documents: Mapping[str, Mapping[str, Sequence[int]]],
    measure: Callable[[MeasuredWriter], None],
) -> Measured:
    """Makes a folder of statistics and returns what a recipe says of it; one that is there already is kept.

    Args:
        out: the folder's name but for the end of its hash, which is added.
        kind, documents: as for `MeasuredWriter`.
        measure: called with the writer.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    leftovers.clear(out.parent, out.name)
    partial = leftovers.partial(out)
    partial.mkdir(parents=True)
    try:
        writer = MeasuredWriter(partial, kind, documents)
        measure(writer)
        digest = writer.close()
        final = out.with_name(f"{out.name}-{digest[:12]}")
        if not final.exists():
            partial.rename(final)
    finally:
        leftovers.discard(partial)
    named = {model: {task: in_words(ids) for task, ids in of.items()} for model, of in documents.items()}
    return Measured(kind=kind, folder=str(final.absolute()), sha256=digest, documents=named)


def in_words(numbers: Sequence[int]) -> str:
    """Documents' numbers as ranges: `0-3, 7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


class MeasuredFiles:
    """Statistics in a folder, every file as it was written.

    Raises:
        UserError: they are not there, or others than the recipe names.
    """

    def __init__(self, stated: Measured):
        self.stated = stated
        folder = Path(stated.folder)
        index = folder / INDEX
        if not index.is_file():
            raise UserError(
                f"statistics.folder {stated.folder} is not there: put the folder of the run that measured it back, "
                f"or name where the statistics {stated.sha256[:12]} are now"
            )
        try:
            self._check(file_digest(index) == stated.sha256)
            told = json.loads(index.read_text(encoding="utf-8"))
            for name, digest in told["files"].items():
                # a name with a path would be read outside of the folder
                self._check(Path(name).name == name and file_digest(folder / name) == digest)
            self._check(told["format"] == _FORMAT and told["kind"] == stated.kind)
            self._files: dict[str, Any] = {name: safe_open(str(folder / name), "pt") for name in told["files"]}
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            raise UserError(f"statistics.folder {stated.folder} cannot be read ({error}): put it back") from None
        self._places: dict[str, dict[str, list[str]]] = told["tensors"]

    def get(self, model: str, name: str) -> Tensor | None:
        """The statistic of one tensor of a model, float32 on the CPU; None where there is none."""
        place = self._places.get(model, {}).get(name)
        return None if place is None else self._files[place[0]].get_tensor(place[1])

    def _check(self, same: bool) -> None:
        if not same:
            raise UserError(
                f"statistics.folder {self.stated.folder} does not hold the statistics {self.stated.sha256[:12]} that "
                "the recipe was made with: put the old files back, or measure them again"
            )
