"""What is right, checked against lm-eval's own verdict on answers that are right and answers that are not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from support.evaluate_tiny import metric, write_task, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.evaluate.gold import gold_choice, gold_text
from mergesearch.evaluate.tasks import load
from scripts.bench.shared import zoo1

ROWS = [
    {
        "question": f"q{n}",
        "choices": ["red", "green", "blue"],
        "number": n % 3,
        "digits": str(n % 3),
        "text": ["red", "green", "blue"][n % 3],
        "several": [0, n % 3],
        "texts": ["sky", "air"],
    }
    for n in range(6)
]
CHOICES = {
    "data": "rows",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "metric_list": [metric("acc")],
}
GENERATE = {
    "data": "rows",
    "output_type": "generate_until",
    "doc_to_text": "question",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [metric("exact_match")],
}
TASKS = {
    "gold_number": {**CHOICES, "doc_to_target": "number"},
    "gold_template": {**CHOICES, "doc_to_target": "{{number}}"},
    "gold_text": {**CHOICES, "doc_to_target": "text"},
    "gold_several": {**CHOICES, "doc_to_target": "several"},
    "gold_inputs": {**CHOICES, "doc_to_text": "number", "doc_to_target": "question"},
    "gold_digits": {**CHOICES, "doc_to_target": "digits"},
    "gold_beyond": {**CHOICES, "doc_to_target": "{{ 7 if question == 'q3' else number }}"},
    "gold_written": {**GENERATE, "doc_to_target": "text"},
    "gold_one_of": {**GENERATE, "doc_to_target": "texts"},
    "gold_of_choices": {**GENERATE, "doc_to_choice": "choices", "doc_to_target": "number", "target_delimiter": "\n"},
    "gold_prefixed": {**GENERATE, "doc_to_target": "text", "gen_prefix": "Answer:"},
}


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gold")
    write_tasks(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, config in TASKS.items():
        write_task(folder, name, **config)
    names = [*TASKS, "tiny_last", "tiny_passages"]
    metrics = {"tiny_last": "acc", "tiny_passages": "bits_per_byte"}
    tasks = load([TaskConfig(task=name, metric=metrics.get(name)) for name in names], [str(folder / "tasks")])
    return {task.label: task.leaves[task.label] for task in tasks}


@pytest.fixture(scope="module")
def zoo() -> dict:
    tasks = load([TaskConfig(task=name) for name in zoo1.METRICS], [str(zoo1.TASKS)])
    return {task.label: task.leaves[task.label] for task in tasks}


def documents(leaf) -> list:
    return list(leaf.eval_docs)


def verdicts(leaf, doc) -> list[float]:
    """lm-eval's accuracy where it is sure of one choice, for each of them."""
    count = len(leaf.doc_to_choice(doc))
    answers = ([(0.0 if n == sure else -9.0, False) for n in range(count)] for sure in range(count))
    return [leaf.process_results(doc, each)["acc"] for each in answers]


@pytest.mark.parametrize("name", ["gold_number", "gold_template", "gold_text", "gold_several", "gold_inputs"])
def test_the_right_choice_is_the_one_that_lm_eval_counts(leaves, name) -> None:
    for doc in documents(leaves[name]):
        found = gold_choice(leaves[name], doc)
        right = [n for n, acc in enumerate(verdicts(leaves[name], doc)) if acc == 1.0]
        assert (list(found) if isinstance(found, tuple) else [found]) == right


@pytest.mark.parametrize("name", ["zoo_names", "zoo_code"])
def test_the_right_choice_on_the_zoo(zoo, name) -> None:
    for doc in documents(zoo[name])[:20]:
        assert verdicts(zoo[name], doc).index(1.0) == gold_choice(zoo[name], doc) == doc["answer"]
        assert gold_text(zoo[name], doc) is None


def test_digits_in_a_field_number_the_choices(leaves) -> None:
    found = [gold_choice(leaves["gold_digits"], doc) for doc in documents(leaves["gold_digits"])]
    assert found == [row["number"] for row in ROWS]


def test_what_is_none_of_the_choices_is_not_known(leaves) -> None:
    assert gold_choice(leaves["gold_beyond"], documents(leaves["gold_beyond"])[3]) is None


def test_a_task_that_scores_by_code_of_its_own_is_not_known(leaves, monkeypatch) -> None:
    leaf = leaves["gold_number"]
    monkeypatch.setattr(leaf.config, "process_results", lambda doc, results: {"acc": 1.0})
    assert gold_choice(leaf, documents(leaf)[0]) is None


def test_texts_to_write(leaves) -> None:
    found = {name: gold_text(leaf, documents(leaf)[1]) for name, leaf in leaves.items()}
    assert found["gold_written"] == " green"
    assert found["gold_one_of"] == " sky"
    assert found["gold_of_choices"] == "\ngreen"
    assert found["gold_prefixed"] == " green"
    assert gold_text(leaves["gold_written"], ROWS[1], chat=True) == "green"
    assert gold_choice(leaves["gold_written"], ROWS[1]) is None


@pytest.mark.parametrize("name", ["tiny_last", "tiny_passages"])
def test_texts_that_are_asked_for(leaves, name) -> None:
    leaf = leaves[name]
    doc = documents(leaf)[0]
    asked = leaf.construct_requests(doc, "some prompt").args[-1]
    assert gold_text(leaf, doc) == asked
    assert gold_choice(leaf, doc) is None


def test_texts_on_the_zoo(zoo) -> None:
    strings, prose = documents(zoo["zoo_strings"])[0], documents(zoo["zoo_prose"])[0]
    assert gold_text(zoo["zoo_strings"], strings) == f" {strings['answer']}"
    assert gold_text(zoo["zoo_prose"], prose) == prose["passage"]
