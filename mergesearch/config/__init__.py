"""The configuration of one run. models: what it holds; space, search, report: parts of it; file: how it is read."""

from __future__ import annotations

from mergesearch.config.backend import BackendConfig
from mergesearch.config.file import from_data, read
from mergesearch.config.models import Config, GuardConfig, ObjectiveConfig
from mergesearch.config.racing import RacingConfig
from mergesearch.config.report import BenchmarkConfig, ReportConfig
from mergesearch.config.search import SearchConfig
from mergesearch.config.space import Freeze, Narrow, Selector, SpaceConfig, StackConfig
from mergesearch.config.tasks import LENGTH, TaskConfig
from mergesearch.config.track import TrackConfig

__all__ = [
    "LENGTH",
    "BackendConfig",
    "BenchmarkConfig",
    "Config",
    "Freeze",
    "GuardConfig",
    "Narrow",
    "ObjectiveConfig",
    "RacingConfig",
    "ReportConfig",
    "SearchConfig",
    "Selector",
    "SpaceConfig",
    "StackConfig",
    "TaskConfig",
    "TrackConfig",
    "from_data",
    "read",
]
