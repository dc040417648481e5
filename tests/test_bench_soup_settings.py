"""The page that compares the settings of learned soups."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergesearch.search.soup.settings import SoupSettings
from scripts.bench import soup_settings


@pytest.mark.parametrize("way", soup_settings.WAYS)
def test_every_way_is_what_a_configuration_may_say(way: str) -> None:
    assert SoupSettings.model_validate(soup_settings.WAYS[way]).model_fields_set == set(soup_settings.WAYS[way])


def test_scores_are_compared_with_the_start_of_their_seed(tmp_path: Path) -> None:
    file, page = tmp_path / "soup-settings.csv", tmp_path / "soup-settings.md"
    whole = {"pool": "real", "loss": "expected", "per": "tensor", "documents": 100, "seconds": 1, "ended": ""}
    holdout = {(soup_settings.START, 5): 0.2, (soup_settings.START, 6): 0.4, ("1 fold, decay 1", 5): 0.3}
    holdout[("1 fold, decay 1", 6)] = 0.7
    for (way, seed), score in holdout.items():
        soup_settings.add(file, {**whole, "way": way, "seed": seed, "search_score": 0.5, "holdout_score": score})
    assert len(soup_settings.read(file)) == 4
    soup_settings.report(file, page)
    row = next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| 1 fold"))
    assert row == "| 1 fold, decay 1 | 5, 6 | 0.500 | 0.500 | +0.200 ± 0.100 | 100 | 1 |"
