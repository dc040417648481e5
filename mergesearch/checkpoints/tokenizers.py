"""Tokenizers and vocabularies: equal, or aligned by token to the vocabulary that the result gets."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesearch import memory
from mergesearch.checkpoints.loading import quiet_transformers
from mergesearch.errors import UserError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path, where: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer in a folder, or None where there is none; `UserError` where it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        if memory.ran_out(error):
            raise UserError(memory.too_little(f"{where}: the tokenizer in {folder}")) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: the tokenizer in {folder} cannot be loaded: {reason}") from None


def check_equal(base: Any, other: Any, folder: Path, where: str) -> None:
    """`UserError` with how they differ where two tokenizers do not give every token the same number."""
    ours, theirs = base.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = dict(ours.items() ^ theirs.items())
    token = min(differing, key=lambda t: (min(ours.get(t, 2**62), theirs.get(t, 2**62)), t))
    places = f"{theirs.get(token, 'absent')} there, {ours.get(token, 'absent')} in the base"
    raise UserError(
        f"{where}: the tokenizer of {folder} has {len(theirs)} tokens, the base's {len(ours)}, and {len(differing)} "
        f"differ, first {token!r} ({places}): set tokenizer: union, or tokenizer: to the model whose vocabulary the "
        "result should have"
    )


# --- the union ----------------------------------------------------------------------------------------------------


def union(tokenizers: Mapping[str, Any]) -> Any:
    """The first tokenizer, the base's, with the tokens of the others after its own; it keeps its numbers.

    Args:
        tokenizers: by the place they come from, the base's first.

    Raises:
        UserError: a tokenizer of another kind, or one that has no tokenizer.json.
    """
    (base_where, base), *others = tokenizers.items()
    if all(other.get_vocab().keys() <= base.get_vocab().keys() for _, other in others):
        return base
    data = _data(base, base_where)
    for where, other in others:
        _add(data, _data(other, where), where)
    joined = _rebuilt(base, data)
    missing = {t for _, other in others for t in other.get_vocab()} - joined.get_vocab().keys()
    moved = base.get_vocab().items() - joined.get_vocab().items()
    if missing or moved:
        raise UserError(
            f"tokenizer: union cannot be built from these tokenizers (token {min(missing or dict(moved))!r}): name the "
            "model whose tokenizer the result should have"
        )
    return joined


def _data(tokenizer: Any, where: str) -> dict[str, Any]:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"{where}: tokenizer: union needs fast tokenizers, this is a {type(tokenizer).__name__}: name the model "
            "whose tokenizer the result should have"
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _add(data: dict[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Adds to a tokenizer.json what another has beside it: vocabulary, merges (after the own ones), added tokens."""
    ours, theirs = data["model"], other["model"]
    if ours.get("type") != theirs.get("type"):
        raise UserError(
            f"{where}: tokenizer: union cannot join a {theirs.get('type')} tokenizer to the base's "
            f"{ours.get('type')}: name the model whose tokenizer the result should have"
        )
    added = {token["content"]: token for token in other["added_tokens"]}
    known = _numbers(data)
    free = 1 + max(known.values())
    missing = [token for token, _ in sorted(_numbers(other).items(), key=lambda item: item[1]) if token not in known]
    for number, token in enumerate(missing, start=free):
        if token in added:
            data["added_tokens"].append({**added[token], "id": number})
        elif isinstance(ours["vocab"], dict):
            ours["vocab"][token] = number
        else:
            _append_scored(ours, theirs, token, number)
    if "merges" in ours:
        have = {tuple(m) for m in ours["merges"]}
        ours["merges"] += [m for m in theirs["merges"] if tuple(m) not in have]


def _append_scored(ours: dict[str, Any], theirs: Mapping[str, Any], token: str, number: int) -> None:
    """Unigram vocabularies are lists whose positions are the numbers: after added tokens there is no place for more."""
    if number != len(ours["vocab"]):
        raise UserError(
            f"tokenizer: union cannot put token {token!r} into a unigram vocabulary that has added tokens after it: "
            "name the model whose tokenizer the result should have"
        )
    ours["vocab"].append(next(entry for entry in theirs["vocab"] if entry[0] == token))


