"""`racing`: how often a candidate is looked at while it is scored, and when it is stopped."""

from __future__ import annotations

from pydantic import Field

from mergesearch.schema import Strict


class RacingConfig(Strict):
    """Scoring block by block, so that a candidate that can no longer win is stopped early."""

    blocks: int = Field(
        default=16, ge=2, le=1000, description="how often a candidate is looked at; the blocks of documents grow"
    )
    error: float = Field(
        default=0.002,
        gt=0,
        le=0.5,
        description="a candidate is stopped once its predicted chance to win is at most this",
    )
