"""Scoring by token tries, the optional speed: what requests share is computed once.

Nothing here says what a score means. `TrieLM` answers the same requests as `evaluate.model.RememberingLM`, and the
scorer asks for it in one place; `scoring: lm_eval` never imports this folder.
"""

from __future__ import annotations

from mergesearch.evaluate.tries.lm import TrieLM

__all__ = ["TrieLM"]