def _numbers(data: Mapping[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    own = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**own, **{token["content"]: token["id"] for token in data["added_tokens"]}}


def _rebuilt(base: Any, data: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        base.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# --- aligning rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What the rows of the result's embeddings and head stand for.

    Attributes:
        tokenizer: the result's.
        rows: how many rows there are, padding included.
        anchor: the parent whose padding rows are kept: the base, or the model whose tokenizer was chosen.
        tokens: for each parent the tokenizer's token -> row, as far as it has the row.
    """

    tokenizer: Any
    rows: int
    anchor: str
    tokens: Mapping[str, Mapping[str, int]]

    def said(self, chosen: str) -> str:
        """What the result's tokens are and whose rows stand for them, in words."""
        words = self.tokenizer.get_vocab()
        what = {"union": "the base's tokens and after them the others'", "base": "the base's tokens"}
        parts = [f"{what.get(chosen, f'the tokens of {chosen}')}: {len(words):,} in {self.rows:,} rows"]
        differing: dict[str, list[str]] = {}
        for parent, theirs in self.tokens.items():
            lacking = [token for token in words if token not in theirs]
            dropped = [token for token in theirs if token not in words]
            name = "the base" if parent == "base_model" else parent.removeprefix("models.")
            for tokens, rows, how in ((lacking, words, "not in"), (dropped, theirs, "left out of")):
                if tokens:
                    differing.setdefault(f"{_some(sorted(tokens, key=rows.__getitem__))} {how}", []).append(name)
        parts += [f"{what} {', '.join(names)}" for what, names in differing.items()]
        return "; ".join(parts) + "; a row that a parent lacks is the base's, or the mean of those that have it"

    def origins(self, parent: str) -> Tensor:
        """For each row of the result the parent's row of the same token, -1 where it has none: (rows,) int64.

        Rows beyond the tokenizer's are padding: the anchor's own in the anchor, nobody's elsewhere.
        """
        rows = torch.full((self.rows,), -1, dtype=torch.int64)
        chosen = self.tokenizer.get_vocab()
        theirs = self.tokens[parent]
        for token, row in chosen.items():
            rows[row] = theirs.get(token, -1)
        if parent == self.anchor:
            taken = set(chosen.values())
            for row in set(range(self.rows)) - taken:
                rows[row] = row
        return rows


def _some(tokens: Sequence[str]) -> str:
    """`3 tokens ('a', 'b', ...)`."""
    first = ", ".join(map(repr, tokens[:2])) + (", ..." if len(tokens) > 2 else "")
    return f"{len(tokens):,} token{'s' * (len(tokens) > 1)} ({first})"


def align(tensors: Mapping[str, Tensor], vocabulary: Vocabulary, base: str) -> dict[str, Tensor]:
    """One embedding or head of each parent with the result's rows, in the parent's own dtype.

    A row that a parent lacks is the base's, so its task vector is zero there; one that the base lacks as well is the
    mean over the parents that have it, in float32; one that no parent has (padding that the anchor lacks) is the mean
    of the anchor's rows.

    Args:
        tensors: (rows of the parent, ...) for each parent.
        vocabulary: the result's.
        base: the parent that fills what others lack.
    """
    origins = {parent: vocabulary.origins(parent).to(tensor.device) for parent, tensor in tensors.items()}
    have = {parent: rows >= 0 for parent, rows in origins.items()}
    filled = _filled(tensors, origins, have, vocabulary.anchor, base)
    aligned = {}
    for parent, tensor in tensors.items():
        rows = filled.to(tensor.dtype, copy=True)
        rows[have[parent]] = tensor[origins[parent][have[parent]]]
        aligned[parent] = rows
    return aligned


def _filled(
    tensors: Mapping[str, Tensor],
    origins: Mapping[str, Tensor],
    have: Mapping[str, Tensor],
    anchor: str,
    base: str,
) -> Tensor:
    """What stands in for a missing row, for every row: float32."""
    total = torch.zeros((len(origins[base]), *tensors[base].shape[1:]), device=tensors[base].device)
    for parent, tensor in tensors.items():
        total[have[parent]] += tensor[origins[parent][have[parent]]].float()
    count = torch.stack(list(have.values())).sum(0)
    shape = (-1, *[1] * (total.ndim - 1))
    rows = torch.where(count.view(shape) > 0, total / count.clamp(min=1).view(shape), tensors[anchor].float().mean(0))
    rows[have[base]] = tensors[base][origins[base][have[base]]].float()
    return rows
