from __future__ import annotations

import copy
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.evaluate_tiny import (
    WORDS,
    greedy,
    make_model,
    make_tokenizer,
    metric,
    write_group,
    write_task,
    write_tasks,
)

from mergesearch.config import TaskConfig
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate import statistics
from mergesearch.evaluate.losses import Losses
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore, load_documents
from mergesearch.evaluate.scoring import Scorer, lm_eval_samples
from mergesearch.evaluate.tasks import load, split

EVERY = {
    "tiny_choice": "acc",
    "tiny_shots": "acc",
    "tiny_fixed": "acc_norm",
    "tiny_last": "acc",
    "tiny_copy": "exact_match,word",
    "tiny_vote": "exact_match",
    "tiny_passages": "bits_per_byte",
}
NONE = {"apply_chat_template": False, "fewshot_as_multiturn": False, "system_instruction": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    write_group(folder, "tiny_group", ["tiny_zero", "tiny_last"])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model(0)


def load_tasks(folder, wanted, **config):
    configs = [TaskConfig(task=name, metric=metric, **config) for name, metric in wanted.items()]
    return load(configs, [str(folder / "tasks")])


def halves(tasks):
    return {task.label: split(task, 0.4, seed=1).search for task in tasks}


def make_scorer(folder, model, tokenizer, wanted=EVERY, batch_size=4, **options):
    tasks = load_tasks(folder, wanted)
    return Scorer(model, tokenizer, tasks, halves(tasks), batch_size=batch_size, **options)


def by_lm_eval(folder, model, tokenizer, tasks, documents, batch_size=4, num_fewshot=None, **options):
    """lm-eval's own figures on the same documents, from a model and a tokenizer of its own."""
    samples = lm_eval_samples(tasks, documents)
    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    manager = TaskManager(include_defaults=False, include_path=str(folder / "tasks"))
    results = simple_evaluate(
        model=lm,
        tasks=[task.label for task in tasks],
        task_manager=manager,
        samples=samples,
        num_fewshot=num_fewshot,
        bootstrap_iters=2,
        log_samples=True,
        **{**NONE, **options},
    )
    return results


def assert_equal(scores, results, tasks):
    for task in tasks:
        ours, theirs = scores.tasks[task.label], results["results"][task.label]
        figure = theirs[f"{task.metric},{task.filter}"]
        # a mean of log-likelihoods shows the rounding of another batch size
        tolerance = 1e-5 if task.aggregation == "perplexity" else 0.0
        assert ours.value == pytest.approx(figure, rel=tolerance, abs=0.0), task.label
        stderr = theirs[f"{task.metric}_stderr,{task.filter}"]
        if task.aggregation == "mean":
            assert ours.stderr == pytest.approx(stderr, rel=1e-12), task.label
            assert len(task.leaves) > 1 or ours.stderr == stderr
        assert ours.documents == len(scores.documents[task.label].ids)
        assert (ours.metric, ours.filter, ours.higher_is_better) == (task.metric, task.filter, task.higher_is_better)


@pytest.fixture(autouse=True)
def _no_pools(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


class TestEqualsLmEval:
    def test_every_request_type_at_once(self, folder, model, tokenizer):
        tasks = load_tasks(folder, EVERY)
        documents = halves(tasks)
        scores = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        results = by_lm_eval(folder, model, tokenizer, tasks, documents)
        assert_equal(scores, results, tasks)
        for task in tasks:
            per_document = scores.documents[task.label]
            assert per_document.ids == documents[task.label]
            logged = [s for s in results["samples"][task.label] if s["filter"] == task.filter]
            assert [s["doc_id"] for s in logged] == per_document.ids
            np.testing.assert_array_equal(per_document.values, [s[task.metric] for s in logged])
        # figures that say something: some answers right, some wrong
        assert all(0 < scores.tasks[name].value < 1 for name in ("tiny_choice", "tiny_last", "tiny_copy", "tiny_vote"))

    @pytest.mark.parametrize(
        ("name", "metric"),
        [
            ("tiny_choice", "acc_norm"),
            ("tiny_last", "perplexity"),
            ("tiny_copy", "exact_match,whole"),
            ("tiny_passages", "byte_perplexity"),
            ("tiny_passages", "word_perplexity"),
            ("tiny_mcc", "mcc"),
            ("tiny_group", "acc"),
        ],
    )
    def test_one_task(self, folder, model, tokenizer, name, metric):
        tasks = load_tasks(folder, {name: metric})
        documents = halves(tasks)
        scores = Scorer(model, tokenizer, tasks, documents, batch_size=3).score()
        results = by_lm_eval(folder, model, tokenizer, tasks, documents, batch_size=3)
        assert_equal(scores, results, tasks)
        assert scores.tasks[name].stderr > 0

    @pytest.mark.parametrize("shots", [0, 1, 5])
    def test_num_fewshot(self, folder, model, tokenizer, shots):
        tasks = load_tasks(folder, {"tiny_choice": "acc", "tiny_shots": "acc", "tiny_fixed": "acc"}, num_fewshot=shots)
        documents = halves(tasks)
        scores = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        results = by_lm_eval(folder, model, tokenizer, tasks, documents, num_fewshot=shots)
        assert_equal(scores, results, tasks)

    @pytest.mark.parametrize("multiturn", [False, True])
    def test_chat_template(self, folder, model, tokenizer, multiturn):
        wanted = {"tiny_shots": "acc", "tiny_last": "acc", "tiny_copy": "exact_match,word"}
        tasks = load_tasks(folder, wanted)
        documents = halves(tasks)
        options = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be brief."}
        scorer = Scorer(model, tokenizer, tasks, documents, batch_size=4, **options)
        results = by_lm_eval(folder, model, tokenizer, tasks, documents, **options)
        scores = scorer.score()
        assert_equal(scores, results, tasks)
        plain = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        assert not np.array_equal(plain.documents["tiny_last"].values, scores.documents["tiny_last"].values) or (
            plain.tasks != scores.tasks
        )

    def test_all_documents_without_samples(self, folder, model, tokenizer):
        tasks = load_tasks(folder, {"tiny_shots": "acc", "tiny_passages": "bits_per_byte"})
        documents = {task.label: range(task.size) for task in tasks}
        scores = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=4)
        manager = TaskManager(include_defaults=False, include_path=str(folder / "tasks"))
        results = simple_evaluate(model=lm, tasks=list(documents), task_manager=manager, bootstrap_iters=2, **NONE)
        assert_equal(scores, results, tasks)

    def test_group_by_its_tasks(self, folder, model, tokenizer):
        """The samples given by hand name the group's tasks; one without documents is left out of the run."""
        tasks = load_tasks(folder, {"tiny_group": "acc"})
        documents = {"tiny_group": [1, 4, 7, 11]}
        assert lm_eval_samples(tasks, documents) == {"tiny_zero": [1, 4, 7, 11]}
        alone = load_tasks(folder, {"tiny_zero": "acc"})
        whole = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        part = Scorer(model, tokenizer, alone, {"tiny_zero": [1, 4, 7, 11]}, batch_size=4).score()
        assert whole.tasks["tiny_group"] == part.tasks["tiny_zero"]

    def test_bfloat16(self, folder, model, tokenizer):
        tasks = load_tasks(folder, EVERY)
        documents = halves(tasks)
        model = model.to(torch.bfloat16)
        scores = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()
        assert_equal(scores, by_lm_eval(folder, model, tokenizer, tasks, documents), tasks)


def figures(scores):
    return scores.tasks, {label: (d.ids, d.values.tolist()) for label, d in scores.documents.items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory, tokenizer):
    """Tasks of every request type; every third document has an empty context, and all of bare_mutual's have."""
    folder, rng, model = tmp_path_factory.mktemp("bare"), random.Random(7), make_model(0)
    (folder / "tasks").mkdir()
    words = ["" if number % 3 == 0 else " ".join(rng.choices(WORDS, k=3)) for number in range(12)]
    choices = [{"text": w, "choices": rng.sample(WORDS, 4), "answer": rng.randrange(4)} for w in words]
    targets = [greedy(model, tokenizer, w, 2) if w else rng.choice(WORDS) for w in words]
    data = {
        "choice": choices,
        "copy": [{"text": w, "target": target} for w, target in zip(words, targets, strict=True)],
        "passages": [{"text": w} for w in words],
    }
    for name, documents in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    choosing = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    target = {"doc_to_text": "text", "doc_to_target": "target", "target_delimiter": ""}
    greedily = {"until": ["\n\n"], "max_gen_toks": 2, "do_sample": False}
    acc, mutual = metric("acc"), metric("acc_mutual_info")
    perplexity = metric("perplexity", False, "perplexity")
    bits = metric("bits_per_byte", False, "bits_per_byte")
    write_task(folder, "bare_choice", "choice", **choosing, doc_to_text="text", metric_list=[acc])
    write_task(folder, "bare_mutual", "choice", **choosing, doc_to_text="", metric_list=[acc, mutual])
    write_task(folder, "bare_last", "copy", **target, output_type="loglikelihood", metric_list=[acc, perplexity])
    how = {"output_type": "generate_until", "generation_kwargs": greedily}
    write_task(folder, "bare_copy", "copy", **target, **how, metric_list=[metric("exact_match")])
    texts = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, "bare_passages", "passages", **texts, metric_list=[bits])
    return folder


