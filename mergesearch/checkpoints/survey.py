"""What is known of the parents before a tensor is read: from headers, configurations and tokenizers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergesearch.checkpoints import checks
from mergesearch.checkpoints.checkpoint import Form
from mergesearch.checkpoints.files import Header, Source, Watched, locate, read_config, read_headers, weight_files
from mergesearch.checkpoints.layout import Layout, Piece
from mergesearch.checkpoints.loading import (
    Blueprint,
    check_taken,
    constants,
    floating_tensors,
    generation_config,
    probe,
    stored_dtype,
    ties,
)
from mergesearch.checkpoints.lora import adapted, check_adapter
from mergesearch.checkpoints.lowrank import factored
from mergesearch.checkpoints.tokenizers import Vocabulary, check_equal, load_tokenizer, union
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


class Survey:
    """The parents as their files describe them, checked against each other as far as no number is needed.

    Parents are keyed by where they stand: `base_model`, `models.NAME`.

    Args:
        base: a reference as `Pool.load` takes it; None where the models have none.
        models: the same by name.
        trust: run code from the folders.
        tokenizer: `base`, `union` or a model's name.
        weights_alone: let parents without a tokenizer through.

    Attributes:
        parents: an outline of each.
        tokenizers: of each, the base's where it has none of its own.
        vocabulary: what the rows of the result stand for; None where they are alike in all parents.
        unties: whether some parent has a head of its own where the base's is tied to its embedding.
        form: what a candidate without stacking looks like.
        blank: such a candidate on the meta device; not to be changed.
        notes: what a reader of the result should know, a sentence each.
        watched: the files, to be watched while they are mapped into memory.

    Raises:
        UserError: anything that keeps the parents from being merged and shows without their numbers.
    """

    def __init__(
        self,
        base: str | None,
        models: Mapping[str, str],
        trust: bool,
        tokenizer: str = BASE,
        weights_alone: bool = False,
    ):
        self.names: list[str] = list(models)
        self.trust: bool = trust
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
        self.watched: Watched = Watched()
        self.parents: dict[str, Outline] = self._probe()
        self.tokenizers: dict[str, Any] = self._tokenizers()
        self.vocabulary: Vocabulary | None = self._vocabulary()
        self.notes += self._repeated()
        checks.shapes({w: p.blank for w, p in self.parents.items()}, self.folders(), self.vocabulary is not None)
        self.unties: bool = self._unties()
        self.blank: nn.Module
        self.form: Form = self.form_for(self.unties)

    def folders(self) -> dict[str, Path]:
        return {where: source.path for where, source in self.sources.items()}

    def base_folder(self) -> Path:
        folder = self.sources[BASE_KEY].folder
        assert folder is not None
        return folder

    def chain(self, source: Source) -> list[Path]:
        """The folders that make a parent: a model, then the adapters that are laid over it in turn."""
        below = [source.folder] if source.folder is not None else self.chain(self.sources[BASE_KEY])
        return below + ([source.adapter] if source.adapter is not None else [])

    def twin(self, where: str) -> str | None:
        """The parent before this one that is made of the same folders."""
        chain = self.chain(self.sources[where])
        first = next(other for other, source in self.sources.items() if self.chain(source) == chain)
        return first if first != where else None

    def beneath(self, where: str, among: Iterable[str]) -> str | None:
        """The first of some parents that is no more than the model which this one begins with."""
        first = self.chain(self.sources[where])[:1]
        return next((other for other in among if self.chain(self.sources[other]) == first), None)

    @property
    def tokenizer(self) -> Any:
        """The result's tokenizer; None where there is none."""
        return self.vocabulary.tokenizer if self.vocabulary else self.tokenizers[self.anchor()]

    def anchor(self) -> str:
        """The parent whose tokenizer and special tokens the result has."""
        return BASE_KEY if self.chosen in (BASE, UNION) else f"models.{self.chosen}"

    def files(self, where: str) -> dict[str, Header]:
        """The tensors of a parent's own files: an adapter's for an adapter."""
        adapter = self.sources[where].adapter
        return self.parents[where].headers if adapter is None else read_headers(adapter, where, "adapter_model")

    @property
    def decision(self) -> str:
        """What was decided about the tokenizer, in a sentence."""
        if self.tokenizer is None:
            return "none: the weights alone are merged"
        if self.vocabulary is None:
            return f"the base's {len(self.tokenizer.get_vocab()):,} tokens, the same in every model"
        return self.vocabulary.said(self.chosen)

    # --- headers ---

    def _probe(self) -> dict[str, Outline]:
        """Each parent as its configuration and its headers describe it, an adapter as the model it lies over."""
        outlines: dict[str, Outline] = {}
        for where, source in self.sources.items():
            folder = source.folder or self.base_folder()
            if source.adapter is not None:
                check_adapter(source.adapter, where)
            same = next((p for p in outlines.values() if (p.source.folder or self.base_folder()) == folder), None)
            probed = self._probe_folder(folder, where, source, outlines.get(BASE_KEY)) if same is None else same
            outlines[where] = probed
        return outlines

    def _probe_folder(self, folder: Path, where: str, source: Source, base: Outline | None) -> Outline:
        config = read_config(folder, where)
        for file in weight_files(folder, where, "model"):
            self.watched.add(file)
        headers = read_headers(folder, where)
        if base is not None:
            self.notes += checks.configurations(base.config, config, folder, where)
        try:
            blank = probe(folder, headers, where, self.trust)
        except UserError:
            if base is not None:
                checks.names(base.headers, headers, folder, where)
            raise
        check_taken(headers, blank, folder, where)
        return Outline(where, source, headers, config, blank)

    # --- tokenizers ---

    def _tokenizers(self) -> dict[str, Any]:
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
        if tokenizers[self.anchor()] is None:
            place = BASE_KEY if self.has_base else f"models.{self.names[0]}"
            self.notes.append(
                f"{place}: {self.base_folder()} has no tokenizer, so the weights alone are merged and the result has "
                "none: copy the files of the models' tokenizer into it"
            )
        return tokenizers

    def _vocabulary(self) -> Vocabulary | None:
        rows = {where: _rows(parent.blank) for where, parent in self.parents.items()}
        if self.tokenizers[self.anchor()] is None:
            return None
        words = {where: tokenizer.get_vocab() for where, tokenizer in self.tokenizers.items()}
        if len(set(rows.values())) == 1 and all(vocab == words[BASE_KEY] for vocab in words.values()):
            return None
        tokenizer = union(self.tokenizers) if self.chosen == UNION else self.tokenizers[self.anchor()]
        count = max(rows[self.anchor()], 1 + max(tokenizer.get_vocab().values()))
        self.notes += [
            checks.other_rows(where, rows[where], count)
            for where, vocab in words.items()
            if rows[where] != count and vocab == tokenizer.get_vocab()
        ]
        tokens = {where: {t: i for t, i in vocab.items() if i < rows[where]} for where, vocab in words.items()}
        return Vocabulary(tokenizer, count, self.anchor(), tokens)

    # --- tensors ---

    def _repeated(self) -> list[str]:
        """A note for each model that is a parent already; where there is no base, the first model stands in for it."""
        notes: list[str] = []
        seen: dict[tuple[Path, ...], str] = {}
        for where, source in self.sources.items():
            if where == BASE_KEY and not self.has_base:
                continue
            before = seen.setdefault(tuple(folder.resolve() for folder in self.chain(source)), where)
            if before != where:
                notes.append(checks.repeated(where, before, source.reference, before == BASE_KEY))
        return notes

    @cached_property
    def layout(self) -> Layout:
        """The tensors of the base as its files have them, without what the others make of it."""
        return Layout.of(self.parents[BASE_KEY].blank)

    def maps(self, where: str) -> bool:
        """Whether a parent's tensors can be read from its files one by one, each as it stands there."""
        source, parent = self.sources[where], self.parents[where]
        if source.adapter is not None or not constants(parent.blank).keys() <= parent.headers.keys():
            return False
        there = ((piece, parent.headers.get(piece.name)) for piece in self.layout.pieces)
        return all(header is not None and header.shape == self._shape_of(where, piece) for piece, header in there)

    def _shape_of(self, where: str, piece: Piece) -> tuple[int, ...]:
        """The shape of a piece in a parent: embeddings and head may have another number of rows."""
        if piece.live not in self.layout.by_token:
            return piece.shape
        there = floating_tensors(self.parents[where].blank).get(piece.live)
        return piece.shape if there is None else tuple(there.shape)

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Each parent's live tensors as they will be once they are read, on the meta device; shared ones are one.

        An adapter's change is float32, or its factors are, where they are all there is to it; what it leaves alone is
        the model's below it.
        """
        outlined: dict[str, dict[str, Tensor]] = {}
        for where, source in self.sources.items():
            twin = self.twin(where)
            if twin is not None:
                outlined[where] = dict(outlined[twin])
                continue
            factors = self.factored(where, outlined.get(BASE_KEY), lambda _, factor: factor, _outlined)
            if factors is not None:
                outlined[where] = factors
                continue
            below = self._below(where, outlined)
            tied = ties(self.parents[where].blank)
            for folder in self.chain(source)[1:]:
                _lay_over(below, tied, adapted(folder, where))
            outlined[where] = below
        self._fill(outlined)
        return outlined

    def factored(
        self,
        where: str,
        base: Mapping[str, Tensor] | None,
        place: Callable[[str, Tensor], Tensor],
        read: Callable[[Path], Mapping[str, Tensor]],
    ) -> dict[str, Tensor] | None:
        """An adapter over the base as the base's tensors and its own factors; None for what has to be read whole.

        Args:
            base: the base's live tensors, once they are known.
            place, read: as for `lowrank.factored`.
        """
        source = self.sources[where]
        if source.adapter is None or base is None or self.chain(source)[:-1] != self.chain(self.sources[BASE_KEY]):
            return None
        return factored(self.parents[where].blank, source.adapter, base, place, read)

    def _below(self, where: str, outlined: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """A parent's live tensors before adapters are laid over them."""
        same = self.beneath(where, outlined)
        if same is not None:
            return dict(outlined[same])
        headers, blank = self.parents[where].headers, floating_tensors(self.parents[where].blank)
        widest = max(filter(None, map(stored_dtype, headers.values())), key=lambda d: d.itemsize, default=torch.float32)
        named: dict[str, torch.dtype] = {}
        for piece in self.layout.pieces:
            dtype = stored_dtype(headers[piece.name]) if piece.name in headers else None
            held = named.setdefault(piece.live, dtype or widest)
            named[piece.live] = max(held, dtype or widest, key=lambda d: d.itemsize)
        return {n: torch.empty(t.shape, dtype=named.get(n, widest), device="meta") for n, t in blank.items()}

    def _fill(self, outlined: dict[str, dict[str, Tensor]]) -> None:
        """Gives heads that only some parents have to all, and rows of the result's number to what is aligned."""
        names = list(dict.fromkeys(name for tensors in outlined.values() for name in tensors))
        for where, tensors in outlined.items():
            tied = ties(self.parents[where].blank)
            for name in names:
                if name not in tensors:
                    tensors[name] = tensors[tied[name]]
        if self.vocabulary is not None:
            for tensors in outlined.values():
                for name in self.layout.by_token & tensors.keys():
                    shape = (self.vocabulary.rows, *tensors[name].shape[1:])
                    tensors[name] = torch.empty(shape, dtype=tensors[name].dtype, device="meta")

    def made(self, where: str) -> set[str]:
        """The live names of a parent's tensors that come to be when it is read: what its files do not hold as it is."""
        names = set(self.tensors[where])
        aligned = set(self.layout.by_token & names) if self.vocabulary is not None else set()
        if self.maps(where):
            return aligned
        same = self.beneath(where, self.sources)
        if same is not None and self.maps(same):  # an adapter: what it leaves alone is read from those files
            below = self.tensors[same]
            return aligned | {n for n, t in self.tensors[where].items() if below.get(n) is not t}
        return names

    # --- form ---

    def _unties(self) -> bool:
        """Whether some parent has a head of its own where the base's is tied to its embedding."""
        base = self.parents[BASE_KEY].blank
        names = {name for tensors in self.tensors.values() for name in tensors}
        return bool(ties(base)) and bool(names - floating_tensors(base).keys())

    def form_for(self, untied: bool) -> Form:
        """What candidates look like, tied or untied."""
        blank = self.parents[BASE_KEY].blank
        config = copy.deepcopy(blank.config)
        if untied:
            _set(config, "tie_word_embeddings", False)
        generation = generation_config(self.base_folder())
        if self.vocabulary is not None:
            _set(config, "vocab_size", self.vocabulary.rows)
        if self.anchor() != BASE_KEY:
            generation = self._special_tokens(config) or generation
        blueprint = Blueprint(type(blank), config, blank._weight_conversions, generation)
        self.blank = blueprint.blank()
        return Form(blueprint, Layout.of(self.blank))

    def _special_tokens(self, config: Any) -> Any | None:
        """The chosen model's numbers of the special tokens; returns its generation configuration."""
        chosen = self.parents[self.anchor()]
        text_config = cast(Any, chosen.blank).config.get_text_config()
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _set(config, key, getattr(text_config, key, None))
        return generation_config(chosen.source.folder or self.base_folder())


