"""What a reader sees of a run: its records, the table, the model card, the report."""

from __future__ import annotations
