"""What the benchmark of many workers measures."""

from __future__ import annotations

from pathlib import Path

import optuna

from mergesearch.search.presence import signs
from scripts.bench.workers import Storage, measured


def test_workers_on_a_server_go_by_signs_of_life(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"  # stands in for a server
    spent, _ = measured(2, 1, 0.01, Storage(url))
    assert len(spent) == 2
    (name,) = [name for name in optuna.get_all_study_names(url) if "/" not in name]
    hosts = {sign.host for sign in signs(optuna.load_study(study_name=name, storage=url)).values()}
    assert len(hosts) == 2
