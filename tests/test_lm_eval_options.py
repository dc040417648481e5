"""What users of lm-eval set: how answers are generated, code that runs, thinking, attention, lengths, revisions."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import huggingface_hub
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.evaluate_tiny import greedy, make_model, make_tokenizer, metric, write_group, write_task, write_tasks

from mergesearch.config import Config, GuardConfig, TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.model import RememberingLM
from mergesearch.evaluate.scores import load_documents
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load, refuse_lengths, refuse_thinking
from mergesearch.evaluate.tries import TrieLM
from mergesearch.recipe import Recipe
from mergesearch.results.card import Asking, Story, lm_eval_commands
from mergesearch.schema import validate
from mergesearch.search import revisions

RUNS_IT = """
def process_results(doc, results):
    scope = {}
    try:
        exec(f"answer = {results[0]!r}", scope)  # what the model wrote
    except Exception:
        pass
    return {"ran": float(scope.get("answer") == doc["target"])}


def pass_at_k(references, predictions, k):
    return {f"pass@{k[0]}": float(references == predictions)}
"""
# as lm-eval's humaneval has it
PASS_AT_K = """
metric_list:
- metric: !function running.pass_at_k
  aggregation: mean
  higher_is_better: true
  k: [1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    write_group(folder, "tiny_group", ["tiny_zero", "tiny_last"])
    (folder / "tasks" / "running.py").write_text(RUNS_IT)
    how = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target", "unsafe_code": True}
    greedily = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    write_task(folder, "tiny_code", "copy", **how, metric_list=[metric("ran")], generation_kwargs=greedily)
    path = folder / "tasks" / "tiny_code.yaml"
    path.write_text(path.read_text() + "process_results: !function running.process_results\n")
    write_task(folder, "tiny_pass", "copy", **how, generation_kwargs=greedily)
    path = folder / "tasks" / "tiny_pass.yaml"
    path.write_text(path.read_text() + PASS_AT_K)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _no_pools(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def loaded(folder, name, chosen="exact_match,whole", *, unsafe_code=False, **config):
    configs = [TaskConfig(task=name, metric=chosen, **config)]
    return load(configs, [str(folder / "tasks")], unsafe_code=unsafe_code)


def scorer(tasks, tokenizer, documents=range(12), seed=0, **options):
    chosen = {tasks[0].label: documents}
    return Scorer(make_model(seed), tokenizer, tasks, chosen, **{"batch_size": 4, "scoring": "lm_eval", **options})


def configuration(**keys) -> Config:
    data = {"base_model": "base", "models": {"a": "a"}, "tasks": [{"task": "t"}], **keys}
    return validate(Config, data, "test.yaml")


class TestGenKwargs:
    def test_they_change_how_answers_are_generated_and_nothing_else_that_is_loaded(self, folder, tokenizer):
        texts, lengths = {}, {}
        for most in (2, 4, None):
            tasks = loaded(folder, "tiny_copy", gen_kwargs={"max_gen_toks": most} if most else None)
            whole = scorer(tasks, tokenizer)
            whole.score()
            texts[most] = [answers[0] for answers, *_ in whole.answers()]
            lengths[most] = {length for _, _, length in whole.answers()}
        assert texts[None] == texts[4] != texts[2]  # the task's own is 4
        assert lengths == {2: {2}, 4: {4}, None: {4}}

    def test_a_task_that_generates_nothing(self, folder):
        with pytest.raises(UserError, match="'tiny_choice' generates nothing, so gen_kwargs says nothing of it"):
            loaded(folder, "tiny_choice", "acc", gen_kwargs={"max_gen_toks": 2})

    def test_a_guard_takes_them_too(self):
        guard = GuardConfig(task="t", max_drop=0.1, gen_kwargs={"temperature": 0.5})
        assert guard.as_task() == TaskConfig(task="t", gen_kwargs={"temperature": 0.5})


class TestUnsafeCode:
    def test_refused_until_it_is_confirmed(self, folder):
        with pytest.raises(UserError) as caught:
            loaded(folder, "tiny_code", "ran")
        for part in ("'tiny_code' runs code that the model wrote", "set confirm_run_unsafe_code to true"):
            assert part in str(caught.value)

    def test_confirmed_it_runs_what_the_model_wrote(self, folder, tokenizer):
        scores = scorer(loaded(folder, "tiny_code", "ran", unsafe_code=True), tokenizer).score()
        # every second document's target is what model 0 writes
        assert scores.documents["tiny_code"].values.tolist() == [float(n % 2 == 1) for n in range(12)]

    def test_a_metric_that_gives_a_figure_of_another_name(self, folder, tokenizer):
        """As humaneval's pass_at_k gives pass@1."""
        whole = scorer(loaded(folder, "tiny_pass", None, unsafe_code=True), tokenizer)
        for _ in range(2):  # lm-eval notes the other name at the first document
            scores = whole.score()
            assert scores.documents["tiny_pass"].values.tolist() == [float(n % 2 == 1) for n in range(12)]
            assert scores.tasks["tiny_pass"].metric == "pass_at_k" and scores.tasks["tiny_pass"].value == 0.5


class TestAttention:
    def test_the_model_attends_so(self, folder, tokenizer):
        tasks = loaded(folder, "tiny_last", "acc")
        model = make_model(0)
        options = {"batch_size": 4, "scoring": "lm_eval"}
        plain = Scorer(model, tokenizer, tasks, {"tiny_last": range(12)}, **options).score()
        eager = Scorer(model, tokenizer, tasks, {"tiny_last": range(12)}, attn_implementation="eager", **options)
        assert model.config._attn_implementation == "eager"
        model.set_attn_implementation("sdpa")  # as a stack of layers does, which is built anew
        assert eager.score().tasks["tiny_last"].value == pytest.approx(plain.tasks["tiny_last"].value)
        assert model.config._attn_implementation == "eager"

    def test_one_that_is_not_there(self, folder, tokenizer):
        with pytest.raises(UserError, match="attn_implementation 'flash_attention_9' cannot be used here"):
            scorer(loaded(folder, "tiny_last", "acc"), tokenizer, attn_implementation="flash_attention_9")


class TestThinking:
    def test_it_needs_an_end_and_generated_answers(self, folder):
        with pytest.raises(UserError, match="enable_thinking is true and there is no think_end_token"):
            configuration(enable_thinking=True)
        assert configuration(enable_thinking=True, think_end_token="</think>").model_args["enable_thinking"]
        refuse_thinking(loaded(folder, "tiny_copy"))
        for name in ("tiny_choice", "tiny_last"):
            with pytest.raises(UserError, match=f"task '{name}' asks for log-likelihoods, and enable_thinking is true"):
                refuse_thinking(loaded(folder, name, "acc"))

    @pytest.mark.parametrize("kind", [TrieLM, RememberingLM])
    def test_the_answer_is_what_follows_as_lm_eval_has_it(self, kind, tokenizer):
        model, rng = make_model(0), random.Random(2)
        options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
        prompts = ["".join(rng.choices("abcdefgh ", k=rng.randint(4, 40))) for _ in range(12)]
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(text, options), idx=0, metadata=("t", 0, 1))
            for text in prompts
        ]
        plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
        texts = plain.generate_until(requests, disable_tqdm=True)
        letter = max(set("".join(texts)), key=lambda each: each.isascii() * sum(each in text for text in texts))
        for end in (letter, tokenizer.encode(letter)[0]):
            thinking = {"enable_thinking": True, "think_end_token": end}
            theirs = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, **thinking)
            ours = kind(model, copy.deepcopy(tokenizer), 4, **thinking)
            ours.tokenize({"generate_until": requests})
            found = ours.generate_until(requests, disable_tqdm=True)
            assert found == theirs.generate_until(requests, disable_tqdm=True) != texts

    def test_the_chat_template_is_told(self, folder, tokenizer):
        told = copy.deepcopy(tokenizer)
        told.chat_template = "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}"
        tasks = loaded(folder, "tiny_copy")
        thinking = {"apply_chat_template": True, "think_end_token": "</think>"}
        asked = [
            next(scorer(tasks, told, enable_thinking=how, **thinking).documents()).requests[0].args[0]
            for how in (True, False)
        ]
        assert asked[0] == f"<think>{asked[1]}"


