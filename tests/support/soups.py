"""A pool whose best mix is known: documents are token sequences, their loss the distance to a chosen mix's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TOKENS = 10


class TargetLosses:
    """Stands in for `Losses`: the cross-entropy to the next-token distributions of the model as it was when made."""

    def __init__(self, model: Any, documents: Mapping[str, Sequence[int]], seed: int = 0, sharpness: float = 1.0):
        self.model, self.batch_size, self.sharpness = model, 16, sharpness
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.vocab_size
        self.tokens = {
            label: {n: torch.randint(3, vocabulary, (TOKENS,), generator=generator) for n in ids}
            for label, ids in documents.items()
        }
        with torch.no_grad():
            self.wanted = {
                label: {n: self._logits(t[None])[0].softmax(-1) for n, t in found.items()}
                for label, found in self.tokens.items()
            }
        self.breaks_at: int | None = None
        self.calls = 0

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits * self.sharpness

    def known(self, documents: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        return {label: [n for n in ids if n in self.tokens[label]] for label, ids in documents.items()}

    def walk(
        self,
        documents: Mapping[str, Sequence[int]],
        take: Callable[[str, Sequence[int], Tensor], None],
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        for label, ids in documents.items():
            for start in range(0, len(ids), self.batch_size):
                part = list(ids)[start : start + self.batch_size]
                logits = self._logits(torch.stack([self.tokens[label][n] for n in part]))
                wanted = torch.stack([self.wanted[label][n] for n in part])
                found = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean(-1)
                self.calls += 1
                take(label, part, found * float("nan") if self.calls == self.breaks_at else found)

    def walk_together(
        self,
        documents: Mapping[str, Sequence[int]],
        take: Callable[[Sequence[tuple[str, int]], Tensor], None],
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self.walk(documents, lambda label, ids, losses: take([(label, n) for n in ids], losses), undo)

    def loss(self, documents: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {label: [] for label in documents}
        self.walk(documents, lambda label, ids, losses: found[label].append(losses))
        return {label: torch.cat(parts) for label, parts in found.items()}

    def gold_sequences(self, documents: Mapping[str, Sequence[int]]) -> Any:
        for label, ids in documents.items():
            tokens = torch.stack([self.tokens[label][n] for n in ids])
            yield tokens, torch.ones_like(tokens)
