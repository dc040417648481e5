"""`track`: where a run's trials are told to beside its own study."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mergesearch.schema import Strict

TRACKERS = ("wandb", "mlflow", "tensorboard")


class TrackConfig(Strict):
    """A tracker, with a row for each trial. It may differ whenever a run is taken up again."""

    to: Literal["wandb", "mlflow", "tensorboard"] = Field(description="which one; each is an extra: mergesearch[wandb]")
    project: str | None = Field(
        default=None, min_length=1, description="W&B's project or MLflow's experiment; default: the run's name"
    )
    where: str | None = Field(
        default=None,
        min_length=1,
        description="W&B's or TensorBoard's folder, or MLflow's tracking URI; default: in the run folder, MLflow's "
        "also as `MLFLOW_TRACKING_URI` says",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"to": value} if isinstance(value, str) else value
