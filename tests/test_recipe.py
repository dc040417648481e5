"""Native recipes: YAML both ways, exactly, and an id that depends on what they state alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesearch import recipe as recipes
from mergesearch.errors import UserError
from mergesearch.recipe import COMPONENTS, Recipe, Rule, TensorInfo
from mergesearch.schema import parse_yaml


def text(max_size: int, min_size: int = 0) -> st.SearchStrategy[str]:
    """Any text; a NUL is no character of one, as no path can hold it."""
    return st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=min_size, max_size=max_size)


names = text(max_size=8, min_size=1).filter(lambda name: name not in ("base", "union"))
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40)
values = numbers | st.booleans() | text(max_size=6) | st.lists(numbers, max_size=3)
ranges = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def rules(draw: st.DrawFn, models: list[str]) -> dict[str, Any]:
    chosen = draw(st.none() | st.lists(st.sampled_from(models), min_size=1, unique=True))
    return {
        "layers": draw(st.none() | ranges.map(list)),
        "components": draw(st.none() | st.lists(st.sampled_from(COMPONENTS), min_size=1, unique=True)),
        "tensors": draw(st.none() | text(max_size=8)),
        "method": draw(st.sampled_from(("ties", "linear", "slerp"))),
        "models": chosen,
        "parameters": draw(
            st.dictionaries(text(max_size=6), values | st.dictionaries(names, numbers, max_size=2), max_size=3)
        ),
    }


@st.composite
def written(draw: st.DrawFn) -> dict[str, Any]:
    models = draw(st.dictionaries(names, text(max_size=12), min_size=1, max_size=3))
    row = st.fixed_dictionaries({draw(st.sampled_from([*models, "base"])): ranges.map(list)})
    return {
        "base": draw(st.none() | text(max_size=12)),
        "models": models,
        "rules": draw(st.lists(rules(list(models)), min_size=1, max_size=3)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "out_dtype": draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        "tokenizer": draw(st.sampled_from(("base", "union", *models))),
        "stack": draw(st.none() | st.lists(row, min_size=1, max_size=3)),
    }


@settings(max_examples=100, deadline=None)
@given(written())
def test_round_trip_is_exact(data: dict[str, Any]) -> None:
    recipe = Recipe.from_data(data, "the test")
    assert Recipe.from_data(recipe.dump(), "the test") == recipe
    back = Recipe.from_data(parse_yaml(recipe.to_yaml(), "the test"), "the test")
    assert back == recipe and back.id == recipe.id and back.to_yaml() == recipe.to_yaml()


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    rule = Rule(layers=(0, 1), components=("mlp",), method="ties", parameters={"density": 1e-05, "weight": {"ä": 0.1}})
    recipe = Recipe(base="zoo:base", models={"ä": "x/y@main"}, rules=(rule, Rule(method="linear")), seed=2**62)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert recipes.read(tmp_path / "recipe.yaml") == recipe


def test_the_id_is_stable_and_sees_every_field() -> None:
    recipe = Recipe(base="b", models={"a": "x", "c": "y"}, rules=(Rule(method="linear"),))
    assert recipe.id == "7a72f812bde6"
    changes = [
        {"base": None},
        {"models": {"c": "y", "a": "x"}},
        {"rules": (Rule(method="ties"),)},
        {"rules": (Rule(method="linear", parameters={"weight": 1.0}),)},
        {"seed": 1},
        {"out_dtype": "float32"},
        {"tokenizer": "union"},
        {"stack": ({"a": (0, 1)},)},
    ]
    ids = {Recipe(**{**recipe.dump(), **change}).id for change in changes}
    assert len(ids) == len(changes) and recipe.id not in ids


def test_the_first_rule_that_covers_wins() -> None:
    models = {"a": "x"}
    layered = Recipe(
        models=models,
        rules=(Rule(layers=(1, 2), components=("mlp",), method="ties"), Rule(tensors="*.q", method="slerp")),
    )
    assert layered.rule_for(TensorInfo("m.1.up", 1, "mlp", ())).method == "ties"
    assert layered.rule_for(TensorInfo("m.1.q", 1, "attention", ())).method == "slerp"
    with pytest.raises(UserError, match=r"no rule of recipe .* covers tensor 'm\.0\.up'"):
        layered.rule_for(TensorInfo("m.0.up", 0, "mlp", ()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rulez": []}, "unknown key 'rulez' in FILE: did you mean 'rules'?"),
        ({"rules": [{"method": "ties", "layer": [0, 1]}]}, "did you mean 'layers'?"),
        ({"rules": [{"method": "ties", "layers": [3, 1]}]}, "first and the last layer"),
        ({"rules": [{"method": "ties", "components": ["attn"]}]}, "unknown component 'attn'"),
        ({"rules": [{"method": "ties", "models": ["b"]}]}, "rules.0.models names 'b'"),
        ({"rules": []}, "rules"),
        ({"models": {}}, "models"),
        ({"seed": -1}, "seed is -1"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"tokenizer": "b"}, "tokenizer is 'b'"),
        ({"stack": [{"a": [0, 1], "base": [0, 2]}]}, "the same number of layers"),
        ({"stack": [{"b": [0, 1]}]}, "names 'b'"),
    ],
)
def test_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    data = {"models": {"a": "x"}, "rules": [{"method": "ties"}], **change}
    with pytest.raises(UserError) as caught:
        Recipe.from_data(data, "FILE")
    assert message in str(caught.value) and "\n" not in str(caught.value)
