"""`report`: what `mergesearch report` may cost, and whether a run ends with it."""

from __future__ import annotations

from pydantic import Field

from mergesearch.schema import Strict


class ReportConfig(Strict):
    """Who is scored on the holdout, and on how much of it. It may differ whenever a run is reported on."""

    finalists: int = Field(
        default=3, ge=1, description="how many of the best proposals are scored beside the baselines"
    )
    documents: int | None = Field(
        default=None,
        ge=2,
        description="the most holdout documents of each task, drawn by the seed; default: all",
    )
    at_end: bool = Field(default=False, description="whether `mergesearch run` ends with the report")
