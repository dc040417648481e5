"""Scoring the live model: lm-eval's requests built once, answered again for every candidate.

The loop is lm_eval.evaluator.evaluate's, cut in two: what depends on the documents happens in the constructor, what
depends on the weights in `Scorer.score`.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lm_eval.api.metrics as lm_eval_metrics
import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.defaults import DEFAULT_OTHER_SEED

from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate import gold, statistics
from mergesearch.evaluate.asking import Asked, Count, counts_of
from mergesearch.evaluate.leaves import FAULTS, generates
from mergesearch.evaluate.leaves import reason as _reason
from mergesearch.evaluate.model import CONTINUOUS, LM_EVAL, RememberingLM
from mergesearch.evaluate.nonfinite import watching
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore, load_documents
from mergesearch.evaluate.surroundings import lm_eval_seeds, quiet
from mergesearch.evaluate.tasks import Task

log: logging.Logger = logging.getLogger(__name__)

# A larger share of truncated prompts or of cut answers is worth a warning.
_WORTH_A_WARNING = 0.01
# prompts that are tried to find where NaN comes from
_TRIED = 8


@dataclass(frozen=True, eq=False)
class _TaskPart:
    """The chosen documents of one lm-eval task, with their requests; `right` remembers which choices are right."""

    task: Task
    name: str
    leaf: LmEvalTask
    ids: list[int]
    instances: list[Instance]
    right: dict[int, Any] = field(default_factory=dict)

    def documents(self) -> Iterable[tuple[int, list[Instance]]]:
        """(number in the task, requests in order) for each document; lm-eval counts the chosen ones from 0."""
        requests = defaultdict(list)
        for instance in self.instances:
            requests[_position(instance)].append(instance)
        first = self.task.offset(self.name)
        for position, number in enumerate(self.ids):
            if position in requests:
                yield first + number, sorted(requests[position], key=lambda instance: instance.idx)

    def only(self, documents: Iterable[int]) -> _TaskPart:
        """The part with the requests of some of its documents alone, as `Task` numbers them."""
        wanted, first = set(documents), self.task.offset(self.name)
        return replace(self, instances=[i for i in self.instances if first + self.ids[_position(i)] in wanted])


@dataclass(frozen=True, eq=False)
class ScoredDocument:
    """A document and lm-eval's requests about it, in order; `number` as `Task` numbers them."""

    task: Task
    leaf: LmEvalTask
    number: int
    requests: list[Instance]


