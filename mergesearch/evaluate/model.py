"""lm-eval's own Hugging Face model, which remembers what it tokenized and counts what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import clear_torch_cache


class RememberingLM(HFLM):
    """HFLM over a live model, whose every text is tokenized once for the run.

    Everything else is lm-eval's code, so its figures are lm-eval's figures. `tokenize` walks through the same code with
    the model left out, which fills the memory with exactly what scoring asks for.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self._truncated: set[Any] = set()
        self._cut: set[str] = set()
        self._prompts: list[str] = []
        self._texts: dict[tuple, list[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._batches: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._model_left_out = False
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        if self._device.type == "meta":  # a model without weights: texts become tokens, and nothing is asked
            self._device = torch.device("cpu")

    def tokenize(self, requests: dict[str, list[Instance]]) -> None:
        """Tokenize requests, by request type, as scoring them would."""
        self._model_left_out = True
        try:
            for request_type, instances in requests.items():
                getattr(self, request_type)(instances, disable_tqdm=True)
        finally:
            self._model_left_out = False

    def shrink(self, request_type: str) -> str | None:
        """After running out of memory: free what can be freed, and do less at once; None where nothing is left to do.

        Returns:
            What is smaller now, in a few words.
        """
        clear_torch_cache()
        if self.batch_size_per_gpu == 1:
            return None
        self.batch_size_per_gpu //= 2
        return f"batch size is now {self.batch_size_per_gpu}"

    def was_truncated(self, request: Instance) -> bool:
        """Whether the request's prompt is longer than the model's context, so that its beginning is lost."""
        return (request.args[0] if request.request_type == "generate_until" else request.args) in self._truncated

    def was_cut(self, request: Instance) -> bool:
        """Whether the last answer to the request ended at the token limit and nowhere else."""
        return request.args[0] in self._cut

    def mark_cut(self, request: Instance, cut: bool) -> None:
        """Makes `was_cut` say so, of an answer that was kept from before."""
        (self._cut.add if cut else self._cut.discard)(request.args[0])

    def can_generate(self, text: str) -> bool:
        """Whether the logits after `text` are numbers: greedy decoding hides NaN, log-likelihoods show it."""
        tokens = torch.tensor([self.tok_encode(text)[-self.max_length :]], device=self.device)
        if tokens.numel() == 0:
            return True
        # -inf is how some models mask a part of the vocabulary
        return bool(torch.isfinite(self._model_call(tokens).amax(dim=-1)).all())

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        key = (string, add_special_tokens, left_truncate_len, *sorted(kwargs.items()))
        if key not in self._texts:
            self._texts[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return self._texts[key]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        key = (context, continuation)
        if key not in self._pairs:
            self._pairs[key] = super()._encode_pair(context, continuation)
            # contexts are shared between choices, the whole text is asked for by nobody else
            self._texts.pop((context + continuation, None, None), None)
        return self._pairs[key]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = (tuple(strings), padding_side, left_truncate_len, truncation)
        self._prompts = list(strings)
        if key not in self._batches:
            self._batches[key] = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
            if left_truncate_len:
                self._truncated.update(text for text in strings if len(self.tok_encode(text)) > left_truncate_len)
        return self._batches[key]

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._model_left_out:
            for arguments, context, continuation in requests:
                if arguments is not None and len(context) + len(continuation) > self.max_length + 1:
                    self._truncated.add(arguments)
            return [(0.0, False)] * len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._cut.difference_update(request.args[0] for request in requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        if self._model_left_out:
            return context
        prompts = self._prompts
        tokens = super()._model_generate(context, max_length, stop, **kwargs)
        if tokens.shape[1] >= max_length:
            answers = tokens[:, context.shape[1] :].tolist()
            self._cut.update(p for p, a in zip(prompts, answers, strict=True) if not self._ended(a, stop))
        return tokens

    def _ended(self, answer: Sequence[int], stop: Sequence[str]) -> bool:
        text = self.tokenizer.decode(answer)
        return not self.ends().isdisjoint(answer) or any(term in text for term in stop if term)

    def ends(self) -> set[int]:
        """The token ids that end a sequence, as the model's generation configuration has them."""
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
