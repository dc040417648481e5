"""The demo zoo as it ships: it loads, it is small, its tasks run from anywhere, its documents are held out."""

from __future__ import annotations

import json

import pytest

from mergesearch import zoo
from mergesearch.errors import UserError
from scripts import zoo_text

TASKS = {"zoo_code": "acc", "zoo_prose": "bits_per_byte", "zoo_names": "acc", "zoo_strings": "exact_match"}
MODELS = ["base", "code", "names", "prose", "strings"]


def rows(name: str) -> list[dict]:
    lines = (zoo.folder() / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks")
    return tasks.TaskManager(include_path=str(zoo.folder() / "tasks"), include_defaults=False)


def test_names_and_paths():
    assert zoo.names() == MODELS
    assert all((zoo.path(name) / "model.safetensors").is_file() for name in MODELS)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'prosa'.*did you mean 'prose'"):
        zoo.path("prosa")


def test_the_zoo_is_at_most_10_mib():
    files = [p for p in zoo.folder().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 10 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_model_and_tokenizer_load(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype="auto")
    assert model.config.model_type == "llama"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 800_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    text = "def f(x):\n    return 'h\u00e9' -> X"
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == model.config.vocab_size
    assert model(torch.tensor([tokens])).logits.isfinite().all()


def test_models_differ_from_the_base_in_every_matrix():
    from safetensors.torch import load_file

    base = load_file(zoo.path("base") / "model.safetensors")
    for name in MODELS[1:]:
        model = load_file(zoo.path(name) / "model.safetensors")
        assert model.keys() == base.keys()
        assert all(not model[k].equal(base[k]) for k in base if base[k].ndim == 2)


@pytest.mark.parametrize("name", TASKS)
def test_task_has_400_distinct_documents(name):
    documents = {json.dumps(row, sort_keys=True) for row in rows(name)}
    assert len(documents) == len(rows(name)) >= 400


@pytest.mark.parametrize("name", ["zoo_code", "zoo_names"])
def test_choices_are_four_and_their_order_tells_nothing(name):
    assert all(len(set(row["choices"])) == 4 for row in rows(name))
    counts = [sum(row["answer"] == i for row in rows(name)) for i in range(4)]
    assert min(counts) > 0.18 * len(rows(name))


def test_request_types_are_covered(manager):
    tasks = manager.load(list(TASKS))["tasks"]
    assert {t.OUTPUT_TYPE for t in tasks.values()} == {"multiple_choice", "loglikelihood_rolling", "generate_until"}
    assert [t.config.num_fewshot for t in tasks.values() if t.OUTPUT_TYPE == "multiple_choice"] == [0, 2]


def test_fewshot_examples_are_no_test_documents():
    tests = {row["context"] + row["choices"][row["answer"]] for row in rows("zoo_names")}
    shots = {row["context"] + row["choices"][row["answer"]] for row in rows("zoo_names_fewshot")}
    assert len(shots) >= 16
    assert not tests & shots


def test_string_answers_are_right_and_held_out():
    for row in rows("zoo_strings"):
        operation, word = row["question"].split(": ")
        assert row["answer"] == zoo_text.OPERATIONS[operation](word)
        assert zoo_text.held_out("strings", row["question"])


def test_names_are_held_out():
    for row in rows("zoo_names") + rows("zoo_names_fewshot"):
        assert zoo_text.held_out("names", f"{row['context']} {row['choices'][row['answer']]}")


def test_string_documents_are_not_in_the_training_text():
    trained = set(zoo_text.split("strings", zoo_text.string_texts()).train)
    assert len(trained) > 50_000
    assert not trained & {f"{row['question']} -> {row['answer']}" for row in rows("zoo_strings")}


def test_tasks_run_from_another_directory(manager, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(tmp_path)
    model = HFLM(pretrained=str(zoo.path("strings")), device="cpu", batch_size=8)
    found = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, limit=8, bootstrap_iters=0, log_samples=False
    )
    for task, metric in TASKS.items():
        assert found["results"][task][f"{metric},none"] >= 0
        assert found["n-samples"][task]["effective"] == 8
