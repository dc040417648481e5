"""The report over stand-ins: who is a finalist, what is kept, what is claimed, how it reads."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mergesearch.config import Config
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.recipe import Recipe
from mergesearch.results.record import Record
from mergesearch.results.report import FORMATS, Entry, Question, Report, build, card, render
from mergesearch.results.report.data import AVERAGE, SINGLE
from mergesearch.results.report.finalists import choose
from mergesearch.results.report.holdout import HoldoutScores, drawn, score_finalists
from mergesearch.search.strategies.baselines import baselines

CONFIG = Config(base_model="base", models={"a": "a", "b": "b"}, tasks=[{"task": "quiz"}, {"task": "bits"}])
RECIPES = {name: recipe.dump() for name, recipe in baselines(CONFIG).items()}
NAMES = {0: "base", 1: "a", 2: "b", 3: "average"}


def record(number: int, objective: float | None, recipe_id: str | None = None) -> Record:
    name = NAMES.get(number)
    scores = {
        "quiz": TaskScore(0.5, 0.01, 10, "acc"),
        "bits": TaskScore(2.0, 0.02, 10, "bits_per_byte", higher_is_better=False),
    }
    return Record(
        number=number,
        name=name,
        state="complete" if objective is not None else "failed",
        objective=objective,
        scores=scores if objective is not None else {},
        recipe=RECIPES[name or "average"],
        method=name or "linear",
        recipe_id=recipe_id or f"id{number}",
    )


PARENTS = [record(0, 0.0), record(1, 0.4), record(2, 0.6), record(3, 0.5)]


# --- who ---


def test_finalists_are_the_best_proposals_and_every_baseline() -> None:
    found = choose([*PARENTS, record(4, 0.7), record(5, 0.9), record(6, None), record(7, 0.8)], CONFIG, 2)
    assert [r.number for r in found.records] == [5, 7, 2, 3, 1, 0]
    assert (found.winner.number, found.single.name, found.average.name) == (5, "b", "average")


def test_no_recipe_is_scored_twice() -> None:
    same = [record(4, 0.9, "x"), record(5, 0.9, "x"), record(6, 0.8, "id3"), record(7, 0.7)]
    assert [r.number for r in choose([*PARENTS, *same], CONFIG, 2).records] == [4, 7, 2, 3, 1, 0]


def test_a_baseline_may_win_and_a_failed_one_is_left_out() -> None:
    found = choose([record(0, 0.0), record(1, 0.4), record(2, None), record(4, 0.1)], CONFIG, 1)
    assert found.winner is found.single and found.average is None
    assert [r.number for r in found.records] == [1, 4, 0]


def test_what_breaks_a_guard_does_not_win() -> None:
    broken = replace(record(4, 0.9), infeasible="safe")
    found = choose([*PARENTS, broken, record(5, 0.7)], CONFIG, 2)
    assert found.winner.number == 5 and broken not in found.records
    safe = choose([*PARENTS[:2], replace(PARENTS[2], infeasible="safe"), record(5, 0.3)], CONFIG, 1)
    assert safe.winner.name == "a" and safe.single.name == "b"
    with pytest.raises(UserError, match="every finished trial breaks a guard"):
        choose([replace(PARENTS[1], infeasible="safe")], CONFIG, 1)


def test_an_empty_run_has_no_finalists() -> None:
    with pytest.raises(UserError, match="no finished trial"):
        choose([record(0, None)], CONFIG, 3)


# --- scored once ---


class Engine:
    def __init__(self, fail: set[str] = frozenset()):
        self.loaded: list[str] = []
        self.fail = fail

    def load(self, recipe: Recipe) -> float:
        self.loaded.append(recipe.id)
        return 0.0


ALL = {"quiz": list(range(300)), "bits": list(range(300))}


class Scorer:
    """Stands in for a scorer of documents: answers as told, scores or an error to raise, and notes what it is asked."""

    def __init__(self, *answers: Any):
        self.told = list(answers)
        self.asked: list[dict[str, list[int]]] = []
        self.there: dict[str, dict[int, Any]] = {"quiz": {}, "bits": {}}
        self.part: dict[str, list[int]] = ALL

    def only(self, documents: Any) -> Scorer:
        part = copy.copy(self)
        part.part = {task: list(ids) for task, ids in documents.items()}
        return part

    def answer(self) -> None:
        told = self.told.pop(0) if self.told else scores()
        if isinstance(told, BaseException):
            raise told
        self.asked.append(self.part)
        for task, ids in self.part.items():
            self.there[task].update({i: told.documents[task].values[i].tolist() for i in ids})

    def answers(self) -> list[list[Any]]:
        return [[task, i, self.there[task][i]] for task, ids in self.part.items() for i in ids]

    def restore(self, answers: Any) -> None:
        for task, i, value in answers:
            self.there[task][i] = value

    def collect(self) -> Scores:
        whole = scores()
        values = {task: np.array([self.there[task][i] for i in ids]) for task, ids in self.part.items()}
        documents = {t: DocumentScores(self.part[t], v, whole.documents[t].aggregation) for t, v in values.items()}
        tasks = {
            task: replace(
                whole.tasks[task],
                value=statistics.figure(found.values, found.aggregation),
                documents=len(found.ids),
            )
            for task, found in documents.items()
        }
        return Scores(tasks, documents, 1.0)

    def score(self) -> Scores:
        self.answer()
        return self.collect()


def scores(right: float = 0.5, seed: int = 0, count: int = 300) -> Scores:
    """Seeds give candidates that differ on few documents."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    chance = np.where(own.random(count) < 0.1, own.random(count), shared.random(count))
    quiz = (chance < right).astype(float)
    length = shared.integers(20, 90, count).astype(float)
    bits = np.stack([-length * (1.5 - right + 0.01 * own.normal(size=count)), length], axis=1)
    bpb = float(-bits[:, 0].sum() / length.sum() / np.log(2))
    ids = list(range(count))
    return Scores(
        tasks={
            "quiz": TaskScore(float(quiz.mean()), 0.01, count, "acc"),
            "bits": TaskScore(bpb, 0.02, count, "bits_per_byte", higher_is_better=False),
        },
        documents={"quiz": DocumentScores(ids, quiz, "mean"), "bits": DocumentScores(ids, bits, "bits_per_byte")},
        seconds=1.0,
    )


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    kept = HoldoutScores(tmp_path / "holdout")
    assert score_finalists(PARENTS, kept, Engine(), Scorer(), ALL) == {}
    again = Engine()
    assert score_finalists(PARENTS, kept, again, Scorer(), ALL) == {} and again.loaded == []
    found = kept.load(PARENTS[0])
    assert {t: s.value for t, s in found.tasks.items()} == pytest.approx(
        {t: s.value for t, s in scores().tasks.items()}
    )
    assert np.array_equal(found.documents["bits"].values, scores().documents["bits"].values)


