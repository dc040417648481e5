"""Differentiable losses of documents, under the weights that the live model holds now.

What lm-eval counts right is no function that a gradient could follow; these losses are, and they fall where the counts
rise. Texts, few-shot examples and tokens are those of the scorer, so are truncation and the choice of documents.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils_hf import clear_torch_cache
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.gold import gold_choice, gold_text
from mergesearch.evaluate.leaves import choices as choices_of
from mergesearch.evaluate.scoring import ScoredDocument, Scorer, out_of_memory

log: logging.Logger = logging.getLogger(__name__)

Documents = Mapping[str, Sequence[int]]  # task -> its documents
Kind = Literal["cross_entropy", "expected", "mixed", "entropy"]
Take = Callable[[str, Sequence[int], Tensor], None]
Pair = tuple[str, int]  # (task, document)
TakeTogether = Callable[[Sequence[Pair], Tensor], None]

# the most tokens, padding and all choices counted, of a batch that has documents of several tasks: what is saved is a
# pass over the weights, and memory is to be no more than one task's documents may take
MOST_TOKENS = 4096

# of the cross-entropy in the mixed loss, by results/soup-settings.md
MIX = 0.03
# stands for an answer that is not known: what follows the prompt is looked at before it
_ANYTHING = "."

# What divides a choice's log-likelihood before choices are compared, by metric.
_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


@dataclass(frozen=True)
class Tokens:
    """Tokens that go into the model, and those that its last rows should predict."""

    inputs: list[int]
    targets: list[int]


@dataclass(frozen=True)
class _Choices:
    """Cross-entropy over the choices: minus the log of the share that the right ones have of exp(ll / length); or the
    entropy of these shares, for which nothing need be right."""

    sequences: tuple[Tokens, ...]
    lengths: tuple[float, ...]
    gold: tuple[int, ...]

    def loss(self, sums: Tensor, kind: Kind) -> Tensor:
        logits = sums / sums.new_tensor(self.lengths)
        if kind == "entropy":
            shares = logits.log_softmax(0)
            return -(shares.exp() * shares).sum()
        missed = -logits.log_softmax(0)[list(self.gold)].logsumexp(0)
        return _mixed(missed, missed, kind)

    @property
    def right(self) -> tuple[Tokens, ...]:
        return (self.sequences[self.gold[0]],)


@dataclass(frozen=True)
class _Text:
    """Minus the log-likelihood of a text in `units`: of so many tokens, or of so many bytes in bits; `whole` where it
    is right as a whole or not at all. Of entropies, summed over its targets, the mean."""

    sequences: tuple[Tokens, ...]
    units: float
    whole: bool

    def loss(self, sums: Tensor, kind: Kind) -> Tensor:
        if kind == "entropy":
            return sums.sum() / sum(len(s.targets) for s in self.sequences)
        mean = -sums.sum() / self.units
        return _mixed(-sums.sum(), mean, kind) if self.whole else mean

    @property
    def right(self) -> tuple[Tokens, ...]:
        return self.sequences


def _mixed(missed: Tensor, mean: Tensor, kind: Kind) -> Tensor:
    """Minus the log-probability of what is right, the chance of what is wrong, or that and a little of the former.

    Args:
        missed: minus that log-probability, nats.
        mean: the same in the units of a cross-entropy.
    """
    if kind == "cross_entropy":
        return mean
    wrong = -torch.expm1(-missed)
    return wrong + MIX * mean if kind == "mixed" else wrong


class Losses:
    """Losses of the documents that a scorer scores.

    - multiple choice: the cross-entropy over the choices, whose logits are their summed log-likelihoods, divided by
      their length where the metric is acc_norm (characters) or acc_bytes; with several right choices, of any of them;
    - generated answers and single targets: the cross-entropy of the target's tokens given the prompt, nats, the mean
      over tokens; a generated answer's target ends with the first of the task's stops that is white space, since an
      answer that does not end is not the right one;
    - whole texts (loglikelihood_rolling): bits per byte.

    `kind: expected` takes in the place of a cross-entropy the chance that an answer drawn from the model is wrong:
    1 - p(the right choices), 1 - p(the whole target). That is nearer to what accuracy and exact match count, and says
    less about what is far from right.

    `kind: mixed` is that and `MIX` times the cross-entropy, so that what is far from right has a slope too.

    `kind: entropy` needs no answers: how unsure the model is, nats, of the choices (divided by length as above), of the
    first token of an answer or a target, of every token of a whole text. Yang et al., "AdaMerging", 2023,
    arXiv:2310.02575. It says nothing of what is right: a model that is sure of what is wrong has the least of it too.

    Args:
        scorer: of all documents that will be asked for; its tokenizer, few-shot examples and truncation count.
        model: the live model.
        batch_size: the most documents at once; halved for good whenever memory runs out.

    Raises:
        UserError: a task whose right answers its documents do not tell, by name.
    """

    def __init__(self, scorer: Scorer, model: Any, batch_size: int = 16, kind: Kind = "cross_entropy"):
        self.model: Any = model
        self.batch_size: int = batch_size
        self.kind: Kind = kind
        self._lm = scorer.language_model
        self._chat = scorer.chat
        self._documents: dict[str, dict[int, _Choices | _Text]] = {}
        for document in scorer.documents():
            known = self._documents.setdefault(document.task.label, {})
            read = self._read(document)
            if read is not None:
                known[document.number] = read
        for label in (label for label, known in self._documents.items() if not known):
            raise UserError(
                f"task {label!r}: its documents do not tell the right answer, so that there is no loss to learn by: "
                "search without gradients (optimizer: cmaes)"
            )

    @property
    def tasks(self) -> list[str]:
        """The tasks' labels."""
        return list(self._documents)

    def known(self, documents: Documents) -> dict[str, list[int]]:
        """Those of the documents that have a loss; a document whose right answer is unknown has none."""
        return {
            label: [number for number in ids if number in self._documents[label]] for label, ids in documents.items()
        }

    def loss(self, documents: Documents) -> dict[str, Tensor]:
        """For each task its documents' losses, float32, [n], in the order given; differentiable where the caller asks
        for gradients, and then all of it is held at once: `walk` holds one batch.

        Raises:
            CandidateError: out of memory with one document at a time.
        """
        kept: dict[str, dict[int, Tensor]] = {label: {} for label in documents}

        def keep(label: str, ids: Sequence[int], losses: Tensor) -> None:
            kept[label].update(zip(ids, losses, strict=True))

        self.walk(documents, keep)
        return {label: torch.stack([kept[label][number] for number in ids]) for label, ids in documents.items()}

    def walk(self, documents: Documents, take: Take, undo: Callable[[], None] = lambda: None) -> None:
        """Calls `take(task, documents, losses)` batch by batch: losses float32, [documents].

        Args:
            take: may run the backward pass.
            undo: called when memory ran out in the middle of a batch, which is then taken again in halves.

        Raises:
            CandidateError: out of memory with one document at a time.
        """
        for label, ids in documents.items():
            waiting = [(label, number) for number in sorted(ids, key=lambda each: (self._length(label, each), each))]
            self._walk(waiting, partial(_of_one_task, take), undo, math.inf)

    def walk_together(self, documents: Documents, take: TakeTogether, undo: Callable[[], None] = lambda: None) -> None:
        """Calls `take([(task, document), ...], losses)` batch by batch: losses float32, [documents]. A batch has
        documents of several tasks, as far as it stays within `MOST_TOKENS` with padding; so a step of learning on few
        documents of many tasks is one backward pass and not one for each task.

        Args and errors: as for `walk`.
        """
        everything = [(label, number) for label, ids in documents.items() for number in ids]
        self._walk(sorted(everything, key=lambda pair: (self._length(*pair), pair)), take, undo, MOST_TOKENS)

    def gold_sequences(self, documents: Documents) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, attention mask), int64, [documents, longest]: prompts with their right answers, batch by batch."""
        for label, ids in documents.items():
            ordered = sorted(ids, key=lambda number: (self._length(label, number), number))
            for start in range(0, len(ordered), self.batch_size):
                chosen = ordered[start : start + self.batch_size]
                yield self._padded([s for number in chosen for s in self._document(label, number).right])

    # --- reading -----------------------------------------------------------------------------------------------

    def _read(self, document: ScoredDocument) -> _Choices | _Text | None:
        kind, first = document.leaf.OUTPUT_TYPE, document.requests[0]
        if kind == "multiple_choice":
            return self._choices(document)
        if kind == "loglikelihood_rolling":
            return self._rolling(first.args[0])
        text = first.arguments[1] if kind == "loglikelihood" else self._answer(document)
        if not text and self.kind == "entropy":
            text = _ANYTHING
        sequence = self._sequence(first.args[0], text) if text else None
        if sequence is None or not sequence.targets:
            return None
        if self.kind == "entropy" and document.task.metric != "perplexity":
            begin = len(sequence.inputs) - len(sequence.targets)
            sequence = Tokens(sequence.inputs[: begin + 1], sequence.targets[:1])
        # perplexity looks at the likelihood, which is no matter of right or wrong
        return _Text((sequence,), len(sequence.targets), document.task.metric != "perplexity")

    def _choices(self, document: ScoredDocument) -> _Choices | None:
        gold = gold_choice(document.leaf, document.requests[0].doc)
        if gold is None and self.kind == "entropy":
            gold = ()
        if gold is None:
            return None
        choices = choices_of(document.leaf, document.requests[0].doc)
        # acc_mutual_info asks for every choice once more, without its context
        requests = document.requests[: len(choices)]
        length = _LENGTHS.get(document.task.metric)
        return _Choices(
            tuple(self._sequence(*request.args) for request in requests),
            tuple(float(length(choice)) or 1.0 if length else 1.0 for choice in choices),
            (gold,) if isinstance(gold, int) else gold,
        )

    def _answer(self, document: ScoredDocument) -> str | None:
        """The text that a generated answer should be, with what ends it."""
        request: Instance = document.requests[0]
        text = gold_text(document.leaf, request.doc, self._chat)
        if text is None:
            return None
        stops = request.arguments[1].get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        return text + next((stop for stop in stops if stop and stop.isspace()), "")

    def _rolling(self, text: str) -> _Text:
        windows = get_rolling_token_windows(
            token_list=self._lm.tok_encode(text),
            prefix_token=self._lm.prefix_token_id,
            max_seq_len=self._lm.max_length,
            context_len=1,
        )
        sequences = tuple(self._cut(*make_disjoint_window(window)) for window in windows)
        return _Text(sequences, max(1, len(text.encode("utf-8"))) * math.log(2), False)

    def _sequence(self, context: str, continuation: str) -> Tokens:
        return self._cut(*self._lm.pair(context, continuation))

    def _cut(self, context: list[int], continuation: list[int]) -> Tokens:
        """The last tokens that the model takes, as HFLM keeps them: one more, for that is only predicted."""
        inputs = (context + continuation)[-(self._lm.max_length + 1) :][:-1]
        return Tokens(inputs, continuation[-len(inputs) :] if inputs else [])

    def _document(self, label: str, number: int) -> _Choices | _Text:
        try:
            return self._documents[label][number]
        except KeyError:
            raise UserError(f"task {label!r}: document {number} is not among the scorer's documents") from None

    def _length(self, label: str, number: int) -> int:
        return max((len(s.inputs) for s in self._document(label, number).sequences), default=0)

    # --- computing ---------------------------------------------------------------------------------------------

    def _walk(self, waiting: Sequence[Pair], take: TakeTogether, undo: Callable[[], None], tokens: float) -> None:
        """Takes all of them in batches of one task, or of several within so many tokens; by length, so that little is
        padding."""
        while waiting:
            part = waiting[: self._batch_length(waiting, tokens)]
            if self._taken(part, take, undo):
                waiting = waiting[len(part) :]

    def _batch_length(self, waiting: Sequence[Pair], tokens: float) -> int:
        """How many of the next documents, which are sorted by length, are a batch."""
        count = sequences = 0
        mixed = False
        for label, number in waiting[: self.batch_size]:
            sequences += len(self._document(label, number).sequences)
            mixed = mixed or label != waiting[0][0]
            if mixed and sequences * self._length(label, number) > tokens:
                break
            count += 1
        return count

    def _taken(self, pairs: Sequence[Pair], take: TakeTogether, undo: Callable[[], None]) -> bool:
        try:
            take(pairs, self._batch(pairs))
            return True
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        # outside the handler: the traceback holds on to the tensors
        undo()
        clear_torch_cache()
        if len(pairs) == 1:
            raise CandidateError(f"out of memory with one document at a time: {reason}")
        self.batch_size = max(1, len(pairs) // 2)
        log.warning("out of memory: losses are now taken of %d documents at once", self.batch_size)
        return False

    def _batch(self, pairs: Sequence[Pair]) -> Tensor:
        documents = [self._document(*pair) for pair in pairs]
        unsure = [self.kind == "entropy" and isinstance(d, _Text) for d in documents for _ in d.sequences]
        sums = self._sums([s for document in documents for s in document.sequences], unsure)
        parts = sums.split([len(document.sequences) for document in documents])
        return torch.stack([document.loss(part, self.kind) for document, part in zip(documents, parts, strict=True)])

    def _sums(self, sequences: Sequence[Tokens], unsure: Sequence[bool]) -> Tensor:
        """[sequences] summed log-probabilities of the targets, float32; where `unsure`, entropies instead."""
        device = self.model.device
        owners = [row for row, s in enumerate(sequences) for _ in s.targets]
        places = [place for s in sequences for place in range(len(s.inputs) - len(s.targets), len(s.inputs))]
        rows, columns = torch.tensor(owners, device=device), torch.tensor(places, device=device)
        targets = torch.tensor([token for s in sequences for token in s.targets], device=device)
        tokens, mask = self._padded(sequences)
        logits = _picked_logits(self.model, tokens, mask, rows, columns)
        # a model in float64 keeps it
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        if any(unsure):
            shares = logits.log_softmax(-1)
            entropies = -(shares.exp() * shares).sum(-1)
            logprobs = torch.where(torch.tensor(unsure, device=device)[rows], entropies, logprobs)
        return logprobs.new_zeros(len(sequences)).index_add(0, rows, logprobs)

    def _padded(self, sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        width = max(len(s.inputs) for s in sequences)
        pad = self._lm.tokenizer.pad_token_id or 0
        tokens = torch.tensor([[*s.inputs, *[pad] * (width - len(s.inputs))] for s in sequences])
        mask = torch.tensor([[1] * len(s.inputs) + [0] * (width - len(s.inputs)) for s in sequences])
        return tokens.to(self.model.device), mask.to(self.model.device)


def _picked_logits(model: Any, tokens: Tensor, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[picks, vocabulary]: the logits at (row, column) of a batch; only these rows go through the head."""
    head = model.get_output_embeddings()
    keep = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with _only_rows(head, rows, columns) as picked:
        logits = model(input_ids=tokens, attention_mask=mask, **keep).logits
    return logits[0] if picked else logits[rows, columns]


@contextmanager
def _only_rows(head: Any, rows: Tensor, columns: Tensor) -> Iterator[list[bool]]:
    """What the head is given is cut to the rows that are asked for; the list is empty where it was not called."""
    picked: list[bool] = []

    def pick(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        picked.append(True)
        return (args[0][rows, columns][None], *args[1:])

    if head is None:
        yield picked
        return
    handle = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        handle.remove()


def _of_one_task(take: Take, pairs: Sequence[Pair], losses: Tensor) -> None:
    take(pairs[0][0], [number for _, number in pairs], losses)
