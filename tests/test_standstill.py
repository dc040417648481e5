"""`search.patience`: when a strategy is ended that finds nothing better beyond noise, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.races import SIZE, Live, settings, start
from support.searches import Engine

from mergesearch.config.search import PatienceConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import Scores
from mergesearch.results.loading import load_run
from mergesearch.search import standstill
from mergesearch.search.estimate import estimate
from mergesearch.search.standstill import expected_gain, latest
from mergesearch.search.trials import State, Trial
from mergesearch.search.worker import Search


class Scripted(Live):
    """Answers a fixed set of questions, the easiest first: `rises` more of them from trial to trial."""

    rises = 0.0

    def answer(self) -> None:
        shared = np.random.default_rng(0).random(SIZE)
        skill = 0.2 + self.rises * len(self.engine.loaded)
        own = np.random.default_rng(len(self.engine.loaded)).normal(0, 0.02, SIZE)
        for document in self.ids:
            self.answered[document] = float(shared[document] + own[document] < skill)

    def score(self) -> Scores:
        self.answer()
        return self.collect()


def search(folder: Path, rises: float, said: list[str], patience: object = None, trials: int = 24, **more) -> Search:
    live = Scripted(Engine())
    live.rises = rises
    given = {"trials": trials, "seed": 3, "strategy": "random", "defaults": False, "patience": patience, **more}
    return start(folder, live, say=said.append, racing=None, search=given)


def ended(run: Search) -> list[Trial]:
    return [trial for trial in run.history().trials if trial.state is State.COMPLETE and trial.strategy == "random"]


def test_a_search_that_finds_nothing_better_ends_for_every_worker_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    run = search(tmp_path / "run", 0.0, said, {"trials": 8})
    run.run()
    # what was there first may have been lucky, so the first window may begin a little later
    assert 8 <= len(ended(run)) < 22
    (word,) = [text for text in said if "search.patience" in text]
    assert word.startswith("note: random: ended by search.patience: its last 8 candidates (960 document evaluations)")
    assert "are expected to bring 0.0" in word
    other = search(tmp_path / "run", 0.0, said, {"trials": 8})
    count = len(ended(other))
    other.run()
    assert len(ended(other)) == count and sum("search.patience" in text for text in said) == 1
    read = load_run(tmp_path / "run")
    assert word in read.words and not any(line.startswith("left:") for line in read.words)
    assert estimate(other.config, other.history()).parts == ()  # type: ignore[union-attr]


def test_more_patience_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    run = search(tmp_path / "run", 0.0, said, {"trials": 8})
    run.run()
    count = len(ended(run))
    longer = search(tmp_path / "run", 0.0, said, {"trials": count + 2})
    longer.run()
    assert len(ended(longer)) > count
    more = run.history().proposals + 2
    without = search(tmp_path / "run", 0.0, said, None, more)
    without.run()
    assert without.history().proposals == more
    assert not any("search.patience" in line for line in load_run(tmp_path / "run").words)


def test_a_search_that_improves_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    run = search(tmp_path / "run", 0.03, said, {"trials": 6}, trials=14)
    run.run()
    assert run.history().proposals == 14 and said == []


def test_patience_in_documents(tmp_path: Path) -> None:
    said: list[str] = []
    run = search(tmp_path / "run", 0.0, said, {"documents": 9 * SIZE})
    run.run()
    assert run.history().proposals < 24
    assert "its last 9 candidates (1,080 document evaluations)" in said[-1]


def test_the_studys_first_stage_gives_way_to_its_second(tmp_path: Path) -> None:
    said: list[str] = []
    run = search(tmp_path / "run", 0.0, said, {"trials": 5}, 40, strategy="study", sampler="auto", study_ends="budget")
    run.run()
    stages = [trial.key["stage"] for trial in run.history().of("study")]
    assert stages.index("refine") < 20 and len(stages) < 40
    assert [text.partition(": ended")[0] for text in said] == ["note: study", "note: study/refine"]


def test_what_is_looked_at() -> None:
    trials = [Trial(number, State.COMPLETE, learning_documents=10) for number in range(6)]

    def numbers(**patience: int) -> list[int] | None:
        late = latest(trials, PatienceConfig.model_construct(**{"trials": None, "documents": None, **patience}))
        return None if late is None else [trial.number for trial in late]

    assert numbers(trials=3) == [3, 4, 5] and numbers(trials=7) is None
    assert numbers(documents=35) == [2, 3, 4, 5] and numbers(documents=61) is None
    assert numbers(documents=1) == [4, 5]  # one alone says nothing
    assert numbers(trials=5, documents=30) == [3, 4, 5]


def test_what_more_would_bring_against_draws() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.1, 4000)
    drawn = rng.normal(1.0, 0.1, (20000, 12)).max(axis=1)
    assert expected_gain(values.tolist(), 1.15, 12) == pytest.approx(np.maximum(drawn - 1.15, 0).mean(), rel=0.05)
    assert expected_gain([0.5, 0.5, 0.5], 0.5, 10) == 0.0
    # what is far below the others says nothing of how they vary
    low = [*values.tolist(), *[-50.0] * 400]
    assert expected_gain(low, 1.15, 12) == pytest.approx(expected_gain(values.tolist(), 1.15, 12), rel=0.4)


def test_what_is_refused_and_what_may_change(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="says neither trials nor documents"):
        settings(tmp_path, search={"patience": {}})
    with pytest.raises(UserError, match=r"patience\.trials"):
        settings(tmp_path, search={"patience": {"trials": 1}})
    one, other = settings(tmp_path, search={"patience": {"trials": 9}}), settings(tmp_path, search={})
    assert one.differences(other) == [] and other.differences(one) == []


def test_a_broken_baseline_or_no_objective_is_nothing_to_compare_with(tmp_path: Path) -> None:
    run = search(tmp_path / "run", 0.0, [], {"trials": 5})
    assert standstill.look(run.history(), "random", dict, lambda number: None) is None
