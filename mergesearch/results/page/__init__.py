"""A run as one self-contained page, to be read in any browser without a network.

`subject` reads what a page is about, `contenders`, `curves`, `depth` and `tradeoffs` make its pictures, `build` the page.
"""

from __future__ import annotations

from mergesearch.results.page.build import page, write
from mergesearch.results.page.depth import anatomy_of
from mergesearch.results.page.subject import Subject

__all__ = ["Subject", "anatomy_of", "page", "write"]
