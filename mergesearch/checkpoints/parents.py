"""Reading the parents: from a survey of their files to tensors that are checked and aligned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergesearch.checkpoints import checks
from mergesearch.checkpoints.checkpoint import Checkpoint
from mergesearch.checkpoints.devices import Devices
from mergesearch.checkpoints.files import Source, Watched
from mergesearch.checkpoints.loading import constants, floating_tensors, read_model, ties
from mergesearch.checkpoints.lora import apply_adapter
from mergesearch.checkpoints.survey import BASE_KEY, Outline, Survey
from mergesearch.checkpoints.tokenizers import Vocabulary, align


class Reader:
    """One pass over the parents' files.

    Args:
        survey: what their headers say.
        devices: where their tensors go.
        allow_unrelated: let a model through whose task vector is as large as the base.
    """

    def __init__(self, survey: Survey, devices: Devices, allow_unrelated: bool):
        self.survey = survey
        self.devices = devices
        self.allow_unrelated = allow_unrelated
        self.watched: Watched = survey.watched if self._maps else Watched()
        # by parent and live name: what is fused in a live tensor, as the files have it
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.aliases: dict[str, dict[str, str]] = {}

    def read(self) -> dict[str, Any]:
        """The fields of a `Pool` that reading gives."""
        survey = self.survey
        loaded, fixed = self._load()
        untied = self._untie(loaded)
        form = survey.form if untied == survey.unties else survey.form_for(untied)
        if survey.vocabulary is not None:
            _align(loaded, form.layout.by_token, survey.vocabulary)
        for where, checkpoint in loaded.items():
            live = checkpoint.live
            checkpoint.live = {piece.live: live[piece.live] for piece in form.layout.pieces if piece.live in live}
            parts = self.parts.get(where, {})
            checkpoint.tensors = {
                piece.name: piece.view(live) if piece.live in live else parts[piece.name]
                for piece in form.layout.pieces
            }
            self.watched.check()
            self._check_numbers(loaded[BASE_KEY], checkpoint, where)
        return {
            "base": loaded[BASE_KEY],
            "models": {name: loaded[f"models.{name}"] for name in survey.names},
            "form": form,
            "constants": fixed,
            "mapped": self.watched,
        }

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """A parent's live tensor where it is to be."""
        return tensor.to(self.devices.of(name))

    @property
    def _maps(self) -> bool:
        """Whether tensors may be read from their files after the pool is loaded: on the CPU they always are."""
        return self.devices.main.type == "cpu"

    def _check_numbers(self, base: Checkpoint, checkpoint: Checkpoint, where: str) -> None:
        checks.numbers(base, checkpoint, where, self.allow_unrelated)

    def _load(self) -> tuple[dict[str, Checkpoint], dict[str, Tensor]]:
        loaded: dict[str, Checkpoint] = {}
        fixed: dict[str, Tensor] = {}
        for where, source in self.survey.sources.items():
            twin = self.survey.twin(where)
            if twin is not None:
                loaded[where] = Checkpoint(source.reference, source.path, dict(loaded[twin].live))
                self.aliases[where] = self.aliases[twin]
                self.parts[where] = self.parts.get(twin, {})
                continue
            base = loaded[BASE_KEY].live if BASE_KEY in loaded else None
            factors = self.survey.factored(where, base, self._place, lambda file: load_file(str(file)))
            if factors is not None:
                loaded[where] = Checkpoint(source.reference, source.path, factors)
                self.aliases[where] = self.aliases[BASE_KEY]
                self.parts[where] = self.parts.get(BASE_KEY, {})
                continue
            model = self._read(self.survey.parents[where], source, where)
            live = floating_tensors(model)
            self.aliases[where] = ties(model)
            fixed = fixed or {name: tensor.to(self.devices.of(name)) for name, tensor in constants(model).items()}
            below = self.survey.beneath(where, loaded)
            shared = set() if below is None else self._share_unchanged(live, loaded[below].live, where, below)
            del model
            for name in list(live):  # one by one, so that what was read is let go as it is placed
                if name not in shared:
                    live[name] = self._place(name, live[name])
            loaded[where] = Checkpoint(source.reference, source.path, live)
        return loaded, fixed

    def _share_unchanged(
        self, live: dict[str, Tensor], below: Mapping[str, Tensor], where: str, other: str
    ) -> set[str]:
        """Lets an adapter's parent share with the model below it what the adapter left alone; returns these names."""
        shared = set()
        for name, tensor in live.items():
            there = below.get(name if name in below else self.aliases[other].get(name, ""))
            if there is not None and there.dtype == tensor.dtype and torch.equal(there, tensor.to(there.device)):
                live[name] = there
                shared.add(name)
        for name, pieces in self._fused(live, other).items():
            theirs = self.parts[other]
            if all(theirs[n].dtype == t.dtype and torch.equal(theirs[n], t) for n, t in pieces.items()):
                del live[name]
                self.parts.setdefault(where, {}).update({n: theirs[n] for n in pieces})
        return shared

    def _fused(self, live: Mapping[str, Tensor], other: str) -> dict[str, dict[str, Tensor]]:
        """The live tensors that another parent has in parts, each as such parts by name."""
        parts = self.parts.get(other, {})
        fused: dict[str, dict[str, Tensor]] = {}
        for piece in self.survey.layout.pieces:
            if piece.name in parts and piece.live in live:
                fused.setdefault(piece.live, {})[piece.name] = piece.view(live)
        return fused

    def _read(self, parent: Outline, source: Source, where: str) -> nn.Module:
        folder, *adapters = self.survey.chain(source)
        model = read_model(folder, parent.headers, where, None, self.survey.trust)
        for adapter in adapters:
            model = apply_adapter(model, adapter, where)
        return model

    def _untie(self, loaded: Mapping[str, Checkpoint]) -> bool:
        """Where one parent has a head of its own, each other one gets the tensor that its head is tied to as its head.

        Returns:
            Whether the base got such a head, so that candidates are untied.
        """
        parents = self.survey.parents
        names = list(dict.fromkeys(name for checkpoint in loaded.values() for name in checkpoint.live))
        for where, checkpoint in loaded.items():
            for name in names:
                if name not in checkpoint.live and name in self.aliases[where]:
                    checkpoint.live[name] = checkpoint.live[self.aliases[where][name]]
        blank = parents[BASE_KEY].blank
        return bool(ties(blank)) and bool(set(names) - floating_tensors(blank).keys())


def _align(loaded: Mapping[str, Checkpoint], by_token: frozenset[str], vocabulary: Vocabulary) -> None:
    for name in by_token & loaded[BASE_KEY].live.keys():
        aligned = align({where: checkpoint.live[name] for where, checkpoint in loaded.items()}, vocabulary, BASE_KEY)
        for where, checkpoint in loaded.items():
            checkpoint.live[name] = aligned[where]
