"""How much memory scoring takes, from a model's configuration and the longest request, and which batch size fits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lm_eval.models.utils_hf import clear_torch_cache

from mergesearch.evaluate.model import longest_pass
from mergesearch.evaluate.scoring import Scorer, out_of_memory

log: logging.Logger = logging.getLogger(__name__)

# the most requests at once that are tried: more of them make a CPU no faster, and a GPU hardly
MOST = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class Length:
    """Of the longest requests, in tokens.

    Attributes:
        scored: of a prompt with what is scored in it, each of whose tokens gets logits.
        generated: of a prompt with the most that may follow it; 0 where nothing is generated.
    """

    scored: int = 0
    generated: int = 0

    @property
    def longest(self) -> int:
        return max(self.scored, self.generated)


def longest(scorer: Scorer) -> Length:
    """The longest requests of a scorer, as lm-eval cuts them to the model's context."""
    lm, scored, generated = scorer.language_model, 0, 0
    for kind, requests in scorer.requests.items():
        for request in requests:
            if kind == "generate_until":
                text, settings = cast("tuple[str, dict[str, Any]]", request.args)
                most = settings.get("max_gen_toks") or lm.max_gen_toks
                generated = max(generated, min(lm.max_length, len(lm.tok_encode(text)) + int(most)))
            elif kind == "loglikelihood":
                scored = max(scored, sum(map(len, lm.pair(*request.args))))
            else:
                scored = max(scored, len(lm.tok_encode(request.args[0])))
    return Length(min(scored, lm.max_length), generated)


@dataclass(frozen=True)
class Appetite:
    """Bytes that scoring takes beside the weights, at most.

    Attributes:
        row: of one request of a batch.
        packed: of a pass of a token trie, which takes its size from no batch size; 0 where lm-eval's own model answers.
        learning: of a step of a soup that learns by gradients; 0 where none does.
    """

    row: int = 0
    packed: int = 0
    learning: int = 0

    def of(self, rows: int) -> int:
        """Of whatever takes most, with so many requests at once."""
        return max(rows * self.row, self.packed, self.learning)


def appetite(
    config: Any, size: int, length: Length, device: str, *, packed: bool = False, documents: int = 0,
    largest: int = 0, checkpointing: bool = False,
) -> Appetite:  # fmt: skip
    """What scoring a model takes, by its configuration; scripts/bench/memory.py compares it with what is taken.

    Args:
        config: of transformers.
        size: bytes of a number of the model.
        length: of the longest requests.
        device: `cpu` or `cuda`.
        packed: whether token tries may be used.
        documents: that a soup learns from at once; 0 where none learns by gradients.
        largest: elements of the largest tensor, whose gradient is held.
        checkpointing: whether layers are computed again for the gradient.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 16
    width = getattr(text, "hidden_size", None) or 1024
    inner, layers = _inner(text, width), getattr(text, "num_hidden_layers", None) or 32
    cached = 2 * layers * (getattr(text, "num_key_value_heads", None) or heads)
    cached *= getattr(text, "head_dim", None) or width // heads
    vocabulary = text.vocab_size
    # one layer's activations, with the attention scores where they are not fused
    eager = getattr(text, "_attn_implementation", None) == "eager"
    scores = heads * length.longest * (size + 4) if eager else length.longest
    layer = size * (8 * width + 4 * inner) + scores
    # the logits, and their log-softmax beside them
    scored = length.scored * (layer + size * (cached + 2 * vocabulary))
    # one row of logits for each sequence, in float32 too; the cache grows by copying
    generated = length.generated * (layer + 2 * size * cached) + (size + 8) * vocabulary
    pass_of_trie = longest_pass(device) * (layer + size * cached + (size + 8) * vocabulary) if packed else 0
    kept = layers * size * width + layer if checkpointing else layers * layer
    learning = documents * length.longest * (kept + (2 * size + 8) * vocabulary) + (size + 4) * largest
    return Appetite(max(scored, generated), pass_of_trie, learning if documents else 0)


def _inner(text: Any, width: int) -> int:
    """Numbers of a token's widest activation in a feed-forward layer; of experts, those of all that a token visits."""
    dense = getattr(text, "intermediate_size", None) or 4 * width
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return max(dense, experts * (getattr(text, "moe_intermediate_size", None) or (dense if experts > 1 else 0)))


def settle(scorer: Scorer, rows: int) -> int:
    """Makes a scorer ask as many requests at once as fit, `rows` at most; returns how many these are.

    On a CUDA device the model is asked: that many copies of the longest request at once, and half as many after each
    time that memory runs out. On the CPU, where no error says so in time, memory of that size is asked for.
    """
    lm = scorer.language_model
    while rows > 1:
        try:
            _attempt(scorer, rows)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                break  # the first candidate meets it again, and says so
        rows //= 2
        clear_torch_cache()
    lm.batch_size_per_gpu = rows
    return rows


def _attempt(scorer: Scorer, rows: int) -> None:
    """What asking so many requests at once takes, taken for a moment; an error where there is no room for it."""
    lm, length = scorer.language_model, longest(scorer)
    device = lm.model.device
    if device.type != "cuda":
        taken = appetite(lm.model.config, lm.model.dtype.itemsize, length, device.type).of(rows)
        torch.empty(taken, dtype=torch.uint8)
        return
    tokens = torch.zeros((rows, max(1, length.longest)), dtype=torch.long, device=device)
    with torch.no_grad():
        torch.nn.functional.log_softmax(lm._model_call(tokens), dim=-1)
    torch.cuda.synchronize(device)


def sample(documents: Sequence[int], few: int = 8) -> list[int]:
    """A few document numbers from all over a task's."""
    return list(documents[:: max(1, len(documents) // few)][:few])
