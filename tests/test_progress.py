"""How a run is shown: the view on a terminal, lines elsewhere, and the sentence on its winner."""

from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.cells import cell_len
from rich.console import Console
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch.commands.live import View, render
from mergesearch.commands.progress import STILL, RunProgress
from mergesearch.commands.winner import sentence
from mergesearch.config import Config
from mergesearch.evaluate.asking import Asked
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.loading import Run
from mergesearch.results.record import Record, record_of
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.soup.learning import LearningStep
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import Kind, State, Trial
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

SCORES = {"quiz": TaskScore(0.5, 0.1, 10, "acc")}
SOUP = "learned soup per tensor by cross-entropy"


class Clock:
    """Seconds that grow when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(number: int, objective: float | None = None, **more: Any) -> Record:
    kept: dict[str, Any] = {"name": None, "state": "complete", "method": "ties", "strategy": "study", **more}
    return Record(number, objective=objective, scores=SCORES, merge_seconds=1.0, score_seconds=2.0, **kept)


# --- the view -----------------------------------------------------------------------------------------------------


def busy() -> View:
    """A view with as long words as there are."""
    best = record(17, 0.5230, method=SOUP)
    single = record(2, 0.1171, name="a-model-with-a-long-name")
    return View(
        stage=SOUP,
        trial=f"trial 18 {SOUP}",
        doing="zoo_letters, zoo_numbers and 3 more",
        documents=140,
        of=600,
        begun=90.0,
        ended=18,
        total=122,
        best=best,
        single=single,
        objective_known=True,
        remaining=4000.0,
        worked=3000.0,
        shares="scoring 78 %, learning 20 %, merging 2 %",
        at=100.0,
    )


def drawn(view: View, width: int, now: float = 100.0) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(render(view, now, width))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_view_is_four_lines_within_the_terminal(width: int) -> None:
    for view in (View(), View(doing="loading 4 tasks"), busy()):
        lines = drawn(view, width)
        assert len(lines) == 4 and max(map(cell_len, lines)) <= width


def test_the_view_says_what_is_done_how_well_it_goes_and_how_long_it_takes() -> None:
    wide = drawn(busy(), 200)
    assert wide[0].startswith(SOUP) and wide[0].rstrip().endswith("18/122 trials  about 1 h 7 min left")
    doing = "zoo_letters, zoo_numbers and 3 more, 140 of 600 documents, 14 a second"
    assert wide[1] == f"trial 18 {SOUP}: {doing}"
    best = f"highest score so far 0.5230 (trial 17 {SOUP})"
    assert wide[2] == f"best single model 0.1171 (a-model-with-a-long-name), {best}"
    assert wide[3] == "50 min at work: scoring 78 %, learning 20 %, merging 2 %"
    narrow = drawn(busy(), 80)
    assert "18/122 trials  about 1 h 7 min left" in narrow[0] and narrow[2].endswith("…")
    assert drawn(busy(), 80, now=1000.0)[0].rstrip().endswith("about 52 min left")
    before = drawn(View(trial="trial 1 code", stage="baselines"), 80)
    assert before[2] == "the objective is known once the base and all models are scored"


def test_a_view_shows_learning_step_by_step() -> None:
    view = busy()
    view.learns(LearningStep(12, 40, loss=7.79671), record(19, method=SOUP, strategy="learned soup"))
    assert drawn(view, 120)[1] == f"trial 19 {SOUP}: step 12 of 40, loss 7.7967"
    view.learns(LearningStep(3, 100, score=0.25), None)
    assert drawn(view, 120)[1] == f"trial 19 {SOUP}: step 3 of 100, best 0.2500"


# --- a run --------------------------------------------------------------------------------------------------------


def run_shown(folder: Path, console: Console, clock: Clock, **changes: Any) -> Search:
    """A search over stand-ins, shown."""
    config = settings(folder, **changes)
    engine = Engine()
    with RunProgress(config, console, clock) as progress:

        def told(of: Any) -> Any:
            return lambda trial: of(record_of(trial, store.objective_of(search.study)))

        search = Search(
            config,
            RunFolder.prepare(config),
            SearchSpace(config, INFOS, 2),
            engine,
            Scorer(engine),
            started=told(progress.started),
            scored=told(progress.scored),
            finished=told(progress.finished),
        )
        progress.say("loading 2 tasks")
        there = [record_of(t, search.history().objective) for t in search.history().trials]
        progress.begin(search.history, there, lambda: search.at_work)
        search.run()
    return search


def test_without_a_terminal_there_is_a_line_for_each_trial(tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    run_shown(tmp_path / "run", console, Clock(), search={"trials": 3})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "loading 2 tasks" and len(lines) == 1 + 4 + 3
    # parents are told with their raw scores as soon as they are scored, and not again
    for number, name in enumerate(("base", "a", "b")):
        assert (
            lines[1 + number].startswith(f"[{number + 1}/")
            and f" trial {number} {name}: quiz acc 0." in lines[1 + number]
        )
    assert "; about " in lines[1] and " left)" in lines[1] and "bits bits_per_byte" in lines[1]
    assert lines[4].startswith("[4/7] trial 3 average: ") and "(highest score " in lines[4]
    assert lines[-1].startswith("[7/7] trial 6 ") and "left" not in lines[-1]
    again = Console(width=80, file=io.StringIO(), force_terminal=False)
    run_shown(tmp_path / "run", again, Clock(), search={"trials": 3})
    assert again.file.getvalue().splitlines()[1:] == ["going on after 7 trials"]  # type: ignore[attr-defined]


def test_on_a_terminal_lines_stay_above_the_view(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    run_shown(tmp_path / "run", console, Clock(), search={"trials": 3})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[7/7] trial 6 " in text and text.count("[2/7] trial 1 a: ") == 1
    # whenever frames were drawn: what was loaded was part of the view, and no line of it is left
    screen = pyte.HistoryScreen(80, 60, history=1000)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    assert not any("loading 2 tasks" in line for line in screen.display)


def test_a_long_trial_says_now_and_then_that_it_goes_on(tmp_path: Path) -> None:
    clock, console = Clock(), Console(width=80, file=io.StringIO(), force_terminal=False)
    progress = RunProgress(settings(tmp_path), console, clock)
    progress.started(record(3, method="ties"))
    for documents in range(0, 100, 10):
        clock.now += STILL / 4
        progress.asked(Asked(("quiz",), documents, 100))
    for step in range(10):
        clock.now += STILL / 4
        progress.learning(LearningStep(step, 10, 0.5))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        "trial 3 ties: 40 of 100 documents",
        "trial 3 ties: 90 of 100 documents",
        "trial 3 ties: step 4 of 10, loss 0.5000",
        "trial 3 ties: step 9 of 10, loss 0.5000",
    ]


def shown_between(folder: Path, mine: Callable[[], int | None]) -> tuple[RunProgress, History, io.StringIO, Clock]:
    """A run of which three trials are under way: 7 was left in the evening, 8 and 9 were begun an hour ago."""
    search = run_shown(folder, Console(file=io.StringIO()), Clock(), search={"trials": 3})
    clock, told = Clock(), io.StringIO()
    history, moment = History(search.study, search.config), datetime.now()
    begun = {7: moment - timedelta(hours=14), 8: moment - timedelta(hours=1), 9: moment - timedelta(hours=1)}
    for (number, taken), per in zip(begun.items(), ("recipe", "group", "tensor"), strict=True):
        key = {"per": per, "loss": "expected", "start": None}
        soup = Trial(number, State.RUNNING, "learned_soup", Kind.LEARNED, key=key, worker=f"w{number}", taken=taken)
        history.trials.append(soup)
    progress = RunProgress(search.config, Console(width=200, file=told), clock)
    progress.begin(lambda: history, [], mine)
    return progress, history, told, clock


def test_each_worker_shows_the_soup_that_it_learns_itself(tmp_path: Path) -> None:
    progress, _, told, clock = shown_between(tmp_path / "run", lambda: 8)
    clock.now += 2 * STILL
    progress.learning(LearningStep(4, 10, 0.5))
    assert progress._view.trial == "trial 8 learned soup per group"
    assert told.getvalue().startswith("trial 8 learned soup per group: step 4 of 10, loss 0.5000")


def test_time_at_work_is_what_the_hours_of_the_run_count(tmp_path: Path) -> None:
    mine: list[int | None] = [None]
    progress, history, _, clock = shown_between(tmp_path / "run", lambda: mine[0])
    assert progress._view.worked == pytest.approx(3600 * history.hours, abs=1)
    mine[0] = 8
    clock.now += 10
    progress.asked(Asked(("quiz",), 0, 8))
    # the trials before were scored in the same hour; nobody has been at trial 7 since the evening
    assert progress._view.worked == pytest.approx(3600, abs=5)


def test_a_trial_that_is_taken_up_again_is_read_again(tmp_path: Path) -> None:
    mine: list[int | None] = [None]
    progress, history, _, clock = shown_between(tmp_path / "run", lambda: mine[0])
    taken = replace(history.trials[7], taken=datetime.now())
    again = copy.copy(history)
    again.trials = [*history.trials[:7], taken, *history.trials[8:]]
    progress._read, mine[0] = lambda: again, 7
    clock.now += 10
    progress.asked(Asked(("quiz",), 0, 8))
    assert progress._view.worked < 60


def test_documents_of_blocks_are_added_up(tmp_path: Path) -> None:
    progress = RunProgress(settings(tmp_path), Console(file=io.StringIO()), Clock())
    progress.started(record(3))
    for asked in (Asked(("quiz",), 0, 8), Asked(("quiz",), 8, 8), Asked(("quiz",), 0, 20), Asked(("quiz",), 5, 20)):
        progress.asked(asked)
    assert progress._view.documents == 13
    progress.started(record(4))
    assert progress._view.documents == 0


# --- the winner ---------------------------------------------------------------------------------------------------

LOOK = "whether that holds on the documents that no search saw has not been looked at yet: type `mergesearch report "


def said(folder: Path, winner: Record, others: list[Record], **changes: Any) -> str:
    config: Config = settings(folder, **changes)
    run = Run(folder, config, tuple([*others, winner]), None, ())
    return sentence(run, winner)


def parents(a: float = 0.2, b: float = 0.1, average: float = 0.15) -> list[Record]:
    scored: Mapping[str, float] = {"base": 0.0, "a": a, "b": b, "average": average}
    return [
        record(n, value, name=name, method=name, strategy="baselines") for n, (name, value) in enumerate(scored.items())
    ]


def test_what_won_by_how_much_over_whom_and_what_to_type_next(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    soup = record(17, 0.3488, method="learned soup per tensor", strategy="learned soup per tensor")
    assert said(folder, soup, parents()) == (
        "A learned soup per tensor (trial 17) won with 0.3488 on the search documents, 0.1488 more than the best "
        f"single model (a) and 0.1988 more than the plain average; {LOOK}'{folder}'`"
    )
    for method, words in {
        "ties": "A TIES merge",
        "dare_ties": "A DARE-TIES merge",
        "task_arithmetic": "A task arithmetic merge",
        "arcee_fusion": "An arcee fusion merge",
        "ties+linear": "A TIES and linear merge",
    }.items():
        assert said(folder, record(9, 0.3, method=method), parents()).startswith(f"{words} (trial 9) won with 0.3000")
    baseline = record(9, 0.2, name="ties 0.2", method="ties 0.2", strategy="baselines")
    text = said(folder, baseline, parents())
    assert text.startswith("The baseline ties 0.2 (trial 9) won") and "as much as the best single model (a)" in text


def test_where_no_merge_is_better_it_says_so(tmp_path: Path) -> None:
    single, *_ = [r for r in parents(a=0.4) if r.name == "a"]
    others = [r for r in parents(a=0.4) if r.name != "a"]
    text = said(tmp_path, single, [*others, record(7, 0.31)])
    assert text.startswith(
        "No merge beat the single model a (0.4000 on the search documents): the best one, a TIES merge "
        "(trial 7), has 0.3100; "
    )
    base = record(0, 0.5, name="base")
    assert said(tmp_path, base, parents()[1:]).startswith("No merge beat the base itself (0.5000")
    average = parents(average=0.6)
    assert said(tmp_path, average[3], average[:3]).startswith(
        "The plain average (trial 3) won with 0.6000 on the search documents, 0.4000 more than the best single "
        "model (a); "
    )


def test_what_a_report_found_is_said(tmp_path: Path) -> None:
    winner = record(9, 0.3)
    (tmp_path / "holdout").mkdir()
    file = tmp_path / "holdout" / "report.json"
    file.write_text(json.dumps({"winner_trial": 9, "improvement": True}))
    export = f"`mergesearch export {tmp_path} OUT` copies it to the folder OUT"
    assert said(tmp_path, winner, parents()).endswith(f"; that holds on the documents that no search saw, and {export}")
    file.write_text(json.dumps({"winner_trial": 9, "improvement": False}))
    assert "that is no improvement beyond noise: `mergesearch report " in said(tmp_path, winner, parents())
    file.write_text(json.dumps({"winner_trial": 3, "improvement": True}))
    assert LOOK in said(tmp_path, winner, parents())  # it is about another winner
    assert said(tmp_path, winner, parents(), holdout=0.0).endswith(f"(holdout is 0), and {export}")


def test_logging_is_left_as_it_was(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    with RunProgress(settings(tmp_path), Console(file=io.StringIO(), force_terminal=True), Clock()):
        pass
    assert logging.getLogger().handlers == before
