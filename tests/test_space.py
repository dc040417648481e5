from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from support.tiny_models import make_pool

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.schema import validate
from mergesearch.search.strategies.baselines import DEFAULTS, baselines
from mergesearch.space import RefineSpace, SearchSpace, StackSpace, TogetherSpace, check_space, space_of, split_rules
from mergesearch.space.around import WIDTH

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
    return validate(Config, data, "test")


def space(**keys: Any) -> SearchSpace:
    return SearchSpace(make(**keys), INFOS, LAYERS)


def trials(searched: SearchSpace, count: int = 12) -> list[tuple[optuna.Trial, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = [study.ask() for _ in range(count)]
    return [(trial, searched.suggest(trial)) for trial in asked]


def test_parameter_names_read_as_they_are_written() -> None:
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


# --- depth, selectors, growing ------------------------------------------------------------------------------------


def coefficient(recipe: Recipe, layer: int, part: str, model: str) -> float:
    info = next(i for i in INFOS if i.name == f"layers.{layer}.{part}")
    return recipe.rule_for(info).parameters["weight"][model]


@pytest.mark.parametrize("components", [["all"], ["attention", "other"]])
@pytest.mark.parametrize(("points", "at"), [(2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_control_points_are_interpolated_between(points: int, at: list[int], components: list[str]) -> None:
    searched = space(methods=["linear"], depth="control_points", control_points=points, components=components)
    prefix = "" if components == ["all"] else ".attention"
    for trial, recipe in trials(searched, 4):
        assert len(trial.params) == searched.dimension == 3 * len(at) * len(components)
        stated = [trial.params[f"depth{n}{prefix}.linear.weight.b"] for n in range(len(at))]
        expected = np.interp(range(LAYERS), at, stated)
        assert [coefficient(recipe, n, "attention", "b") for n in range(LAYERS)] == pytest.approx(list(expected))
        assert all(sum(rule.covers(info) for rule in recipe.rules) == 1 for info in INFOS)
        assert searched.parameters(recipe) == pytest.approx(trial.params)


@pytest.mark.parametrize("depth", ["control_points", "split"])
def test_one_mix_for_the_whole_model_is_read_back_at_every_depth(depth: str) -> None:
    searched = space(methods=["linear", "ties"], depth=depth)
    found = searched.parameters(baselines(searched.config)["ties 0.2"])
    assert found is not None and found["method"] == "ties"
    again = searched.suggest(optuna.trial.FixedTrial(found))
    assert all(rule.parameters["density"] == {"a": 0.2, "b": 0.2, "c": 0.2} for rule in again.rules)


@pytest.mark.parametrize("per", ["recipe", "group"])
def test_a_split_has_one_mix_below_and_another_above(per: str) -> None:
    searched = space(methods=["linear", "ties"], depth="split", components=["attention", "other"], method_per=per)
    found = trials(searched, 16)
    assert {trial.params["split"] for trial, _ in found} == {1, 2, 3}
    for trial, recipe in found:
        split = trial.params["split"]
        rules = [next(recipe.rule_for(i) for i in INFOS if i.name == f"layers.{n}.mlp") for n in range(LAYERS)]
        assert len({r.layers for r in rules[:split]}) == len({r.layers for r in rules[split:]}) == 1
        assert rules[split - 1].layers == (0, split - 1) and rules[split].layers == (split, LAYERS - 1)
        assert searched.parameters(recipe) == trial.params


@pytest.mark.parametrize("depth", ["groups", "control_points", "split"])
def test_models_of_one_layer_have_one_place(depth: str) -> None:
    infos = [info for info in INFOS if info.layer == 0]
    searched = SearchSpace(make(methods=["linear"], depth=depth), infos, 1)
    for trial, recipe in trials(searched, 2):
        assert len(recipe.rules) == 1 and len(trial.params) == searched.dimension == 3
        assert searched.parameters(recipe) == trial.params


@pytest.mark.parametrize(
    ("at", "stated"),
    [
        ("base", ("task_arithmetic", {"weight": 0.0})),
        ("average", ("linear", {"weight": 1.0})),
        ("b", ("linear", {"weight": {"a": 0.0, "b": 1.0, "c": 0.0}})),
    ],
)
@pytest.mark.parametrize("depth", ["groups", "control_points", "split"])
def test_frozen_tensors_stay_as_a_parent_has_them(at: str, stated: tuple[str, Any], depth: str) -> None:
    freeze = [{"components": ["norm", "embedding"], "at": at}, {"layers": [1, 1], "at": at}]
    searched = space(methods=["linear", "ties"], depth=depth, components=["attention", "mlp"], freeze=freeze)
    for trial, recipe in trials(searched, 6):
        for info in INFOS:
            rule = recipe.rule_for(info)
            frozen = info.component in ("norm", "embedding") or info.layer == 1
            assert ((rule.method, rule.parameters) == stated) == frozen
        assert depth == "split" or searched.parameters(recipe) == pytest.approx(trial.params)


def test_groups_have_ranges_of_their_own() -> None:
    own = [
        {"layers": [0, 1], "weight": [0.1, 0.2]},
        {"components": ["attention"], "density": 0.5, "weight": [0.6, 0.7]},
    ]
    searched = space(methods=["ties"], layer_groups=2, components=["attention", "other"], ranges_for=own)
    for trial, _ in trials(searched):
        for name, value in trial.params.items():
            if ".weight." in name and name.startswith("layers0-1"):
                assert 0.1 <= value <= 0.2
            if ".weight." in name and name.startswith("layers2-3.attention"):
                assert 0.6 <= value <= 0.7
        assert "layers0-1.attention.ties.density.a" in trial.params  # the first selector counts alone
        assert not any(name.startswith("layers2-3.attention.ties.density") for name in trial.params)
    assert searched.dimension == len(trials(searched, 1)[0][0].params)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"freeze": [{"components": ["atention"]}]}, ["space.freeze.0", "did you mean 'attention'"]),
        ({"freeze": [{"at": "basis"}]}, ["space.freeze.0.at", "'basis'", "did you mean 'base'"]),
        ({"freeze": [{"layers": [2, 4]}]}, ["space.freeze.0.layers", "[2, 4]", "0 to 3"]),
        ({"freeze": [{}]}, ["space.freeze", "leaves no tensor"]),
        ({"ranges_for": [{"wieght": [0, 1]}]}, ["space.ranges_for.0", "did you mean 'weight'"]),
        ({"ranges_for": [{"density": [0, 1]}], "methods": ["ties"]}, ["space.ranges_for.0", "density 0 in", "(0, 1]"]),
        ({"ranges_for": [{"layers": [0, 0], "weight": 1}]}, ["space.ranges_for.0", "a part of the group layers0-3"]),
        ({"ranges_for": [{"layers": [0, 0], "weight": 1}], "depth": "split"}, ["names layers", "depth is split"]),
        ({"stack": {"repeats": [2, 1]}}, ["[2, 1]", "fewest and the most"]),
        ({"stack": {"repeats": [0, 0]}}, ["[0, 0]", "fewest and the most"]),
    ],
)
def test_selectors_that_select_nothing_sensible_are_refused(keys: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        space(**keys)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def refined(recipe: Recipe | None = None, **keys: Any) -> RefineSpace:
    given = make(**keys)
    return RefineSpace(given, recipe or trials(SearchSpace(given, INFOS, LAYERS), 1)[0][1])


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "della", "breadcrumbs"])
def test_refining_begins_with_the_very_recipe_and_stays_around_it(name: str) -> None:
    around = refined(methods=[name], layer_groups=2, components=["attention", "other"])
    same = around.suggest(optuna.trial.FixedTrial(around.start))
    assert around.parameters(around.origin) == around.start and len(around.start) == around.dimension
    wide = space(methods=[name], layer_groups=2, components=["attention", "other"])
    assert wide.parameters(same) == wide.parameters(around.origin)
    for trial, recipe in trials(around, 8):
        assert wide.parameters(recipe) is not None  # never outside the ranges of the whole space
        assert [rule.label for rule in recipe.rules] == [rule.label for rule in around.origin.rules]
        assert all(t.low <= trial.params[t.name] <= t.high for t in around.turned)
        knobs = {knob.parameter.key: knob for knob in wide.knobs[name]}
        for turned in around.turned:
            reach = WIDTH * (knobs[turned.key].high - knobs[turned.key].low)
            assert abs(trial.params[turned.name] - turned.value) <= reach + 1e-9


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "della", "breadcrumbs"])
def test_moved_together_numbers_keep_their_proportions(name: str) -> None:
    one = refined(methods=[name], layer_groups=4, components=["attention", "other"])
    around = TogetherSpace(one.config, one.origin)
    assert around.suggest(optuna.trial.FixedTrial(around.start)) == one.origin
    assert around.parameters(one.origin) == around.start and len(around.start) == around.dimension < one.dimension
    assert {t for of in around.factors.values() for t in of} == {t for t in one.turned if t.parameter.kind != "int"}
    for trial, recipe in trials(around, 8):
        numbers = RefineSpace(one.config, recipe)
        assert [rule.label for rule in recipe.rules] == [rule.label for rule in one.origin.rules]
        for before, after in zip(one.turned, numbers.turned, strict=True):
            factor = trial.params[".".join(["refine", before.key, *([before.model] if before.model else [])])]
            assert after.value == min(max(before.value * factor, before.low), before.high)


