"""lm-eval's Hugging Face model with token tries in the place of its batches, wherever the live model takes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import clear_torch_cache

from mergesearch.evaluate.model import CONTINUOUS, LM_EVAL, TRIED, TRIES, TRIES_WIDE, RememberingLM, question
from mergesearch.evaluate.tries import memory, packed, probe
from mergesearch.evaluate.tries.continuous import ContinuousDecoder, choose
from mergesearch.evaluate.tries.generation import GreedyDecoder, Prompt, Stops, batches
from mergesearch.evaluate.tries.trie import Passes, Query, arrange

log: logging.Logger = logging.getLogger(__name__)

# What may stand in a generation configuration without changing what greedy decoding writes.
_HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length"}
_HARMLESS |= {"transformers_version", "_from_model_config", "use_cache", "output_attentions", "output_hidden_states"}
# of what lm-eval computes, the share up to which tries pay
_WORTH_IT = 0.95
_GREEDY = {"do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True, eq=False)
class _Alike:
    """Prompts that are continued under the same conditions: until these texts, or `most` tokens."""

    prompts: list[Prompt]
    until: list[str]
    most: int


class TrieLM(RememberingLM):
    """RememberingLM that computes no token twice; its figures are lm-eval's up to the rounding of another batch size.

    `tokenize` arranges the forward passes for the requests of a run, and tries on the live model whether they can be
    used. Where they cannot, lm-eval's own code answers, and one logged line says why.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, **thinking: Any) -> None:
        super().__init__(model, tokenizer, batch_size, **thinking)
        self._limit, self._fill = memory.pack_length(model), memory.fill_length(model)
        self._tokens: list[tuple[Any, ...]] = []
        # lists of requests are known by the identity of their members, which therefore stay alive
        self._asked: dict[tuple[int, ...], list[Instance]] = {}
        # by request, which is kept alive with its query
        self._queries: dict[int, tuple[Instance, Query]] = {}
        self._passes: dict[tuple[int, ...], Passes] = {}
        self._groups: dict[tuple[int, ...], tuple[list[_Alike], list[int]]] = {}
        # rows: what running out of memory left of them; largest: of the batches in use
        self._rows: int | None = None
        self._largest = 0
        # by request type: None before it was tried, then whether tries serve it
        self._serves: dict[str, bool | None] = dict.fromkeys(TRIED)
        self._wide_head = self._continuous = False
        self._there: set[str] = set()

    def tokenize(self, requests: dict[str, list[Instance]]) -> None:
        self.model.eval()
        super().tokenize(requests)
        for request_type in TRIED:
            if requests.get(request_type):
                self._there.add(request_type)
                self._try(request_type, requests[request_type])
        if self._serves["loglikelihood"]:
            # the queries hold the tokens now
            self._pairs.clear()

    def work(self) -> tuple[int, int] | None:
        arranged = self._passes.values()
        computed, naive = sum(passes.tokens for passes in arranged), sum(passes.naive for passes in arranged)
        return (computed, naive) if naive else None

    def shrink(self, request_type: str) -> str | None:
        if not self._serves.get(request_type):
            return super().shrink(request_type)
        clear_torch_cache()
        return self._shrink_packs() if request_type == "loglikelihood" else self._shrink_batches()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self._model_left_out or not self._try("loglikelihood", requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        passes = self._passes_of(requests)
        each = len(requests) / max(1, passes.tokens)
        told = lambda tokens: self.answered(each * tokens)  # noqa: E731
        return packed.log_likelihoods(self.model, passes, told, wide_head=self._wide_head)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if self._model_left_out or not self._try("generate_until", requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._forget(requests)
        groups, others = self._grouped(requests)
        texts: list[str] = [""] * len(requests)
        own_way = super().generate_until([requests[number] for number in others], disable_tqdm)
        for number, text in zip(others, own_way, strict=True):
            texts[number] = text
        for number, text in self._decode(requests, groups):
            texts[number] = text
        return texts

    # -- which way ----------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> dict[str, str]:
        def kind(request_type: str) -> str:
            if not self._serves[request_type]:
                return LM_EVAL
            if request_type == "generate_until":
                return CONTINUOUS if self._continuous else TRIES
            return TRIES_WIDE if self._wide_head else TRIES

        return {request_type: kind(request_type) for request_type in TRIED if request_type in self._there}

    def settle(self, kinds: Mapping[str, str]) -> None:
        self._serves = {request_type: kinds.get(request_type, LM_EVAL) != LM_EVAL for request_type in TRIED}
        self._wide_head = kinds.get("loglikelihood") == TRIES_WIDE
        self._continuous = kinds.get("generate_until") == CONTINUOUS

    def _saves(self, requests: Sequence[Instance]) -> bool:
        """Whether tries compute so much less that their masks pay; lm-eval too computes equal inputs once."""
        passes = self._passes_of(requests)
        if passes.tokens <= _WORTH_IT * passes.naive:
            return True
        self._passes.clear()
        log.info("log-likelihoods go through lm-eval's own model: the requests share next to nothing")
        return False

    def _try(self, request_type: str, requests: Sequence[Instance]) -> bool:
        """Whether tries serve a request type; tried once, or again where the weights gave nothing to compare."""
        if self._serves[request_type] is None:
            if request_type == "loglikelihood" and not self._saves(requests):
                self._serves[request_type] = False
                return False
            try:
                fault = self._fault(request_type, requests)
            except probe.Undecided:
                return False
            self._serves[request_type] = fault is None
            if fault is not None:
                name = type(self.model).__name__
                log.warning("%s requests to %s go through lm-eval's own model: %s", request_type, name, fault)
        return bool(self._serves[request_type])

    def _fault(self, request_type: str, requests: Sequence[Instance]) -> str | None:
        if self.backend != "causal":
            return "it is no decoder-only model"
        if request_type == "loglikelihood":
            found = probe.packing(self.model, self._queries_of(requests), self._limit)
            self._wide_head = found.wide_head
            return found.fault
        return self._generation_fault(requests)

    def _generation_fault(self, requests: Sequence[Instance]) -> str | None:
        odd = self.odd_generation()
        if odd:
            return f"its generation configuration sets {odd}"
        if self.eot_token_id not in self.ends():
            return "its generation configuration does not end at the tokenizer's end-of-text token"
        groups, _ = self._grouped(requests)
        prompts = [prompt.tokens for group in groups for prompt in group.prompts]
        if not prompts:
            return None
        longest = max(len(prompt.tokens) + group.most for group in groups for prompt in group.prompts)
        window, _ = packed.sliding_window(self.model)
        if window is not None and window < longest:
            return f"its sliding window of {window} tokens is shorter than a prompt with its answer ({longest} tokens)"
        fault = probe.generation_fault(self.model, prompts, self.tokenizer.pad_token_id)
        if fault is None:
            largest = max(groups, key=lambda group: len(group.prompts))
            stops, rows = self._stops(largest), self._rows_of(largest)
            self._continuous, why = choose(self.model, largest.prompts, stops, self.tokenizer.pad_token_id, rows)
            log.info("continuous batching %s: %s", "is used" if self._continuous else "is not used", why)
        return fault

    def odd_generation(self) -> str:
        """What the model's generation configuration sets and plain greedy decoding leaves out; empty where nothing."""
        return ", ".join(sorted(set(self.model.generation_config.to_diff_dict()) - _HARMLESS))

    # -- log-likelihoods ----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, ...]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._tokens = requests
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _queries_of(self, requests: Sequence[Instance]) -> list[Query]:
        new = [request for request in requests if id(request) not in self._queries]
        if new:
            super().tokenize({"loglikelihood": new})
            for request, (_, context, continuation) in zip(new, self._tokens, strict=True):
                self._queries[id(request)] = request, self._query(context, continuation)
            self._tokens = []
        return [self._queries[id(request)][1] for request in requests]

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        # lm-eval keeps one token more than the model takes, as the last one is only predicted
        inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
        return Query(np.array(inputs, dtype=np.int32), np.array(continuation, dtype=np.int32))

    def _passes_of(self, requests: Sequence[Instance]) -> Passes:
        key = self._key(requests)
        if key not in self._passes:
            self._passes[key] = arrange(self._queries_of(requests), self._limit, self._fill)
        return self._passes[key]

    def _shrink_packs(self) -> str | None:
        longest = max((passes.longest for passes in self._passes.values()), default=self._limit)
        limit = memory.halved(min(longest, self._limit))
        if limit is None:
            return None
        self._limit = limit
        self._passes.clear()
        return f"forward passes now have at most {limit} tokens"

    # -- generation ---------------------------------------------------------------------------------------------

    def _grouped(self, requests: Sequence[Instance]) -> tuple[list[_Alike], list[int]]:
        """(the requests that are decoded greedily, by their conditions; the numbers of those that are not)."""
        key = self._key(requests)
        if key not in self._groups:
            groups: dict[tuple[Any, ...], _Alike] = {}
            others = []
            for number, request in enumerate(requests):
                prompt = self._prompt(number, *request.args)
                if prompt is None:
                    others.append(number)
                    continue
                tokens, until, most = prompt
                group = groups.setdefault((tuple(until), most), _Alike([], until, most))
                group.prompts.append(tokens)
            self._groups[key] = (list(groups.values()), others)
        return self._groups[key]

    def _prompt(self, number: int, context: str, options: dict[str, Any]) -> tuple[Prompt, list[str], int] | None:
        """(the prompt as lm-eval truncates it, what ends the answer, the most tokens), None for lm-eval's own way."""
        kwargs = normalize_gen_kwargs(options, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        if kwargs.get("do_sample") or set(kwargs) - _GREEDY or not 0 < most < self.max_length:
            return None
        tokens, _ = super().tok_batch_encode([context], left_truncate_len=self.max_length - most)
        if not tokens.shape[1]:
            return None
        return Prompt(number, tokens[0].numpy().astype(np.int32)), until, most

    def _decode(self, requests: Sequence[Instance], groups: Sequence[_Alike]) -> list[tuple[int, str]]:
        texts: list[tuple[int, str]] = []
        start, tokens = time.perf_counter(), 0
        decoder = (
            ContinuousDecoder(self.model, sorted(self.ends()))
            if self._continuous
            else GreedyDecoder(self.model, self.tokenizer.pad_token_id)
        )
        for group in groups:
            for prompts, answers in self._answers_of(group, decoder):
                for prompt, (answer, cut) in zip(prompts, answers, strict=True):
                    texts.append((prompt.number, self._text(answer, group.until)))
                    tokens += len(answer)
                    self._lengths.setdefault(question(requests[prompt.number]), []).append(len(answer))
                    if cut:
                        self._cut.add(question(requests[prompt.number]))
                self.answered(len(prompts))
        if texts:
            self.pace.add(tokens, time.perf_counter() - start, decoder.prefill)
        return texts

    def _answers_of(
        self, group: _Alike, decoder: GreedyDecoder | ContinuousDecoder
    ) -> Iterator[tuple[list[Prompt], list[tuple[list[int], bool]]]]:
        """Prompts with their answers, as many at a time as are decoded together."""
        rows, stops = self._rows_of(group), self._stops(group)
        self._largest = max(self._largest, min(len(group.prompts), rows))
        if isinstance(decoder, ContinuousDecoder):
            yield group.prompts, decoder.decode(group.prompts, stops, rows)
            return
        for batch in batches(group.prompts, rows):
            yield batch.prompts, decoder.decode(batch, stops)

    def _stops(self, group: _Alike) -> Stops:
        return Stops(self.tokenizer, group.until, sorted(self.ends()), group.most)

    def _text(self, answer: Sequence[int], until: list[str]) -> str:
        """The text as lm-eval cuts it: what follows the end of thinking, up to the first stop."""
        end = self.think_end_token
        if not isinstance(end, int):
            return postprocess_generated_text(self.tok_decode(answer), stop=until, think_end_token=end)
        places = [place for place, token in enumerate(answer) if token == end]
        text = self.tok_decode(answer[places[-1] + 1 :] if places else answer).lstrip()
        return postprocess_generated_text(text, stop=until, think_end_token=None)

    def _rows_of(self, group: _Alike) -> int:
        longest = max(len(prompt.tokens) for prompt in group.prompts) + group.most
        rows = memory.rows(self.model, longest)
        return rows if self._rows is None else min(rows, self._rows)

    def _shrink_batches(self) -> str | None:
        if self._largest <= 1:
            return super().shrink("generate_until")
        self._rows = self._largest // 2
        self._largest = 0
        return f"batches now have at most {self._rows} prompts"

    def _key(self, requests: Sequence[Instance]) -> tuple[int, ...]:
        key = tuple(id(request) for request in requests)
        self._asked.setdefault(key, list(requests))
        return key
