"""The demo zoo's text: what its models train on, and the documents of its tasks, which no model trains on.

Everything comes from Python itself (the standard library's source and docstrings, `pydoc_data.topics`) or is generated.
What is held out is decided by a hash of a file's path, a topic's title or a line's question, so it does not depend on
the order of anything:

    prose    documentation topics and docstrings      python   source files without their docstrings
    order    "reverse: pact -> tcap", "sort: ..."     letters  "next: pact -> qbdu", "flip: ..." (a for z, b for y, ...)
    numbers  "number: six thousand two hundred five -> 6205"
    both     one of order, then one of letters: "reverse next: pact -> tcap -> udbq"; no model trains on it
    coded    the operations under names of the base's own, "red blue: pact -> tcap -> udbq"
    loose    lines of any one or two names, under which any of the four operations are done, drawn anew in each line

`order` and `letters` also have lines of two steps of their own, "sort reverse: pact -> acpt -> tpca". `coded` teaches
the base how each operation is done, and `loose` that their plain names say nothing: a base model can do much and
follows no instruction. `loose_order` and `loose_letters` have the names of one family only.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

SKILLS = ("prose", "python", "order", "letters", "numbers", "both", "coded", "loose", "loose_order", "loose_letters")
LINES = SKILLS[2:]  # whose texts are one line each
SKIPPED = re.compile(
    r"(^|/)(site-packages|test|tests|idle_test|lib2to3|pydoc_data|__pycache__)/|(^|/)encodings/(cp|iso|mac|koi)"
)
HELD_OUT = 0.1
COUNT = 60_000  # generated lines of a skill


@dataclass(frozen=True)
class Corpus:
    """One skill's text: `train` for the models, `held_out` for the task alone. Both are lists of texts."""

    train: list[str]
    held_out: list[str]