def test_refining_keeps_what_is_frozen_and_the_ranges_of_groups() -> None:
    keys = {
        "methods": ["linear"],
        "layer_groups": 2,
        "components": ["attention", "mlp", "other"],
        "freeze": [{"components": ["norm", "embedding"], "at": "a"}],
        "ranges_for": [{"components": ["mlp"], "weight": [0.9, 1.0]}],
    }
    searched = space(**keys)
    plain = baselines(searched.config)["average"]
    split = split_rules(plain, searched.config, INFOS, LAYERS)
    assert [rule.label for rule in split.rules] == [
        "all.norm+embedding", "layers0-1.attention", "layers0-1.mlp", "layers2-3.attention", "layers2-3.mlp",
    ]  # fmt: skip
    around = RefineSpace(searched.config, split)
    assert around.dimension == 4 * 3
    for _, recipe in trials(around, 8):
        assert all(0.9 <= coefficient(recipe, n, "mlp", "b") <= 1.0 for n in range(LAYERS))
        assert all(coefficient(recipe, n, "norm", "b") == 0.0 for n in range(LAYERS))
    again = split_rules(split, searched.config, INFOS, LAYERS)
    assert again == split


def test_a_recipe_restated_for_each_group_does_the_same() -> None:
    whole = baselines(make())["ties 0.2"]
    split = split_rules(whole, make(layer_groups=4, components=["attention", "other"]), INFOS, LAYERS)
    assert len(split.rules) == 8
    for info in INFOS:
        assert sum(rule.covers(info) for rule in split.rules) == 1
        assert split.rule_for(info).parameters == whole.rules[0].parameters
    assert split_rules(whole, make(), INFOS, LAYERS) == whole


