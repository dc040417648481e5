"""What the soak's page says of its figures."""

from __future__ import annotations

from pathlib import Path

from scripts.bench.soak import Look, around, page, settings


def looks(count: int, grows: float, slows: float) -> list[Look]:
    return [Look(n, int((1000 + grows * n) * 2**20), 0.1 + slows * n) for n in range(count)]


def test_medians_of_the_window_that_ends_there() -> None:
    memory, seconds = around(looks(400, 0.0, 0.001), 200)
    assert memory == 1000 and abs(seconds - (0.1 + 0.001 * 174.5)) < 1e-9


def test_what_is_kept_and_what_is_missed() -> None:
    kept = page(looks(2000, 0.005, 0.0), 8, [])
    assert "From trial 200 to 2000 memory grew by 0.9%" in kept[-2] and kept[-2].endswith(": kept.")
    assert sum(line.startswith("| ") for line in kept) == 1 + 6
    assert page(looks(2000, 0.05, 0.0), 8, [])[-2].endswith(": missed.")
    assert page(looks(2000, 0.0, 0.001), 8, [])[-2].endswith(": missed.")
    assert "grew by 0.0%" in page(looks(60, 0.0, 0.0), 8, ["", "a note"])[-4]


def test_its_configuration_is_one(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", 2000, 8)
    assert config.search.trials == 2000 and config.search.strategies == ["baselines", "study"]
