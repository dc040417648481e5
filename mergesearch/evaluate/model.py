"""lm-eval's own Hugging Face model, which remembers what it tokenized and counts what was cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import clear_torch_cache

if TYPE_CHECKING:

    class _HFLM:
        """What is used of HFLM, with HFLM's own types.

        lm-eval registers its models by a decorator without types, and says nowhere that it is typed: whoever checks
        code that uses this package would see neither HFLM nor what is made of it.
        """

        tokenizer: Any
        backend: str
        think_end_token: str | int | None
        batch_size_per_gpu: int
        _device: torch.device

        def __init__(self, pretrained: Any, *, tokenizer: Any, batch_size: int, **options: Any) -> None: ...
        @property
        def model(self) -> Any: ...
        @property
        def device(self) -> torch.device: ...
        @property
        def batch_size(self) -> int: ...
        @property
        def max_length(self) -> int: ...
        @property
        def max_gen_toks(self) -> int: ...
        @property
        def eot_token_id(self) -> int: ...
        @property
        def prefix_token_id(self) -> int: ...
        @property
        def tokenizer_name(self) -> str: ...
        def set_cache_hook(self, cache_hook: Any) -> None: ...
        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str: ...
        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]: ...
        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]: ...
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str: ...
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]: ...
        def _model_call(self, inps: torch.Tensor) -> torch.Tensor: ...
        def _model_generate(
            self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
        ) -> torch.Tensor: ...
        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, ...]], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]: ...
        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]: ...
        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]: ...
        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]: ...

else:
    _HFLM = HFLM


# by what requests are answered: lm-eval's own model, token tries, and these with the model's head in float32
LM_EVAL, TRIES, TRIES_WIDE = "lm_eval", "tries", "tries, head in float32"
# the types of request that tries may answer
TRIED = ("loglikelihood", "generate_until")


class _Answers:
    """In the place of lm-eval's cache: counts the answers as they come, and keeps none."""

    def __init__(self, answered: Callable[[float], None]):
        self._answered = answered

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if kind != "loglikelihood_rolling":  # all of these come at the end: their windows are counted
            self._answered(1)