def test_killed_it_goes_on(tmp_path: Path) -> None:
    kept = HoldoutScores(tmp_path / "holdout")
    with pytest.raises(KeyboardInterrupt):
        score_finalists(PARENTS, kept, Engine(), Scorer(scores(), scores(), KeyboardInterrupt()), ALL)
    rest = Engine()
    score_finalists(PARENTS, kept, rest, Scorer(), ALL)
    assert len(rest.loaded) == 2


def test_documents_without_figures_count_as_not_scored(tmp_path: Path) -> None:
    kept = HoldoutScores(tmp_path)
    scores().save_documents(tmp_path / "00000.npz")
    assert kept.load(PARENTS[0]) is None


def test_another_recipe_under_the_same_number_is_scored(tmp_path: Path) -> None:
    kept = HoldoutScores(tmp_path)
    kept.save(record(4, 0.5, "old"), scores())
    assert kept.load(record(4, 0.5, "new")) is None


@pytest.mark.parametrize("error", [CandidateError("made NaN"), RuntimeError("odd")])
def test_one_that_fails_is_named_and_tried_again_next_time(tmp_path: Path, error: Exception) -> None:
    kept = HoldoutScores(tmp_path)
    failed = score_finalists(PARENTS, kept, Engine(), Scorer(scores(), error), ALL)
    assert list(failed) == [1] and str(error) in failed[1]
    assert score_finalists(PARENTS, kept, Engine(), Scorer(), ALL) == {}