class Scorer:
    """Scores whatever weights a live model holds, on fixed documents.

    Args:
        model: a transformers causal LM, already on its device; its weights may change in place between calls.
        tokenizer: its tokenizer; a copy of it is used.
        tasks: as `tasks.load` gives them.
        documents: for each task's label, the documents to score, as `Task` numbers them.
        batch_size: the most requests at once where lm-eval's own model answers; halved for good whenever memory runs
            out. Token tries take their sizes from the free memory.
        scoring: `auto`, by token tries wherever the model takes them; `lm_eval`, by lm-eval's own model alone.
        apply_chat_template, fewshot_as_multiturn, system_instruction: as the options of `lm_eval`.
        attn_implementation: how the model attends, as transformers names it; None leaves what it has.
        enable_thinking, think_end_token: as HFLM takes them.
        shuffle: ask the requests in an order drawn from this seed; None keeps lm-eval's. The few-shot examples of each
            document stay the same.

    Raises:
        UserError: requests that cannot be built from the documents, a missing chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        documents: Mapping[str, Iterable[int]],
        *,
        batch_size: int,
        scoring: str = "auto",
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        system_instruction: str | None = None,
        shuffle: int | None = None,
        attn_implementation: str | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
    ) -> None:
        _check_chat(tokenizer, apply_chat_template, fewshot_as_multiturn)
        self._tasks = list(tasks)
        self.chat: bool = apply_chat_template
        self._shuffle = shuffle
        self._attention = attn_implementation
        _attend(model, attn_implementation)
        thinking = {"enable_thinking": enable_thinking, "think_end_token": think_end_token}
        with quiet():
            self._new_lm: Callable[[type[RememberingLM]], RememberingLM] = lambda kind: kind(
                model, copy.deepcopy(tokenizer), batch_size, **thinking
            )
            self._lm = self._new_lm(_language_model(scoring))
            options = {
                "system_instruction": system_instruction,
                "apply_chat_template": apply_chat_template,
                "fewshot_as_multiturn": fewshot_as_multiturn,
                "chat_template": self._lm.apply_chat_template if apply_chat_template else None,
                "tokenizer_name": self._lm.tokenizer_name if apply_chat_template else "",
            }
            self._parts = [part for task in tasks for part in _build(task, documents[task.label], options)]
            self._requests = _by_type(self._parts, shuffle)
            for part in self._parts:
                _refuse_lengths(part, self._lm)
            self._lm.tokenize(self._requests)
        self._truncated = self._truncated_shares()
        for label, share in self._truncated.items():
            if share > _WORTH_A_WARNING:
                log.warning("task %r: %.1f %% of its prompts are longer than the model's context", label, 100 * share)
        self._warned_of_cuts: set[str] = set()
        # told while the model is asked, batch by batch
        self.asked: Callable[[Asked], None] | None = None

    @property
    def batch_size(self) -> int:
        """The most requests at once, after what running out of memory has taught."""
        return self._lm.batch_size

    @property
    def labels(self) -> list[str]:
        """The tasks that are scored."""
        return [task.label for task in self._tasks]

    @property
    def pace(self) -> str:
        """How fast answers were generated so far, in words; empty where none were."""
        return str(self._lm.pace) if self._lm.pace.tokens and self._lm.pace.seconds else ""

    @property
    def kinds(self) -> dict[str, str]:
        """By what each type of request that token tries may answer is answered; see `model.RememberingLM.kinds`."""
        return self._lm.kinds

    def settle(self, kinds: Mapping[str, str]) -> None:
        """Answers from now on as `kinds` says, which another scorer of the same requests gave."""
        self._lm.settle(kinds)

    def by_lm_eval(self) -> Scorer | None:
        """A scorer of the tasks that token tries answer here, by lm-eval's own model; None where they answer none.

        It shares the requests with this one, and the answers to them.
        """
        tried = {request_type for request_type, kind in self.kinds.items() if kind != LM_EVAL}
        tasks = {part.task.label for part in self._parts for each in part.instances if each.request_type in tried}
        if not tasks:
            return None
        other = copy.copy(self)
        other._tasks = [task for task in self._tasks if task.label in tasks]
        other._parts = [part for part in self._parts if part.task.label in tasks]
        other._requests = _by_type(other._parts, self._shuffle)
        with quiet():
            other._lm = self._new_lm(RememberingLM)
            # the card's command has it, and batches are made of so many
            other._lm.batch_size_per_gpu = self._lm.batch_size_per_gpu
            other._lm.tokenize(other._requests)
        other.asked = None
        return other

    @property
    def requests(self) -> Mapping[str, Sequence[Instance]]:
        """lm-eval's requests by type; `resps` holds the answers of the weights that were scored last."""
        return self._requests

    @property
    def language_model(self) -> RememberingLM:
        """lm-eval's model around the live one: how texts become tokens."""
        return self._lm

    def documents(self) -> Iterator[ScoredDocument]:
        """Every document that is scored, with its requests; not to be changed."""
        for part in self._parts:
            for number, requests in part.documents():
                yield ScoredDocument(part.task, part.leaf, number, requests)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """(tokens that token tries compute for log-likelihoods, tokens without them); None where lm-eval answers."""
        return self._lm.work()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all requests, each for itself: prompts with their continuations, without what is generated."""
        return sum(self._tokens_of(request) for asked in self._requests.values() for request in asked)

    def _tokens_of(self, request: Instance) -> int:
        if request.request_type == "loglikelihood":
            return sum(map(len, self._lm.pair(*request.args)))
        return len(self._lm.tok_encode(request.args[0]))

    def score(self) -> Scores:
        """The scores of the model's present weights.

        Raises:
            CandidateError: log-likelihoods or logits that are no numbers, a figure that is none, a task that fails on
                the answers, out of memory with one request at a time.
        """
        start = time.perf_counter()
        self.answer()
        return replace(self.collect(), seconds=time.perf_counter() - start)

    def answer(self) -> None:
        """Asks the model; `collect` makes scores of what it answers.

        Raises:
            CandidateError: as for `score`.
        """
        with quiet(), lm_eval_seeds():
            self._lm.model.eval()
            # a stack of layers makes the live model another one
            _attend(self._lm.model, self._attention)
            counts = counts_of(self._requests, self._documents_by_type(), self.asked)
            for request_type, requests in self._requests.items():
                with counts[request_type].of_answers(self._lm):
                    self._answer(request_type, requests, counts[request_type])

    def collect(self) -> Scores:
        """The scores of the answers that are there, of all documents; the model is not asked.

        Raises:
            CandidateError: as for `score`.
        """
        with quiet(), lm_eval_seeds():
            scored = {task.label: self._score_task(task) for task in self._tasks}
        return Scores(
            tasks={label: score for label, (score, _) in scored.items()},
            documents={label: documents for label, (_, documents) in scored.items()},
        )

    def only(self, documents: Mapping[str, Iterable[int]]) -> Scorer:
        """A scorer of some of the documents, given by task label; tasks without any are no part of it.

        It shares requests and answers with this one. Once every document was answered by one part or another, `collect`
        here gives the scores of them all. Few-shot examples stay those that the whole choice of documents drew.
        """
        part = copy.copy(self)
        part._tasks = [task for task in self._tasks if documents.get(task.label)]
        some = [each.only(documents.get(each.task.label, ())) for each in self._parts]
        part._parts = [each for each in some if each.instances]
        part._requests = _by_type(part._parts, self._shuffle)
        part._truncated = part._truncated_shares()
        return part

    def answers(self) -> list[list[Any]]:
        """The answers to the requests, as plain data: for each a few numbers or texts, whether they were cut, and how
        many tokens they took where they were generated."""
        every = [each for part in self._parts for each in part.instances]
        return [[list(each.resps), self._lm.was_cut(each), self._lm.length_of(each)] for each in every]

    def restore(self, answers: Sequence[Sequence[Any]]) -> None:
        """Puts back what `answers` gave, after JSON.

        Raises:
            ValueError: they are answers to other requests.
        """
        instances = [instance for part in self._parts for instance in part.instances]
        for instance, (responses, cut, *length) in zip(instances, answers, strict=True):
            instance.resps = [tuple(answer) if isinstance(answer, list) else answer for answer in responses]
            instance.filtered_resps = {}
            self._lm.mark_cut(instance, cut)
            self._lm.mark_length(instance, length[0] if length else None)

    def _documents_by_type(self) -> dict[str, dict[tuple[int, int], str]]:
        """By type of request: the documents that have such requests, with the labels of their tasks."""
        documents: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        for number, part in enumerate(self._parts if self.asked is not None else ()):
            for instance in part.instances:
                documents[instance.request_type][number, _position(instance)] = part.task.label
        return documents

    def _answer(self, request_type: str, requests: list[Instance], count: Count) -> None:
        for request in requests:
            request.resps, request.filtered_resps = [], {}
        answers = self._run(request_type, requests, count)
        for request, answer in zip(requests, answers, strict=True):
            request.resps.append(answer)
        if request_type != "generate_until":
            self._refuse_not_finite(requests, answers)

    def _run(self, request_type: str, requests: list[Instance], count: Count) -> list[Any]:
        while True:
            count.begin()
            try:
                return self._ask(request_type, requests)
            except CandidateError:
                raise
            except Exception as error:
                if not out_of_memory(error):
                    raise CandidateError(f"the model failed on {request_type} requests: {_reason(error)}") from error
                reason = _reason(error)
            # outside the handler: the traceback holds on to the tensors
            smaller = self._lm.shrink(request_type)
            if smaller is None:
                raise CandidateError(f"out of memory with one request at a time: {reason}")
            log.warning("out of memory on %s requests: %s", request_type, smaller)

    def _ask(self, request_type: str, requests: list[Instance]) -> list[Any]:
        ask = getattr(self._lm, request_type)
        if request_type != "generate_until":
            return ask(requests, disable_tqdm=True)
        if not self._lm.can_generate(_shortest(requests)):
            raise self._not_finite("the model's logits are not finite numbers", [_shortest(requests)])
        # its passes may be recorded on the device and played again; to continue nothing says nothing about the weights
        if self._lm.kinds.get(request_type) == CONTINUOUS or not all(request.args[0] for request in requests):
            return ask(requests, disable_tqdm=True)
        with watching(self._lm.model) as watch:
            answers = ask(requests, disable_tqdm=True)
        if watch.found:
            texts = [request.args[0] for request in requests[:_TRIED]]
            raise self._not_finite("logits of generated answers are not finite numbers", texts)
        return answers

    def _refuse_not_finite(self, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
        values = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
        wrong = [position for position, value in enumerate(values) if not math.isfinite(value)]
        if wrong:
            first = requests[wrong[0]]
            raise self._not_finite(
                f"{len(wrong)} of {len(values)} log-likelihoods are not finite numbers "
                f"(the first, in task {first.task_name!r}, is {values[wrong[0]]})",
                ["".join(str(part) for part in first.args)],
            )

    def _not_finite(self, what: str, texts: Sequence[str]) -> CandidateError:
        """The error that says so, and which tensor it comes from, as far as that can be found."""
        try:
            return CandidateError(f"{what}: {self._lm.where_not_finite(texts)}")
        except Exception:  # the fault itself is what has to be told
            log.debug("where NaN comes from was not found", exc_info=True)
            return CandidateError(what)

    def _score_task(self, task: Task) -> tuple[TaskScore, DocumentScores]:
        items = [items for items in (self._items(part) for part in self._parts if part.task is task) if items]
        if not items:
            raise CandidateError(f"task {task.label!r}: no document gave {task.metric}")
        try:
            value = _figure(task, [[item for _, item, _ in leaf] for leaf in items])
            documents = _document_scores(task, [each for leaf in items for each in leaf])
            documents = replace(documents, length=self._lengths(task, documents.ids))
        except FAULTS as error:
            raise CandidateError(f"task {task.label!r}: {task.metric} cannot be computed: {_reason(error)}") from error
        if not math.isfinite(value):
            raise CandidateError(f"task {task.label!r}: {task.metric} is {value}")
        score = TaskScore(
            value=value,
            stderr=_stderr(documents, [len(leaf) for leaf in items]),
            documents=len(documents.ids),
            metric=task.metric,
            filter=task.filter,
            higher_is_better=task.higher_is_better,
            truncated=self._truncated[task.label],
            cut=self._cut(task),
            gold=None if documents.gold is None else gold.mean_probability(_first(task), documents.gold),
            length=_mean_length(documents.length),
        )
        return score, documents

    def _items(self, part: _TaskPart) -> list[tuple[int, Any, float]]:
        if not part.task.counts_tokens:
            return _items(part)
        lengths = ((number, self._length(requests)) for number, requests in part.documents())
        return [(number, length, math.nan) for number, length in lengths if not math.isnan(length)]

    def _lengths(self, task: Task, ids: Sequence[int]) -> np.ndarray | None:
        """The tokens that were generated for documents of a task; None where none of its answers is generated."""
        parts = [part for part in self._parts if part.task is task]
        if not any(generates(part.leaf) for part in parts):
            return None
        lengths = {number: self._length(requests) for part in parts for number, requests in part.documents()}
        return np.array([lengths[number] for number in ids], dtype=np.float64)

    def _length(self, requests: Sequence[Instance]) -> float:
        known = [length for request in requests if (length := self._lm.length_of(request)) is not None]
        return float(np.mean(known)) if known else math.nan

    def _truncated_shares(self) -> dict[str, float]:
        return {task.label: self._share(task, self._lm.was_truncated) for task in self._tasks}

    def _cut(self, task: Task) -> float:
        share = self._share(task, self._lm.was_cut)
        if share > _WORTH_A_WARNING and task.label not in self._warned_of_cuts:
            self._warned_of_cuts.add(task.label)
            log.warning("task %r: %.1f %% of its answers end at the token limit", task.label, 100 * share)
        return share

    def _share(self, task: Task, holds: Callable[[Instance], bool]) -> float:
        requests = [request for part in self._parts if part.task is task for request in part.instances]
        return sum(map(holds, requests)) / max(1, len(requests))


def _mean_length(lengths: np.ndarray | None) -> float | None:
    known = lengths[np.isfinite(lengths)] if lengths is not None else np.zeros(0)
    return float(known.mean()) if len(known) else None


def _attend(model: Any, implementation: str | None) -> None:
    if implementation is None or getattr(model.config, "_attn_implementation", None) == implementation:
        return
    try:
        model.set_attn_implementation(implementation)
    except Exception as error:
        raise UserError(
            f"attn_implementation {implementation!r} cannot be used here ({_reason(error)}): leave it out, or use sdpa "
            "or eager"
        ) from None


def _language_model(scoring: str) -> type[RememberingLM]:
    if scoring == "lm_eval":
        return RememberingLM
    # the only way to the token tries: without them everything works as lm-eval does it
    from mergesearch.evaluate.tries import TrieLM

    return TrieLM


def lm_eval_samples(tasks: Sequence[Task], documents: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """What `lm_eval --samples` takes to score the same documents: ids by lm-eval task, a group's by its tasks."""
    return {name: ids for task in tasks for name, ids in task.place(documents[task.label]).items()}