class TestEmptyContexts:
    """lm-eval scores what has no context, after the token that begins a text."""

    METRICS: ClassVar = {
        "bare_choice": "acc",
        "bare_mutual": "acc_mutual_info",
        "bare_last": "perplexity",
        "bare_copy": "exact_match",
        "bare_passages": "bits_per_byte",
    }

    @pytest.mark.parametrize("scoring", ["lm_eval", "auto"])
    @pytest.mark.parametrize("name", METRICS)
    def test_they_are_scored_as_lm_eval_scores_them(self, bare, model, tokenizer, name, scoring):
        tasks = load_tasks(bare, {name: self.METRICS[name]})
        documents = {name: range(12)}
        # all in one batch: lm-eval fails on a batch of prompts that are all empty
        scorer = Scorer(model, tokenizer, tasks, documents, batch_size=64, scoring=scoring)
        assert scorer.prompt_tokens > 0
        scores = scorer.score()
        results = by_lm_eval(bare, model, tokenizer, tasks, documents, batch_size=64)
        assert_equal(scores, results, tasks)
        theirs = [s[tasks[0].metric] for s in sorted(results["samples"][name], key=lambda s: s["doc_id"])]
        np.testing.assert_allclose(scores.documents[name].values, theirs, rtol=1e-5)
        if name == "bare_copy":
            assert 0 < scores.tasks[name].value < 1
            theirs = [s["resps"][0][0] for s in sorted(results["samples"][name], key=lambda s: s["doc_id"])]
            assert [answers[0] for answers, *_ in scorer.answers()] == theirs

    @pytest.mark.parametrize("scoring", ["lm_eval", "auto"])
    def test_prompts_that_are_all_empty_are_continued_as_beside_others(self, bare, model, tokenizer, scoring):
        tasks = load_tasks(bare, {"bare_copy": "exact_match"})
        together = Scorer(model, tokenizer, tasks, {"bare_copy": range(12)}, batch_size=64, scoring=scoring)
        alone = Scorer(model, tokenizer, tasks, {"bare_copy": [0, 3, 6]}, batch_size=2, scoring=scoring)
        together.score()
        alone.score()
        assert alone.answers() == [together.answers()[number] for number in (0, 3, 6)]

    def test_losses_are_of_the_same_tokens(self, bare, model, tokenizer):
        tasks = load_tasks(bare, {"bare_last": "perplexity"})
        scorer = Scorer(model, tokenizer, tasks, {"bare_last": range(12)}, batch_size=64)
        values = scorer.score().documents["bare_last"].values
        losses = Losses(scorer, model).loss({"bare_last": range(12)})["bare_last"]
        lengths = [len(scorer.language_model.pair(*d.requests[0].args)[1]) for d in scorer.documents()]
        np.testing.assert_allclose(losses.detach().numpy() * lengths, -values, rtol=1e-4)