# --- stacks -------------------------------------------------------------------------------------------------------


def stacks(folder: Path, **stack: Any) -> tuple[StackSpace, Engine]:
    written = make_pool(folder, "llama", models=2)
    pool = written.load()
    data = {
        "base_model": written.base,
        "models": written.models,
        "tasks": [{"task": "quiz"}],
        "space": {"stack": stack},
        "dtype": "float32",
    }
    made = space_of(validate(Config, data, "test"), pool.infos, pool.layers)
    assert isinstance(made, StackSpace)
    return made, Engine(pool, "float32")


def test_a_stack_is_built_of_the_parents_own_memory(tmp_path: Path) -> None:
    searched, engine = stacks(tmp_path, repeats=[1, 3], base=False)
    assert searched.sources == ("a", "b") and searched.dimension == 4
    for trial, recipe in trials(searched, 6):
        origins = [
            (trial.params[f"layer{n}.model"], n) for n in range(2) for _ in range(trial.params[f"layer{n}.repeats"])
        ]
        assert [row for row in recipe.stack] == [{name: (n, n)} for name, n in origins]
        engine.load(recipe)
        layers = engine.model.model.layers
        assert len(layers) == len(origins) <= 2 * 3
        for (name, n), layer in zip(origins, layers, strict=True):
            for key, tensor in layer.named_parameters():
                theirs = engine.pool.parent(name).live[f"model.layers.{n}.{key}"]
                assert tensor.data_ptr() == theirs.data_ptr()
        with torch.no_grad():
            assert engine.model(torch.tensor([[3, 5, 7]])).logits.isfinite().all()
    assert searched.parameters(baselines(searched.config)["average"]) is None


def test_only_the_output_projections_of_repeated_layers_are_scaled(tmp_path: Path) -> None:
    searched, engine = stacks(tmp_path, repeats=[1, 2], scale=0.5)
    params = {"layer0.model": "a", "layer0.repeats": 2, "layer1.model": "base", "layer1.repeats": 1}
    engine.load(searched.suggest(optuna.trial.FixedTrial(params)))
    for depth, (name, n, scaled) in enumerate([("a", 0, True), ("a", 0, True), ("base", 1, False)]):
        for key, tensor in engine.model.model.layers[depth].named_parameters():
            theirs = engine.pool.parent(name).live[f"model.layers.{n}.{key}"]
            factor = 0.5 if scaled and ("o_proj" in key or "down_proj" in key) else 1.0
            assert torch.equal(tensor, factor * theirs)


def test_a_scale_is_searched_for_repeated_layers_and_skipped_layers_are_gone(tmp_path: Path) -> None:
    searched, _ = stacks(tmp_path, repeats=[0, 2], scale=[0.3, 0.9])
    assert searched.dimension == 2 * 3
    depths = set()
    for trial, recipe in trials(searched, 24):
        times = [trial.params[f"layer{n}.repeats"] for n in range(2)]
        assert [f"layer{n}.scale" in trial.params for n in range(2)] == [t > 1 for t in times]
        assert len(recipe.stack) == (sum(times) or 1)
        depths.add(sum(times))
    assert depths >= {0, 1, 2, 3}


def test_a_scale_needs_output_projections_that_are_known() -> None:
    with pytest.raises(UserError, match=r"space.stack.scale: .*leave scale out"):
        space_of(make(stack={"scale": [0.5, 1.0]}), INFOS, LAYERS)