def _check_chat(tokenizer: Any, apply_chat_template: bool, fewshot_as_multiturn: bool) -> None:
    if fewshot_as_multiturn and not apply_chat_template:
        raise UserError("fewshot_as_multiturn needs a chat template: set apply_chat_template, or leave it out")
    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("apply_chat_template is set and the tokenizer has no chat template: unset it")


def _build(task: Task, documents: Iterable[int], options: Mapping[str, Any]) -> list[_TaskPart]:
    documents = list(documents)
    beyond = next((number for number in documents if not 0 <= number < task.size), None)
    if beyond is not None or not documents:
        what = "no documents were chosen" if beyond is None else f"there is no document {beyond}"
        raise UserError(f"task {task.label!r}: {what}; it has {task.size}, numbered from 0")
    return [
        _TaskPart(task, name, task.leaves[name], ids, _requests_of(task.leaves[name], name, ids, options))
        for name, ids in task.place(documents).items()
    ]


def _requests_of(leaf: LmEvalTask, name: str, ids: list[int], options: Mapping[str, Any]) -> list[Instance]:
    try:
        with lm_eval_seeds():
            # the draw of examples starts again, as in a run of its own
            leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            leaf.build_all_requests(samples=ids, rank=0, world_size=1, **options)
    except FAULTS as error:
        raise UserError(f"task {name!r}: its requests cannot be built: {_reason(error)}") from error
    return list(leaf.instances)


