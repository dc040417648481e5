"""mergekit's YAML, both ways: a file of it becomes a `Recipe`, a `Recipe` becomes a file that mergekit runs.

`known` says what the files may hold, `file` takes one apart, `reading` makes a recipe of it, `grouping` finds the
shortest list of rules. `models` says what part each model plays in a file. The other way, `placement` says where the
result's tensors stand as mergekit sees them, `filters` tells them apart, and `exporting` writes the file.

The format is the one mergekit 0.1.5 documents; where its documentation is silent, its behaviour was observed from
outside, and tests/test_mergekit.py compares with it.
"""

from __future__ import annotations

from mergesearch.mergekit.exporting import export, limits, write
from mergesearch.mergekit.reading import from_data, is_mergekit, read, read_any

__all__ = ["export", "from_data", "is_mergekit", "limits", "read", "read_any", "write"]
