"""How far scoring is, told while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluate.asking import Asked, counts_of

pytest.importorskip("lm_eval")

from support.evaluate_tiny import make_model, make_tokenizer, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load, split

WANTED = {"tiny_choice": "acc", "tiny_copy": "exact_match,word", "tiny_passages": "bits_per_byte"}


class Model:
    """Says of nothing that it was answered."""

    def __init__(self) -> None:
        self.answered: Any = lambda count: None


def test_answers_become_documents_and_start_again_where_memory_ran_out() -> None:
    told: list[Asked] = []
    documents = {
        "loglikelihood": {(0, n): "quiz" for n in range(4)},
        "generate_until": {(1, n): "copy" for n in range(3)},
    }
    counts = counts_of({"loglikelihood": [0] * 12, "generate_until": [0] * 3}, documents, told.append)
    model = Model()
    with counts["loglikelihood"].of_answers(model):
        counts["loglikelihood"].begin()
        model.answered(2)
        model.answered(1)
        counts["loglikelihood"].begin()
        model.answered(12.0)
    assert [(asked.documents, asked.of) for asked in told] == [(0, 7), (0, 7), (1, 7), (0, 7), (4, 7)]
    with counts["generate_until"].of_answers(model):
        counts["generate_until"].begin()
        model.answered(5)  # more than there are
    assert told[-1] == Asked(("copy",), 7, 7)
    count = len(told)
    model.answered(1)
    assert len(told) == count


@pytest.mark.parametrize("scoring", ["lm_eval", "auto"])
def test_a_scorer_tells_of_every_type_of_request(scoring: str, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    tasks = load([TaskConfig(task=n, metric=m) for n, m in WANTED.items()], [str(tmp_path / "tasks")])
    documents = {task.label: split(task, 0.5, seed=0).search for task in tasks}
    scorer = Scorer(make_model(0), make_tokenizer(), tasks, documents, batch_size=4, scoring=scoring)
    silent = scorer.score()
    told: list[Asked] = []
    scorer.asked = told.append
    assert scorer.score().tasks == silent.tasks
    size = sum(map(len, documents.values()))
    assert told[0].documents == 0 and told[-1].documents == size and {asked.of for asked in told} == {size}
    assert [a.documents for a in told] == sorted(a.documents for a in told)
    for task in tasks:  # each to its end, and in several steps where lm-eval's batches answer
        mine = {asked.documents for asked in told if asked.tasks == (task.label,)}
        assert max(mine) - min(mine) == len(documents[task.label]) and (len(mine) > 2 or scoring == "auto")
    part = scorer.only({"tiny_choice": documents["tiny_choice"][:2], "tiny_copy": [], "tiny_passages": []})
    told.clear()
    part.answer()
    assert told[-1] == Asked(("tiny_choice",), 2, 2)