def _refuse_lengths(part: _TaskPart, lm: RememberingLM) -> None:
    """`UserError` for a choice or target that lm-eval fails on: without a token, or longer than the model takes."""
    asked = [each for each in part.instances if each.request_type == "loglikelihood"]
    for request in asked:
        length = len(lm.pair(*request.args)[1])
        if 0 < length <= lm.max_length:
            continue
        number = part.task.offset(part.name) + part.ids[_position(request)]
        what = f"choice {request.idx}" if part.leaf.OUTPUT_TYPE == "multiple_choice" else "its target"
        fault = f"has {length} tokens, and the model takes {lm.max_length} at most" if length else "has no token"
        raise UserError(
            f"task {part.name!r}: {what} of document {number} {fault}, so that it cannot be scored: change the "
            "document, or leave the task out"
        )


def _by_type(parts: Sequence[_TaskPart], shuffle: int | None = None) -> dict[str, list[Instance]]:
    """The requests in the order in which lm-eval asks them, each as often as its task repeats it; or shuffled."""
    requests: dict[str, list[Instance]] = defaultdict(list)
    for part in parts:
        for instance in part.instances:
            requests[instance.request_type].extend([instance] * (instance.repeats or 1))
    if shuffle is not None:
        for asked in requests.values():
            np.random.Generator(np.random.PCG64(shuffle)).shuffle(asked)
    return dict(requests)


