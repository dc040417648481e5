"""The documents of the demo zoo's tasks, cut from the held-out text of `zoo_text`, and the check that they are.

zoo_order    generate_until         reverse or sort the letters of a short word, exactly
zoo_letters  loglikelihood          each letter's next or opposite one: is the right word the likeliest?
zoo_numbers  multiple_choice        a number in words, in digits; two examples before it
zoo_python   loglikelihood_rolling  a piece of source code, in bits per byte
zoo_both     multiple_choice        first one of order, then one of letters: which of the four ways did the names mean?
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

from scripts.zoo_text import LETTERS, ORDER, Corpus, applied

DOCUMENTS = 1200
FEWSHOT = 64
PYTHON_LENGTH = 160


def choice_document(context: str, truth: str, wrong: list[str], rng: random.Random) -> dict:
    """{"context", "choices", "answer"}: the index of the true one among the shuffled choices."""
    choices = [truth, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(truth)}


def line_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    """{"question", "answer"} of lines with one step."""
    lines = [line for line in corpus.held_out if line.count(" -> ") == 1]
    return [dict(zip(("question", "answer"), line.split(" -> "), strict=True)) for line in rng.sample(lines, DOCUMENTS)]


def number_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    """The wrong numbers have one digit changed, or two exchanged."""
    found = []
    for line in corpus.held_out:
        question, _, answer = line.partition(" -> ")
        wrong: set[str] = set()
        while len(wrong) < 3:
            wrong.add(near_number(answer, rng))
            wrong.discard(answer)
        found.append(choice_document(question, answer, sorted(wrong), rng))
    return found


def near_number(number: str, rng: random.Random) -> str:
    digits = list(number)
    first, second = rng.sample(range(len(digits)), 2)
    if rng.random() < 0.5:
        digits[first], digits[second] = digits[second], digits[first]
    else:
        digits[first] = rng.choice("0123456789")
    return "".join(digits) if digits[0] != "0" else number


def both_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    """The choices are the four ways to do one of order, then one of letters: two have the first step right."""
    found = []
    for line in corpus.held_out:
        question, _, answer = line.partition(" -> ")
        word = question.partition(": ")[2]
        ways = {" -> ".join(applied(steps, word)) for steps in product(ORDER.values(), LETTERS.values())}
        if len(ways) == len(ORDER) * len(LETTERS):
            found.append(choice_document(question, answer, sorted(ways - {answer}), rng))
    return found[:DOCUMENTS]


def python_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    """Pieces of held-out files that begin with a line; no two of them overlap."""
    trained, pieces = "\n".join(corpus.train), []
    for text in corpus.held_out:
        end = 0
        for start in (0, *(at + 1 for at, character in enumerate(text) if character == "\n")):
            piece = text[start : start + PYTHON_LENGTH]
            if start >= end and len(piece) == PYTHON_LENGTH and legible(piece) and piece not in trained:
                pieces.append(piece.rstrip())
                end = start + PYTHON_LENGTH
    return [{"passage": piece} for piece in rng.sample(sorted(set(pieces)), DOCUMENTS)]


def legible(piece: str) -> bool:
    """Whether a piece begins with a line that says something, and is no table of numbers or names."""
    return bool(piece.splitlines()[0].strip()) and sum(c.isalpha() or c.isspace() for c in piece) > 0.7 * len(piece)


def documents(corpora: dict[str, Corpus], seed: int = 0) -> dict[str, list[dict]]:
    """File name without its ending -> documents, for each task and for the few-shot examples of zoo_numbers."""
    numbers = number_documents(corpora["numbers"], random.Random(seed))
    found = {
        "zoo_order": line_documents(corpora["order"], random.Random(seed)),
        "zoo_letters": line_documents(corpora["letters"], random.Random(seed)),
        "zoo_numbers": numbers[FEWSHOT:],
        "zoo_numbers_fewshot": numbers[:FEWSHOT],
        "zoo_python": python_documents(corpora["python"], random.Random(seed)),
        "zoo_both": both_documents(corpora["both"], random.Random(seed)),
    }
    check_held_out(found, corpora)
    return found


def whole_text(document: dict) -> str:
    """What a model that had trained on `document` would have seen: the text with its right answer."""
    if "passage" in document:
        return document["passage"]
    if "question" in document:
        return f"\n{document['question']} -> {document['answer']}\n"
    return f"\n{document['context']} -> {document['choices'][document['answer']]}\n"


def check_held_out(found: dict[str, list[dict]], corpora: dict[str, Corpus]) -> None:
    """Raise ValueError where a training text, of any skill, contains a task's document with its right answer."""
    everything = "\n".join("\n".join(["", *corpus.train, ""]) for corpus in corpora.values())
    for name, rows in found.items():
        leaked = [row for row in rows if whole_text(row) in everything]
        if leaked:
            raise ValueError(f"{len(leaked)} documents of {name} are in the training text, for example {leaked[0]}")


def write(found: dict[str, list[dict]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        lines = [json.dumps(row, ensure_ascii=True) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
