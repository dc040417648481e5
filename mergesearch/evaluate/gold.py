"""What is right in a document of an lm-eval task, as lm-eval takes it, and how probable the answers make it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.api.utils import maybe_delimit

from mergesearch.evaluate.leaves import aggregations

# What a task can be scored on beside its own metrics: the mean of the probability, or of its logarithm.
METRICS = ("gold_prob", "gold_logprob")


def gold_choice(leaf: LmEvalTask, doc: dict[str, Any]) -> int | tuple[int, ...] | None:
    """Which of a document's choices is right.

    Args:
        leaf: an lm-eval task.
        doc: one of its documents.

    Returns:
        The position among the document's choices, which is the `idx` of the choice's log-likelihood request; a tuple of
        positions where the task has several right ones. None where it cannot be known: the task has no choices, it
        scores them by code of its own (`process_results`), or what it names as right is none of them, which lm-eval
        counts as wrong whatever is answered.
    """
    if not _is(leaf, "multiple_choice") or callable(leaf.config.process_results):
        return None
    choices = leaf.doc_to_choice(doc)
    # as in ConfigurableTask.process_results: where the prompts are the choices, doc_to_text says which is right
    right = leaf.doc_to_text(doc) if leaf.multiple_input else leaf.doc_to_target(doc)
    if isinstance(right, (list, tuple)):
        positions = [_position(each, choices) for each in right]
        known = {position for position in positions if position is not None}
        return None if None in positions or not known else tuple(sorted(known))
    return _position(right, choices)


def gold_text(leaf: LmEvalTask, doc: dict[str, Any], chat: bool = False) -> str | None:
    """What the model should write after a document's prompt, to the letter.

    Args:
        leaf: an lm-eval task.
        doc: one of its documents.
        chat: whether prompts go through a chat template, which stands in the place of the task's delimiter.

    Returns:
        For `generate_until` the target after its delimiter, the first where there are several; for `loglikelihood` the
        continuation that is asked for; for `loglikelihood_rolling` the whole text, which has no prompt. None for tasks
        with choices, see `gold_choice`, and where there is no target text.
    """
    if _is(leaf, "loglikelihood") or _is(leaf, "loglikelihood_rolling"):
        target = leaf.doc_to_target(doc)
        return target if isinstance(target, str) and target else None
    if not _is(leaf, "generate_until"):
        return None
    target = _target(leaf, doc)
    return _delimited(leaf, doc, target, chat) if target else None


def is_answered(leaf: LmEvalTask) -> bool:
    """Whether the answers to a task's requests hold the probability of what is right: it has choices, or one target."""
    own_code = isinstance(leaf, ConfigurableTask) and callable(leaf.config.process_results)
    return _is(leaf, "loglikelihood") or (_is(leaf, "multiple_choice") and not own_code)


def gold_logprob(leaf: LmEvalTask, right: Any, answers: Sequence[float]) -> float:
    """The log-probability of what is right, from the answers to one document's requests.

    For a task with choices log(sum over the right ones of e^l / sum over all of e^l), the softmax over the choices'
    log-likelihoods l; else the log-likelihood of the target text.

    Args:
        leaf: a task that `is_answered`.
        right: what `gold_choice` gave.
        answers: log-likelihoods in nats, by `idx`.

    Returns:
        At most 0, in nats; NaN where what is right is not known.
    """
    if _is(leaf, "loglikelihood"):
        return float(answers[0])
    if right is None:
        return math.nan
    # for mutual information each choice is asked for once more, without the prompt
    count = len(answers) // 2 if "acc_mutual_info" in aggregations(leaf) else len(answers)
    logits = np.asarray(answers[:count], dtype=np.float64)
    chosen = logits[[right] if isinstance(right, int) else list(right)]
    return float(min(0.0, np.logaddexp.reduce(chosen) - np.logaddexp.reduce(logits)))


def mean_probability(leaf: LmEvalTask, logprobs: np.ndarray) -> float | None:
    """What `TaskScore.gold` says, from [n] `gold_logprob`s; None where all of them are NaN."""
    known = logprobs[np.isfinite(logprobs)]
    if not len(known):
        return None
    # targets may be long, and the mean of their probabilities that of the shortest ones
    return float(np.exp(known.mean()) if _is(leaf, "loglikelihood") else np.exp(known).mean())


def _is(leaf: LmEvalTask, output_type: str) -> TypeGuard[ConfigurableTask]:
    return isinstance(leaf, ConfigurableTask) and output_type == leaf.OUTPUT_TYPE


def _position(right: Any, choices: Sequence[str]) -> int | None:
    if isinstance(right, str):
        if right in choices:
            return list(choices).index(right)
        # a field of digits; those that come out of a template are numbers already
        right = int(right) if right.isdecimal() else None
    if isinstance(right, float) and right.is_integer():
        right = int(right)
    return int(right) if isinstance(right, int) and 0 <= right < len(choices) else None


def _target(leaf: ConfigurableTask, doc: dict[str, Any]) -> str | None:
    target = leaf.doc_to_target(doc)
    if leaf.config.doc_to_choice is not None:
        choices = leaf.doc_to_choice(doc)
        position = _position(target, choices)
        return None if position is None else choices[position]
    if isinstance(target, (list, tuple)):
        target = target[0] if target else None
    return None if target is None else str(target)


def _delimited(leaf: ConfigurableTask, doc: dict[str, Any], target: str, chat: bool) -> str:
    """As few-shot examples show it, see ConfigurableTask.build_qa_turn."""
    prefix = leaf.resolve_field(doc, leaf.config.gen_prefix)
    if prefix:
        return maybe_delimit(prefix, target, delimiter=" ")[len(prefix) :]
    return target if chat else f"{leaf.config.target_delimiter}{target}"
