"""What mkdocstrings asks of docstrings (mkdocs.yml names this file): examples are code, wherever they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).+\n?)*)+", re.MULTILINE)


class Examples(griffe.Extension):
    """Fences what a docstring shows Python's prompt with, which Markdown would else read as text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """`docstring` with each example between fences."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring)
