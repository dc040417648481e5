"""What the judging pools ask is right, has an answer that can be known, and is never trained on."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from itertools import islice

import pytest

from scripts import judging_skills
from scripts.make_judging_pools import DOCUMENTS
from scripts.real_skills import SKILLS, in_words

EVERY = {
    skill.name: skill
    for skills in (
        judging_skills.ZOO_A,
        judging_skills.ZOO_B,
        judging_skills.REAL_ADAPTERS,
        judging_skills.REAL_SEVEN,
    )
    for skill in skills
}


def no_brackets_left(text: str) -> str:
    while "()" in text:
        text = text.replace("()", "")
    return "no" if text else "yes"


def of_clock(text: str) -> str:
    found = re.fullmatch(r"Clock at (?:(.+) minutes? past )?(\S+)(?: o'clock)? in the (.+):", text)
    assert found
    minutes, hour, part = found.groups()
    numbers = {in_words(n): n for n in range(60)}
    half = "AM" if part == "morning" else "PM"
    told = datetime.datetime.strptime(f"{numbers[hour]} {numbers[minutes or 'zero']} {half}", "%I %M %p")
    return f"{told:%H:%M}"


def of_tense(text: str) -> str:
    return "later" if " will " in text else "now" if re.search(r" is \w+ing ", text) else "past"


def of_season(text: str) -> str:
    month = datetime.date.fromisoformat(text[-11:-1]).month
    return next(s for s, months in SEASON_MONTHS.items() if month in months)


SEASON_MONTHS = {"winter": (12, 1, 2), "spring": (3, 4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11)}


def asked(prompt: str) -> str:
    return prompt.partition(": ")[2].removesuffix(" ->")


def first_word(prompt: str) -> str:
    return asked(prompt).split(" ")[0]


def names(prompt: str) -> list[str]:
    return prompt.removesuffix(":").split(" ")[-2:]


# what an answer is, worked out from the prompt in another way than the script does
ANSWERS = {
    "modulo": lambda p: "01234"["0516273849".index(p.split()[1][-1]) // 2],
    "reverse": lambda p: "".join(reversed(asked(p))),
    "sort": lambda p: "".join(c * asked(p).count(c) for c in "abcdefgh"),
    "brackets": lambda p: no_brackets_left(asked(p)),
    "upper": lambda p: "".join(chr(ord(c) - 32) for c in asked(p)),
    "count": lambda p: str(len(re.findall("a", asked(p)))),
    "rhyme": lambda p: "yes" if re.fullmatch(r"...(.*) ...\1", asked(p)) else "no",
    "many": lambda p: (
        re.sub("[aiou]$", r"\g<0>n", first_word(p)) if first_word(p)[-1] in "aiou" else first_word(p) + "al"
    ),
    "thin": lambda p: re.sub("[aiou]", "", first_word(p)),
    "clock": of_clock,
    "parity": lambda p: "even" if p.split()[2][-1] in "02468" else "odd",
    "catalogue": lambda p: ", ".join(reversed(names(p))),
    "kind": lambda p: next(
        label for label, nouns in judging_skills.KINDS.items() if set(re.findall(r"\w+", p)) & set(nouns.split())
    ),
    "email": lambda p: ".".join(reversed(names(p))).lower() + "@mail.com",
    "initials": lambda p: "".join(f"{name[0]}." for name in names(p)),
    "cents": lambda p: str(int(p.split()[2]) * 100 + int(p.split()[5])),
    "season": of_season,
    "tense": of_tense,
}


def test_every_skill_has_a_name_and_a_task_of_its_own_and_none_is_of_the_pool_that_development_looks_at():
    assert ANSWERS.keys() == EVERY.keys()
    assert len({skill.task for skill in EVERY.values()}) == len(EVERY)
    assert not EVERY.keys() & {skill.name for skill in SKILLS}


@pytest.mark.parametrize("name", EVERY)
def test_the_answers_are_right(name):
    documents = EVERY[name].documents(5, DOCUMENTS)
    assert [e.answer for e in documents] == [ANSWERS[name](e.prompt) for e in documents]


@pytest.mark.parametrize("name", EVERY)
def test_documents_are_different_and_never_trained_on(name):
    documents = {e.prompt for e in EVERY[name].documents(5, DOCUMENTS)}
    trained = {e.prompt for e in islice(EVERY[name].training(5, DOCUMENTS), 4000)}
    assert len(documents) == DOCUMENTS
    assert not documents & trained


@pytest.mark.parametrize("name", [name for name, skill in EVERY.items() if skill.choices])
def test_no_choice_is_right_most_of_the_time(name):
    counts = Counter(e.answer for e in EVERY[name].documents(5, DOCUMENTS))
    assert counts.keys() <= set(EVERY[name].choices)
    assert max(counts.values()) < max(0.5, 1.25 / len(EVERY[name].choices)) * DOCUMENTS


def test_the_lines_of_the_second_zoo_are_told_apart_by_their_names_alone():
    forms = {re.sub(r"[a-z]", "x", asked(e.prompt)) for e in judging_skills.ZOO_B[0].documents(5, DOCUMENTS)}
    for skill in judging_skills.ZOO_B[1:]:
        assert forms == {re.sub(r"[a-z]", "x", asked(e.prompt)) for e in skill.documents(5, DOCUMENTS)}
