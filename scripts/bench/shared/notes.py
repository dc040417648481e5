"""What the figures of a page alone do not say: written by hand, in a file beside it, and put at the page's end."""

from __future__ import annotations

from pathlib import Path


def notes_of(page: Path) -> list[str]:
    """The lines of `NAME.notes.md` beside `NAME.md`, an empty one before them; none where there is no such file."""
    notes = page.with_suffix(".notes.md")
    return ["", *notes.read_text(encoding="utf-8").rstrip().splitlines()] if notes.is_file() else []