def _items(part: _TaskPart) -> list[tuple[int, Any, float]]:
    """(document, its item of the metric, the log-probability of what is right) for the documents that give an item."""
    if part.task.metric in gold.METRICS:
        logprobs = [(number, _logprob(part, number, requests)) for number, requests in part.documents()]
        alike = math.exp if part.task.metric == "gold_prob" else float
        return [(number, alike(logprob), logprob) for number, logprob in logprobs if not math.isnan(logprob)]
    items = []
    try:
        # the task may have built other requests since
        part.leaf._instances = part.instances
        part.leaf.apply_filters()
    except FAULTS as error:
        raise CandidateError(f"task {part.name!r}: filter {part.task.filter!r} failed: {_reason(error)}") from error
    for number, requests in part.documents():
        answers = [request.filtered_resps[part.task.filter] for request in requests]
        try:
            # a task may write into its document
            metrics = part.leaf.process_results(copy.deepcopy(requests[0].doc), answers)
        except FAULTS as error:
            reason = f"cannot process the answers to document {number}: {_reason(error)}"
            raise CandidateError(f"task {part.name!r} {reason}") from error
        if not isinstance(metrics, Mapping):
            raise CandidateError(
                f"task {part.name!r}: process_results gave {type(metrics).__name__} for document {number}: it has to "
                f"return its metrics by name, as {{{part.task.metric!r}: 1.0}}"
            )
        name = _key_of(part, metrics)
        if name in metrics:
            items.append((number, metrics[name], _logprob(part, number, requests)))
    return items