class TestLength:
    @pytest.mark.parametrize("scoring", ["lm_eval", "auto"])
    def test_it_is_the_tokens_up_to_the_end(self, folder, tokenizer, scoring, tmp_path):
        model, most = make_model(0), 8
        prompts = [json.loads(line)["prompt"] for line in (folder / "copy.jsonl").read_text().splitlines()]
        texts = [[greedy(model, tokenizer, prompt, count) for count in range(1, most + 1)] for prompt in prompts]
        letters = sorted({letter for text in texts for letter in text[-1] if letter.isascii() and letter.strip()})
        until = max(letters, key=lambda letter: sum(letter in text[-1] for text in texts))
        expected = [float(next((n for n, text in enumerate(each, 1) if until in text), most)) for each in texts]
        assert len(set(expected)) > 2
        generation = {"until": [until], "max_gen_toks": most}
        tasks = loaded(folder, "tiny_copy", "length", gen_kwargs=generation)
        assert not tasks[0].higher_is_better and tasks[0].aggregation == "mean"
        counting = scorer(tasks, tokenizer, scoring=scoring)
        scores = counting.score()
        found = scores.documents["tiny_copy"]
        assert found.values.tolist() == found.length.tolist() == expected
        assert scores.tasks["tiny_copy"].value == scores.tasks["tiny_copy"].length == np.mean(expected)
        # beside another metric it is recorded
        other = scorer(loaded(folder, "tiny_copy", gen_kwargs=generation), tokenizer, scoring=scoring)
        assert other.score().tasks["tiny_copy"].length == np.mean(expected)
        # and kept: in a file, and with the answers to blocks
        scores.save_documents(tmp_path / "scores.npz")
        assert load_documents(tmp_path / "scores.npz")["tiny_copy"].length.tolist() == expected
        again = scorer(tasks, tokenizer, scoring=scoring, seed=1)
        again.restore(json.loads(json.dumps(counting.answers())))
        assert again.collect().tasks == scores.tasks

    def test_answers_of_choices_have_none(self, folder, tokenizer):
        scores = scorer(loaded(folder, "tiny_choice", "acc"), tokenizer).score()
        assert scores.tasks["tiny_choice"].length is None and scores.documents["tiny_choice"].length is None
        with pytest.raises(UserError, match=r"'tiny_choice' has no length: its answers are no generated texts"):
            loaded(folder, "tiny_choice", "length")
        with pytest.raises(UserError, match=r"guard 'tiny_choice' is on the length of answers, and the task generates"):
            refuse_lengths(loaded(folder, "tiny_choice", "acc"), ["tiny_choice", "tiny_copy"])
        with pytest.raises(UserError, match="length is taken before any filter"):
            loaded(folder, "tiny_copy", "length,word")