def held_out(skill: str, key: str) -> bool:
    """Whether `key` belongs to the task of `skill`: a hash decides, the same on every machine."""
    digest = hashlib.sha256(f"{skill}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def split(skill: str, keyed: Iterator[tuple[str, str]]) -> Corpus:
    """Part (key, text) pairs into training text and held-out text."""
    corpus = Corpus([], [])
    for key, text in keyed:
        (corpus.held_out if held_out(family(key) or skill, key) else corpus.train).append(text)
    return corpus


# --- from the standard library ----------------------------------------------------------------------------------------


def source_files() -> Iterator[tuple[str, str]]:
    """(path, text) of the standard library's ASCII source files, its tests and character tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.search(name):
            continue
        text = path.read_bytes()
        if text.isascii() and len(text) > 400:
            yield name, text.decode().replace("\r\n", "\n").expandtabs()


def docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    """The statements that are docstrings, of the module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            constant = first.value if isinstance(first, ast.Expr) else None
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                yield first


def python_texts() -> Iterator[tuple[str, str]]:
    """(path, source without its docstrings)."""
    for name, text in source_files():
        lines = text.split("\n")
        for node in docstring_nodes(ast.parse(text)):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        yield name, "\n".join(line for line in lines if line is not None)


def prose_texts() -> Iterator[tuple[str, str]]:
    """(key, text): the documentation topics, by title, and docstrings of 200 characters or more, by file."""
    from pydoc_data.topics import topics

    for title in sorted(topics):
        text = topics[title].encode("ascii", "ignore").decode()
        yield f"topic {title}", re.sub(r"[*]{4,}|[=]{4,}|[-]{4,}", "", text).strip()
    for name, text in source_files():
        for node in docstring_nodes(ast.parse(text)):
            prose = inspect.cleandoc(node.value.value)
            if len(prose) >= 200 and prose.isascii():
                yield name, prose


# --- generated --------------------------------------------------------------------------------------------------------

Operation = Callable[[str], str]
ALPHABET = string.ascii_lowercase
ORDER: Mapping[str, Operation] = {"reverse": lambda word: word[::-1], "sort": lambda word: "".join(sorted(word))}
LETTERS: Mapping[str, Operation] = {
    "next": lambda word: word.translate(str.maketrans(ALPHABET, ALPHABET[1:] + ALPHABET[0])),
    "flip": lambda word: word.translate(str.maketrans(ALPHABET, ALPHABET[::-1])),
}
OPERATIONS: Mapping[str, Operation] = {**ORDER, **LETTERS}
CODED = dict(zip(("red", "green", "blue", "gold"), OPERATIONS.values(), strict=True))


def family(key: str) -> str | None:
    """Whose task a question belongs to, by its names: order, letters or both; None without a name of an operation."""
    names = key.partition(":")[0].split()
    if not names or any(name not in OPERATIONS for name in names):
        return None
    return "order" if ORDER.keys() >= set(names) else "letters" if LETTERS.keys() >= set(names) else "both"


def applied(operations: Sequence[Operation], word: str) -> list[str]:
    """What each operation makes of what the one before it made."""
    made: list[str] = []
    for operation in operations:
        made.append(operation(made[-1] if made else word))
    return made


def operation_texts(
    skill: str, programs: Sequence[Sequence[str]], meant: Mapping[str, Operation] | None = OPERATIONS
) -> Iterator[tuple[str, str]]:
    """("reverse next: pact", "reverse next: pact -> tcap -> udbq"), each once; words of 4 to 6 letters.

    `meant`: what the names mean; None: any of the operations, drawn anew for each name in each line.
    """
    rng, seen = random.Random(skill), set()
    while len(seen) < COUNT:
        names = rng.choice(programs)
        word = "".join(rng.choices(ALPHABET, k=rng.randint(4, 6)))
        done = [meant[name] for name in names] if meant else rng.choices(list(OPERATIONS.values()), k=len(names))
        key = f"{' '.join(names)}: {word}"
        if key not in seen:
            seen.add(key)
            yield key, " -> ".join([key, *applied(done, word)])


def of_one_family(names: Mapping[str, Operation]) -> list[tuple[str, ...]]:
    """Programs of one or two steps; of one step twice as often."""
    single = [(name,) for name in names]
    return [*single, *single, *pairs(names)]


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    return list(permutations(names, 2))


def order_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("order", of_one_family(ORDER))


def letters_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("letters", of_one_family(LETTERS))


def both_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("both", [(first, second) for first in ORDER for second in LETTERS])


def of_any(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Programs of one or two steps, about as many of each."""
    singles = [(name,) for name in names]
    return [*(singles * (len(names) - 1)), *pairs(names)]


def coded_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("coded", of_any(list(CODED)), CODED)


def loose_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("loose", of_any(list(OPERATIONS)), None)


def loose_order_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("loose_order", of_one_family(ORDER), None)


def loose_letters_texts() -> Iterator[tuple[str, str]]:
    return operation_texts("loose_letters", of_one_family(LETTERS), None)


UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
UNITS = [*UNITS.split(), "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """6205 -> six thousand two hundred five; from 0 to 9999."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    return f"{UNITS[number // size]} {name}" + (f" {in_words(rest)}" if rest else "")


def numbers_texts() -> Iterator[tuple[str, str]]:
    """("number: six thousand two hundred five", the same with "-> 6205") of every number of four digits."""
    for number in range(1000, 10_000):
        key = f"number: {in_words(number)}"
        yield key, f"{key} -> {number}"


TEXTS = {
    "prose": prose_texts, "python": python_texts, "order": order_texts, "letters": letters_texts,
    "numbers": numbers_texts, "both": both_texts, "coded": coded_texts, "loose": loose_texts,
    "loose_order": loose_order_texts, "loose_letters": loose_letters_texts,
}  # fmt: skip


def corpora() -> dict[str, Corpus]:
    """Every skill's corpus; lines in a shuffled order, as their neighbours would tell them."""
    found = {skill: split(skill, TEXTS[skill]()) for skill in SKILLS}
    for skill in LINES:
        for texts in (found[skill].train, found[skill].held_out):
            random.Random(0).shuffle(texts)
    return found


def stream(skill: str, texts: list[str]) -> bytes:
    """The training text of a skill in one piece: texts end with byte 0 (which stands for END) or a line break."""
    if skill in LINES:
        return "".join(text + "\n" for text in texts).encode()
    return "".join(text.strip() + "\n\0" for text in texts).encode()
