"""A document as a person reads it: what was asked, what is right, what a model answered."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from mergesearch.evaluate.leaves import FAULTS
from mergesearch.evaluate.scoring import ScoredDocument

# characters of a prompt, of its end, and of an answer
LONGEST = 4_000
# choices that an answer names
CHOICES = 4


@dataclass(frozen=True)
class AskedDocument:
    """What a document asks.

    Attributes:
        prompt: the text before the answer; of a long one the end.
        target: what is right; empty where the task does not say.
    """

    prompt: str
    target: str


def asked(document: ScoredDocument) -> AskedDocument:
    """What a document asks; the model need not have been asked."""
    first = document.requests[0]
    rolling = first.request_type == "loglikelihood_rolling"
    prompt = "" if rolling else str(first.args[0])
    return AskedDocument(_end(prompt), str(first.args[0])[:LONGEST] if rolling else _target(document))


def answered(document: ScoredDocument) -> str:
    """What the weights that were scored last answered: the text, or the choices with their log-probabilities in nats,
    the most probable first."""
    requests = document.requests
    kind = requests[0].request_type
    arguments: list[tuple[Any, ...]] = [cast("tuple[Any, ...]", each.args) for each in requests]
    if kind == "generate_until":
        return str(requests[0].resps[0])[:LONGEST]
    if kind == "loglikelihood_rolling":
        return f"log-probability {_number(requests[0].resps[0]):.2f}"
    choices = sorted(
        ((_number(each.resps[0]), str(given[1])) for each, given in zip(requests, arguments, strict=True)), reverse=True
    )
    lines = [f"{text.strip()[:LONGEST]}   ({logprob:.2f})" for logprob, text in choices[:CHOICES]]
    return "\n".join([*lines, *([f"and {len(choices) - CHOICES} more"] if len(choices) > CHOICES else [])])


def _target(document: ScoredDocument) -> str:
    doc = copy.deepcopy(document.requests[0].doc)
    try:
        target: Any = document.leaf.doc_to_target(doc)
        if isinstance(target, int) and document.leaf.OUTPUT_TYPE == "multiple_choice":
            target = document.leaf.doc_to_choice(doc)[target]  # pyright: ignore[reportAttributeAccessIssue]
    except FAULTS:
        return ""
    if isinstance(target, Sequence) and not isinstance(target, str):
        target = " or ".join(map(str, target))
    return str(target).strip()[:LONGEST]


def _end(text: str) -> str:
    return text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"


def _number(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, (tuple, list)) else answer)