def _key_of(part: _TaskPart, metrics: Mapping[str, Any]) -> str:
    """Under which name a document has the task's metric: a metric may give a figure of another name alone, as
    humaneval's `pass_at_k` gives `pass@1`, and lm-eval then aggregates that like the metric."""
    if part.task.metric in metrics:
        return part.task.metric
    declared = getattr(part.leaf, "_metric_fn_list", {})
    others = [name for name in metrics if name not in declared]
    return others[0] if part.task.metric in declared and len(others) == 1 else part.task.metric


def _logprob(part: _TaskPart, number: int, requests: Sequence[Instance]) -> float:
    if not gold.is_answered(part.leaf):
        return math.nan
    if number not in part.right:
        part.right[number] = _right(part, requests[0].doc)
    return gold.gold_logprob(part.leaf, part.right[number], [request.resps[0][0] for request in requests])


def _right(part: _TaskPart, document: Any) -> Any:
    try:
        # a task may write into its document
        return gold.gold_choice(part.leaf, copy.deepcopy(document))
    except FAULTS as error:
        log.debug("task %r does not say what is right: %s", part.name, _reason(error))
        return None


def _first(task: Task) -> LmEvalTask:
    return next(iter(task.leaves.values()))


def _figure(task: Task, items: Sequence[list[Any]]) -> float:
    """The figure as lm-eval computes it: for a group, its tasks' means weighted by their documents."""
    figures = [task.aggregate(part) for part in items]
    if len(figures) == 1:
        return float(figures[0])
    return float(lm_eval_metrics.aggregate_subtask_metrics(figures, [len(part) for part in items]))


def _document_scores(task: Task, documents: Sequence[tuple[int, Any, float]]) -> DocumentScores:
    items = [item for _, item, _ in documents]
    jackknife = task.aggregation == statistics.JACKKNIFE
    values = _jackknife(items, task) if jackknife else np.array(items, dtype=np.float64)
    logprobs = np.array([logprob for _, _, logprob in documents], dtype=np.float64)
    known = not np.isnan(logprobs).all()
    return DocumentScores([number for number, _, _ in documents], values, task.aggregation, logprobs if known else None)


def _jackknife(items: Sequence[Any], task: Task) -> np.ndarray:
    try:
        return statistics.jackknife_values(items, task.aggregate)
    except FAULTS as error:
        # the figure stands, though a part of the documents has none, as f1 where one class is missing
        log.debug("task %r has no jackknife: %s", task.label, _reason(error))
        return np.full(len(items), np.nan)


def _stderr(documents: DocumentScores, sizes: Sequence[int]) -> float | None:
    if len(sizes) > 1:
        stderr = statistics.pooled_stderr(documents.values, np.repeat(np.arange(len(sizes)), sizes))
    else:
        stderr = statistics.standard_error(documents.values, documents.aggregation)
    return stderr if stderr is not None and math.isfinite(stderr) else None


def _position(request: Instance) -> int:
    """Where its document stands among the chosen ones of its task."""
    assert request.doc_id is not None
    return request.doc_id


def _shortest(requests: Sequence[Instance]) -> str:
    """The shortest prompt that says something: to continue none shows nothing about the weights."""
    return min((text for request in requests if (text := request.args[0])), key=len, default="")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the host or on the device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)


__all__ = ["DocumentScores", "ScoredDocument", "Scorer", "Scores", "TaskScore", "lm_eval_samples", "load_documents"]
