"""The configuration of one run. models: what it holds; space, search, report: parts of it; file: how it is read."""

from __future__ import annotations

from mergesearch.config.file import read
from mergesearch.config.models import Config, GuardConfig, ObjectiveConfig, RacingConfig, TaskConfig
from mergesearch.config.report import ReportConfig
from mergesearch.config.search import SearchConfig
from mergesearch.config.space import Freeze, Narrow, Selector, SpaceConfig, StackConfig

__all__ = [
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
    "read",
]
