"""Packs of a token trie run through a transformers causal LM: the head on the needed rows only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mergesearch.evaluate.tries.precision import head_in_float32
from mergesearch.evaluate.tries.trie import Pack, Passes


def log_likelihoods(
    model: Any, passes: Passes, computed: Callable[[int], None] = lambda tokens: None, *, wide_head: bool = False
) -> list[tuple[float, bool]]:
    """For every query (the log-probability of its targets, whether greedy decoding would have chosen them all).

    Log-probabilities are float32, from the model's logits; their sums float64. The model's present weights count:
    nothing is kept from one call to the next.

    Args:
        computed: told after each pack how many tokens went through the model.
        wide_head: whether the model's head computes in float32.

    Raises:
        Whatever the model raises; out of memory included.
    """
    with head_in_float32(model) if wide_head else nullcontext():
        answers = [(picks, *(part.cpu() for part in values)) for picks, values in _run(model, passes, computed)]
    sums, greedy = np.zeros(passes.queries), np.ones(passes.queries, dtype=bool)
    for picks, log_probabilities, chosen in answers:
        np.add.at(sums, picks[:, 2], log_probabilities.numpy().astype(np.float64))
        np.logical_and.at(greedy, picks[:, 2], chosen.numpy())
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _run(
    model: Any, passes: Passes, computed: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, tuple[torch.Tensor, torch.Tensor]]]:
    run = PackRunner(model)
    for pack in passes.packs:
        logits = run(pack)
        if len(pack.picks):
            yield pack.picks, picked(logits, pack.picks)
        computed(len(pack.tokens))


class PackRunner:
    """Runs packs in their order; the cached path lives as long as the runner."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache()
        self._device, self._dtype = model.device, model.dtype
        self._window, self._mixed = sliding_window(model)
        self._chooses_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, pack: Pack) -> torch.Tensor:
        """The logits of the pack's rows: [rows, vocabulary], in the dtype of the model's head."""
        crop(self._cache, pack.cached)
        # a pass that neither stands on the cache nor stays in it does without
        cached = pack.keep or pack.cached > 0
        rows = self._tensor(pack.rows) if len(pack.rows) else self._tensor(np.zeros(1))
        outputs = self._model(
            input_ids=self._tensor(pack.tokens)[None],
            position_ids=self._tensor(pack.positions)[None],
            attention_mask=self._masks(pack),
            past_key_values=self._cache if cached else None,
            use_cache=cached,
            **({"logits_to_keep": rows} if self._chooses_rows else {}),
        )
        return outputs.logits[0] if self._chooses_rows else outputs.logits[0, rows]

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)

    def _masks(self, pack: Pack) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive, [1, 1, n, cached + n]; by kind of layer where the model has layers with a window and without."""
        hidden, positions = self._hidden(pack)
        if self._window is None:
            return self._additive(hidden)
        cached = torch.arange(pack.cached, device=self._device)
        far = positions[:, None] - torch.cat([cached, positions])[None, :] >= self._window
        if not self._mixed:
            return self._additive(hidden | far)
        return {"full_attention": self._additive(hidden), "sliding_attention": self._additive(hidden | far)}

    def _hidden(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """(what each token may not see: bool, [n, cached + n]; the tokens' positions)."""
        ends = self._tensor(pack.ends)
        nodes = torch.arange(len(ends), device=self._device)
        hidden = torch.zeros(len(ends), pack.cached + len(ends), dtype=torch.bool, device=self._device)
        hidden[:, pack.cached :] = (nodes[None, :] > nodes[:, None]) | (nodes[:, None] >= ends[None, :])
        return hidden, self._tensor(pack.positions)

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        # the minimum, not -inf: a row of -inf alone would be NaN in some kernels
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)[None, None]


def sliding_window(model: Any) -> tuple[int | None, bool]:
    """(the window in tokens, None where there is none; whether other layers see everything)."""
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if not window or (kinds and "sliding_attention" not in kinds):
        return None, False
    return window, len(kinds) > 1


def crop(cache: DynamicCache, length: int) -> None:
    """Drop what lies beyond the first `length` tokens."""
    beyond = cache.get_seq_length() - length
    if beyond > 0:
        cache.crop(-beyond)


def picked(logits: torch.Tensor, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities float32, whether each target is the likeliest token), in the order of the picks."""
    logits = logits.float()
    rows, targets = (torch.from_numpy(picks[:, column].astype(np.int64)).to(logits.device) for column in (0, 1))
    norms, best = torch.logsumexp(logits, dim=-1), logits.argmax(dim=-1)
    return logits[rows, targets] - norms[rows], best[rows] == targets
