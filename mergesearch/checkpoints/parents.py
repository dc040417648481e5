"""Reading the parents: from references to tensors that are checked and aligned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergesearch.checkpoints import checks
from mergesearch.checkpoints.checkpoint import Checkpoint, Form
from mergesearch.checkpoints.files import Header, Source, Watched, locate, read_config, read_headers, weight_files
from mergesearch.checkpoints.layout import Layout
from mergesearch.checkpoints.loading import (
    Blueprint,
    constants,
    floating_tensors,
    generation_config,
    probe,
    read_model,
    ties,
)
from mergesearch.checkpoints.lora import apply_adapter, check_adapter
from mergesearch.checkpoints.lowrank import factored
from mergesearch.checkpoints.tokenizers import Vocabulary, align, check_equal, load_tokenizer, union
from mergesearch.errors import UserError
from mergesearch.recipe import BASE, UNION

# under which key the base stands, beside `models.NAME`
BASE_KEY = "base_model"


@dataclass
class Outline:
    """What is known of a parent before its tensors are read."""

    where: str
    source: Source
    headers: dict[str, Header]
    config: dict[str, Any]
    blank: nn.Module


class Reader:
    """One pass from references to a pool: everything that the files' headers tell is checked before a tensor is read.

    Parents are keyed by where they stand: `base_model`, `models.NAME`.
    """

    def __init__(
        self,
        base: str | None,
        models: Mapping[str, str],
        device: torch.device,
        trust: bool,
        allow_unrelated: bool,
        tokenizer: str,
        weights_alone: bool = False,
    ):
        self.names: list[str] = list(models)
        self.device: torch.device = device
        self.trust: bool = trust
        self.allow_unrelated: bool = allow_unrelated
        self.chosen: str = tokenizer
        self.weights_alone: bool = weights_alone
        self.has_base: bool = base is not None
        base = base or next(iter(models.values()))
        references = {BASE_KEY: base, **{f"models.{name}": reference for name, reference in models.items()}}
        self.sources: dict[str, Source] = {where: locate(reference, where) for where, reference in references.items()}
        if self.sources[BASE_KEY].folder is None:
            raise UserError(f"{BASE_KEY}: {base} is an adapter, not a model: name the checkpoint it was trained on")
        if tokenizer not in (BASE, UNION, *models):
            raise UserError(f"tokenizer is {tokenizer!r}: use base, union or one of {', '.join(models)}")
        self.notes: list[str] = []
        self.mapped: Watched = Watched()

    def read(self) -> dict[str, Any]:
        """The fields of a `Pool`."""
        parents = self._probe()
        tokenizers = self._tokenizers()
        vocabulary = self._vocabulary(parents, tokenizers)
        self.notes += self._repeated()
        checks.shapes({w: p.blank for w, p in parents.items()}, self._folders(), aligned=vocabulary is not None)
        loaded, fixed = self._load(parents)
        untied = self._untie(loaded, parents)
        form = self._form(parents, vocabulary, untied)
        if vocabulary is not None:
            _align(loaded, form.layout.by_token, vocabulary)
        for where, checkpoint in loaded.items():
            checkpoint.live = {piece.live: checkpoint.live[piece.live] for piece in form.layout.pieces}
            checkpoint.tensors = form.layout.views(checkpoint.live)
            self.mapped.check()
            self._check_numbers(loaded[BASE_KEY], checkpoint, where)
        return {
            "base": loaded[BASE_KEY],
            "models": {name: loaded[f"models.{name}"] for name in self.names},
            "form": form,
            "tokenizer": vocabulary.tokenizer if vocabulary else tokenizers[self._anchor()],
            "tokenizers": {name: tokenizers[f"models.{name}"] for name in self.names},
            "device": self.device,
            "tokenizer_source": self.chosen,
            "trust_remote_code": self.trust,
            "constants": fixed,
            "notes": tuple(self.notes),
            "mapped": self.mapped,
        }

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    @property
    def _maps(self) -> bool:
        """Whether tensors may be read from their files after the pool is loaded: on the CPU they always are."""
        return self.device.type == "cpu"

    def _check_numbers(self, base: Checkpoint, checkpoint: Checkpoint, where: str) -> None:
        checks.numbers(base, checkpoint, where, self.allow_unrelated)

    def _folders(self) -> dict[str, Path]:
        return {where: source.path for where, source in self.sources.items()}

    # --- headers ---

    def _probe(self) -> dict[str, Outline]:
        """Each parent as its configuration and its headers describe it, an adapter as the model it lies over."""
        outlines: dict[str, Outline] = {}
        for where, source in self.sources.items():
            folder = source.folder or self._base_folder()
            if source.adapter is not None:
                check_adapter(source.adapter, where)
            same = next((p for p in outlines.values() if (p.source.folder or self._base_folder()) == folder), None)
            probed = self._probe_folder(folder, where, source, outlines.get(BASE_KEY)) if same is None else same
            outlines[where] = probed
        return outlines

    def _base_folder(self) -> Path:
        folder = self.sources[BASE_KEY].folder
        assert folder is not None
        return folder

    def _probe_folder(self, folder: Path, where: str, source: Source, base: Outline | None) -> Outline:
        config = read_config(folder, where)
        if self._maps:
            for file in weight_files(folder, where, "model"):
                self.mapped.add(file)
        headers = read_headers(folder, where)
        if base is not None:
            self.notes += checks.configurations(base.config, config, folder, where)
        try:
            return Outline(where, source, headers, config, probe(folder, headers, where, self.trust))
        except UserError:
            if base is not None:
                checks.names(base.headers, headers, folder, where)
            raise

    # --- tokenizers ---

    def _tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each parent, the base's where it has none of its own."""
        tokenizers: dict[str, Any] = {}
        for where, source in self.sources.items():
            folders = [f for f in (source.adapter, source.folder) if f is not None]
            loaded = (load_tokenizer(folder, where, self.trust) for folder in folders)
            tokenizers[where] = next((t for t in loaded if t is not None), tokenizers.get(BASE_KEY))
            if tokenizers[where] is None and not (self.weights_alone and self.chosen == BASE):
                raise UserError(
                    f"{where}: {source.folder} has no tokenizer that transformers can load: add the tokenizer's files"
                )
            if self.chosen == BASE and tokenizers[BASE_KEY] is not None:
                check_equal(tokenizers[BASE_KEY], tokenizers[where], source.path, where)
        if tokenizers[self._anchor()] is None:
            place = BASE_KEY if self.has_base else f"models.{self.names[0]}"
            self.notes.append(
                f"{place}: {self._base_folder()} has no tokenizer, so the weights alone are merged and the result has "
                "none: copy the files of the models' tokenizer into it"
            )
        return tokenizers

    def _anchor(self) -> str:
        return BASE_KEY if self.chosen in (BASE, UNION) else f"models.{self.chosen}"

    def _vocabulary(self, parents: Mapping[str, Outline], tokenizers: Mapping[str, Any]) -> Vocabulary | None:
        """What the rows of the result stand for, or None where they are alike in all parents."""
        rows = {where: _rows(parent.blank) for where, parent in parents.items()}
        if tokenizers[self._anchor()] is None:
            return None
        words = {where: tokenizer.get_vocab() for where, tokenizer in tokenizers.items()}
        if len(set(rows.values())) == 1 and all(vocab == words[BASE_KEY] for vocab in words.values()):
            return None
        tokenizer = union(tokenizers) if self.chosen == UNION else tokenizers[self._anchor()]
        count = max(rows[self._anchor()], 1 + max(tokenizer.get_vocab().values()))
        self.notes += [
            checks.other_rows(where, rows[where], count)
            for where, vocab in words.items()
            if rows[where] != count and vocab == tokenizer.get_vocab()
        ]
        tokens = {where: {t: i for t, i in vocab.items() if i < rows[where]} for where, vocab in words.items()}
        return Vocabulary(tokenizer, count, self._anchor(), tokens)

    # --- tensors ---

    def _repeated(self) -> list[str]:
        """A note for each model that is a parent already; where there is no base, the first model stands in for it."""
        notes: list[str] = []
        seen: dict[tuple[Path, ...], str] = {}
        for where, source in self.sources.items():
            if where == BASE_KEY and not self.has_base:
                continue
            before = seen.setdefault(tuple(folder.resolve() for folder in self._chain(source)), where)
            if before != where:
                notes.append(checks.repeated(where, before, source.reference, before == BASE_KEY))
        return notes

    def _load(self, parents: Mapping[str, Outline]) -> tuple[dict[str, Checkpoint], dict[str, Tensor]]:
        loaded: dict[str, Checkpoint] = {}
        self.aliases: dict[str, dict[str, str]] = {}
        fixed: dict[str, Tensor] = {}
        for where, source in self.sources.items():
            twin = next((w for w in loaded if self._chain(self.sources[w]) == self._chain(source)), None)
            if twin is not None:
                loaded[where] = Checkpoint(source.reference, source.path, dict(loaded[twin].live))
                self.aliases[where] = self.aliases[twin]
                continue
            factors = self._factored(parents[where], source, loaded)
            if factors is not None:
                loaded[where] = Checkpoint(source.reference, source.path, factors)
                self.aliases[where] = self.aliases[BASE_KEY]
                continue
            model = self._read(parents[where], source, where)
            live = {name: self._place(tensor) for name, tensor in floating_tensors(model).items()}
            self.aliases[where] = ties(model)
            fixed = fixed or {name: tensor.to(self.device) for name, tensor in constants(model).items()}
            if source.adapter is not None:
                _share_unchanged(live, loaded[BASE_KEY].live if BASE_KEY in loaded else {})
            loaded[where] = Checkpoint(source.reference, source.path, live)
        return loaded, fixed

    def _factored(self, parent: Outline, source: Source, loaded: Mapping[str, Checkpoint]) -> dict[str, Tensor] | None:
        """An adapter over the base as the base's tensors and its own factors; None for what has to be read whole."""
        if (
            source.adapter is None
            or BASE_KEY not in loaded
            or self._chain(source)[:-1] != self._chain(self.sources[BASE_KEY])
        ):
            return None
        return factored(parent.blank, source.adapter, loaded[BASE_KEY].live, self._place)

    def _chain(self, source: Source) -> list[Path]:
        """The folders that make a parent: a model, then the adapters that are laid over it in turn."""
        below = [source.folder] if source.folder is not None else self._chain(self.sources[BASE_KEY])
        return below + ([source.adapter] if source.adapter is not None else [])

    def _read(self, parent: Outline, source: Source, where: str) -> nn.Module:
        folder, *adapters = self._chain(source)
        model = read_model(folder, parent.headers, where, None, self.trust)
        for adapter in adapters:
            model = apply_adapter(model, adapter, where)
        return model

    def _untie(self, loaded: Mapping[str, Checkpoint], parents: Mapping[str, Outline]) -> bool:
        """Where one parent has a head of its own, each other one gets the tensor that its head is tied to as its head.

        Returns:
            Whether the base got such a head, so that candidates are untied.
        """
        names = list(dict.fromkeys(name for checkpoint in loaded.values() for name in checkpoint.live))
        for where, checkpoint in loaded.items():
            for name in names:
                if name not in checkpoint.live:
                    checkpoint.live[name] = checkpoint.live[self.aliases[where][name]]
        return bool(ties(parents[BASE_KEY].blank)) and len(names) > len(floating_tensors(parents[BASE_KEY].blank))

    # --- form ---

    def _form(self, parents: Mapping[str, Outline], vocabulary: Vocabulary | None, untied: bool) -> Form:
        blank = parents[BASE_KEY].blank
        config = copy.deepcopy(blank.config)
        if untied:
            _set(config, "tie_word_embeddings", False)
        generation = generation_config(self._base_folder())
        if vocabulary is not None:
            _set(config, "vocab_size", vocabulary.rows)
        if self._anchor() != BASE_KEY:
            generation = self._special_tokens(config, parents) or generation
        blueprint = Blueprint(type(blank), config, blank._weight_conversions, generation)
        return Form(blueprint, Layout.of(blueprint.blank()))

    def _special_tokens(self, config: Any, parents: Mapping[str, Outline]) -> Any | None:
        """The chosen model's numbers of the special tokens; returns its generation configuration."""
        chosen = parents[self._anchor()]
        text_config = cast(Any, chosen.blank).config.get_text_config()
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _set(config, key, getattr(text_config, key, None))
        return generation_config(chosen.source.folder or self._base_folder())


def _rows(model: nn.Module) -> int:
    """How many tokens the embedding has rows for."""
    return cast(Any, model).get_input_embeddings().weight.shape[0]


def _align(loaded: Mapping[str, Checkpoint], by_token: frozenset[str], vocabulary: Vocabulary) -> None:
    for name in by_token & loaded[BASE_KEY].live.keys():
        aligned = align({where: checkpoint.live[name] for where, checkpoint in loaded.items()}, vocabulary, BASE_KEY)
        for where, checkpoint in loaded.items():
            checkpoint.live[name] = aligned[where]


def _share_unchanged(live: dict[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Lets an adapter's parent share with the base what the adapter did not touch."""
    for name, tensor in live.items():
        if name in base and base[name].dtype == tensor.dtype and torch.equal(base[name], tensor):
            live[name] = base[name]


def _set(config: Any, key: str, value: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, key):
            setattr(part, key, value)
