from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mergesearch.config import Config, GuardConfig, TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.results.loading import given_up
from mergesearch.results.record import Record
from mergesearch.schema import validate
from mergesearch.search import guards
from mergesearch.search import objective as objectives
from mergesearch.search.objective import Objective

TASKS = [TaskConfig(task="quiz", weight=2.0), TaskConfig(task="bits")]


def scores(quiz: float, bits: float, error: float | None = 0.1) -> dict[str, TaskScore]:
    return {
        "quiz": TaskScore(quiz, error, 100, "acc"),
        "bits": TaskScore(bits, error, 100, "bits_per_byte", higher_is_better=False),
    }


def test_raw_is_the_weighted_mean_with_lower_is_better_negated() -> None:
    assert objectives.raw(TASKS).value(scores(0.5, 2.0)) == pytest.approx((2 * 0.5 - 2.0) / 3)


def test_parents_puts_the_base_at_0_and_the_best_single_model_at_1() -> None:
    models = {"a": scores(0.6, 3.0), "b": scores(0.5, 1.5)}
    found = objectives.parents(TASKS, scores(0.4, 2.0), models)
    assert found.value(scores(0.4, 2.0)) == pytest.approx(0)
    assert found.value(scores(0.6, 1.5)) == pytest.approx(1)
    assert found.value(scores(0.6, 2.0)) == pytest.approx(2 / 3)
    assert not found.notes


def test_a_task_whose_best_model_does_not_beat_the_base_stays_raw_and_says_so() -> None:
    found = objectives.parents(TASKS, scores(0.7, 2.0), {"a": scores(0.6, 1.0), "b": scores(0.7, 1.5)})
    assert found.value(scores(0.9, 2.0)) == pytest.approx(2 * 0.9 / 3)
    assert len(found.notes) == 1 and "quiz" in found.notes[0] and "0.7000" in found.notes[0]


def test_the_standard_error_follows_the_scale() -> None:
    found = objectives.parents(TASKS, scores(0.4, 2.0), {"a": scores(0.6, 1.5)})
    expected = math.sqrt((2 * 0.1 / 0.2 / 3) ** 2 + (0.1 / 0.5 / 3) ** 2)
    assert found.stderr(scores(0.5, 1.7)) == pytest.approx(expected)
    assert found.stderr(scores(0.5, 1.7, error=None)) is None


def counted(right: int, gold: float | None, bits: float = 2.0) -> dict[str, TaskScore]:
    return {
        "quiz": TaskScore(right / 100, 0.1, 100, "acc", gold=gold),
        "bits": TaskScore(bits, 0.1, 100, "bits_per_byte", higher_is_better=False, gold=None),
    }


def test_a_tie_break_decides_among_equals_and_never_over_a_document() -> None:
    alone = TASKS[:1]
    found = objectives.broken_by("gold_prob", objectives.raw(alone), counted(50, 0.1))
    order = [counted(50, 0.1), counted(50, 0.2), counted(51, 0.0), counted(52, 1.0)]
    ranked = [found.ranking(scores) for scores in order]
    assert ranked == sorted(ranked) and len(set(ranked)) == 4
    assert found.ranking(counted(50, 1.0)) < found.ranking(counted(51, 0.0))
    assert found.value(order[0]) == found.value(order[1]) == objectives.raw(alone).value(order[0])


def test_a_tie_break_is_worth_half_a_document_at_most_on_every_scale() -> None:
    plain = objectives.parents(TASKS, scores(0.4, 2.0), {"a": scores(0.6, 1.5)})
    found = objectives.broken_by("gold_prob", plain, counted(50, 0.1))
    document = plain.value(counted(51, None)) - plain.value(counted(50, None))
    assert found.ranking(counted(50, 1.0)) - found.ranking(counted(50, 0.0)) == pytest.approx(document / 2)
    assert plain.ranking(counted(50, 1.0)) == plain.value(counted(50, 1.0))


def test_tasks_without_a_tie_break_are_named() -> None:
    assert objectives.broken_by(None, objectives.raw(TASKS), scores(0.5, 2.0)) == objectives.raw(TASKS)
    found = objectives.broken_by("gold_prob", objectives.raw(TASKS), scores(0.5, 2.0))
    assert len(found.notes) == 1 and "quiz (acc)" in found.notes[0] and "bits" not in found.notes[0]
    assert Objective.from_data(found.to_data()) == found


def test_the_worst_task_has_its_share() -> None:
    plain = objectives.parents(TASKS, scores(0.4, 2.0), {"a": scores(0.6, 1.5)})
    found = replace(plain, worst=0.5)
    given_up = scores(0.6, 1.95)  # 1 on quiz, 0.1 on bits, which weighs half as much
    assert plain.value(given_up) == pytest.approx(0.7) and found.value(given_up) == pytest.approx(0.4)
    assert found.value(scores(0.5, 1.75)) == plain.value(scores(0.5, 1.75)) == pytest.approx(0.5)
    # near these scores it moves as the factors say, and its noise is theirs
    for moved in (scores(0.61, 1.95), scores(0.6, 1.94)):
        step = found.value(moved) - found.value(given_up)
        factors, before = found.factors(given_up), given_up
        assert step == pytest.approx(sum(factors[t] * (moved[t].value - before[t].value) for t in factors))
    assert found.stderr(given_up) == pytest.approx(math.hypot(*(0.1 * each for each in factors.values())))
    assert Objective.from_data(found.to_data()) == found
    config = {"base_model": "b", "models": {"a": "a"}, "tasks": [{"task": "quiz"}], "objective": {"worst": 0.5}}
    assert validate(Config, config, "test").objective.worst == 0.5
    for more, words in ({"racing": {}}, "racing"), ({"objective": {"worst": 0.5, "pareto": True}}, "pareto"):
        with pytest.raises(UserError, match=words):
            validate(Config, {**config, **more}, "test")