class RememberingLM(_HFLM):
    """HFLM over a live model, whose every text is tokenized once for the run.

    Everything else is lm-eval's code, so its figures are lm-eval's figures. `tokenize` walks through the same code with
    the model left out, which fills the memory with exactly what scoring asks for.

    Attributes:
        answered: called with how many more requests were answered, batch by batch; a text in several windows in parts.

    Args:
        thinking: `enable_thinking` and `think_end_token`, as HFLM takes them.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, **thinking: Any) -> None:
        # by what was asked, as `question` gives it: tasks may share prompts and not what becomes of them
        self._truncated: set[tuple[str, ...]] = set()
        self._cut: set[tuple[str, ...]] = set()
        # the tokens of each answer to a question: as many as it is repeated
        self._lengths: dict[tuple[str, ...], list[float]] = {}
        # of the batch under way: its prompts, and the conditions of their generation
        self._prompts: list[str] = []
        self._conditions: str | None = None
        self._texts: dict[tuple[Any, ...], list[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._batches: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._model_left_out = False
        # of all texts that are asked for by loglikelihood_rolling
        self._rolling, self._windows = 0, 0
        self.answered: Callable[[float], None] = lambda count: None
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **thinking)
        if self._device.type == "meta":  # a model without weights: texts become tokens, and nothing is asked
            self._device = torch.device("cpu")
        self.set_cache_hook(_Answers(lambda count: self.answered(count)))

    def tokenize(self, requests: dict[str, list[Instance]]) -> None:
        """Tokenize requests, by request type, as scoring them would."""
        self._model_left_out = True
        self._rolling += len(requests.get("loglikelihood_rolling", ()))
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
        self.batch_size_per_gpu: int = self.batch_size_per_gpu // 2
        return f"batch size is now {self.batch_size_per_gpu}"

    def was_truncated(self, request: Instance) -> bool:
        """Whether the request's prompt is longer than the model's context, so that its beginning is lost."""
        return question(request) in self._truncated

    def was_cut(self, request: Instance) -> bool:
        """Whether the last answer to the request ended at the token limit and nowhere else."""
        return request.request_type == "generate_until" and question(request) in self._cut

    def mark_cut(self, request: Instance, cut: bool) -> None:
        """Makes `was_cut` say so, of an answer that was kept from before."""
        (self._cut.add if cut else self._cut.discard)(question(request))

    def length_of(self, request: Instance) -> float | None:
        """How many tokens were generated for the request, what ended the answer counted; the mean over its repeats.
        None where nothing is generated, or where that is not known."""
        lengths = self._lengths.get(question(request)) if request.request_type == "generate_until" else None
        return sum(lengths) / len(lengths) if lengths else None

    def mark_length(self, request: Instance, length: float | None) -> None:
        """Makes `length_of` say so, of an answer that was kept from before."""
        if length is not None:
            self._lengths[question(request)] = [length]

    def _forget(self, requests: Sequence[Instance]) -> None:
        """What is known of earlier answers to these requests."""
        for key in map(question, requests):
            self._cut.discard(key)
            self._lengths.pop(key, None)

    def work(self) -> tuple[int, int] | None:
        """(tokens that the log-likelihoods compute, tokens of one sequence for each distinct request); None where
        every request is computed for itself, as lm-eval does."""
        return None

    @property
    def kinds(self) -> dict[str, str]:
        """By what each type of request that tries may answer is answered, as far as there are such requests: LM_EVAL,
        TRIES or TRIES_WIDE. Scores by different ones differ by rounding, and are not to be compared."""
        return {}

    def settle(self, kinds: Mapping[str, str]) -> None:
        """Answers as `kinds` of another process says, from now on; what it does not say goes through lm-eval."""

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

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of what follows it, as `TemplateLM.loglikelihood` takes them: where there is no
        context, the token that begins a text stands for it. A continuation may come out empty, which lm-eval fails on.
        """
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], tokens) if tokens[:1] != [prefix] else (tokens[:1], tokens[1:])

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
        if left_truncate_len and self._conditions is not None:
            long = [text for text in strings if len(self.tok_encode(text)) > left_truncate_len]
            self._truncated.update(("generate_until", text, self._conditions) for text in long)
        return self._batches[key]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, ...]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._model_left_out:
            for arguments, context, continuation in requests:
                if arguments is not None and len(context) + len(continuation) > self.max_length + 1:
                    self._truncated.add(("loglikelihood", *arguments))
            self._windows += sum(arguments is None for arguments, _, _ in requests)
            return [(0.0, False)] * len(requests)
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if requests and requests[0][0] is None:
            self.answered(len(requests) * self._rolling / max(1, self._windows))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._forget(requests)
        # lm-eval makes its batches of requests with equal conditions too, so that one call for each of them gives the
        # same batches in the same order
        numbers: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            numbers.setdefault(_conditions(request), []).append(number)
        texts = [""] * len(requests)
        try:
            for self._conditions, chosen in numbers.items():
                answers = super().generate_until([requests[number] for number in chosen], disable_tqdm=disable_tqdm)
                for number, text in zip(chosen, answers, strict=True):
                    texts[number] = text
        finally:
            self._conditions = None
        return texts

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        if self._model_left_out:
            return context
        if not context.shape[1]:
            # beside longer prompts one without a token is padding alone, and so it is without them; lm-eval fails there
            padding = torch.full((len(context), 1), self.tokenizer.pad_token_id, device=self.device)
            kwargs["attention_mask"] = torch.zeros_like(padding)
            return self._model_generate(padding, max_length + 1, stop, **kwargs)[:, 1:]
        prompts, conditions = self._prompts, self._conditions
        tokens = super()._model_generate(context, max_length, stop, **kwargs)
        answers = tokens[:, context.shape[1] :].tolist()
        for prompt, answer in zip(prompts, answers, strict=True):
            key = ("generate_until", prompt, str(conditions))
            self._lengths.setdefault(key, []).append(self._length(answer, stop))
        if tokens.shape[1] >= max_length:
            cut = [prompt for prompt, answer in zip(prompts, answers, strict=True) if not self._ended(answer, stop)]
            self._cut.update(("generate_until", prompt, str(conditions)) for prompt in cut)
        return tokens

    def _ended(self, answer: Sequence[int], stop: Sequence[str]) -> bool:
        text = self.tokenizer.decode(answer)
        return not self.ends().isdisjoint(answer) or any(term in text for term in stop if term)

    def _length(self, answer: Sequence[int], stop: Sequence[str]) -> int:
        """How many tokens an answer took: others in the batch may go on after it has ended."""
        ends, stops = self.ends(), [term for term in stop if term]
        high = next((place for place, token in enumerate(answer, start=1) if token in ends), len(answer))

        def ended(count: int) -> bool:
            text = self.tokenizer.decode(answer[:count])
            return any(term in text for term in stops)

        if not high or not ended(high):
            return high
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if ended(middle) else (middle, high)
        return high

    def ends(self) -> set[int]:
        """The token ids that end a sequence, as the model's generation configuration has them."""
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _conditions(request: Instance) -> str:
    """Under which conditions a text is generated: lm-eval's generation arguments in one spelling."""
    return json.dumps(request.arguments[1], sort_keys=True, default=repr)


def question(request: Instance) -> tuple[str, ...]:
    """What the model is asked: requests of equal questions get equal answers, up to sampling."""
    if request.request_type == "generate_until":
        return ("generate_until", request.args[0], _conditions(request))
    return (request.request_type, *request.args)
