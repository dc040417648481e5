"""Recipes written for mergekit: what it makes of the file is what this package exports, off the ties to one unit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import QUICKSTART, mergesearch, small
from support.mergekit_runs import LAYERS, need_mergekit, ours, theirs, theirs_multi, units_apart, written
from support.tiny_models import MOE, TinyPool, make_pool

from mergesearch import mergekit, methods
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.mergekit.placement import of
from mergesearch.recipe import Recipe, Rule, TensorInfo


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> TinyPool:
    return make_pool(tmp_path_factory.mktemp("parents"), models=3, num_hidden_layers=LAYERS)


def rule(method: str, layers: tuple[int, int] | None = None, *components: str, **more: Any) -> Rule:
    parameters = {key.removesuffix("_"): value for key, value in more.pop("parameters", {}).items()}
    return Rule(layers=layers, components=components or None, method=method, parameters=parameters, **more)


def grid() -> list[Rule]:
    """A rule for each range of layers and component, as a search with groups makes them."""
    rest = ("embedding", "norm", "head")
    return [
        rule(
            "ties",
            layers,
            *components,
            parameters={
                "density": [0.3, 0.4 + layers[0] / 10, 0.2],
                "weight": {"a": 0.2 + layers[0] / 10, "b": 0.5, "c": 0.1 if "mlp" in components else 0.6},
                "lambda_": 1 + layers[1] / 10,
            },
        )
        for layers in ((0, 1), (2, 3), (4, 4))
        for components in (("attention",), ("mlp",), rest)
    ]


SINGLE = {
    "ties": [rule("ties", parameters={"density": 0.3, "weight": {"a": 0.2, "b": 0.5, "c": 0.7}, "lambda_": 1.2})],
    "grid": grid(),
    "components": [
        rule("slerp", None, "attention", models=("b", "a"), parameters={"t": 0.3}),
        rule("slerp", None, "mlp", models=("b", "a"), parameters={"t": 0.6}),
        rule("slerp", tensors="*input_layernorm*", models=("b", "a"), parameters={"t": 0.61}),
        rule("slerp", models=("b", "a"), parameters={"t": 0.7}),
    ],
    "other_models_in_other_layers": [rule("linear", (0, 2), models=("a", "b")), rule("linear", models=("c", "b"))],
    "scaled": [
        rule("passthrough", None, "mlp", models=("a",), parameters={"scale": 0.5}),
        rule("passthrough", models=("a",)),
    ],
    "crumbs": [rule("breadcrumbs_ties", parameters={"density": 0.5, "gamma": 0.02, "rescale": "l1"})],
    "task_negation": [rule("task_arithmetic", parameters={"weight": [1.0, -0.5, 0.25], "normalize": True})],
    "nuslerp": [rule("nuslerp", models=("c", "a"), parameters={"weight": [0.3, 0.4], "flatten": False})],
    "nearswap": [rule("nearswap", models=("a", "b"), parameters={"t": 0.01})],
    "multislerp": [rule("multislerp", parameters={"weight": [0.5, 0.3, 0.9], "normalize": False})],
    **{name: [rule(name)] for name in ("karcher", "model_stock", "sce", "ram", "ramplus_tl", "uniform_soup")},
}  # fmt: skip
STACKS = {
    "frankenmerge": ([rule("passthrough")], ({"a": (0, 2)}, {"b": (2, 4)}, {"base": (1, 1)})),
    "task_vectors": (
        [rule("ties", None, "mlp", parameters={"density": 0.4, "weight": {"a": 0.2, "b": 0.3}}), rule("ties")],
        ({"a": (0, 2), "b": (1, 3)}, {"b": (2, 4), "c": (2, 4), "base": (2, 4)}),
    ),
}
SEVERAL = {
    "by_layers": ([rule("ties", (0, 1), parameters={"density": 0.3}), rule("linear", (2, 4))], None),
    "within_layers": (
        [
            rule("task_arithmetic", (0, 2), "attention", parameters={"weight": 0.4}),
            rule("slerp", None, "mlp", models=("c", "a"), parameters={"t": 0.25}),
            rule("sce"),
        ],
        None,
    ),
    "stacked": (
        [rule("ties", (0, 2), parameters={"density": 0.4}), rule("slerp", parameters={"t": 0.4})],
        ({"a": (0, 2), "b": (1, 3)}, {"b": (2, 4), "c": (0, 2)}),
    ),
    "more_models_behind": ([rule("ties")], ({"a": (0, 2)}, {"b": (2, 4), "c": (2, 4)})),
}


def recipe_of(parents: TinyPool, rules: list[Rule], stack: Any = None) -> Recipe:
    return parents.recipe(*rules, out_dtype="bfloat16", stack=stack)


def export(recipe: Recipe) -> str:
    return mergekit.export(recipe)[0]


def assert_neighbours(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    apart = {name: int(units_apart(one[name], other[name]).max()) for name in one}
    assert max(apart.values()) <= 1, {name: units for name, units in apart.items() if units > 1}
    share = sum(int((units_apart(one[k], other[k]) > 0).sum()) for k in one) / sum(t.numel() for t in one.values())
    assert share < 0.01


@pytest.mark.parametrize("name", [*SINGLE, *STACKS])
def test_mergekit_makes_our_export(name: str, parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    recipe = recipe_of(parents, *([SINGLE[name]] if name in SINGLE else STACKS[name]))
    text = export(recipe)
    assert_neighbours(ours(recipe), theirs(text, tmp_path / "out"))


@pytest.mark.parametrize("name", SEVERAL)
def test_mergekit_multi_makes_our_export(name: str, parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    recipe = recipe_of(parents, *SEVERAL[name])
    text = export(recipe)
    documents = list(yaml.safe_load_all(text))
    assert [d.get("name") for d in documents] == [*(f"group-{n}" for n in range(1, len(documents))), None]
    assert documents[-1]["merge_method"] == ("linear" if name == "within_layers" else "passthrough")
    assert_neighbours(ours(recipe), theirs_multi(text, tmp_path / name))


COMPONENT_RULES = [
    rule("ties", None, "attention", parameters={"density": 0.4}),
    rule("ties", (1, 1), "mlp", "experts", parameters={"density": 0.6, "weight": [0.3, 0.9]}),
    rule("ties", None, "norm", parameters={"weight": 0.7}),
    rule("ties", parameters={"weight": 0.5, "lambda_": 0.9}),
]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi3", "qwen3", "olmo2"])
def test_components_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    need_mergekit()
    recipe = recipe_of(make_pool(tmp_path / "pool", architecture), COMPONENT_RULES)
    assert_neighbours(ours(recipe), theirs(export(recipe), tmp_path / "out"))


@pytest.mark.parametrize("architecture", MOE)
def test_fused_experts(architecture: str, tmp_path: Path) -> None:
    """mergekit sees the experts of a layer as one tensor, which makes no difference where every element is alone."""
    need_mergekit()
    pool = make_pool(tmp_path / "pool", architecture)
    rules = [
        rule("linear", None, "experts", parameters={"weight": [0.7, 0.3]}),
        rule("linear", None, "router", "norm", parameters={"weight": [0.1, 0.7]}),
        rule("linear"),
    ]
    recipe = recipe_of(pool, rules)
    engine = Engine(pool.load(), "bfloat16")
    engine.load(recipe)
    text = export(recipe)
    made = theirs(text, tmp_path / "out")
    assert "# Experts: mergekit cuts and measures those of a layer as one tensor" in text
    assert_neighbours({name: engine.model.state_dict()[name] for name in made}, made)
    apart = [rule("linear", tensors="*experts.0.*", parameters={"weight": [0.1, 0.4]}), rule("linear")]
    with pytest.raises(UserError, match=r"cannot be written for mergekit, which sees it as a part of .*experts"):
        export(recipe_of(pool, apart))


def test_groups_keep_float32_until_the_end(parents: TinyPool) -> None:
    documents = list(yaml.safe_load_all(export(recipe_of(parents, *SEVERAL["within_layers"]))))
    assert [d["out_dtype"] for d in documents] == ["float32"] * 3 + ["bfloat16"]
    assert {d["dtype"] for d in documents} == {"float32"}


@pytest.mark.parametrize(
    ("method", "scaled"), [("dare_ties", "not by 1/density"), ("della_linear", "not by 1/density")]
)
def test_random_methods_say_what_cannot_be_reproduced(
    method: str, scaled: str, parents: TinyPool, tmp_path: Path
) -> None:
    recipe = recipe_of(parents, [rule(method, parameters={"density": 0.6})])
    text = export(recipe)
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(method in line and "masks from another generator" in line and scaled in line for line in head)
    matched = recipe_of(parents, [rule(method, parameters={"density": 0.6, "rescale": "l1"})])
    assert scaled not in export(matched)
    assert "rescale" not in yaml.safe_load(text).get("parameters", {})
    none = recipe_of(parents, [rule(method, parameters={"density": 0.6, "rescale": "none"})])
    assert yaml.safe_load(export(none))["parameters"]["rescale"] is False


def test_random_methods_run_there(parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    recipe = recipe_of(parents, [rule("dare_linear", parameters={"density": 0.7, "weight": 0.5})])
    made = theirs(export(recipe), tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in made.values()) and made.keys() == ours(recipe).keys()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule("sce", parameters={"weight": [1, 1, 2]})], "weight .* of sce in rules.0 cannot be written for mergekit"),
        ([rule("ram", parameters={"lambda_": 2})], "lambda 2.0 of ram"),
        ([rule("dare_ties", parameters={"samples": 4})], "samples 4 of dare_ties"),
    ],
)
def test_what_mergekit_cannot_do_is_refused(rules: list[Rule], message: str, parents: TinyPool) -> None:
    with pytest.raises(UserError, match=message):
        export(recipe_of(parents, rules))


def test_a_model_that_is_its_own_base_is_refused(parents: TinyPool) -> None:
    recipe = Recipe(base=parents.base, models={**parents.models, "same": parents.base}, rules=(rule("ties"),))
    with pytest.raises(UserError, match="takes part twice"):
        export(recipe)


def test_values_that_no_part_of_a_name_tells_apart_are_refused(parents: TinyPool) -> None:
    infos = [TensorInfo(f"model.layers.0.{name}", 0, "mlp", (2,)) for name in ("gate", "gate_scale", "scale_gate")]
    recipe = recipe_of(parents, [rule("linear", tensors="*.gate", parameters={"weight": 0.1}), rule("linear")])
    references = {"base": parents.base, **parents.models}
    with pytest.raises(UserError, match=r"weight of linear of model.layers.0.gate cannot be written for mergekit"):
        mergekit.write(recipe, of(infos, 1, recipe, references), references)


def test_tokenizers_are_named(parents: TinyPool) -> None:
    recipe = recipe_of(parents, SINGLE["ties"])
    assert "tokenizer_source" not in yaml.safe_load(export(recipe))
    for source, there in (("union", "union"), ("b", parents.models["b"])):
        changed = Recipe.from_data({**recipe.dump(), "tokenizer": source}, "the test")
        assert yaml.safe_load(export(changed))["tokenizer_source"] == there


# --- there and back ------------------------------------------------------------------------------------------------

COMPONENTS = ("embedding", "attention", "mlp", "norm", "head")
PARTS = {"attention": ("self_attn.q_proj", "self_attn.o_proj"), "mlp": ("mlp.up_proj",), "norm": ("input_layernorm",)}
INFOS = [
    TensorInfo("model.embed_tokens.weight", 0, "embedding", (4, 4)),
    *(
        TensorInfo(f"model.layers.{layer}.{part}.weight", layer, component, (4, 4))
        for layer in range(LAYERS)
        for component, parts in PARTS.items()
        for part in parts
    ),
    TensorInfo("model.norm.weight", LAYERS - 1, "norm", (4,)),
    TensorInfo("lm_head.weight", LAYERS - 1, "head", (4, 4)),
]
numbers = st.floats(0.01, 1.0, allow_nan=False)


@st.composite
def group_rules(draw: st.DrawFn) -> list[Rule]:
    """Rules of one method over random groups, and one for everything at the end."""
    method = draw(st.sampled_from(("linear", "ties", "task_arithmetic", "breadcrumbs")))
    found = []
    for last in range(draw(st.integers(0, 5)) + 1):
        first = draw(st.integers(0, LAYERS - 1))
        layers = draw(st.none() | st.just((first, draw(st.integers(first, LAYERS - 1)))))
        components = draw(st.lists(st.sampled_from(COMPONENTS), max_size=2, unique=True))
        parameters: dict[str, Any] = {
            "weight": draw(st.lists(numbers, min_size=2, max_size=2)),
            "normalize": draw(st.booleans()),
        }
        if method in ("ties", "breadcrumbs"):
            parameters["density"] = draw(numbers)
        whole = last == 0
        made = rule(method, None if whole else layers, *([] if whole else components), parameters=parameters)
        found.insert(0, made)
    return found


@settings(max_examples=60, deadline=None)
@given(group_rules())
def test_there_and_back(rules: list[Rule]) -> None:
    references = {"base": "/x/base", "one": "/x/one", "two": "/x/two"}
    models = {name: folder for name, folder in references.items() if name != "base"}
    recipe = Recipe(base="/x/base", models=models, rules=tuple(rules))
    try:
        text = mergekit.write(recipe, of(INFOS, LAYERS, recipe, references), references)
    except UserError as error:
        pytest.fail(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergesearch.mergekit.models.tensor_names", lambda file: [info.name for info in INFOS])
        patch.setattr("mergesearch.mergekit.models._count", lambda file: LAYERS)
        back = mergekit.from_data(yaml.safe_load(text), "FILE")
    assert back.models == recipe.models and back.out_dtype == recipe.out_dtype
    for info in INFOS:
        assert _meaning(back, info) == _meaning(recipe, info), f"{info.name}\n{text}"


def _meaning(recipe: Recipe, info: TensorInfo) -> tuple[Any, ...]:
    chosen = recipe.rule_for(info)
    names = chosen.models or tuple(recipe.models)
    return chosen.method, names, methods.get(chosen.method).complete(chosen.parameters, names, "the test")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the demo zoo of version 0.1 with a candidate of several groups."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    space = {"space__methods": "[linear, task_arithmetic]", "space__layer_groups": 2, "dtype": "bfloat16"}
    done = mergesearch("run", QUICKSTART, *small(folder, 2, 6, **space))
    assert done.status == 0, done.err
    return folder


def test_the_exported_file_makes_the_exported_checkpoint(finished: Path, tmp_path: Path) -> None:
    need_mergekit()
    number = 6 + 1  # behind the base, its models and the plain average
    file, checkpoint, made = tmp_path / "candidate.yaml", tmp_path / "checkpoint", tmp_path / "made"
    done = mergesearch("export", finished, file, "--format", "mergekit", "--trial", number)
    assert (done.status, done.err) == (0, "") and "off the ties" in done.out
    assert mergesearch("export", finished, checkpoint, "--trial", number).status == 0
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(file), str(made), "--quiet"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, other = written(checkpoint), written(made)
    assert one.keys() == other.keys()
    assert max(int(units_apart(one[name], other[name]).max()) for name in one) <= 1
    again = tmp_path / "again"
    assert mergesearch("merge", file, again).status == 0
    back = written(again)
    assert all((back[name] == one[name]).all() for name in one), "our own reading of the file"


def test_export_says_what_is_wrong(finished: Path, tmp_path: Path) -> None:
    done = mergesearch("export", finished, tmp_path / "x", "--format", "mergkit")
    assert done.status == 2 and "did you mean 'mergekit'?" in done.err
    there = tmp_path / "there.yaml"
    there.write_text("mine", encoding="utf-8")
    done = mergesearch("export", finished, there, "--format", "mergekit")
    assert done.status == 2 and "exists already: name a new file" in done.err and there.read_text() == "mine"
