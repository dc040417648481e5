"""Stands in for vLLM where there is none: what mergesearch asks of it, by transformers, one prompt after another.

`FAKE_VLLM_FAULT` names what goes wrong: `start`, it does not start; `deaf`, it keeps the weights that it got second;
`head`, the head keeps the first weights; `cache`, keys and values of prompts that were asked before stay those of then;
`reset`, its cache is not reset; `once`, its process ends at the first answers after the file that `FAKE_VLLM_MARK`
names is there, and takes that away; `names`, it does not know a tensor.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

__version__ = "9.9.9"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


@dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str
    cumulative_logprob: float | None


@dataclass
class Output:
    outputs: list[Completion]


class LLM:
    def __init__(self, model: str, dtype: str, load_format: str, max_model_len: int, **options: Any) -> None:
        print("whatever a library prints")
        self.fault = os.environ.get("FAKE_VLLM_FAULT", "")
        if self.fault == "start":
            raise ValueError("there is no room for the cache")
        assert load_format == "dummy" and options["enable_prefix_caching"]
        self._most, self._loads = max_model_len, 0
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self._cache: dict[tuple[int, ...], Any] = {}

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        assert name == "reload_weights" and kwargs["is_checkpoint_format"]
        there = self._model.state_dict()
        self._loads += 1
        for tensor, value in kwargs["weights_iterator"]:
            if self.fault == "names":
                raise KeyError(tensor)
            if self.fault == "deaf" and self._loads > 2:
                continue
            if self.fault == "head" and self._loads > 1 and tensor == "lm_head.weight":
                continue
            there[tensor].copy_(value)

    def apply_model(self, change: Any) -> list[None]:
        return [change(self._model)]

    def reset_prefix_cache(self) -> bool:
        if self.fault != "cache":
            self._cache.clear()
        return self.fault != "reset"

    @torch.no_grad()
    def generate(self, prompts: list[Any], settings: list[SamplingParams], use_tqdm: bool) -> list[Output]:
        mark = Path(os.environ.get("FAKE_VLLM_MARK", "nowhere"))
        if self.fault == "once" and mark.exists():
            mark.unlink()
            print("the engine core died", file=sys.stderr, flush=True)
            os._exit(7)
        pairs = zip(prompts, settings, strict=True)
        return [Output([self._answer(prompt["prompt_token_ids"], setting)]) for prompt, setting in pairs]

    def _answer(self, prompt: list[int], settings: SamplingParams) -> Completion:
        assert settings.temperature == 0 and len(prompt) + settings.max_tokens <= self._most
        assert not any(stop == "" for stop in settings.stop)
        ends = self._model.generation_config.eos_token_id
        tokens, total, reason = [], 0.0, "length"
        if tuple(prompt) not in self._cache:
            read = self._model(torch.tensor([prompt[:-1]]), use_cache=True) if len(prompt) > 1 else None
            self._cache[tuple(prompt)] = read and read.past_key_values
        past, last = copy.deepcopy(self._cache[tuple(prompt)]), prompt[-1]
        while len(tokens) < settings.max_tokens:
            out = self._model(torch.tensor([[last]]), past_key_values=past, use_cache=True)
            logprobs, past = out.logits[0, -1].float().log_softmax(-1), out.past_key_values
            token = last = int(logprobs.argmax())
            tokens.append(token)
            total += float(logprobs[token])
            text = self._tokenizer.decode(tokens)
            if token == ends or any(stop in text for stop in settings.stop):
                reason = "stop"
                break
        written = self._tokenizer.decode(tokens[:-1] if tokens[-1] == ends else tokens)
        for stop in settings.stop:
            written = written.split(stop)[0]
        return Completion(written, tokens, reason, None if settings.logprobs is None else total)
