"""What the pages show: fenced blocks by language, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

COMMAND = "mergesearch"


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: where it stands.
        language: as the fence names it; empty for what is typed or printed.
        title: a file's name, where the fence gives one.
        text: what is between the fences.
    """

    page: Path
    language: str
    title: str | None
    text: str

    def commands(self) -> list[list[str]]:
        """Its lines that are commands of ours, as a shell splits them, without comments and the program's name."""
        if self.language:
            return []
        found = []
        for line in self.text.splitlines():
            # in a session what a command does stands behind it, after two spaces or more
            typed = re.split(r"\s{2,}", line.strip())[0]
            if typed.startswith(f"{COMMAND} "):
                found.append(shlex.split(typed, comments=True)[1:])
        return found


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; those of one language where one is named."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    found = [Block(page, name, title or None, body) for name, title, body in fenced]
    return [block for block in found if language is None or block.language == language]


def inline_commands(page: Path) -> list[list[str]]:
    """Commands of ours between single backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return [shlex.split(span)[1:] for span in spans if re.match(rf"{COMMAND} [a-z-]", span)]