class TestAgainAndAgain:
    def test_three_times_the_same(self, folder, model, tokenizer):
        scorer = make_scorer(folder, model, tokenizer)
        first = figures(scorer.score())
        assert figures(scorer.score()) == first
        assert figures(scorer.score()) == first

    def test_other_weights_and_back(self, folder, model, tokenizer):
        scorer = make_scorer(folder, model, tokenizer)
        ours, other = copy.deepcopy(model.state_dict()), make_model(1)
        first = figures(scorer.score())
        model.load_state_dict(other.state_dict())
        second = figures(scorer.score())
        model.load_state_dict(ours)
        assert figures(scorer.score()) == first
        assert second == figures(make_scorer(folder, other, tokenizer).score())
        assert second[0]["tiny_passages"] != first[0]["tiny_passages"]

    def test_two_scorers_of_the_same_tasks(self, folder, model, tokenizer):
        tasks = load_tasks(folder, EVERY)
        parts = {task.label: split(task, 0.4, seed=1) for task in tasks}
        search = Scorer(model, tokenizer, tasks, {k: v.search for k, v in parts.items()}, batch_size=4)
        first = figures(search.score())
        holdout = Scorer(model, tokenizer, tasks, {k: v.holdout for k, v in parts.items()}, batch_size=4)
        second = figures(holdout.score())
        assert figures(search.score()) == first
        assert figures(holdout.score()) == second
        again = Scorer(model, tokenizer, tasks, {k: v.search for k, v in parts.items()}, batch_size=4)
        assert figures(again.score()) == first
        assert [i.args for p in again._parts for i in p.instances] == [
            i.args for p in search._parts for i in p.instances
        ]

    def test_nothing_is_tokenized_again(self, folder, model, tokenizer, monkeypatch):
        scorer = make_scorer(folder, model, tokenizer)
        texts, backend = [], type(tokenizer)._encode_plus

        def encode_plus(self, text, *args, **kwargs):
            texts.extend([text] if isinstance(text, str) else text)
            return backend(self, text, *args, **kwargs)

        monkeypatch.setattr(type(tokenizer), "_encode_plus", encode_plus)
        scorer.score()
        scorer.score()
        # lm-eval's stopping criterion encodes its stop strings, and nothing else is left
        assert set(texts) <= {"\n\n", tokenizer.eos_token}
        make_scorer(folder, model, tokenizer)
        assert len(set(texts)) > 50

    def test_training_mode_is_left(self, folder, tokenizer, model):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_choice": "acc"})
        model.train()
        scorer.score()
        assert not model.training


