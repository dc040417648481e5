from __future__ import annotations

from typing import Any

import optuna
import pytest

from mergesearch import config, methods
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.recipe import TensorInfo
from mergesearch.search.baselines import DEFAULTS, baselines
from mergesearch.space import SearchSpace, check_space

LAYERS = 4
INFOS = [
    TensorInfo("embed", 0, "embedding", (8, 4)),
    *(
        TensorInfo(f"layers.{i}.{part}", i, part, (4, 4))
        for i in range(LAYERS)
        for part in ("attention", "mlp", "norm")
    ),
    TensorInfo("norm", LAYERS - 1, "norm", (4,)),
]


def make(**space: Any) -> Config:
    data = {
        "base_model": "base",
        "models": {"a": "a", "b": "b", "c": "c"},
        "tasks": [{"task": "quiz"}],
        "space": space,
        "search": {"seed": 5},
    }
    return config.validate(Config, data, "test")


def space(**keys: Any) -> SearchSpace:
    return SearchSpace(make(**keys), INFOS, LAYERS)


def trials(searched: SearchSpace, count: int = 12) -> list[tuple[optuna.Trial, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = [study.ask() for _ in range(count)]
    return [(trial, searched.suggest(trial)) for trial in asked]


def test_parameter_names_read_as_the_readme_says() -> None:
    searched = space(methods=["ties"], layer_groups=2, components=["attention", "mlp", "other"])
    trial, recipe = trials(searched, 1)[0]
    assert "layers0-1.attention.ties.weight.a" in trial.params
    assert "layers2-3.other.ties.lambda" in trial.params
    assert len(trial.params) == searched.dimension == 6 * (3 + 3 + 1)
    assert [rule.label for rule in recipe.rules][:3] == [
        "layers0-1.attention",
        "layers0-1.mlp",
        "layers0-1.embedding+norm",
    ]


@pytest.mark.parametrize("per", ["recipe", "group"])
@pytest.mark.parametrize("components", [["all"], ["attention", "other"], ["norm", "embedding", "mlp", "attention"]])
def test_every_tensor_falls_into_one_group(per: str, components: list[str]) -> None:
    searched = space(methods=["linear", "ties", "slerp"], layer_groups=3, components=components, method_per=per)
    for _, recipe in trials(searched):
        for info in INFOS:
            assert sum(rule.covers(info) for rule in recipe.rules) == 1


@pytest.mark.parametrize("per", ["recipe", "group"])
@pytest.mark.parametrize("name", methods.names())
def test_recipe_and_trial_parameters_are_two_forms_of_one_thing(name: str, per: str) -> None:
    searched = space(methods=[name], layer_groups=2, components=["attention", "other"], method_per=per)
    for trial, recipe in trials(searched, 4):
        assert searched.parameters(recipe) == trial.params
        assert recipe.seed == 5


def test_one_method_for_the_recipe_or_one_for_each_group() -> None:
    names = ["linear", "task_arithmetic", "ties"]
    assert all(len(r.methods) == 1 for _, r in trials(space(methods=names, layer_groups=4)))
    mixed = trials(space(methods=names, layer_groups=4, method_per="group"))
    assert any(len(r.methods) > 1 for _, r in mixed)


def test_slerp_takes_each_pair_of_models() -> None:
    pairs = {recipe.rules[0].models for _, recipe in trials(space(methods=["slerp"]), 40)}
    assert pairs == {("a", "b"), ("a", "c"), ("b", "c")}


def test_a_single_number_fixes_a_parameter() -> None:
    searched = space(methods=["ties"], density=0.3)
    trial, recipe = trials(searched, 1)[0]
    assert not any("density" in name for name in trial.params)
    assert recipe.rules[0].parameters["density"] == {"a": 0.3, "b": 0.3, "c": 0.3}
    assert searched.parameters(recipe) == trial.params


def test_baselines_are_points_of_the_space_where_it_holds_them() -> None:
    searched = space(methods=["linear", "task_arithmetic"], layer_groups=2)
    plain = {name: recipe for name, recipe in baselines(searched.config).items() if name not in DEFAULTS}
    for name, recipe in plain.items():
        found = searched.parameters(recipe)
        assert found is not None, name
        assert found["method"] == ("task_arithmetic" if name == "base" else "linear")
    narrow = space(methods=["ties"])
    assert all(narrow.parameters(recipe) is None for recipe in plain.values())
    assert narrow.parameters(baselines(narrow.config)["ties 0.2"]) is not None


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"methods": ["tise"]}, ["'tise'", "did you mean 'ties'"]),
        ({"layer_group": 2}, ["'layer_group'", "did you mean 'layer_groups'"]),
        ({"methods": ["ties"], "density": [0.0, 1.0]}, ["density", "0.0", "(0, 1]"]),
        ({"methods": ["slerp"], "t": [0.0, 2.0]}, ["t 2.0", "[0, 1]"]),
        ({"methods": ["slerp"], "t": "half"}, ["space.t", "range"]),
        ({"components": ["atention", "other"]}, ["'atention'", "did you mean 'attention'"]),
        ({"components": ["all", "mlp"]}, ["all", "alone"]),
    ],
)
def test_a_wrong_space_is_refused_before_any_model_is_read(keys: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_space(make(**keys))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [({"layer_groups": 5}, ["layer_groups is 5", "4 layers"]), ({"components": ["mlp"]}, ["attention", "add other"])],
)
def test_what_the_models_do_not_have_is_refused(keys: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        space(**keys)
    for part in parts:
        assert part in str(caught.value)
