"""A strategy is one file: one that is registered from a file of its own stands everywhere where the others do."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import QUICKSTART, mergesearch
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch import registry
from mergesearch.config import Config, SearchConfig
from mergesearch.errors import UserError
from mergesearch.results.record import records
from mergesearch.results.table import render
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies import refuse, words
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

FILE = '''
"""Mixes of the first model at growing weights."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mergesearch.errors import UserError
from mergesearch.recipe import single_rule
from mergesearch.registry import register
from mergesearch.schema import Strict
from mergesearch.search.budget import Wanted
from mergesearch.search.strategies.base import Cost, Stated, Strategy


class LadderSettings(Strict):
    steps: int = Field(default=3, ge=1, description="how many weights")


@register
class Ladder(Strategy):
    """The first model at growing weights.

    More of it.
    """

    name = "ladder"
    keys: ClassVar = {"ladder": (LadderSettings, Field(default_factory=LadderSettings))}

    @classmethod
    def refuse(cls, config):
        if len(config.models) > 4:
            raise UserError("the ladder climbs with four models at most: leave some out")

    @classmethod
    def cost(cls, config, documents):
        return Cost(documents=7, words="exactly 7 to look at the ladder")

    def _left(self, history):
        steps = self.config.search.key("ladder", LadderSettings).steps
        return steps - len(history.of(self.name))

    def next(self, history, budget):
        left = self._left(history)
        if left <= 0:
            return None
        first = next(iter(self.config.models))
        weights = {model: 1.0 / (1 + left) * (model == first) for model in self.config.models}
        return Stated(self.config.recipe(single_rule("task_arithmetic", weight=weights)), key={"rung": left})

    def wants(self, history):
        return Wanted(max(0, self._left(history)))

    @classmethod
    def label(cls, trial):
        return f"rung {trial.key['rung']}"

    @classmethod
    def method(cls, trial):
        return "ladder of " + super().method(trial)

    @classmethod
    def words(cls, history):
        return [f"the ladder has {len(history.of(cls.name))} rungs"]
'''


@pytest.fixture
def ladder(tmp_path: Path) -> Iterator[None]:
    file = tmp_path / "ladder.py"
    file.write_text(FILE)
    spec = importlib.util.spec_from_file_location("ladder", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ladder"] = module
    spec.loader.exec_module(module)
    yield
    registry.unregister("ladder")
    del sys.modules["ladder"]


def test_the_configuration_has_its_keys(ladder: None, tmp_path: Path) -> None:
    config = settings(tmp_path, search={"strategy": "ladder", "ladder": {"steps": 2}})
    assert config.dump()["search"]["ladder"] == {"steps": 2} and config.search.strategies == ["baselines", "ladder"]
    assert "ladder" in SearchConfig.model_json_schema()["properties"]
    assert "LadderSettings" in json.dumps(Config.model_json_schema())
    with pytest.raises(UserError, match=r"search.ladder.steps is 0: it must be in \[1, inf\)"):
        settings(tmp_path, search={"ladder": {"steps": 0}})
    with pytest.raises(UserError, match=r"unknown key .step. in test, search.ladder: did you mean .steps."):
        settings(tmp_path, search={"ladder": {"step": 1}})
    with pytest.raises(UserError, match="'lader' is no strategy: did you mean 'ladder'"):
        settings(tmp_path, search={"strategy": "lader"})


def test_its_keys_are_gone_with_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'ladder' in test, search"):
        settings(tmp_path, search={"ladder": {"steps": 2}})


def test_a_run_has_it_in_budget_and_table(ladder: None, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", search={"strategy": ["study", "ladder"], "trials": 8, "ladder": {"steps": 3}})
    engine = Engine()
    search = Search(config, RunFolder.prepare(config), SearchSpace(config, INFOS, 2), engine, Scorer(engine))
    search.run()
    history = search.history()
    # the study left it what it wanted, and its trials count
    order = [trial.strategy for trial in history.trials]
    assert order == ["baselines"] * 4 + ["study"] * 5 + ["ladder"] * 3 and history.proposals == 8
    rows = json.loads(render(records(history), "json"))
    mine = {row["strategy"]: row["method"] for row in rows if row["strategy"].startswith("rung")}
    assert mine == dict.fromkeys(("rung 3", "rung 2", "rung 1"), "ladder of task_arithmetic")
    assert words(history) == ["the ladder has 3 rungs"]


def test_it_refuses_what_it_cannot_do(ladder: None, tmp_path: Path) -> None:
    many = {name: name for name in "abcde"}
    with pytest.raises(UserError, match="four models at most"):
        refuse(settings(tmp_path, models=many, search={"strategy": "ladder"}))
    refuse(settings(tmp_path, models=many))  # it is no part of this run


def test_check_and_the_list_of_strategies_have_it(ladder: None, tmp_path: Path) -> None:
    sets = ["--set", "search.strategy=ladder", "--set", f"output={tmp_path / 'run'}", "--set", "trust_tasks=true"]
    checked = mergesearch("check", QUICKSTART, *sets)
    assert checked.status == 0, checked.err
    assert "baselines, then ladder" in checked.out and "and exactly 7 to look at the ladder" in checked.out
    listed = mergesearch("strategies")
    assert "ladder  The first model at growing weights." in listed.out
    assert "search.ladder.steps = 3 (a whole number in [1, inf)): how many weights" in listed.out
    rows = {row["name"]: row for row in json.loads(mergesearch("strategies", "--format", "json").out)}
    assert rows["ladder"]["keys"][0]["key"] == "search.ladder.steps" and not rows["ladder"]["auto"]
    auto = {name for name, row in rows.items() if row["auto"]}
    assert auto == {"baselines", "sweep", "greedy_soup", "learned_soup", "study"}
    one = mergesearch("strategies", "ladder")
    assert "More of it." in one.out and "greedy_soup" not in one.out
    wrong = mergesearch("strategies", "lader")
    assert wrong.status == 2 and "unknown strategy 'lader' in the command line: did you mean 'ladder'?" in wrong.err


def test_two_strategies_cannot_share_a_name_or_a_key(ladder: None) -> None:
    other = type("Other", (registry.Declared,), {"name": "ladder", "__module__": "elsewhere"})
    with pytest.raises(ValueError, match="strategy 'ladder' of elsewhere is already in ladder"):
        registry.register(other)
    other = type(
        "Other", (registry.Declared,), {"name": "other", "keys": {"ladder": (int, 3)}, "__module__": "elsewhere"}
    )
    with pytest.raises(ValueError, match="key 'ladder' of strategy 'other' is already one of 'ladder'"):
        registry.register(other)
