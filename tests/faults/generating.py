"""Hypothesis as a source of cases: the same ones in every run, none of them twice."""

from __future__ import annotations

from typing import Protocol, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


class Named(Protocol):
    """A case says what it is."""

    @property
    def name(self) -> str: ...


Case = TypeVar("Case", bound=Named)


def cases(strategy: st.SearchStrategy[Case], count: int) -> list[Case]:
    """About `count` cases. All of them can be tried: a failure that is known does not hide the next."""
    found: dict[str, Case] = {}

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
        found.setdefault(case.name, case)

    collect()
    return list(found.values())