@pytest.mark.parametrize("scale", ["parents", "raw"])
def test_tasks_that_were_given_up_are_named(scale: str) -> None:
    every = {"base": scores(0.4, 2.0), "a": scores(0.6, 1.5), "b": scores(0.3, 1.6)}
    every = {name: scores(each["quiz"].value, each["bits"].value, 0.01) for name, each in every.items()}
    models = {name: each for name, each in every.items() if name != "base"}
    found = objectives.raw(TASKS) if scale == "raw" else objectives.parents(TASKS, every["base"], models)
    assert found.shares(scores(0.5, 1.5), every) == {"quiz": pytest.approx(0.5), "bits": pytest.approx(1.0)}
    assert found.neglected(scores(0.6, 1.95), every) == [("bits", pytest.approx(0.1))]
    assert not found.neglected(scores(0.5, 1.8), every) and not found.neglected(scores(0.4, 2.0), every)
    # a task in which no model is better than the base beyond noise says nothing about shares
    every["base"], unsure = scores(0.4, 1.0, 0.01), scores(0.6, 1.5, 0.2)
    assert set(found.shares(scores(0.6, 9.0), every)) == {"quiz"}
    assert not found.neglected(scores(0.6, 9.0), every)
    assert not found.shares(unsure, {"base": unsure, "a": scores(0.7, 1.3, 0.2)})
    assert not found.shares(unsure, {"a": unsure}) and not found.shares(unsure, {"base": unsure})


def test_it_survives_storage() -> None:
    found = objectives.parents(TASKS, scores(0.7, 2.0), {"a": scores(0.6, 1.0)})
    assert Objective.from_data(found.to_data()) == found


def test_a_guard_may_count_the_tokens_of_a_tasks_answers_beside_its_metric() -> None:
    def of(value: float, length: float | None) -> dict[str, TaskScore]:
        return {"quiz": TaskScore(value, 0.1, 100, "exact_match", length=length)}

    wanted = [GuardConfig(task="quiz", metric="length", max_drop=2.0)]
    (guard,) = guards.fix(wanted, of(0.5, 40.0), {})
    assert (guard.reference, guard.limit, guard.higher_is_better) == (40.0, 42.0, False)
    assert guard.excess(of(0.1, 42.0)["quiz"]) <= 0 < guard.excess(of(0.9, 43.0)["quiz"])
    assert guard.excess(of(0.9, None)["quiz"]) == math.inf
    assert guard.why(of(0.9, 43.0)["quiz"]) == "quiz length 43.0000 is above its guard's 42.0000"
    assert guard.words("exact_match") == "guard quiz: length at most 42.0000 (base 40.0000, max_drop 2)"
    assert guards.Guard(**guard.to_data()) == guard
    documents = {"quiz": DocumentScores([0, 1, 2], np.ones(3), "mean", length=np.array([7.0, math.nan, 9.0]))}
    both = guards.with_lengths([guard], Scores(of(0.5, 8.0), documents))
    assert both.tasks["quiz"].value == 0.5 and both.tasks["quiz, length"].value == 8.0
    assert both.documents["quiz, length"].ids == [0, 2]
    assert both.documents["quiz, length"].values.tolist() == [7.0, 9.0]
    # a task that is scored on the length has it as its figure
    own = {"quiz": TaskScore(30.0, 0.1, 100, "length", higher_is_better=False, length=30.0)}
    assert not guards.fix(wanted, own, {})[0].length


def test_the_table_names_the_skills_that_the_best_candidate_gave_up() -> None:
    given = {"base_model": "b", "models": {"a": "a"}, "tasks": [{"task": "quiz"}, {"task": "bits"}]}
    config = validate(Config, given, "test")
    found = {
        "base": ("base", None, scores(0.4, 2.0, 0.01)),
        "a": ("a", None, scores(0.6, 1.5, 0.01)),
        "soup": (None, "learned soup per tensor", scores(0.9, 1.95, 0.01)),
        "other": (None, "learned soup per group", scores(0.5, 1.8, 0.01)),
    }
    objective = objectives.parents(config.tasks, found["base"][2], {"a": found["a"][2]})
    every = [
        Record(number, name, "complete", objective.value(each), scores=each, strategy=strategy)
        for number, (name, strategy, each) in enumerate(found.values())
    ]
    assert given_up(every[:2], objective, config) == []
    (said,) = given_up(every[:3], objective, config)
    assert "bits (0.10, of all merges at most 0.10)" in said and "worst: 0.5" in said and "quiz" not in said
    (said,) = given_up(every, objective, config)
    assert "bits (0.10, of all merges at most 0.40)" in said
    assert given_up(every, None, config) == []
