"""Samplers of one fixed space: their stage has a study of its own, which holds what the run's study knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from support.late import some
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch.search import samplers, store, trials
from mergesearch.search.samplers import bring_up_to_date
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

SPACE = {"x": FloatDistribution(0.0, 1.0)}


def start(folder: Path, sampler: str = "cmaes", scorer: Scorer | None = None, **search: Any) -> Search:
    # no baseline is a point of it, so that the first proposals are drawn one number after another
    space = (
        {"methods": ["task_arithmetic"], "weight": [0.1, 0.9]} if sampler == "gp" else {"methods": ["task_arithmetic"]}
    )
    config = settings(folder, space=space, search={"sampler": sampler, "trials": 10, **search})
    scorer = scorer or Scorer(Engine())
    return Search(config, RunFolder.prepare(config), SearchSpace(config, INFOS, 2), scorer.engine, scorer)


def stage_of(search: Search) -> optuna.Study:
    storage = store.open_storage(search.config, search.folder)
    return optuna.load_study(study_name="test/study", storage=storage)


def test_a_stage_knows_every_trial_that_is_a_point_of_its_space(tmp_path: Path) -> None:
    search = start(tmp_path / "run")
    search.run()
    stage = stage_of(search)
    names = {"layers0-1.task_arithmetic.weight.a", "layers0-1.task_arithmetic.weight.b"}
    bring_up_to_date(stage, search.study, names | {"layers0-1.task_arithmetic.lambda"})
    copies = trials.copies(stage)
    ours = [trial for trial in search.study.get_trials() if names <= trial.params.keys()]
    assert len(ours) == 11 and [trial.number for trial in ours] == sorted(copies)  # the base is a point of it too
    for trial in ours:
        copy = copies[trial.number]
        assert copy.params.items() <= trial.params.items() and copy.values == trial.values
        assert copy.state == trial.state
    # CMA-ES keeps its own state there, and none with the run's trials
    assert any(key.startswith("cma:") for trial in stage.get_trials() for key in trial.system_attrs)
    assert not any(key.startswith("cma:") for trial in search.study.get_trials() for key in trial.system_attrs)


@pytest.mark.parametrize("sampler", ["cmaes", "gp"])
@pytest.mark.parametrize("moment", ["add_trial", "suggest_float"])
@pytest.mark.parametrize("at", some([1, 2, 5], now=[2]))
def test_killed_while_a_stage_is_asked_it_proposes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, moment: str, at: int
) -> None:
    whole = start(tmp_path / "whole", sampler, trials=6)
    whole.run()
    owner: Any = optuna.Study if moment == "add_trial" else optuna.Trial
    original, calls = getattr(owner, moment), []

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", sampler, trials=6).run()
    monkeypatch.undo()
    again = start(tmp_path / "cut", sampler, trials=6)
    again.run()
    assert [t.params for t in again.study.get_trials()] == [t.params for t in whole.study.get_trials()]
    numbers = [trial.number for trial in stage_of(again).get_trials()]
    assert len(numbers) == len(trials.copies(stage_of(again)))  # nothing was asked twice


def test_bringing_up_to_date_twice_changes_nothing() -> None:
    study, stage = optuna.create_study(), optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=0.5, params={"x": 0.1}, distributions=SPACE))
    study.add_trial(optuna.trial.create_trial(value=0.7, params={}, distributions={}))  # no point of the space
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, params={"x": 0.2}, distributions=SPACE))
    pruned = optuna.trial.create_trial(
        state=TrialState.PRUNED, params={"x": 0.3}, distributions=SPACE, intermediate_values={2: 0.4}
    )
    study.add_trial(pruned)
    study.ask(SPACE)
    for _ in range(2):
        bring_up_to_date(stage, study, ["x"])
        assert sorted(trials.copies(stage)) == [0, 3]
    assert trials.copies(stage)[3].intermediate_values == {2: 0.4}


def test_a_stage_is_told_what_came_of_what_it_proposed() -> None:
    study, stage = optuna.create_study(), optuna.create_study()
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        handle = study.ask(SPACE)
        handle.set_constraint("guard", 0.1)
        handle.report(0.3, step=1)
        stage.add_trial(trials.begin_copy(handle.number))
        study.tell(handle, 0.5 if state == TrialState.COMPLETE else None, state=state)
    bring_up_to_date(stage, study, ["x"])
    told = trials.copies(stage)
    assert [told[n].state for n in range(3)] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert told[0].value == 0.5 and told[1].value == 0.3
    assert all(told[n].constraints == {"guard": 0.1} for n in range(3))


def test_a_proposal_does_not_depend_on_the_order_in_which_copies_came() -> None:
    """CMA-ES seeds with the trial's number: that of the run counts, not that in the stage's study."""
    proposals = []
    for order in ((0, 1), (1, 0)):
        stage = optuna.create_study()
        for number in order:
            stage.add_trial(trials.copy_of(_ended(number), SPACE))
        stage.add_trial(trials.begin_copy(7))
        inner = optuna.samplers.CmaEsSampler(seed=3, warn_independent_sampling=False)
        stage.sampler = samplers._OfOneSpace(inner, {**SPACE, "y": FloatDistribution(0.0, 1.0)}, 7)
        asked = optuna.Trial(stage, trials.copies(stage)[7]._trial_id)
        proposals.append([asked.suggest_float(name, 0.0, 1.0) for name in ("x", "y")])
    assert proposals[0] == proposals[1]


def _ended(number: int) -> optuna.trial.FrozenTrial:
    trial = optuna.trial.create_trial(value=0.5, params={"x": 0.1 * number}, distributions=SPACE)
    trial.number = number
    return trial


def test_each_trial_has_a_seed_of_its_own() -> None:
    assert len({samplers.trial_seed(seed, number) for seed in range(20) for number in range(50)}) == 1000
