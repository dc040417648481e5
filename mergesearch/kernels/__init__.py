"""Fast paths of the merge methods: each equals the plain definition in `mergesearch.methods`.

symbols: a method run once on symbols shows its elementwise part and its statistics. program: the elementwise part as a
function over blocks. compiled: the same compiled. tables, statistics: what is kept between candidates. runner: all of it.
"""

from __future__ import annotations

from mergesearch.kernels.compiled import WORTH_COMPILING, Compiler
from mergesearch.kernels.runner import Recipe, Runner, Task
from mergesearch.kernels.statistics import Operands, Statistics

__all__ = ["WORTH_COMPILING", "Compiler", "Operands", "Recipe", "Runner", "Statistics", "Task"]
