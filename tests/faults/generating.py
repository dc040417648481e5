"""Hypothesis as a source of cases: the same ones in every run, all of them tried, none of them twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


class Named(Protocol):
    """A case says what it is."""

    @property
    def name(self) -> str: ...


Case = TypeVar("Case", bound=Named)
Result = TypeVar("Result")


def each(strategy: st.SearchStrategy[Case], count: int, tried: Callable[[Case], Result]) -> list[Result]:
    """What comes of about `count` cases. All are tried: a failure that is known does not hide the next."""
    results: dict[str, Result] = {}

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        if case.name not in results:
            results[case.name] = tried(case)

    collect()
    return list(results.values())
