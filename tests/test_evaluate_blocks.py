"""Blocks of documents: drawn alike for everybody, scored one after another to the same figures."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest

from mergesearch.evaluate import blocks as blocks_module
from mergesearch.evaluate.blocks import BlockScorer, split_blocks

pytest.importorskip("lm_eval")

from support.evaluate_tiny import make_model, make_tokenizer, write_group, write_tasks

from mergesearch.config import TaskConfig
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load, split

WANTED = {
    "tiny_choice": "acc",
    "tiny_shots": "acc",
    "tiny_group": "acc",
    "tiny_copy": "exact_match,word",
    "tiny_passages": "bits_per_byte",
    "tiny_mcc": "mcc",
}
DOCUMENTS = {"quiz": list(range(3, 103)), "bits": list(range(0, 66, 2))}


def sizes(blocks: list[dict[str, list[int]]], label: str) -> list[int]:
    return [len(block[label]) for block in blocks]


@pytest.mark.parametrize("spread", [None, {"quiz": 1.0, "bits": 0.1}, {"quiz": 0.0, "bits": 2.0}])
def test_blocks_hold_every_document_once(spread: dict[str, float] | None) -> None:
    blocks = split_blocks(DOCUMENTS, 8, seed=1, spread=spread)
    for label, ids in DOCUMENTS.items():
        assert sorted(i for block in blocks for i in block[label]) == ids
        assert all(block[label] == sorted(block[label]) for block in blocks)
        assert len(blocks[0][label]) >= 8
    assert all(sum(map(len, block.values())) for block in blocks)


def test_blocks_grow_and_share_alike_without_a_spread() -> None:
    large = {"quiz": list(range(1000)), "bits": list(range(500))}
    blocks = split_blocks(large, 10, seed=1)
    totals = [sum(map(len, block.values())) for block in blocks]
    assert len(blocks) == 10 and 40 <= totals[0] <= 50
    assert totals[1:] == sorted(totals[1:])
    assert all(
        abs(quiz - 2 * bits) <= 2 for quiz, bits in zip(sizes(blocks, "quiz"), sizes(blocks, "bits"), strict=True)
    )


def test_documents_that_decide_come_first() -> None:
    large = {"quiz": list(range(600)), "bits": list(range(600)), "none": list(range(600))}
    blocks = split_blocks(large, 10, seed=1, spread={"quiz": 3.0, "bits": 1.0, "none": 0.0})
    quiz, bits, none = (np.cumsum(sizes(blocks, label)) for label in large)
    half = int(np.argmax(quiz + bits + none >= 400))
    assert quiz[half] == pytest.approx(3 * bits[half], abs=4) and none[half] == 8
    first = int(np.argmax(none > 8))
    assert quiz[first] == bits[first] == 600


def test_blocks_depend_on_the_seed_and_the_task_alone() -> None:
    blocks = split_blocks(DOCUMENTS, 8, seed=1)
    assert split_blocks(DOCUMENTS, 8, seed=1) == blocks
    assert split_blocks(DOCUMENTS, 8, seed=2) != blocks
    assert blocks[0]["quiz"] != DOCUMENTS["quiz"][: len(blocks[0]["quiz"])]


def test_few_documents_make_few_blocks() -> None:
    few = {"quiz": list(range(50)), "few": [1, 2, 3]}
    blocks = split_blocks(few, 8, seed=0)
    assert blocks[0]["few"] == [1, 2, 3] and len(blocks) < 8
    assert split_blocks({"few": [1, 2, 3]}, 8, seed=0) == [{"few": [1, 2, 3]}]
    assert split_blocks(few, 1, seed=0) == [few]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Scorer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tasks(folder)
    write_group(folder, "tiny_pair", ["tiny_zero", "tiny_last"])
    wanted = {("tiny_pair" if name == "tiny_group" else name): metric for name, metric in WANTED.items()}
    tasks = load([TaskConfig(task=name, metric=metric) for name, metric in wanted.items()], [str(folder / "tasks")])
    return Scorer(
        make_model(0), make_tokenizer(), tasks, {t.label: split(t, 0.4, 1).search for t in tasks}, batch_size=4
    )


def blocks_of(scorer: Scorer, count: int = 3) -> BlockScorer:
    numbers = {label: found.ids for label, found in scorer.score().documents.items()}
    with mock.patch.object(blocks_module, "FEWEST", 2):
        return BlockScorer(scorer, numbers, count, seed=0)


def forget(scorer: Scorer) -> None:
    scorer.restore([[[], False] for _ in scorer.answers()])


def assert_same(ours, theirs) -> None:
    for label, score in theirs.tasks.items():
        assert ours.tasks[label].value == pytest.approx(score.value, rel=1e-5)
        assert ours.tasks[label].documents == score.documents
        assert ours.documents[label].ids == theirs.documents[label].ids
        np.testing.assert_allclose(ours.documents[label].values, theirs.documents[label].values, rtol=1e-4)


def test_block_by_block_gives_the_scores_of_all(scorer: Scorer) -> None:
    whole = scorer.score()
    blocks = blocks_of(scorer)
    forget(scorer)
    seconds = sum(blocks.score_block(number) for number in range(blocks.count))
    found = blocks.collect(blocks.count, seconds)
    assert_same(found, whole)
    assert found.seconds == seconds > 0


def test_the_first_blocks_give_the_values_of_their_documents(scorer: Scorer) -> None:
    whole = scorer.score()
    blocks = blocks_of(scorer)
    forget(scorer)
    blocks.score_block(0)
    found = blocks.collect(1)
    for label in ("tiny_choice", "tiny_shots", "tiny_passages", "tiny_pair"):
        place = {document: position for position, document in enumerate(whole.documents[label].ids)}
        ids = found.documents[label].ids
        assert 0 < len(ids) == found.tasks[label].documents < len(place)
        expected = whole.documents[label].values[[place[document] for document in ids]]
        np.testing.assert_allclose(found.documents[label].values, expected, rtol=1e-4)


def test_answers_come_back_to_the_last_bit(scorer: Scorer) -> None:
    blocks = blocks_of(scorer)
    for number in range(blocks.count):
        blocks.score_block(number)
    before = blocks.collect(blocks.count)
    kept = [json.loads(json.dumps(blocks.answers(number))) for number in range(blocks.count)]
    forget(scorer)
    for number, answers in enumerate(kept):
        blocks.restore(number, answers)
    after = blocks.collect(blocks.count)
    assert after.tasks == before.tasks
    for label, documents in before.documents.items():
        assert np.array_equal(after.documents[label].values, documents.values)


def test_what_was_cut_comes_back_too(scorer: Scorer) -> None:
    scorer.score()
    kept = json.loads(json.dumps(scorer.answers()))
    cut = scorer.collect().tasks["tiny_copy"].cut
    assert cut > 0
    forget(scorer)
    assert not any(scorer._lm.was_cut(request) for request in scorer.requests["generate_until"])
    scorer.restore(kept)
    assert scorer.collect().tasks["tiny_copy"].cut == cut


def test_a_part_says_what_of_its_own_prompts_was_lost(scorer: Scorer) -> None:
    lost = scorer.score().tasks["tiny_choice"]
    assert lost.truncated > 0
    ids = list(scorer.collect().documents["tiny_choice"].ids)
    everything = {label: list(found.ids) for label, found in scorer.collect().documents.items()}
    with_it = scorer.only({**everything, "tiny_choice": [3]})
    without = scorer.only({**everything, "tiny_choice": [number for number in ids if number != 3]})
    assert with_it.collect().tasks["tiny_choice"].truncated == 1.0
    assert without.collect().tasks["tiny_choice"].truncated == 0.0


def test_parts_tokenize_nothing_again(scorer: Scorer, tmp_path) -> None:
    folder = tmp_path / "tries"
    folder.mkdir()
    write_tasks(folder)
    tasks = load([TaskConfig(task="tiny_shots", metric="acc")], [str(folder / "tasks")])
    whole = Scorer(make_model(0), make_tokenizer(), tasks, {"tiny_shots": range(24)}, batch_size=4, scoring="auto")
    expected = whole.score()
    with mock.patch.object(type(whole._lm).__mro__[1], "tok_encode", side_effect=AssertionError("tokenized again")):
        part = whole.only({"tiny_shots": range(0, 24, 2)})
        part.answer()
    found = part.collect().documents["tiny_shots"]
    np.testing.assert_allclose(found.gold, expected.documents["tiny_shots"].gold[::2], atol=1e-4)


def test_answers_to_other_requests_are_refused(scorer: Scorer) -> None:
    blocks = blocks_of(scorer)
    with pytest.raises(ValueError):
        blocks.restore(0, blocks.answers(0)[1:])


def test_tasks_that_tell_nobody_apart_are_drawn_alike() -> None:
    documents = {"quiz": range(64), "bits": range(64)}
    blocks = split_blocks(documents, 5, seed=1, spread={"quiz": 0.0, "bits": 0.0})
    assert len(blocks) > 1 and blocks == split_blocks(documents, 5, seed=1)