def _outlined(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file on the meta device."""
    headers = read_headers(file.parent, str(file), file.stem)
    return {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}


def _rows(model: nn.Module) -> int:
    """How many tokens the embedding has rows for."""
    return cast(Any, model).get_input_embeddings().weight.shape[0]


def _lay_over(live: dict[str, Tensor], tied: Mapping[str, str], names: Sequence[str]) -> None:
    """Lays an adapter over outlined tensors: what it changes is float32, and no longer tied to anything.

    Args:
        live: by live name, changed in place.
        tied: for each name that is tied to another, that other.
        names: of the adapter's own tensors.
    """
    before, every = dict(live), [*live, *(alias for alias in tied if alias not in live)]
    replaced = set(names) & set(every)
    by_module: dict[str, list[str]] = {}
    for name in every:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    touched = set(replaced)
    for name in set(names) - replaced:
        while name and name not in by_module:
            name = name.rpartition(".")[0]
        touched.update(by_module.get(name, ()))
    # a head that is replaced is made float32 with what it is tied to, before it gets a copy of its own
    touched |= {tied[name] for name in replaced & tied.keys()}
    for name in touched:
        live[name] = torch.empty(before[tied.get(name, name)].shape, dtype=torch.float32, device="meta")
    for alias, name in tied.items():
        if name in touched and name in before and alias not in touched:
            live.setdefault(alias, before[name])


def _set(config: Any, key: str, value: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, key):
            setattr(part, key, value)
