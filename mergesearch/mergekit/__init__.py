"""mergekit's YAML, both ways: a file of it becomes a `Recipe`, a `Recipe` becomes a file that mergekit runs.

`known` says what the files may hold, `file` takes one apart, `reading` makes a recipe of it, `grouping` finds the
shortest list of rules, and `writing` goes the other way. The format is the one mergekit 0.1.5 documents; where its
documentation is silent, its behaviour was observed from outside, and tests/test_mergekit.py compares with it.
"""

from __future__ import annotations

from mergesearch.mergekit.reading import from_data, is_mergekit, read, read_any
from mergesearch.mergekit.writing import export, limits, write

__all__ = ["export", "from_data", "is_mergekit", "limits", "read", "read_any", "write"]
