"""The documents of the demo zoo's tasks, cut from the held-out text of `zoo_text`, and the check that they are.

zoo_code     multiple_choice        which 20 characters follow in a source file; all four come from that file
zoo_prose    loglikelihood_rolling  a passage of documentation, in bits per byte
zoo_names    multiple_choice        the last word of a character's name, after two whole names
zoo_strings  generate_until         upper case, reverse or sort a short word, exactly
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from pathlib import Path

from scripts.zoo_text import Corpus

DOCUMENTS = 800
FEWSHOT = 64
CODE_CONTEXT, CODE_CHOICE = 48, 20
PROSE_LENGTH = 200


def code_document(text: str, rng: random.Random) -> dict | None:
    """A place in `text` with its true continuation among three from elsewhere in it, all after the same character."""
    start = rng.randrange(CODE_CONTEXT, len(text) - CODE_CHOICE)
    before = text[start - 1]
    # lm-eval moves white space at a context's end to the continuation: a context ends in something else
    if before.isspace() or not text[start : start + CODE_CHOICE].strip():
        return None
    places = [m.end() for m in re.finditer(re.escape(before), text[:-CODE_CHOICE])]
    places = [p for p in places if abs(p - start) > CODE_CHOICE]
    truth = text[start : start + CODE_CHOICE]
    wrong = sorted({text[p : p + CODE_CHOICE] for p in places} - {truth})
    if len(wrong) < 8:
        return None
    return choice_document(text[start - CODE_CONTEXT : start], truth, rng.sample(wrong, 3), rng)


def choice_document(context: str, truth: str, wrong: list[str], rng: random.Random) -> dict:
    """{"context", "choices", "answer"}: the index of the true one among the shuffled choices."""
    choices = [truth, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(truth)}


def code_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    texts = [t for t in corpus.held_out if len(t) > 2000]
    found: list[dict] = []
    while len(found) < DOCUMENTS:
        document = code_document(rng.choice(texts), rng)
        if document is not None and not seen_in(corpus, document["context"] + document["choices"][document["answer"]]):
            found.append(document)
    return found


def seen_in(corpus: Corpus, piece: str) -> bool:
    """Whether a training text contains `piece`."""
    return any(piece in text for text in corpus.train)


def passages(text: str) -> list[str]:
    """Runs of whole paragraphs' starts: each passage begins with a paragraph and has about PROSE_LENGTH characters."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n")
        letters = sum(c.isalpha() or c == " " for c in lines)
        if len(lines) >= 160 and letters > 0.85 * len(lines):
            piece = lines[:PROSE_LENGTH]
            found.append(piece if len(lines) <= PROSE_LENGTH else piece.rsplit(" ", 1)[0])
    return [p.rstrip() for p in found]


def prose_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    pieces = sorted({p for text in corpus.held_out for p in passages(text) if not seen_in(corpus, p)})
    rng.shuffle(pieces)
    return [{"passage": p} for p in pieces[:DOCUMENTS]]


def name_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    """Names of three words or more that begin no training name; the wrong words have nearly the same length."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for name in corpus.train + corpus.held_out:
        by_length[len(name.split()[-1])].append(name.split()[-1])
    known = "\n".join(["", *corpus.train, ""])
    found = []
    for name in corpus.held_out:
        context, _, last = name.rpartition(" ")
        if len(name.split()) < 3 or not 3 <= len(last) <= 14 or len(name) > 48 or f"\n{name}" in known:
            continue
        nearby = [w for n in (-1, 0, 1) for w in by_length[len(last) + n]]
        wrong: list[str] = []
        while len(wrong) < 3:
            word = rng.choice(nearby)
            if word != last and word not in wrong and f"\n{context} {word}\n" not in known:
                wrong.append(word)
        found.append(choice_document(context, last, wrong, rng))
    return found[: DOCUMENTS + FEWSHOT]


def string_documents(corpus: Corpus, rng: random.Random) -> list[dict]:
    lines = rng.sample(corpus.held_out, DOCUMENTS)
    return [dict(zip(("question", "answer"), line.split(" -> "), strict=True)) for line in lines]


def documents(corpora: dict[str, Corpus], seed: int = 0) -> dict[str, list[dict]]:
    """File name without its ending -> documents, for each task and for the few-shot examples of zoo_names."""
    names = name_documents(corpora["names"], random.Random(seed))
    found = {
        "zoo_code": code_documents(corpora["code"], random.Random(seed)),
        "zoo_prose": prose_documents(corpora["prose"], random.Random(seed)),
        "zoo_names": names[:DOCUMENTS],
        "zoo_names_fewshot": names[DOCUMENTS:],
        "zoo_strings": string_documents(corpora["strings"], random.Random(seed)),
    }
    check_held_out(found, corpora)
    return found


def whole_text(task: str, document: dict) -> str:
    """What a model that had trained on `document` would have seen: the text with its right answer."""
    if task == "zoo_prose":
        return document["passage"]
    if task == "zoo_strings":
        return f"\n{document['question']} -> {document['answer']}\n"
    truth = document["choices"][document["answer"]]
    return document["context"] + truth if task == "zoo_code" else f"\n{document['context']} {truth}\n"


def check_held_out(found: dict[str, list[dict]], corpora: dict[str, Corpus]) -> None:
    """Raise ValueError where a training text, of any skill, contains a task's document with its right answer."""
    everything = "\n".join("\n".join(["", *corpus.train, ""]) for corpus in corpora.values())
    for name, rows in found.items():
        leaked = [row for row in rows if whole_text(name, row) in everything]
        if leaked:
            raise ValueError(f"{len(leaked)} documents of {name} are in the training text, for example {leaked[0]}")


def write(found: dict[str, list[dict]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        lines = [json.dumps(row, ensure_ascii=True) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
