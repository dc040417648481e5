"""scripts/bench/search.py counts how often the judging pools are looked at, and its page says so."""

from __future__ import annotations

import subprocess

import pytest
from support.bench_pools import put_in_place

from scripts.bench import judging, search, search_rows

pytest.importorskip("cma", reason="pip install cma")


@pytest.fixture(autouse=True)
def a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "FILE", tmp_path / "judging.md")


@pytest.fixture
def pools(tmp_path, monkeypatch):
    """Two pools, one of them for judging, and searches that end at once."""

    def run(unit):
        point = search_rows.Point(10, 1.0, 0.5, 0.4)
        return search_rows.Curve([point], 10, 1.0, unit.settings, unit.budget)

    put_in_place(monkeypatch, tmp_path, ("mine", "judged"), run, judging={"judged"})
    return tmp_path


def command(folder, *more: str) -> int:
    return search.main(["--out", str(folder / "out"), "--results", str(folder / "search"), *more])


def rows() -> list[str]:
    return [line for line in judging.FILE.read_text().splitlines() if line.startswith("| 2")]


def test_each_command_that_runs_on_a_judging_pool_is_a_row_and_what_runs_nothing_is_none(pools):
    both = ["--pool", "mine", "judged", "--only", "auto", "cmaes", "--seeds", "3", "5"]
    command(pools, *both)
    (row,) = rows()
    assert row.endswith(f"| {judging.commit()} | judged | auto, cmaes | 3 5 |")
    command(pools, *both)
    command(pools, "--report")
    command(pools, "--pool", "mine", "--only", "auto", "--seeds", "7")
    assert len(rows()) == 1
    command(pools, "--pool", str(pools / "judged.yaml"), "--only", "auto", "--seeds", "7")
    assert rows()[1].endswith("| judged | auto | 7 |")
    assert judging.looks() == {"judged": 2}


def test_what_fails_or_has_no_time_left_was_looked_at_too(pools):
    arguments = ["--pool", "judged", "--only", "auto", "--seeds", "0", "--stop-after", "-1"]
    for looks in (1, 2):
        with pytest.raises(SystemExit, match="no search is finished yet"):
            command(pools, *arguments)
        assert judging.looks()["judged"] == looks


def test_the_page_has_judging_pools_last_under_a_heading_of_their_own(pools):
    command(pools, "--pool", "judged", "mine", "--only", "auto", "--seeds", "0")
    command(pools, "--pool", "judged", "--only", "cmaes", "--seeds", "0")
    text = (pools / "search.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Pool mine", "## Judging pools", "## Pool judged"]
    assert text.count("Looked at 2 times.") == 1
    command(pools, "--pool", "mine", "--only", "cmaes", "--seeds", "0", "--results", str(pools / "other"))
    assert "udging" not in (pools / "other.md").read_text()


def test_the_commit_is_the_repositorys(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "ROOT", tmp_path)
    assert judging.commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    clean = judging.commit()
    assert len(clean) >= 7 and clean[-1] != "+"
    (tmp_path / "file").write_text("a")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    assert judging.commit() == clean + "+"


def test_the_committed_count_is_read_and_its_rows_name_judging_pools(monkeypatch):
    monkeypatch.setattr(judging, "FILE", judging.ROOT / "results" / "judging.md")
    assert judging.FILE.read_text(encoding="utf-8").startswith(judging.HEAD)
    judged = {name for name, pool in search.POOLS.items() if pool.judging}
    assert judging.looks().keys() <= judged
    assert sum(judging.looks().values()) == len(rows())
