"""The report on the holdout: `build` (scores -> Report), `text` (Report -> text, Markdown, JSON, model card)."""

from __future__ import annotations

from mergesearch.results.report.build import Entry, Question, build
from mergesearch.results.report.data import Comparison, Figure, Noise, Report, Row, Section
from mergesearch.results.report.text import FORMATS, card, render

__all__ = [
    "FORMATS",
    "Comparison",
    "Entry",
    "Figure",
    "Noise",
    "Question",
    "Report",
    "Row",
    "Section",
    "build",
    "card",
    "render",
]
