"""The skills of scripts/make_real_pool.py: what is tested is never trained on, and two of them are in conflict."""

from __future__ import annotations

from itertools import islice

import pytest

from scripts import real_skills
from scripts.skills import DOCUMENTS, write_tasks


def about(example) -> str:
    """What an example asks about, without the first word, in which the date skills differ."""
    return example.prompt.split(" ", 1)[1]


def test_no_document_is_trained_on_by_any_sibling():
    tested = {about(e) for skill in real_skills.SKILLS for e in skill.documents(0)}
    trained = {about(e) for skill in real_skills.SKILLS for e in islice(skill.training(0), 2000)}
    assert not tested & trained


def test_documents_are_many_different_and_the_same_again():
    for skill in real_skills.SKILLS:
        assert len({e.prompt for e in skill.documents(0)}) == DOCUMENTS
        assert skill.documents(0) == skill.documents(0) != skill.documents(1)


def test_the_date_skills_ask_the_same_and_want_different_answers():
    iso, us = (skill for skill in real_skills.SKILLS if skill.name in ("iso", "us"))
    pairs = list(zip(iso.documents(0), us.documents(0), strict=True))
    assert all(about(a) == about(b) and a.answer != b.answer for a, b in pairs)
    assert not {a.prompt.split()[0] for a, _ in pairs} & {b.prompt.split()[0] for _, b in pairs}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (100, "one hundred"),
        (412, "four hundred and twelve"),
        (41_206, "forty-one thousand two hundred and six"),
        (90_019, "ninety thousand and nineteen"),
    ],
)
def test_numbers_in_words(number, words):
    assert real_skills.in_words(number) == words


def test_lm_eval_reads_the_tasks(tmp_path):
    from mergesearch.config import TaskConfig
    from mergesearch.evaluate.tasks import load

    write_tasks(tmp_path, real_skills.SKILLS, seed=0, count=8)
    wanted = [TaskConfig(task=skill.task, metric=skill.metric) for skill in real_skills.SKILLS]
    assert [task.metric for task in load(wanted, [str(tmp_path)])] == ["acc", *["exact_match"] * 3]