class TestIndependence:
    def test_examples_do_not_depend_on_what_else_is_scored(self, folder, model, tokenizer):
        random.seed(7)
        np.random.seed(7)
        alone = make_scorer(folder, model, tokenizer, {"tiny_shots": "acc"})
        random.seed(8)
        np.random.seed(8)
        among = make_scorer(folder, model, tokenizer, {"tiny_copy": "exact_match,word", **EVERY})
        prompts = [instance.args for instance in alone._parts[0].instances]
        there = next(part for part in among._parts if part.name == "tiny_shots")
        assert prompts == [instance.args for instance in there.instances]

    def test_global_generators_are_left_alone(self, folder, model, tokenizer):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        expected = (random.Random(3).random(), np.random.RandomState(3).rand())
        make_scorer(folder, model, tokenizer, {"tiny_vote": "exact_match", "tiny_shots": "acc"}).score()
        assert (random.random(), np.random.rand()) == expected
        found = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(found, torch.rand(3))

    def test_the_tokenizer_is_left_alone(self, folder, model):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = None
        make_scorer(folder, model, tokenizer, {"tiny_copy": "exact_match,word"}).score()
        assert tokenizer.pad_token is None and tokenizer.padding_side == "right"

    def test_silence(self, folder, model, tokenizer, capfd):
        levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
        make_scorer(folder, model, tokenizer).score()
        captured = capfd.readouterr()
        assert captured.out == "" and captured.err == ""
        assert levels == {name: logging.getLogger(name).level for name in levels}


