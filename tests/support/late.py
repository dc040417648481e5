"""Cases of one test of which a few are enough every day: the others wait for the long form, `pytest -m slow`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], now: Container[Any]) -> list[Any]:
    """`values` as pytest's parameters, those that are not in `now` marked slow."""
    return [value if value in now else pytest.param(value, marks=pytest.mark.slow) for value in values]
