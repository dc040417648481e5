"""The demo zoo's text: what its models train on, and the documents of its tasks, which no model trains on.

Everything comes from Python itself: the standard library's source and docstrings, `pydoc_data.topics`, the
names in `unicodedata`, and generated string tasks. What is held out is decided by a hash of a file's path, a
topic's title, a character's name or a string task's operand, so it does not depend on the order of anything:

    code    whole source files                      prose   whole documentation topics, and the docstrings of the
    names   single character names                          source files that are held out
    strings single (operation, operand) pairs
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import re
import string
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

END = 256  # the token that ends a text; a byte is its own token
SKILLS = ("code", "prose", "names", "strings")
SKIPPED = re.compile(
    r"(^|/)(site-packages|test|tests|idle_test|lib2to3|pydoc_data|__pycache__)/|(^|/)encodings/(cp|iso|mac|koi)"
)
HELD_OUT_SHARE = {"code": 0.1, "prose": 0.25, "names": 0.1, "strings": 0.1}


@dataclass(frozen=True)
class Corpus:
    """One skill's text: `train` for the models, `held_out` for the task alone. Both are lists of texts."""

    train: list[str]
    held_out: list[str]


def held_out(skill: str, key: str) -> bool:
    """Whether `key` belongs to the task of `skill`: a hash decides, the same on every machine."""
    digest = hashlib.sha256(f"{skill}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE[skill] * 2**32


def split(skill: str, keyed: Iterator[tuple[str, str]]) -> Corpus:
    """Part (key, text) pairs into training text and held-out text."""
    corpus = Corpus([], [])
    for key, text in keyed:
        (corpus.held_out if held_out(skill, key) else corpus.train).append(text)
    return corpus


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


def code_texts() -> Iterator[tuple[str, str]]:
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


def name_texts() -> Iterator[tuple[str, str]]:
    """(name, name) of every character whose name is not a serial number."""
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name and not re.search(r"[0-9]", name) and not name.startswith(("HANGUL SYLLABLE", "BRAILLE")):
            yield name, name


def shout(word: str) -> str:
    return word.upper()


def mirror(word: str) -> str:
    return word[::-1]


def arrange(word: str) -> str:
    return "".join(sorted(word))


OPERATIONS: dict[str, Callable[[str], str]] = {"upper": shout, "reverse": mirror, "sort": arrange}


def string_texts(count: int = 60_000, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(operation and operand, "operation: operand -> result"), each pair once; operands of 4 to 6 letters."""
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        operation = rng.choice(sorted(OPERATIONS))
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 6)))
        key = f"{operation}: {word}"
        if key not in seen:
            seen.add(key)
            yield key, f"{key} -> {OPERATIONS[operation](word)}"


TEXTS = {"code": code_texts, "prose": prose_texts, "names": name_texts, "strings": string_texts}


def corpora() -> dict[str, Corpus]:
    """Every skill's corpus; names and string tasks in a shuffled order, as their neighbours would tell them."""
    found = {skill: split(skill, TEXTS[skill]()) for skill in SKILLS}
    for skill in ("names", "strings"):
        for texts in (found[skill].train, found[skill].held_out):
            random.Random(0).shuffle(texts)
    return found


def stream(skill: str, texts: list[str]) -> bytes:
    """The training text of a skill in one piece: texts end with byte 0 (which stands for END) or a line break."""
    if skill in ("names", "strings"):
        return "".join(text + "\n" for text in texts).encode()
    return "".join(text.strip() + "\n\0" for text in texts).encode()
