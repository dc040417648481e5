"""Greedy decoding of many prompts: a shared beginning is computed once, and finished sequences leave the batch."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mergesearch.evaluate.tries.trie import common_prefix

# A beginning shared by fewer tokens or fewer prompts than this is computed again for each of them.
_WORTH_SHARING = 32
_FEWEST = 8
# Prompts leave the batch once a share of this size is finished: to take one out copies the others' cache.
_LEAVE = 0.125


@dataclass(frozen=True, eq=False)
class Prompt:
    """What to continue: `tokens`, int32, [n], and the number of the request that it answers."""

    number: int
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts to be decoded side by side, of which the first `shared` tokens are the same."""

    prompts: list[Prompt]
    shared: int


class Stops:
    """When a sequence is finished, as lm-eval and transformers decide it for a sequence alone.

    Args:
        tokenizer: decodes what was generated.
        until: the texts that end an answer, lm-eval's `until` and its end-of-text token.
        ends: the ids that end a sequence in transformers' generation configuration.
        most: tokens after which a sequence is cut.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], ends: Sequence[int], most: int) -> None:
        self.most: int = most
        self.ends: set[int] = set(ends)
        self._tokenizer, self._until = tokenizer, [text for text in until if text]
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in self._until]
        # lm-eval looks back two more tokens than the text takes: it may be written in others
        self._back = max(lengths, default=0) + 2

    def shortened(self, most: int) -> Stops:
        """The same, cut after fewer tokens."""
        other = copy.copy(self)
        other.most = min(most, self.most)
        return other

    def finished(self, answers: Sequence[list[int]]) -> list[bool]:
        """For each answer so far whether a stop ends it; its length does not count here."""
        texts = self._tokenizer.batch_decode([answer[-self._back :] for answer in answers])
        return [
            answer[-1] in self.ends or any(stop in text for stop in self._until)
            for answer, text in zip(answers, texts, strict=True)
        ]


def batches(prompts: Sequence[Prompt], size: int) -> list[PromptBatch]:
    """Prompts that begin alike together, at most `size` in a batch, longest first as lm-eval orders them."""
    ordered = sorted(prompts, key=lambda prompt: prompt.tokens.astype(">u4").tobytes())
    alone, *families = _families(ordered)
    together: list[PromptBatch] = []
    for members, fork in families:
        if len(members) < _FEWEST:
            alone[0].extend(members)
            continue
        # every prompt keeps a token of its own, whose logits say what comes next
        shared = min(fork, min(len(prompt.tokens) for prompt in members) - 1)
        together.extend(PromptBatch(part, shared) for part in _parts(members, size))
    return together + [PromptBatch(part, 0) for part in _parts(alone[0], size)]


def _families(ordered: Sequence[Prompt]) -> list[tuple[list[Prompt], int]]:
    """(members, how many tokens they share) for each beginning worth sharing; first those that share none."""
    common = [common_prefix(a.tokens, b.tokens) for a, b in pairwise(ordered)]
    families: list[tuple[list[Prompt], int]] = [([], 0)]
    waiting = [(0, len(ordered), 0)]
    while waiting:
        low, high, family = waiting.pop()
        if high - low < _FEWEST:
            families[family][0].extend(ordered[low:high])
            continue
        fork = min(common[low : high - 1])
        if fork - families[family][1] >= _WORTH_SHARING:
            families.append(([], fork))
            family = len(families) - 1
        cuts = [low, *(at + 1 for at in range(low, high - 1) if common[at] == fork), high]
        waiting.extend((begin, end, family) for begin, end in pairwise(cuts))
    return families


def _parts(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
    return [longest_first[begin : begin + size] for begin in range(0, len(prompts), size)]


class GreedyDecoder:
    """Continues batches of prompts with the likeliest token, over and over; the model's present weights count."""

    def __init__(self, model: Any, pad: int) -> None:
        self._model, self._pad, self._device = model, pad, model.device
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._beginning: tuple[bytes, DynamicCache] | None = None
        # seconds that reading prompts took, so far
        self.prefill: float = 0.0

    @torch.no_grad()
    def decode(self, batch: PromptBatch, stops: Stops) -> list[tuple[list[int], bool]]:
        """For each prompt its answer in tokens, and whether it was cut at `stops.most`."""
        start = time.perf_counter()
        state = _State(batch, self._prefill(batch))
        # the first token waits for the device
        first = state.logits.float().argmax(dim=-1).tolist()
        self.prefill += time.perf_counter() - start
        for taken in range(1, stops.most + 1):
            state.take(first if taken == 1 else state.logits.float().argmax(dim=-1).tolist(), stops)
            if not state.live or taken == stops.most:
                break
            state.leave()
            state.logits = self._step(state)
        return [(answer, cut) for answer, cut in zip(state.answers, state.cut(), strict=True)]

    def first_logits(self, batch: PromptBatch, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits after each prompt, and those after one more token each: two [prompts, vocabulary]."""
        with torch.no_grad():
            state = _State(batch, self._prefill(batch))
            first = state.logits
            state.last = list(tokens)
            return first, self._step(state)

    def _prefill(self, batch: PromptBatch) -> _Prefilled:
        cache = self._shared(batch)
        rest = [prompt.tokens[batch.shared :] for prompt in batch.prompts]
        width = max(len(tokens) for tokens in rest)
        tokens = np.full((len(rest), width), self._pad, dtype=np.int64)
        seen = np.zeros((len(rest), width), dtype=np.int64)
        for row, own in enumerate(rest):
            tokens[row, width - len(own) :] = own
            seen[row, width - len(own) :] = 1
        mask = torch.from_numpy(np.concatenate([np.ones((len(rest), batch.shared), dtype=np.int64), seen], axis=1))
        positions = torch.from_numpy((batch.shared + seen.cumsum(axis=1) - 1).clip(0))
        logits = self._forward(torch.from_numpy(tokens), mask.to(self._device), positions, cache)
        return _Prefilled(logits, mask.to(self._device), positions[:, -1].to(self._device), cache)

    def _shared(self, batch: PromptBatch) -> DynamicCache:
        """A cache with the shared beginning, once for each prompt; computed again only where it is another one."""
        cache = DynamicCache()
        if not batch.shared:
            return cache
        tokens = batch.prompts[0].tokens[: batch.shared].astype(np.int64)
        if self._beginning is None or self._beginning[0] != tokens.tobytes():
            fresh, row = DynamicCache(), torch.from_numpy(tokens)[None]
            self._forward(row, torch.ones_like(row).to(self._device), torch.arange(len(tokens))[None], fresh)
            self._beginning = (tokens.tobytes(), fresh)
        layers: list[Any] = list(self._beginning[1].layers)
        for index, layer in enumerate(layers):
            keys, values = (part.expand(len(batch.prompts), -1, -1, -1) for part in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache

    def _step(self, state: _State) -> torch.Tensor:
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), 1)], dim=1)
        state.positions = state.positions + 1
        return self._forward(torch.tensor(state.last)[:, None], state.mask, state.positions[:, None], state.cache)

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """The logits of the last position, [rows, vocabulary]."""
        outputs = self._model(
            input_ids=tokens.to(self._device),
            attention_mask=mask,
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        return outputs.logits[:, -1]


@dataclass(eq=False)
class _Prefilled:
    logits: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache


class _State(_Prefilled):
    """A batch under way.

    Attributes:
        answers: the tokens of every prompt's answer so far.
        live: which prompts the rows of the tensors stand for.
        last: the token that each row goes on with.
    """

    def __init__(self, batch: PromptBatch, start: _Prefilled) -> None:
        super().__init__(start.logits, start.mask, start.positions, start.cache)
        self.answers: list[list[int]] = [[] for _ in batch.prompts]
        self.live = list(range(len(batch.prompts)))
        self.last: list[int] = []
        self._done = [False] * len(batch.prompts)

    def take(self, tokens: Sequence[int], stops: Stops) -> None:
        """The next token of each row; rows that are finished go on until they leave, and their tokens are dropped."""
        self.last = list(tokens)
        going = [(which, token) for which, token in zip(self.live, tokens, strict=True) if not self._done[which]]
        for which, token in going:
            self.answers[which].append(token)
        complete = stops.finished([self.answers[which] for which, _ in going])
        for (which, _), finished in zip(going, complete, strict=True):
            self._done[which] = finished
        if all(self._done[which] for which in self.live):
            self.live = []

    def leave(self) -> None:
        """Take the finished rows out, where they are enough to be worth it."""
        rows = [row for row, which in enumerate(self.live) if not self._done[which]]
        if len(self.live) - len(rows) < max(1, _LEAVE * len(self.live)):
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.live, self.last = [self.live[row] for row in rows], [self.last[row] for row in rows]

    def cut(self) -> list[bool]:
        return [not done for done in self._done]
