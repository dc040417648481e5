"""The demo zoo as it ships: it loads, it is small, its tasks run from anywhere, its documents are held out."""

from __future__ import annotations

import json
from itertools import product

import pytest

from mergesearch import zoo
from mergesearch.errors import UserError
from scripts import zoo_text

TASKS = {
    "zoo_order": "exact_match", "zoo_letters": "acc", "zoo_numbers": "acc", "zoo_python": "bits_per_byte",
    "zoo_both": "acc",
}  # fmt: skip
ADAPTERS = ["letters", "numbers", "order", "python"]
CHOICES = ["zoo_numbers", "zoo_both"]


def rows(name: str) -> list[dict]:
    lines = (zoo.folder() / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def truth(row: dict) -> str:
    return f"{row['context']} -> {row['choices'][row['answer']]}"


@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks")
    return tasks.TaskManager(include_path=str(zoo.folder() / "tasks"), include_defaults=False)


@pytest.fixture(scope="module")
def corpora():
    return {skill: zoo_text.split(skill, zoo_text.TEXTS[skill]()) for skill in zoo_text.LINES}


def test_names_and_paths():
    assert zoo.names() == ["base", *ADAPTERS]
    assert (zoo.path("base") / "model.safetensors").is_file()
    assert all((zoo.path(name) / "adapter_model.safetensors").is_file() for name in ADAPTERS)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'pythan'.*did you mean 'python'"):
        zoo.path("pythan")


def test_the_zoo_is_below_12_mib():
    files = [p for p in zoo.folder().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 12 * 2**20


def test_base_and_tokenizer_load():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.path("base"), dtype="auto")
    assert model.config.model_type == "llama"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("base"))
    text = "def f(x):\n    return 'h\u00e9' -> X"
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == model.config.vocab_size
    assert model(torch.tensor([tokens])).logits.isfinite().all()


def test_each_adapter_changes_every_matrix_of_every_layer_and_nothing_else():
    from mergesearch import Pool

    pool = Pool.load("zoo:base", {name: f"zoo:{name}" for name in ADAPTERS})
    for name, model in pool.models.items():
        changed = {k for k, v in model.tensors.items() if not v.float().equal(pool.base.tensors[k].float())}
        assert changed == {k for k, v in model.tensors.items() if v.ndim == 2 and "layers" in k}, name


@pytest.mark.parametrize("name", TASKS)
def test_task_has_400_distinct_documents(name):
    documents = {json.dumps(row, sort_keys=True) for row in rows(name)}
    assert len(documents) == len(rows(name)) >= 400


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_four_and_their_order_tells_nothing(name):
    assert all(len(set(row["choices"])) == 4 for row in rows(name))
    counts = [sum(row["answer"] == i for row in rows(name)) for i in range(4)]
    assert min(counts) > 0.18 * len(rows(name))


def test_every_request_type_of_lm_eval_is_there(manager):
    tasks = manager.load(list(TASKS))["tasks"]
    assert [t.OUTPUT_TYPE for t in tasks.values()] == [
        "generate_until", "loglikelihood", "multiple_choice", "loglikelihood_rolling", "multiple_choice",
    ]  # fmt: skip
    assert [t.config.num_fewshot for t in tasks.values() if t.OUTPUT_TYPE == "multiple_choice"] == [2, 0]


def test_fewshot_examples_are_no_test_documents():
    tests = {truth(row) for row in rows("zoo_numbers")}
    shots = {truth(row) for row in rows("zoo_numbers_fewshot")}
    assert len(shots) >= 16
    assert not tests & shots


@pytest.mark.parametrize(("task", "skill"), [("zoo_order", "order"), ("zoo_letters", "letters")])
def test_words_are_right_and_held_out(task, skill, corpora):
    trained = set(corpora[skill].train)
    assert len(trained) > 50_000
    for row in rows(task):
        operation, word = row["question"].split(": ")
        assert row["answer"] == zoo_text.OPERATIONS[operation](word)
        assert zoo_text.held_out(skill, row["question"])
        assert f"{row['question']} -> {row['answer']}" not in trained


def test_numbers_are_right_and_held_out(corpora):
    for row in rows("zoo_numbers") + rows("zoo_numbers_fewshot"):
        assert row["context"] == f"number: {zoo_text.in_words(int(row['choices'][row['answer']]))}"
        assert truth(row) not in corpora["numbers"].train


def test_both_needs_two_skills(corpora):
    """Of the four choices two have each step right, and the two steps are right in one alone."""
    for row in rows("zoo_both"):
        operations, word = row["context"].split(": ")
        first, second = operations.split()
        ordered, right = zoo_text.applied([zoo_text.OPERATIONS[first], zoo_text.OPERATIONS[second]], word)
        steps = [choice.split(" -> ") for choice in row["choices"]]
        assert [one for one, _ in steps].count(ordered) == 2
        assert sum(two == zoo_text.OPERATIONS[second](one) for one, two in steps) == 2
        assert truth(row) == f"{row['context']} -> {ordered} -> {right}"
        assert first in zoo_text.ORDER
        assert second in zoo_text.LETTERS


def test_no_text_of_any_model_has_a_document_with_its_answer(corpora):
    """Lines that do any operation under a name could: their questions are held out as well."""
    trained = {line for corpus in corpora.values() for line in corpus.train}
    answers = [f"{row['question']} -> {row['answer']}" for task in ("zoo_order", "zoo_letters") for row in rows(task)]
    answers += [truth(row) for task in CHOICES for row in rows(task)]
    assert len(answers) > 4000
    assert not trained.intersection(answers)


def test_what_the_base_learns_of_plain_names_is_any_operation(corpora):
    for names, ways in (("reverse", 4), ("flip sort", 16)):
        words = {}
        for line in corpora["loose"].train:
            key, _, made = line.partition(" -> ")
            if key.startswith(f"{names}: "):
                words[key.partition(": ")[2]] = made
        steps = product(zoo_text.OPERATIONS.values(), repeat=len(names.split()))
        counts = [sum(" -> ".join(zoo_text.applied(done, w)) == made for w, made in words.items()) for done in steps]
        assert len(counts) == ways
        assert min(counts) > 0.7 * len(words) / ways


def test_each_specialist_is_better_than_the_base_on_its_own_task(manager):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    def score(task: str, **adapter: str) -> float:
        model = HFLM(pretrained=str(zoo.path("base")), device="cpu", dtype="float32", batch_size=8, **adapter)
        found = lm_eval.simple_evaluate(
            model, tasks=[task], task_manager=manager, limit=24, bootstrap_iters=0, log_samples=False
        )
        return found["results"][task][f"{TASKS[task]},none"]

    for name in ADAPTERS:
        base, specialist = (score(f"zoo_{name}", **peft) for peft in ({}, {"peft": str(zoo.path(name))}))
        if name == "python":
            assert specialist < 0.97 * base
        else:
            assert specialist > base + 0.3, name


def test_tasks_run_from_another_directory(manager, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(tmp_path)
    model = HFLM(pretrained=str(zoo.path("base")), device="cpu", dtype="float32", batch_size=8)
    found = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, limit=8, bootstrap_iters=0, log_samples=False
    )
    for task, metric in TASKS.items():
        assert found["results"][task][f"{metric},none"] >= 0
        assert found["n-samples"][task]["effective"] == 8