@contextmanager
def changed(weight: torch.Tensor, where: Any, value: float) -> Iterator[None]:
    """A context in which a weight has another value at a place."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[where] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


class TestBadCandidates:
    @pytest.mark.parametrize("name", ["tiny_choice", "tiny_last", "tiny_copy", "tiny_passages"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, folder, model, tokenizer, name, value):
        named = r"not finite .*: the weight model\.layers\.0\.mlp\.down_proj\.weight is not finite"
        scorer = make_scorer(folder, model, tokenizer, {name: EVERY[name]})
        good = figures(scorer.score())
        kept = model.model.layers[0].mlp.down_proj.weight.detach().clone()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.fill_(value)
        with pytest.raises(CandidateError, match=named):
            scorer.score()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.copy_(kept)
        assert figures(scorer.score()) == good

    @pytest.mark.parametrize("name", ["tiny_choice", "tiny_copy"])
    def test_finite_weights_that_overflow_are_named_by_the_first_output(self, folder, model, tokenizer, name):
        scorer = make_scorer(folder, model, tokenizer, {name: EVERY[name]})
        with changed(model.model.layers[1].mlp.up_proj.weight, ..., 3e38):
            named = r"the first output that is not is that of model\.layers\.1\.mlp\."
            with pytest.raises(CandidateError, match=named):
                scorer.score()

    def test_nan_that_only_some_prompts_meet_is_found_in_generated_answers(self, folder, model, tokenizer, monkeypatch):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_copy": EVERY["tiny_copy"]})
        good = figures(scorer.score())
        # as where the damage is in a token's row that the prompt that is tried first does not have
        monkeypatch.setattr(type(scorer.language_model), "can_generate", lambda self, text: True)
        with changed(model.model.layers[0].mlp.down_proj.weight, (0, 0), float("nan")):
            named = r"generated answers are not finite numbers: the weight model\.layers\.0\.mlp\.down_proj\.weight is"
            with pytest.raises(CandidateError, match=named):
                scorer.score()
        assert figures(scorer.score()) == good

    def test_a_task_that_raises(self, folder, model, tokenizer):
        source = "def process_results(doc, results):\n    raise KeyError('colour')\n"
        scorer = make_scorer(folder, model, tokenizer, {_custom(folder, "raising", source): "hit"})
        with pytest.raises(CandidateError, match=r"'tiny_raising' cannot process.*KeyError: 'colour'"):
            scorer.score()

    @pytest.mark.parametrize(
        ("stem", "source", "aggregation", "part"),
        [
            ("leaving", "import sys\ndef process_results(doc, results):\n    sys.exit(0)\n", "mean", "SystemExit: 0"),
            ("nothing", "def process_results(doc, results):\n    pass\n", "mean", "process_results gave NoneType for"),
            (
                "adding",
                "import sys\ndef process_results(doc, results):\n    return {'hit': 1.0}\n"
                "def total(items):\n    sys.exit(0)\n",
                "!function adding.total",
                "SystemExit: 0",
            ),
        ],
    )
    def test_a_task_whose_code_leaves_or_gives_nothing(self, folder, model, tokenizer, stem, source, aggregation, part):
        scorer = make_scorer(folder, model, tokenizer, {_custom(folder, stem, source, aggregation): "hit"})
        with pytest.raises(CandidateError) as caught:
            scorer.score()
        assert f"'tiny_{stem}'" in str(caught.value) and part in str(caught.value)

    def test_a_figure_that_overflows(self, folder, model, tokenizer):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_passages": "word_perplexity"})
        with torch.no_grad():
            model.lm_head.weight.mul_(1e4)
        with pytest.raises(CandidateError, match=r"'tiny_passages': word_perplexity cannot be computed: OverflowError"):
            scorer.score()

    def test_model_that_raises(self, folder, model, tokenizer, monkeypatch):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_last": "acc"})
        monkeypatch.setattr(model.lm_head, "forward", _raise(RuntimeError("mat1 and mat2 disagree")))
        with pytest.raises(
            CandidateError, match="failed on loglikelihood requests: RuntimeError: mat1 and mat2 disagree"
        ):
            scorer.score()

    def test_interrupt_passes(self, folder, model, tokenizer, monkeypatch):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_last": "acc"})
        first = figures(scorer.score())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.lm_head, "forward", _raise(KeyboardInterrupt()))
            scorer.score()
        assert figures(scorer.score()) == first


def _raise(error):
    def forward(*args, **kwargs):
        raise error

    return forward


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


class TestItems:
    def test_repeats(self, folder, model, tokenizer):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_vote": "exact_match"})
        scorer.score()
        answers = [instance.resps for instance in scorer._parts[0].instances]
        assert {len(each) for each in answers} == {3}
        assert any(len(set(each)) > 1 for each in answers)

    def test_documents_without_the_metric_do_not_count(self, folder, model, tokenizer):
        source = "def process_results(doc, results):\n    return {'hit': 1.0} if 'amber' in doc['text'] else {}\n"
        scorer = make_scorer(folder, model, tokenizer, {_custom(folder, "partly", source): "hit"})
        scores = scorer.score()
        documents = scorer._tasks[0].leaves["tiny_partly"].eval_docs
        expected = [n for n in halves(scorer._tasks)["tiny_partly"] if "amber" in documents[n]["text"]]
        assert 0 < len(expected) < 7
        assert scores.documents["tiny_partly"].ids == expected
        assert scores.tasks["tiny_partly"].documents == len(expected)

    def test_a_task_that_writes_into_its_documents(self, folder, model, tokenizer):
        source = "def process_results(doc, results):\n    doc['text'] += 'x'\n    return {'hit': len(doc['text'])}\n"
        scorer = make_scorer(folder, model, tokenizer, {_custom(folder, "writing", source): "hit"})
        assert figures(scorer.score()) == figures(scorer.score())

    def test_a_figure_without_jackknife(self, folder, model, tokenizer):
        source = (
            "def process_results(doc, results):\n    return {'hit': 1.0}\n"
            "def whole(items):\n    assert len(items) == 7\n    return sum(items)\n"
        )
        name = _custom(folder, "whole", source, aggregation="!function whole.whole")
        scores = make_scorer(folder, model, tokenizer, {name: "hit"}).score()
        assert (scores.tasks[name].value, scores.tasks[name].stderr) == (7.0, None)
        assert np.isnan(scores.documents[name].values).all()


def _custom(folder, stem, source, aggregation="mean"):
    """A task that processes its answers with the function in `source`, into the metric `hit`."""
    (folder / "tasks" / f"{stem}.py").write_text(source)
    config = {"output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": "last"}
    write_task(folder, f"tiny_{stem}", "last", **config)
    path = folder / "tasks" / f"tiny_{stem}.yaml"
    path.write_text(
        f"{path.read_text()}process_results: !function {stem}.process_results\n"
        f"metric_list: [{{metric: hit, aggregation: {aggregation}, higher_is_better: true}}]\n"
    )
    return f"tiny_{stem}"


class TestOutOfMemory:
    @pytest.mark.parametrize(
        ("error", "name"),
        list(zip(OUT_OF_MEMORY, ["tiny_choice", "tiny_copy", "tiny_passages"], strict=True)),
        ids=["cuda", "cpu", "python"],
    )
    def test_halves_the_batch(self, folder, model, tokenizer, monkeypatch, caplog, error, name):
        scorer = make_scorer(folder, model, tokenizer, {name: EVERY[name]}, batch_size=8, scoring="lm_eval")
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "mergesearch"):
            self._room_for(3, model, patch, error)
            scores = scorer.score()
        assert scorer.batch_size == 2
        assert [r.message for r in caplog.records if "batch size is now" in r.message] != []
        expected = make_scorer(folder, model, tokenizer, {name: EVERY[name]}, batch_size=2, scoring="lm_eval").score()
        assert figures(scores) == figures(expected)

    def test_gives_up_at_one(self, folder, model, tokenizer, monkeypatch):
        scorer = make_scorer(folder, model, tokenizer, {"tiny_choice": "acc"}, batch_size=8, scoring="lm_eval")
        self._room_for(0, model, monkeypatch, OUT_OF_MEMORY[0])
        with pytest.raises(CandidateError, match="out of memory with one request at a time"):
            scorer.score()

    @staticmethod
    def _room_for(rows, model, patch, error):
        forward = model.forward

        def limited(input_ids=None, **kwargs):
            if len(input_ids) > rows:
                raise error
            return forward(input_ids=input_ids, **kwargs)

        patch.setattr(model, "forward", limited)


class TestTokenTries:
    def test_the_switch(self, folder, model, tokenizer):
        tasks = load_tasks(
            folder, {"tiny_fixed": "acc", "tiny_copy": "exact_match,word", "tiny_passages": "bits_per_byte"}
        )
        made = {s: Scorer(model, tokenizer, tasks, halves(tasks), batch_size=4, scoring=s) for s in ("auto", "lm_eval")}
        scores = {scoring: scorer.score() for scoring, scorer in made.items()}
        computed, naive = made["auto"].tokens
        assert computed < naive / 3 and made["lm_eval"].tokens is None
        golds = [scores[way].tasks["tiny_fixed"].gold for way in ("auto", "lm_eval")]
        assert golds[0] == pytest.approx(golds[1], abs=1e-4)
        plain = [{label: replace(s, gold=None) for label, s in scores[way].tasks.items()} for way in scores]
        assert plain[0] == plain[1]
        assert figures(scores["auto"])[1] == figures(scores["lm_eval"])[1]
        assert scores["auto"].documents["tiny_passages"].values.tolist()

    @pytest.mark.parametrize("scoring", ["auto", "lm_eval"])
    def test_what_was_lost_is_in_the_scores(self, folder, model, tokenizer, caplog, scoring):
        with caplog.at_level(logging.WARNING, "mergesearch"):
            scorer = make_scorer(
                folder, model, tokenizer, {"tiny_zero": "acc", "tiny_copy": "exact_match,word"}, scoring=scoring
            )
            scores = scorer.score()
            scorer.score()
        lost = sum(len(tokenizer.encode(" ".join(r.args))) > 257 for r in scorer.requests["loglikelihood"])
        assert scores.tasks["tiny_zero"].truncated == lost / len(scorer.requests["loglikelihood"])
        assert scores.tasks["tiny_zero"].cut == 0.0
        assert scores.tasks["tiny_copy"].cut > 0.5 and scores.tasks["tiny_copy"].truncated == 0.0
        said = [r.getMessage() for r in caplog.records if "token limit" in r.getMessage()]
        assert len(said) == 1 and "'tiny_copy'" in said[0]
        again = Scores.from_json(json.loads(json.dumps(scores.to_json())))
        assert again.tasks == scores.tasks

    def test_without_tries_the_folder_is_not_imported(self, folder):
        """lm-eval's own model answers alone, as where the optional speed was taken away."""
        code = """
            import sys
            from pathlib import Path
            from test_evaluate_scoring import make_model, make_scorer, make_tokenizer

            def tries():
                return sorted(name for name in sys.modules if name.startswith("mergesearch.evaluate.tries"))

            def scored(way):
                wanted = {"tiny_copy": "exact_match,word"}
                scorer = make_scorer(Path(sys.argv[1]), make_model(0), make_tokenizer(), wanted, scoring=way)
                return len(scorer.score().documents["tiny_copy"].ids)

            assert scored("lm_eval") and not tries(), tries()
            assert scored("auto") and tries()
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("scoring", ["auto", "lm_eval"])
    def test_tasks_that_share_prompts_share_nothing_that_was_lost(self, tmp_path, model, tokenizer, caplog, scoring):
        write_tasks(tmp_path)
        asked = {"data": "copy", "doc_to_text": "prompt", "doc_to_target": "target", "metric_list": [metric("acc")]}
        write_task(tmp_path, "same_choice", output_type="multiple_choice", doc_to_choice=WORDS, **asked)
        answered = {**asked, "metric_list": [metric("exact_match")], "output_type": "generate_until"}
        conditions = {"same_short": {"max_gen_toks": 2}, "same_long": {"max_gen_toks": 244}, "same_stopped": {}}
        stops = {"same_stopped": [chr(byte) for byte in range(256)]}
        for name, options in conditions.items():
            kwargs = {"until": stops.get(name, ["\n\n"]), "do_sample": False, "max_gen_toks": 4, **options}
            write_task(tmp_path, name, generation_kwargs=kwargs, **answered)
        wanted = {"same_choice": "acc", **dict.fromkeys(conditions, "exact_match")}
        with caplog.at_level(logging.WARNING, "mergesearch"):
            scores = make_scorer(tmp_path, model, tokenizer, wanted, scoring=scoring).score()
        cut = {label: score.cut for label, score in scores.tasks.items()}
        assert cut["same_choice"] == 0.0 and cut["same_short"] > 0.5 and cut["same_stopped"] < cut["same_short"]
        truncated = {label: score.truncated for label, score in scores.tasks.items()}
        assert truncated.pop("same_long") == 1.0 and set(truncated.values()) == {0.0}
        said = [r.getMessage() for r in caplog.records if "token limit" in r.getMessage()]
        assert not any("'same_choice'" in line for line in said) and any("'same_short'" in line for line in said)


class TestBadInput:
    def test_no_chat_template(self, folder, model):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            make_scorer(folder, model, tokenizer, apply_chat_template=True)

    def test_multiturn_without_chat(self, folder, model, tokenizer):
        with pytest.raises(UserError, match="fewshot_as_multiturn needs a chat template"):
            make_scorer(folder, model, tokenizer, fewshot_as_multiturn=True)

    @pytest.mark.parametrize(("documents", "part"), [([], "no documents"), ([3, 24], "no document 24"), ([-1], "-1")])
    def test_documents(self, folder, model, tokenizer, documents, part):
        tasks = load_tasks(folder, {"tiny_choice": "acc"})
        with pytest.raises(UserError, match=f"'tiny_choice': .*{part}.*it has 24"):
            Scorer(model, tokenizer, tasks, {"tiny_choice": documents}, batch_size=4)

    def test_documents_that_do_not_fit_the_task(self, folder, model, tokenizer):
        config = yaml.safe_load((folder / "tasks" / "tiny_last.yaml").read_text())
        config = {**config, "task": "tiny_unfit", "doc_to_text": "{{ text | no_such_filter }}"}
        (folder / "tasks" / "tiny_unfit.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=r"'tiny_unfit' .*no_such_filter"):
            make_scorer(folder, model, tokenizer, {"tiny_unfit": "acc"})

    @pytest.mark.parametrize(
        ("choice", "part"),
        [("x" * 300, "has 301 tokens, and the model takes 256 at most"), ("", "has no token")],
    )
    def test_choices_that_lm_eval_fails_on(self, folder, model, tokenizer, choice, part):
        documents = [{"question": "", "choices": ["amber", other], "answer": 0} for other in ("birch", choice)]
        (folder / "unfit.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        config = yaml.safe_load((folder / "tasks" / "tiny_choice.yaml").read_text())
        keys = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
        keys |= {"output_type": "multiple_choice", "target_delimiter": " " if choice else ""}
        write_task(folder, "tiny_long", "unfit", **keys, metric_list=config["metric_list"])
        tasks = load_tasks(folder, {"tiny_long": "acc"})
        with pytest.raises(UserError, match=rf"task 'tiny_long': choice 1 of document 1 {part}"):
            Scorer(model, tokenizer, tasks, {"tiny_long": [0, 1]}, batch_size=4)


class TestScores:
    def test_values_explain_the_figure(self, folder, model, tokenizer):
        wanted = {**EVERY, "tiny_mcc": "mcc", "tiny_group": "acc"}
        del wanted["tiny_last"]
        scores = make_scorer(folder, model, tokenizer, wanted).score()
        for label, score in scores.tasks.items():
            documents = scores.documents[label]
            figure = statistics.figure(documents.values, documents.aggregation)
            assert figure == pytest.approx(score.value, abs=0.1 if documents.aggregation == "jackknife" else 1e-12)
            if label != "tiny_group":
                assert statistics.standard_error(documents.values, documents.aggregation) == score.stderr
        assert scores.documents["tiny_passages"].values.shape == (scores.tasks["tiny_passages"].documents, 2)
        assert scores.seconds > 0

    def test_there_and_back(self, tmp_path):
        scores = Scores(
            tasks={
                "a/b": TaskScore(0.25, 0.125, 4, "acc", "none", True),
                "c": TaskScore(1.5, None, 1, "ppl", "x", False),
            },
            documents={
                "a/b": DocumentScores([1, 2, 5, 9], np.array([0.0, 1.0, 0.0, 0.1]), "mean"),
                "c": DocumentScores([0], np.array([[-3.25, 7.0]]), "bits_per_byte"),
            },
            seconds=1.5,
        )
        scores.save_documents(tmp_path / "new" / "0.npz")
        documents = load_documents(tmp_path / "new" / "0.npz")
        again = Scores.from_json(json.loads(json.dumps(scores.to_json())), documents)
        assert again.tasks == scores.tasks and again.seconds == 1.5
        assert figures(again) == figures(scores)
        assert [d.aggregation for d in again.documents.values()] == ["mean", "bits_per_byte"]
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["0.npz"]

    def test_a_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        scores = Scores(tasks={}, documents={"a": DocumentScores([1], np.array([0.5]), "mean")})
        scores.save_documents(tmp_path / "0.npz")
        before = (tmp_path / "0.npz").read_bytes()
        monkeypatch.setattr(np, "savez_compressed", _raise(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            scores.save_documents(tmp_path / "0.npz")
        assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]
        assert (tmp_path / "0.npz").read_bytes() == before

    def test_foreign_file(self, tmp_path):
        np.savez(tmp_path / "other.npz", a=np.zeros(3))
        with pytest.raises(ValueError, match="holds no document scores"):
            load_documents(tmp_path / "other.npz")


@pytest.mark.gpu
def test_on_a_gpu(folder, tokenizer):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tasks = load_tasks(folder, EVERY)
    documents, model = halves(tasks), make_model(0).to("cuda")
    scorer = Scorer(model, tokenizer, tasks, documents, batch_size=4)
    scores = scorer.score()
    assert_equal(scores, by_lm_eval(folder, model, tokenizer, tasks, documents), tasks)
    assert figures(scorer.score()) == figures(scores)