def test_a_full_disk_is_not_the_candidates_fault(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        score_finalists(PARENTS, HoldoutScores(tmp_path), Engine(), Scorer(OSError(28, "No space left on device")), ALL)


def test_looks_are_noted_before_scoring_and_told_when_another_had_won(tmp_path: Path) -> None:
    kept = HoldoutScores(tmp_path)
    first = choose([*PARENTS, record(4, 0.7)], CONFIG, 1)
    assert kept.look(first) == [] and kept.look(first) == []
    assert [look["winner"] for look in json.loads((tmp_path / "looks.json").read_text())] == [4]
    assert kept.look(choose([*PARENTS, record(4, 0.7), record(5, 0.6)], CONFIG, 2)) == []
    (earlier, _) = kept.look(choose([*PARENTS, record(4, 0.7), record(5, 0.9)], CONFIG, 1))
    assert earlier["winner"] == 4 and earlier["trials"] == 5


# --- on how many documents ---


def test_a_part_of_the_holdout_is_drawn_by_the_seed_and_nested() -> None:
    few, more = drawn(ALL, 10, 0), drawn(ALL, 40, 0)
    assert {task: len(ids) for task, ids in few.items()} == {"quiz": 10, "bits": 10}
    assert all(set(few[task]) < set(more[task]) and few[task] == sorted(few[task]) for task in ALL)
    assert few["quiz"] != few["bits"] and drawn(ALL, 10, 1) != few and drawn(ALL, 10, 0) == few
    assert drawn(ALL, None, 0) == drawn(ALL, 999, 0) == ALL


@pytest.mark.parametrize("later", [40, None])
def test_more_documents_ask_only_for_those_that_are_missing(tmp_path: Path, later: int | None) -> None:
    kept, first, second = HoldoutScores(tmp_path), Scorer(), Scorer()
    few, more = drawn(ALL, 10, 0), drawn(ALL, later, 0)
    score_finalists(PARENTS[:1], kept, Engine(), first, few, most=10)
    assert first.asked == [few] and kept.load(PARENTS[0], "", later) is None
    assert kept.load(PARENTS[0], "", 10).documents["quiz"].ids == few["quiz"]
    score_finalists(PARENTS[:1], kept, Engine(), second, more, most=later)
    assert second.asked == [{task: [i for i in more[task] if i not in few[task]] for task in ALL}]
    found, whole = kept.load(PARENTS[0], "", later), Scorer()
    whole.answer()
    assert found.tasks == whole.only(more).collect().tasks
    assert score_finalists(PARENTS[:1], kept, Engine(), Scorer(RuntimeError()), more, most=later) == {}
    # what was answered is kept only as long as more may be asked
    assert (tmp_path / "00000.answers.json").is_file() == (later is not None)


def test_a_report_goes_by_no_fewer_documents_than_an_earlier_one(tmp_path: Path) -> None:
    kept, found = HoldoutScores(tmp_path), choose([*PARENTS, record(4, 0.7)], CONFIG, 1)
    assert kept.at_least(10) == 10
    assert kept.look(found, 40) == [] and kept.at_least(10) == 40 and kept.at_least(None) is None
    (earlier,) = kept.look(found, None)
    assert earlier["documents"] == 40 and kept.at_least(10) is None


def test_looks_of_an_older_version_were_at_all_documents(tmp_path: Path) -> None:
    (tmp_path / "looks.json").write_text(json.dumps([{"trials": 5, "winner": 4, "finalists": [4]}]))
    kept = HoldoutScores(tmp_path)
    assert kept.looks[0]["documents"] is None and kept.at_least(10) is None
    kept.save(PARENTS[0], scores())
    data = json.loads((tmp_path / "00000.json").read_text())
    del data["most"]
    (tmp_path / "00000.json").write_text(json.dumps(data))
    assert kept.load(PARENTS[0]) is not None and kept.most(PARENTS[0]) is None and kept.most(PARENTS[1]) == 0


# --- what is claimed ---

FACTORS = {"quiz": 0.5, "bits": -0.5}


def objective(found: Scores) -> float:
    return sum(factor * found.tasks[task].value for task, factor in FACTORS.items())


def entry(number: int, found: Scores | None, **extra: Any) -> Entry:
    extra = {"error": "made NaN", **extra} if found is None else {"objective": objective(found), **extra}
    return Entry(record(number, 1.0 - number / 10), found, **extra)


def question(winner: int = 4, **changes: Any) -> Question:
    references = {SINGLE: 2, AVERAGE: 3}
    fields = {"references": {w: n for w, n in references.items() if n != winner}, "factors": FACTORS, **changes}
    return Question(run="test", winner=winner, **fields)


def made(winner: float = 0.5, single: float = 0.5, average: float = 0.5, repeated: Scores | None = None) -> Report:
    first = scores(winner, seed=4)
    again = {"repeated": repeated, "repeated_objective": objective(repeated)} if repeated else {}
    entries = [entry(4, first, **again), entry(2, scores(single, seed=2)), entry(3, scores(average, seed=3))]
    return build(question(repeat="batch size 42 instead of 64"), entries, draws=400)


def guarded(winner: float, max_drop: float, against: int = 2) -> Report:
    entries = [entry(4, scores(winner, seed=4)), entry(2, scores(0.6, seed=2)), entry(3, scores(0.5, seed=3))]
    asked = question(factors={"quiz": 0.5}, guards={"bits": (against, max_drop)})
    return build(asked, entries, draws=400)


def test_guards_are_checked_on_the_holdout() -> None:
    kept, broken = guarded(0.6, 0.1), guarded(0.3, 0.1)
    assert [report.guards[0].verdict for report in (kept, broken)] == ["kept", "broken"]
    assert broken.guards[0].difference.value < -0.1 and broken.guards[0].against == "b"
    assert "Guard bits (bits_per_byte)" in render(broken, "md") and "allowed -0.1000: broken" in render(broken, "md")
    assert Report.from_data(json.loads(render(broken, "json"))) == broken
    assert guarded(0.6, 0.1, against=7).guards[0].verdict == "unscored"


def test_guards_are_no_part_of_the_objective() -> None:
    report = guarded(0.6, 0.1)
    assert [section.name for section in report.sections] == ["objective", "quiz", "bits"]
    assert report.sections[0].documents == 300
    row, quiz = report.sections[0].rows[0].compared[0], report.sections[1].rows[0].compared[0]
    assert row.difference.high == pytest.approx(
        row.difference.value + (quiz.difference.high - quiz.difference.value) / 2
    )


def test_a_clear_gain_is_an_improvement() -> None:
    report = made(winner=0.7)
    assert report.improvement
    assert report.sentence.startswith("Improvement: trial 4 (linear) is better than the best single model b (+0.")
    assert "the plain average (+0." in report.sentence and "on 600 holdout documents" in report.sentence


def test_a_gain_over_one_only_says_so() -> None:
    report = made(winner=0.7, average=0.7)
    assert not report.improvement
    assert report.sentence.startswith("Improvement over the best single model b (")
    assert "but none beyond noise over the plain average (" in report.sentence


def test_equal_candidates_are_no_improvement() -> None:
    report = made()
    assert not report.improvement and report.sentence.startswith("No improvement beyond noise: trial 4")


def test_a_loss_is_called_one() -> None:
    assert made(winner=0.3).sentence.startswith("No improvement: trial 4 (linear) is worse than the best single")


def test_a_difference_within_the_noise_floor_is_noise() -> None:
    report = made(winner=0.7, repeated=scores(0.2, seed=4))
    assert not report.improvement and {c.verdict for c in report.sections[0].rows[0].compared} == {"noise"}
    assert [noise.name for noise in report.noise] == ["objective", "quiz", "bits"]
    assert report.noise[1].changed > 0 and report.noise[0].first != report.noise[0].second


def test_the_same_scores_again_are_no_noise() -> None:
    noise = made(winner=0.7, repeated=scores(0.7, seed=4)).noise
    assert [n.changed for n in noise] == [None, 0, 0] and all(n.first == n.second for n in noise)


def test_figures_are_those_of_the_scores_and_more_is_better_in_differences() -> None:
    report = made(winner=0.7)
    bits = report.sections[2]
    ours, single, _ = bits.rows
    assert bits.metric == "bits_per_byte" and not bits.higher_is_better and bits.documents == 300
    assert ours.holdout.value == scores(0.7, seed=4).tasks["bits"].value
    assert ours.holdout.low < ours.holdout.value < ours.holdout.high
    (against, _) = ours.compared
    assert against.reference == SINGLE and against.against == "b" and against.verdict == "better"
    assert against.difference.value == pytest.approx(single.holdout.value - ours.holdout.value)
    assert against.difference.low < against.difference.value < against.difference.high
    assert report.sections[0].rows[0].search == 0.6 and single.compared == ()


def test_claims_are_corrected_together_and_the_rest_together() -> None:
    entries = [entry(4, scores(0.55, seed=4)), entry(5, scores(0.5, seed=5))]
    entries += [entry(2, scores(0.5, seed=2)), entry(3, scores(0.5, seed=3))]
    report = build(question(), entries, draws=400)
    found = [(s.name, r.trial, c) for s in report.sections for r in s.rows for c in r.compared]
    assert len(found) == 3 * 2 * 2
    claims = sorted((c for name, trial, c in found if (name, trial) == ("objective", 4)), key=lambda c: c.p_raw)
    assert claims[0].p == pytest.approx(min(1.0, 2 * claims[0].p_raw))
    smallest = min((c for name, trial, c in found if (name, trial) != ("objective", 4)), key=lambda c: c.p_raw)
    assert smallest.p == pytest.approx(min(1.0, 10 * smallest.p_raw))


def test_a_winner_that_is_a_baseline_is_no_improvement_by_searching() -> None:
    found = build(question(winner=2), [entry(2, scores(0.7, seed=2)), entry(3, scores(0.5, seed=3))], draws=400)
    assert not found.improvement
    assert found.sentence.startswith(
        "No improvement by searching: the best on the search's own documents is the baseline b, which is better than "
        "the plain average (+0."
    )


def test_a_winner_that_fails_says_why() -> None:
    found = build(question(), [entry(4, None), entry(2, scores()), entry(3, scores())], draws=50)
    assert "could not be scored on the holdout (made NaN)" in found.sentence and not found.improvement
    assert all(render(found, form) for form in FORMATS)


def test_a_reference_that_fails_is_noted() -> None:
    found = build(question(), [entry(4, scores(0.7, seed=4)), entry(2, None), entry(3, scores(seed=3))], draws=400)
    assert any("best single model (b) could not be scored" in note for note in found.notes)
    assert found.sentence.startswith("Improvement: trial 4 (linear) is better than the plain average")
    assert all(render(found, form) for form in FORMATS)


def test_all_may_fail() -> None:
    found = build(question(), [entry(4, None), entry(2, None), entry(3, None)], draws=50)
    assert found.sections == () and card(found, 4) is None
    assert all(render(found, form) for form in FORMATS)


def test_a_metric_without_values_by_document_cannot_be_tested() -> None:
    def blind(seed: int) -> Scores:
        found = scores(seed=seed)
        nothing = DocumentScores(list(range(300)), np.full(300, np.nan), "jackknife")
        return Scores(found.tasks, {**found.documents, "quiz": nothing})

    found = build(question(), [entry(4, blind(4)), entry(2, blind(2)), entry(3, blind(3))], draws=50)
    assert "cannot be tested" in found.sentence
    assert found.sections[0].rows[0].holdout.low is None and found.sections[2].rows[0].holdout.low is not None
    assert "nan" not in render(found, "json").lower()


# --- how it reads ---


def test_json_holds_all_and_comes_back() -> None:
    report = made(winner=0.7, repeated=scores(0.7, seed=4))
    assert Report.from_data(json.loads(render(report, "json"))) == report


def test_markdown_is_tables_and_the_sentence() -> None:
    report = made(winner=0.7, repeated=scores(0.7, seed=4))
    text = render(report, "md")
    assert f"**{report.sentence}**" in text and "## bits, bits_per_byte, lower is better, 300 documents" in text
    assert "| candidate | search | holdout | against b, best single model | against average |" in text
    assert "Noise floor: trial 4 built and scored again (batch size 42 instead of 64)" in text
    assert "Winner's curse: from the search documents to the holdout the objective of trial 4 changed by" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables) == {6}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_text_fits_a_terminal_and_cuts_no_digit(width: int) -> None:
    report = made(winner=0.7, repeated=scores(0.7, seed=4))
    table = render(report)
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert " ".join(text.split()).startswith(report.sentence)
    words = text.split()
    for row in report.sections[0].rows:
        assert f"{row.holdout.value:.4f}" in words
    if width >= 80:
        (single, average) = report.sections[0].rows[0].compared
        for figure in (single.difference, average.difference):
            assert f"{figure.value:+.4f}," in words and f"{figure.high:+.4f}]" in words


def test_the_text_is_whole_where_there_is_no_width() -> None:
    report = made(winner=0.7)
    text = str(render(report))
    assert "left out" not in text and text.splitlines()[0] == report.sentence
    assert text.index("Figures on the holdout") < text.index("Differences on the holdout") < text.index("Intervals:")


def test_the_card_shows_the_candidate_and_the_baselines() -> None:
    report = made(winner=0.7)
    text = card(report, 4)
    assert text.startswith(report.sentence) and "| **this model** | " in text and "| average | " in text
    assert "Improvement" not in card(report, 3)
    assert card(report, 17) is None


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="markdown"):
        render(made(), "markdown")
