"""`mergesearch check` says how long a run will take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.commands import QUICKSTART, mergesearch, small

from mergesearch.commands import probe
from mergesearch.evaluate.losses import Losses
from mergesearch.evaluate.scoring import Scorer
from mergesearch.search.estimate import estimate
from mergesearch.search.history import History
from mergesearch.search.soup.learner import Learner
from mergesearch.search.speed import probe_of
from mergesearch.search.store import open_run


def line(out: str, label: str) -> str:
    return next(text for name, _, text in (each.partition(": ") for each in out.splitlines()) if name == label)


def test_before_a_run_by_a_probe_and_then_by_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soups = {"search__strategy": "auto", "search__learned_soup__steps": 2}
    options = small(tmp_path / "run", trials=0, limit=8, **soups)
    trusted = {**soups, "trust_tasks": "true"}
    before = mergesearch("check", QUICKSTART, *small(tmp_path / "run", trials=6, limit=8, **trusted))
    assert before.status == 0, before.err
    said = line(before.out, "time")
    took = r"\d+ (s|min|h)( \d+ (s|min))?"
    assert re.match(
        f"about {took}: 6 baselines {took}, the sweep {took}, 2 learned soups {took}, 3 greedy soups {took}, "
        f"1 proposal {took} unless a learned soup is ahead of all else by then",
        said,
    )
    assert "a probe of a few documents" in said and not (tmp_path / "run").exists()

    done = mergesearch("run", QUICKSTART, *options)
    assert done.status == 0, done.err
    config, study = open_run(tmp_path / "run")
    history = History(study, config)
    noted = probe_of(history)
    assert noted is not None and set(noted.scoring) == set(noted.documents) and noted.export > 0
    assert noted.learning is not None and noted.learning > 0 and noted.loading > 0
    rest = estimate(config, history)
    assert rest is not None and rest.parts == ()
    asked: list[Scorer] = []
    monkeypatch.setattr(probe, "measure", lambda *_: asked.append(1))
    after = mergesearch("check", QUICKSTART, *small(tmp_path / "run", trials=3, limit=8, **soups))
    assert line(after.out, "left").startswith("about ") and "2 learned soups" in line(after.out, "left")
    assert "\ntime: " not in after.out and asked == []


def test_what_statistics_of_documents_take_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("regmean_full", "regmean_plus", "fisher_full")
    changes = {"trust_tasks": "true", "search__strategy": f"[{', '.join(names)}]"}
    said = mergesearch("check", QUICKSTART, *small(tmp_path / "run", limit=8, **changes))
    assert said.status == 0, said.err
    for name in names:
        told = r"about \d+ (s|min).* once for 4 models on about \d+ documents and [\d.]+ MiB in the run folder"
        then = "" if name == "fisher_full" else r", then about \d+ (s|min).* a candidate"
        assert re.fullmatch(told + then, line(said.out, f"statistics {name}"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Learner, "foreseen", lambda *_: None)
    unknown = mergesearch("check", QUICKSTART, *small(tmp_path / "run", limit=8, **changes))
    assert line(unknown.out, "statistics fisher_full").startswith("not known: ")


def test_what_cannot_be_measured_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "SECONDS", -1.0)
    said = mergesearch("check", QUICKSTART, *small(tmp_path / "run", limit=8, trust_tasks="true"))
    assert said.status == 0 and line(said.out, "time").startswith("not known: ")


def test_soups_of_tasks_that_say_no_answers_are_counted_as_they_will_be_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CMA-ES, whose candidates are scored on all documents: several times what gradients take."""
    monkeypatch.setattr(Losses, "_read", lambda *_: None)
    changes = {"trust_tasks": "true", "search__strategy": "learned_soup", "search__learned_soup__candidates": 7}
    said = mergesearch("check", QUICKSTART, *small(tmp_path / "run", limit=8, **changes))
    assert said.status == 0, said.err
    assert line(said.out, "soups").startswith("learned without gradients, by CMA-ES: task ")
    found = re.search(r"(\d+) documents each.*and at most (\d+) to learn 1 soup(;|$)", line(said.out, "budget"))
    assert found is not None and int(found[2]) == 7 * int(found[1])
    assert "1 learned soup " in line(said.out, "time")
