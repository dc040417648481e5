"""How often the report is right, over simulated searches that go through the code of the command."""

from __future__ import annotations

import pytest

from scripts.bench.shared.simulated import World, claims_any, simulate

DRAWS = 200  # the randomisation test is exact with any number of draws


@pytest.mark.parametrize("differ", [0.08, 0.3])
def test_equal_candidates_are_seldom_called_an_improvement(differ: float) -> None:
    claims = [claims_any(simulate(World(documents=150, differ=differ), seed, DRAWS)) for seed in range(1000)]
    assert sum(claims) / 1000 <= 0.05


def test_a_gain_of_three_points_on_a_thousand_documents_is_found() -> None:
    """Where equal candidates differ on 8 % of the documents; results/calibration.md has other shares."""
    world = World(documents=1000, differ=0.08, gain=0.03)
    found = [claims_any(simulate(world, seed, DRAWS)) for seed in range(300)]
    assert sum(found) / 300 >= 0.8
