"""Scoring by token tries, the optional speed: what requests share is computed once."""

from __future__ import annotations