def test_predict_only_is_refused():
    with pytest.raises(UserError, match="predict_only leaves out the figures, and a search goes by them"):
        configuration(predict_only=True)


class TestRevisions:
    COMMITS = ("a" * 40, "b" * 40)

    def hub(self, tmp_path: Path, monkeypatch) -> list[str | None]:
        """A hub whose main moves on to another commit; returns which revisions were asked for."""
        asked: list[str | None] = []

        def snapshot_download(name, revision=None, **_):
            asked.append(revision)
            commit = revision if revision in self.COMMITS else self.COMMITS[sum(each is None for each in asked) > 1]
            folder = tmp_path / name.replace("/", "--") / "snapshots" / commit
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("{}")
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    def test_what_was_read_stays(self, tmp_path, monkeypatch):
        asked = self.hub(tmp_path, monkeypatch)
        (tmp_path / "local" / "snapshots" / ("c" * 40)).mkdir(parents=True)
        local = str(tmp_path / "local" / "snapshots" / ("c" * 40))
        config = configuration(base_model="owner/base", models={"a": local})
        noted = revisions.revisions(config)
        assert noted == {"base_model": f"owner/base@{self.COMMITS[0]}"}  # a folder is what it is
        # the hub has moved on
        assert revisions.revisions(config) == {"base_model": f"owner/base@{self.COMMITS[1]}"}
        pinned = revisions.at(config, noted)
        assert pinned.base_model == noted["base_model"] and pinned.models == config.models
        assert revisions.revisions(pinned) == {} and asked[-1] == self.COMMITS[0]
        assert "owner/base@aaaa" in revisions.words(noted)[0]


def test_the_card_says_them_all(tmp_path):
    story = Story(
        title="t",
        versions={},
        tasks={"one": None, "two": None, "three": None},
        samples={"one": [1], "two": [2], "three": [3]},
        asking=Asking(
            confirm_run_unsafe_code=True, model_args={"enable_thinking": True, "think_end_token": "</think>"}
        ),
        gen_kwargs={"two": {"max_gen_toks": 5, "until": ["\n"]}},
    )
    recipe = Recipe(base="b", models={"a": "a"}, rules=[{"method": "linear"}])
    first, second = lm_eval_commands(story, recipe.out_dtype)
    assert "--tasks one,three" in first and "gen_kwargs" not in first and "--confirm_run_unsafe_code" in first
    assert """--gen_kwargs '{"max_gen_toks": 5, "until": ["\\n"]}'""" in second and "--tasks two" in second
    assert """--model_args '{"pretrained": ".", "dtype": "bfloat16", "enable_thinking": true, "think""" in first
