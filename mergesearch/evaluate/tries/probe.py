"""Whether an architecture can be scored in packs: decided by trying it on the live model, not from a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mergesearch.evaluate.tries.generation import GreedyDecoder, Prompt, PromptBatch
from mergesearch.evaluate.tries.packed import PackRunner
from mergesearch.evaluate.tries.trie import Passes, Query, arrange

# What rounding alone may do to a row of logits, as a share of their spread; deep models in bfloat16 reach 0.02.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_OTHERS = 3
_BRANCH = 16


class Undecided(Exception):
    """The model's weights give no finite logits, so nothing can be compared."""


def packing_fault(model: Any, inputs: Sequence[np.ndarray], limit: int) -> str | None:
    """Why token tries cannot be used with a model, in a few words; None where they can.

    Args:
        model: a causal LM in evaluation mode.
        inputs: token ids of requests, int32, [n] each; the longest of them and a few others are tried.
        limit: the most tokens of one forward pass.

    Raises:
        Undecided: see there.
    """
    texts = _texts(inputs)
    queries = [Query(text, text[-min(len(text), _BRANCH) :]) for text in texts]
    # once side by side, once with the shared beginning in the cache
    arrangements = [arrange(queries, limit, limit), arrange(queries, limit, 1)]
    return _fault(lambda: _compare_packs(model, texts, arrangements))


def generation_fault(model: Any, prompts: Sequence[np.ndarray], pad: int) -> str | None:
    """Why greedy decoding with a shared beginning cannot be used with a model; None where it can.

    Args:
        model: a causal LM in evaluation mode.
        prompts: token ids, int32, [n] each; the longest of them is tried, and one made of it.
        pad: the token that fills up a batch.

    Raises:
        Undecided: see there.
    """
    longest = max(prompts, key=len)
    return _fault(lambda: _compare_steps(model, longest, pad))


def _fault(compare: Callable[[], tuple[float, float]]) -> str | None:
    try:
        error, allowed = compare()
    except (Undecided, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        return f"the model does not take it ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    if error <= allowed:
        return None
    return f"its logits differ from those of plain sequences by {error:.2g} of their spread ({allowed:.2g} is rounding)"


def _texts(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The longest inputs, one that leaves the longest half way, and a few others."""
    by_length = sorted(inputs, key=len)
    longest = by_length[-1]
    others = by_length[:: max(1, len(by_length) // _OTHERS)][:_OTHERS]
    half = len(longest) // 2
    # reversed tokens: something else to say, whatever the vocabulary is
    fork = np.concatenate([longest[:half], longest[half:][::-1][:_BRANCH]])
    return [longest, fork, *others]


def _compare_packs(model: Any, texts: Sequence[np.ndarray], arrangements: Sequence[Passes]) -> tuple[float, float]:
    expected = [_plain(model, text) for text in texts]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for passes in arrangements:
        run = PackRunner(model)
        for pack in passes.packs:
            logits = run(pack).float()
            depths = pack.positions[pack.rows]
            for row, _, query in _once(pack.picks):
                rows.append((logits[row], expected[query][depths[row]]))
    return max(_difference(got, wanted) for got, wanted in rows), _allowed(model, texts, expected)


def _once(picks: np.ndarray) -> np.ndarray:
    return np.unique(picks, axis=0)


def _compare_steps(model: Any, longest: np.ndarray, pad: int) -> tuple[float, float]:
    half = len(longest) // 2
    shorter = np.concatenate([longest[:half], longest[half:][::-1][: max(1, (len(longest) - half) // 2)]])
    texts = [longest, shorter]
    batch = PromptBatch([Prompt(number, text) for number, text in enumerate(texts)], half)
    following = [int(text[0]) for text in texts]
    first, second = GreedyDecoder(model, pad).first_logits(batch, following)
    longer = [np.append(text, token) for text, token in zip(texts, following, strict=True)]
    expected = [_plain(model, text) for text in longer]
    pairs = [(first[row].float(), expected[row][-2]) for row in range(2)]
    pairs += [(second[row].float(), expected[row][-1]) for row in range(2)]
    return max(_difference(got, wanted) for got, wanted in pairs), _allowed(model, longer, expected)


def _plain(model: Any, text: np.ndarray) -> torch.Tensor:
    """The logits of a sequence alone, as any user of the model gets them: float32, [n, vocabulary]."""
    return _batch(model, [text])[0]


@torch.no_grad()
def _batch(model: Any, texts: Sequence[np.ndarray]) -> torch.Tensor:
    width = max(len(text) for text in texts)
    padded = np.stack([np.pad(text, (0, width - len(text))) for text in texts]).astype(np.int64)
    return model(torch.from_numpy(padded).to(model.device)).logits.float()


def _allowed(model: Any, texts: Sequence[np.ndarray], expected: Sequence[torch.Tensor]) -> float:
    """What another batch makes of the same sequences, or what rounding may do, whichever is more."""
    together = _batch(model, texts[:2])
    noise = max(_difference(together[row, len(texts[row]) - 1], expected[row][-1]) for row in range(2))
    return max(4 * noise, _ROUNDING.get(model.dtype, 1e-3))


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two rows of logits as a share of the spread of the second; some models mask a part with -inf."""
    if torch.isnan(expected).any() or torch.isposinf(expected).any():
        raise Undecided("the model's logits are not finite")
    open_ = torch.isfinite(expected)
    if not torch.equal(open_, torch.isfinite(logits)):
        return float("inf")
    expected, logits = expected[open_], logits[open_]
    spread = (expected - expected.mean()).norm()
    return float((logits - expected).norm() / spread.clamp(min=1e-12))
