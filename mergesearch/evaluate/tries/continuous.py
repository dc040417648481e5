"""Greedy decoding by transformers' continuous batching: a paged cache, shared beginnings, no waiting for the longest.

A prompt takes the place of a finished one at once. It pays on a GPU, where a batch that shrinks leaves the card idle;
on a CPU the paged attention of transformers 5.23 was measured at a fraction of the speed of one prompt after another
(82 s against 6 s for 18 prompts of 24 tokens, one thread). So `choose` times both where there is a GPU, and where there
is none does not try. `python -m scripts.bench.generation` measures all ways.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from mergesearch.errors import CandidateError
from mergesearch.evaluate.tries.generation import GreedyDecoder, Prompt, Stops, batches
from mergesearch.evaluate.tries.precision import in_float32

log: logging.Logger = logging.getLogger(__name__)

_PAGE = {"cpu": 32, "cuda": 256}
# tokens of one forward pass, prefilled and generated ones together
_TOKENS = {"cpu": 512, "cuda": 4096}
# what `choose` times: prompts, and how many tokens of each
_FEW, _STEPS = 32, 24
# seconds without a token after which something is wrong
_PATIENCE = 300.0


class ContinuousDecoder:
    """Continues prompts with the likeliest token, over and over; the model's present weights count.

    Args:
        model: a causal LM that takes a paged cache.
        ends: the token ids that end a sequence.
    """

    def __init__(self, model: Any, ends: Sequence[int]) -> None:
        self._model, self._ends = model, list(ends)
        # seconds that reading prompts took, so far; None where this transformers does not let them be told apart
        self.prefill: float | None = 0.0

    @torch.no_grad()
    def decode(self, prompts: Sequence[Prompt], stops: Stops, rows: int) -> list[tuple[list[int], bool]]:
        """For each prompt its answer in tokens, and whether it was cut at `stops.most`; so many side by side at most.

        Raises:
            CandidateError: transformers gave an answer up.
        """
        config = GenerationConfig(do_sample=False, max_new_tokens=stops.most, eos_token_id=self._ends or -1)
        answers: dict[str, tuple[list[int], bool]] = {}
        # by request the tokens that were looked at
        seen: dict[str, int] = {}
        # a manager of its own for each call: pages of other weights' keys must not be found again
        context = self._model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=self._config(prompts, stops.most, rows), warmup=False
        )
        with context as manager:
            self._clock(manager)
            # those that begin alike one after another, so that the pages they share are there
            order = sorted(range(len(prompts)), key=lambda at: prompts[at].tokens.astype(">u4").tobytes())
            for number in order:
                tokens = prompts[number].tokens.tolist()
                manager.add_request(
                    tokens, str(number), max_new_tokens=stops.most, streaming=True, eos_token_id=self._ends or -1
                )
            since = time.monotonic()
            while len(answers) < len(prompts):
                told = manager.get_result(timeout=1)
                if told is None:
                    if not manager.is_running() or time.monotonic() - since > _PATIENCE:
                        raise CandidateError("transformers' continuous batching ended without an answer")
                    continue
                since = time.monotonic()
                if told.error is not None:
                    raise CandidateError(f"transformers' continuous batching gave an answer up: {told.error}")
                if told.request_id in answers:  # tokens that were under way when it was called off
                    continue
                tokens = list(told.generated_tokens)
                found = _ended(tokens, seen.get(told.request_id, 0), stops, told.is_finished())
                seen[told.request_id] = len(tokens)
                if found is not None:
                    answers[told.request_id] = found
                    if not told.is_finished():
                        manager.cancel_request(told.request_id)
        return [answers[str(number)] for number in range(len(prompts))]

    def _clock(self, manager: Any) -> None:
        """Counts of each forward pass the share of its tokens that are of prompts. No public way of transformers tells
        what a pass holds, so where its inner names are others the share is left unknown."""
        step: Callable[[], None] | None = getattr(manager, "_generation_step", None)
        if step is None:
            self.prefill = None
            return

        def clocked() -> None:
            start = time.perf_counter()
            # without overlapping batches it waits for the device
            step()
            seconds = time.perf_counter() - start
            try:
                held = manager.batch_processor.inputs_and_outputs.requests_in_batch
                # not by its status, which the last part of a prompt has already changed
                read = sum(each.query_length for each in held if not each.state.generated_len())
                if self.prefill is not None:
                    self.prefill += seconds * read / sum(each.query_length for each in held)
            except AttributeError:
                self.prefill = None

        manager._generation_step = clocked

    def _config(self, prompts: Sequence[Prompt], most: int, rows: int) -> ContinuousBatchingConfig:
        """Pages for as many sequences as fit side by side; by default transformers takes all memory there is."""
        device = self._model.device.type
        page, longest = _PAGE.get(device, 64), max(len(prompt.tokens) for prompt in prompts) + most
        rows = min(rows, len(prompts))
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=rows * math.ceil((longest + 1) / page) + 2,
            max_batch_tokens=max(_TOKENS.get(device, 512), rows),
            max_requests_per_batch=rows,
            auto_switch_to_flash=False,
            use_cuda_graph=None if device == "cuda" else False,
            use_async_batching=False,
        )


def _ended(tokens: list[int], seen: int, stops: Stops, finished: bool) -> tuple[list[int], bool] | None:
    """(the answer, whether it was cut) once it has ended; it had not after the first `seen` tokens."""
    for count in range(seen + 1, len(tokens) + 1):
        if stops.finished([tokens[:count]])[0]:
            return tokens[:count], False
    return (tokens, True) if finished else None


def choose(model: Any, prompts: Sequence[Prompt], stops: Stops, pad: int, rows: int) -> tuple[bool, str]:
    """Whether continuous batching is the faster way for prompts like these, and why, in words.

    Args:
        model: a causal LM in evaluation mode.
        prompts: of the run; a few are timed.
        stops: of theirs; a few tokens are generated.
        pad: the token that fills up a batch.
        rows: sequences side by side.
    """
    if model.device.type == "cpu":
        return False, "on a CPU its paged attention is slower"
    few = list(prompts[:: max(1, len(prompts) // _FEW)][:_FEW])
    short = stops.shortened(_STEPS)
    continuous, padded = ContinuousDecoder(model, sorted(stops.ends)), GreedyDecoder(model, pad)

    def by_batches() -> list[tuple[list[int], bool]]:
        found: dict[int, tuple[list[int], bool]] = {}
        for batch in batches(few, rows):
            for prompt, answer in zip(batch.prompts, padded.decode(batch, short), strict=True):
                found[prompt.number] = answer
        return [found[prompt.number] for prompt in few]

    try:
        # where nothing is rounded away; in half precision two right ways may write two texts
        with in_float32(model):
            if continuous.decode(few, short, rows) != by_batches():
                return False, "its texts in float32 are others"
        ours, theirs = (
            min(_timed(way) for _ in range(2)) for way in (lambda: continuous.decode(few, short, rows), by_batches)
        )
    except Exception as error:  # whatever it is, the other way is there
        log.debug("continuous batching was not taken", exc_info=True)
        return False, f"the model does not take it ({type(error).__name__})"
    faster = ours < theirs
    return faster, f"{ours:.2f} s against {theirs:.2f} s for {len(few)} prompts"


def _timed(way: Any) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


__all__ = ["ContinuousDecoder", "choose"]
