"""How probable what is right is: beside the metric, and as the metric itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from support.evaluate_tiny import make_model, make_tokenizer, metric, write_group, write_task, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import load_documents
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    write_group(folder, "tiny_group", ["tiny_shots", "tiny_zero"])
    choices = {
        "data": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
    }
    brier = [metric("brier_score", False, "brier_score"), metric("acc")]
    write_task(folder, "tiny_brier", **choices, doc_to_target="answer", metric_list=brier)
    write_task(folder, "tiny_mutual", **choices, doc_to_target="answer", metric_list=[metric("acc_mutual_info")])
    return folder


def scored(folder, default=None, **wanted):
    tasks = load(
        [TaskConfig(task=name, metric=chosen) for name, chosen in wanted.items()],
        [str(folder / "tasks")],
        metric=default,
    )
    scorer = Scorer(make_model(0), make_tokenizer(), tasks, {t.label: range(t.size) for t in tasks}, batch_size=4)
    return scorer.score(), scorer


def test_the_probability_is_the_one_in_lm_evals_brier_score(folder):
    found, _ = scored(folder, tiny_brier="acc")
    task = load([TaskConfig(task="tiny_brier", metric="brier_score")], [str(folder / "tasks")])[0]
    scorer = Scorer(make_model(0), make_tokenizer(), [task], {"tiny_brier": range(24)}, batch_size=4)
    scorer.score()
    requests = sorted(scorer.requests["loglikelihood"], key=lambda request: (request.doc_id, request.idx))
    leaf = task.leaves["tiny_brier"]
    for document, logprob in enumerate(found.documents["tiny_brier"].gold):
        answers = [request.resps[0] for request in requests if request.doc_id == document]
        right, probabilities = leaf.process_results(requests[4 * document].doc, answers)["brier_score"]
        assert math.exp(logprob) == pytest.approx(probabilities[right], rel=1e-6)


def test_it_stands_beside_the_metric(folder):
    found, scorer = scored(
        folder, tiny_choice="acc", tiny_last="acc", tiny_group="acc", tiny_copy="exact_match,word",
        tiny_passages="bits_per_byte",
    )  # fmt: skip
    for label in ("tiny_choice", "tiny_group"):
        documents = found.documents[label]
        assert documents.gold.shape == (len(documents.ids),) and (documents.gold <= 0).all()
        assert found.tasks[label].gold == pytest.approx(float(np.exp(documents.gold).mean()))
    last = [request.resps[0][0] for request in scorer.requests["loglikelihood"] if request.task_name == "tiny_last"]
    assert found.documents["tiny_last"].gold.tolist() == last
    assert found.tasks["tiny_last"].gold == pytest.approx(math.exp(np.mean(last)))
    for label in ("tiny_copy", "tiny_passages"):
        assert found.tasks[label].gold is None and found.documents[label].gold is None


def test_the_likeliest_choice_has_the_largest_share(folder):
    found, _ = scored(folder, tiny_choice="acc")
    probability, right = np.exp(found.documents["tiny_choice"].gold), found.documents["tiny_choice"].values == 1
    assert (probability[right] >= 0.25).all() and (probability[~right] <= 0.5).all()


def test_mutual_information_asks_without_the_prompt_too(folder):
    found, _ = scored(folder, tiny_mutual="acc_mutual_info")
    alone, _ = scored(folder, tiny_brier="acc")
    np.testing.assert_allclose(found.documents["tiny_mutual"].gold, alone.documents["tiny_brier"].gold, rtol=1e-5)


def test_as_the_metric_itself(folder):
    beside, _ = scored(folder, tiny_choice="acc", tiny_last="acc", tiny_group="acc")
    wanted = {"tiny_choice": "gold_prob", "tiny_last": "gold_logprob", "tiny_group": "gold_prob"}
    found, _ = scored(folder, **wanted)
    for label, name in wanted.items():
        score, gold = found.tasks[label], beside.documents[label].gold
        expected = np.exp(gold) if name == "gold_prob" else gold
        assert score.metric == name and score.higher_is_better
        assert score.value == pytest.approx(float(expected.mean())) and score.stderr > 0
        np.testing.assert_allclose(found.documents[label].values, expected)


def test_the_objectives_metric_goes_to_tasks_that_have_it_and_name_none(folder):
    found, _ = scored(folder, "gold_prob", tiny_choice=None, tiny_shots="acc_norm", tiny_copy="exact_match,word")
    assert [score.metric for score in found.tasks.values()] == ["gold_prob", "acc_norm", "exact_match"]
    with pytest.raises(UserError, match=r"unknown metric 'gold_prb' in objective.metric"):
        scored(folder, "gold_prb", tiny_passages="bits_per_byte")


@pytest.mark.parametrize("name", ["tiny_copy", "tiny_passages"])
def test_tasks_without_it_refuse(folder, name):
    with pytest.raises(UserError, match=f"task '{name}' has no gold_prob.*choose one of its metrics") as caught:
        load([TaskConfig(task=name, metric="gold_prob")], [str(folder / "tasks")])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="before any filter"):
        load([TaskConfig(task="tiny_choice", metric="gold_prob,none")], [str(folder / "tasks")])


def test_there_and_back(folder, tmp_path):
    found, _ = scored(folder, tiny_choice="acc", tiny_passages="bits_per_byte")
    found.save_documents(tmp_path / "x.npz")
    back = load_documents(tmp_path / "x.npz")
    assert np.array_equal(back["tiny_choice"].gold, found.documents["tiny_choice"].gold)
    assert back["tiny_passages"].gold is None


def test_in_blocks_as_in_one_go(folder):
    whole, scorer = scored(folder, tiny_choice="acc", tiny_last="acc")
    part = scorer.only({"tiny_choice": range(0, 24, 2), "tiny_last": range(4)})
    part.answer()
    found = part.collect()
    np.testing.assert_allclose(found.documents["tiny_choice"].gold, whole.documents["tiny_choice"].gold[::2], atol=1e-4)
