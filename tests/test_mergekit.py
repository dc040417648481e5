"""mergekit's files, read: our tensors are those that mergekit itself writes, and what is not supported is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.mergekit_runs import LAYERS, filled, largest_difference, need_mergekit, ours, theirs
from support.tiny_models import TinyPool, make_pool

from mergesearch import mergekit, methods
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe, TensorInfo


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> TinyPool:
    return make_pool(tmp_path_factory.mktemp("parents"), models=3, num_hidden_layers=LAYERS)


def read(text: str) -> Recipe:
    return mergekit.from_data(yaml.safe_load(text), "FILE")


WEIGHTED = ("task_arithmetic", "breadcrumbs", "breadcrumbs_ties", "multislerp", "linear")
PLAIN = ("sce", "model_stock", "karcher", "ram", "ramplus_tl")

FILES = {
    "gradient": """
        merge_method: linear
        models:
        - {model: <a>, parameters: {weight: [0, 1]}}
        - {model: <b>, parameters: {weight: [1, 0.2, 0.4]}}""",
    "slerp_with_filters_and_gradients": """
        merge_method: slerp
        base_model: <a>
        models: [{model: <a>}, {model: <b>}]
        parameters:
          t:
          - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
          - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
          - {value: 0.5}""",
    "a_filter_for_everything": """
        merge_method: slerp
        base_model: <b>
        models: [{model: <a>}, {model: <b>}]
        parameters:
          t:
          - {filter: lm_head, value: [0.55]}
          - {filter: embed_tokens, value: [0.7]}
          - {filter: self_attn, value: [0.65, 0.35]}
          - {filter: layernorm, value: [0.4, 0.6]}
          - {filter: modelnorm, value: [0.6]}
          - {filter: "*", value: 0.5}""",
    "parameters_at_every_level": """
        merge_method: ties
        base_model: <base>
        models:
        - model: <a>
          parameters: {density: [1, 0.7, 0.1], weight: 1.0}
        - model: <b>
          parameters:
            density: 0.33
            weight: [{filter: mlp, value: 0.5}, {filter: norm, value: [0.3, 0.1]}, {value: 0.2}]
        - model: <c>
          parameters: {weight: {filter: q_proj, value: 0.4}}
        parameters:
          normalize: 1
          int8_mask: true
          weight: 0.1
          density: [{filter: up_proj, value: 0.5}, {value: 0.9}]""",
    "filters_that_meet": """
        merge_method: linear
        models:
        - model: <a>
          parameters:
            weight:
            - {filter: self_attn, value: 0.1}
            - {filter: layers.1., value: 0.2}
            - {filter: norm, value: 0.7}
            - {value: 0.3}
        - model: <b>
          parameters:
            weight:
            - {filter: layers.1, value: 0.4}
            - {filter: attn.q, value: 0.5}
            - {filter: layernorm, value: [0.2, 0.5]}
            - {value: 0.6}""",
    "slices_in_place": """
        merge_method: linear
        slices:
        - sources:
          - {model: <a>, layer_range: [0, 2], parameters: {weight: 0.1}}
          - {model: <b>, layer_range: [0, 2], parameters: {weight: [0.9, 0.5]}}
        - sources:
          - {model: <c>, layer_range: [2, 5], parameters: {weight: [0.6, 0.8]}}
          - {model: <b>, layer_range: [2, 5], parameters: {weight: [0.4, 0.2]}}
          parameters: {normalize: false}""",
    "source_before_slice_before_global": """
        merge_method: linear
        slices:
        - sources:
          - {model: <a>, layer_range: [0, 5], parameters: {weight: {filter: q_proj, value: 0.1}}}
          - {model: <b>, layer_range: [0, 5], parameters: {weight: 1.0}}
          parameters: {weight: {filter: mlp, value: 0.2}}
        parameters: {weight: 0.3, normalize: false}""",
    "stack": """
        merge_method: passthrough
        slices:
        - sources: [{model: <a>, layer_range: [0, 3]}]
        - sources:
          - model: <b>
            layer_range: [2, 5]
            parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}""",
    "stack_merged": """
        merge_method: slerp
        base_model: <a>
        slices:
        - sources: [{model: <b>, layer_range: [0, 2]}, {model: <a>, layer_range: [1, 3]}]
        - sources: [{model: <a>, layer_range: [2, 5]}, {model: <c>, layer_range: [1, 4]}]
          parameters: {t: [0.2, 0.7]}
        parameters: {t: 0.5}""",
    "stack_of_task_vectors": """
        merge_method: ties
        base_model: <base>
        slices:
        - sources: [{model: <base>, layer_range: [0, 4]}, {model: <b>, layer_range: [0, 4]}]
        - sources:
          - {model: <base>, layer_range: [3, 5]}
          - {model: <a>, layer_range: [3, 5]}
          - {model: <c>, layer_range: [1, 3]}
          parameters: {density: [0.2, 0.7]}
        parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0.7}], density: 0.5}""",
    "fewer_layers": """
        merge_method: linear
        slices:
        - sources: [{model: <b>, layer_range: [0, 2]}, {model: <a>, layer_range: [0, 2]}]
        parameters: {weight: 0.5}""",
    "base_is_one_more_input": """
        merge_method: karcher
        base_model: <base>
        models: [{model: <a>}, {model: <b>}]""",
    "base_listed_with_parameters": """
        merge_method: task_arithmetic
        base_model: <base>
        models:
        - {model: <base>, parameters: {weight: 0.5}}
        - {model: <a>, parameters: {weight: 0.3}}
        parameters: {normalize: true}""",
    "nuslerp_of_task_vectors": """
        merge_method: nuslerp
        base_model: <base>
        models:
        - {model: <a>, parameters: {weight: 0.4}}
        - {model: <b>, parameters: {weight: [0.3, 0.7]}}""",
    "nuslerp_by_rows": """
        merge_method: nuslerp
        models:
        - {model: <a>, parameters: {weight: 0.4}}
        - {model: <b>, parameters: {weight: "6e-1"}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}""",
    "nearswap": """
        merge_method: nearswap
        base_model: <a>
        models: [{model: <b>}]
        parameters: {t: [0.001, 0.01]}""",
    **{
        method: f"""
        merge_method: {method}
        base_model: <base>
        models:
        - {{model: <base>{", parameters: {weight: 0.1}" if method == "linear" else ""}}}
        - {{model: <a>, parameters: {{weight: 0.4}}}}
        - {{model: <b>, parameters: {{weight: [0.3, 0.7]}}}}
        - {{model: <c>, parameters: {{weight: [0.2, 0.5, 0.1]}}}}"""
        for method in WEIGHTED
    },
    **{
        method: f"""
        merge_method: {method}
        base_model: <base>
        models: [{{model: <a>}}, {{model: <b>}}, {{model: <c>}}]"""
        for method in PLAIN
    },
}


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_mergekits(name: str, parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    text = filled(FILES[name], parents) + "\n        dtype: float32"
    apart = largest_difference(ours(read(text)), theirs(text, tmp_path / "out"))
    assert max(apart.values()) < 2e-6, apart


def test_results_are_rounded_to_out_dtype(parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    text = filled(FILES["slices_in_place"], parents) + "\n        dtype: float32\n        out_dtype: bfloat16"
    apart = largest_difference(ours(read(text)), theirs(text, tmp_path / "out"))
    assert max(apart.values()) == 0


def test_an_adapter_over_a_model(parents: TinyPool, tmp_path: Path) -> None:
    need_mergekit()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        get_peft_model(AutoModelForCausalLM.from_pretrained(parents.models["a"]), adapted).save_pretrained(
            tmp_path / "lora"
        )
    text = filled(FILES["gradient"], parents).replace(parents.models["a"], f"{parents.models['a']}+{tmp_path / 'lora'}")
    recipe = read(text + "\n        dtype: float32")
    assert list(recipe.models) == ["a+lora", "b"]
    apart = largest_difference(ours(recipe), theirs(text + "\n        dtype: float32", tmp_path / "out"))
    assert max(apart.values()) < 2e-6
    assert mergekit.export(recipe)[0].splitlines()[0].endswith("mergekit-yaml FILE OUT --lora-merge-cache FOLDER")


# --- what is read -------------------------------------------------------------------------------------------------

TIES = """
base_model: o/base
merge_method: ties
models: [{model: o/one, parameters: {weight: 1}}, {model: o/two, parameters: {weight: 1}}]
dtype: bfloat16
"""


def ties(**changes: Any) -> dict[str, Any]:
    data = {**yaml.safe_load(TIES), **changes}
    return {key: value for key, value in data.items() if value is not None}


def test_one_rule_where_nothing_depends_on_the_tensor() -> None:
    recipe = read(TIES)
    assert (recipe.base, recipe.models) == ("o/base", {"one": "o/one", "two": "o/two"})
    assert len(recipe.rules) == 1 and recipe.rules[0].parameters == {"weight": [1.0, 1.0]}
    assert recipe.rules[0].tensors is None and recipe.rules[0].layers is None
    assert recipe.out_dtype == "bfloat16" and recipe.stack is None


def test_rules_are_as_few_as_can_be(parents: TinyPool) -> None:
    recipe = read(filled(FILES["slerp_with_filters_and_gradients"], parents) + "\n        dtype: float32")
    assert len(recipe.rules) == 2 * LAYERS + 1
    assert recipe.rules[-1].model_dump(exclude_none=True) == {"method": "slerp", "parameters": {"t": 0.5}}
    constant = FILES["gradient"].replace("[0, 1]", "[0.5, 0.5]").replace("[1, 0.2, 0.4]", "[1]")
    assert len(read(filled(constant, parents) + "\n        dtype: float32").rules) == 1


def test_final_norm_and_head_take_the_first_value_of_a_gradient(parents: TinyPool) -> None:
    recipe = read(filled(FILES["gradient"], parents) + "\n        dtype: float32")
    places = {
        "model.embed_tokens.weight": (0, "embedding", [0.0, 1.0]),
        "model.layers.0.mlp.up_proj.weight": (0, "mlp", [0.0, 1.0]),
        "model.layers.4.input_layernorm.weight": (4, "norm", [1.0, 0.4]),
        "model.norm.weight": (4, "norm", [0.0, 1.0]),
        "lm_head.weight": (4, "head", [0.0, 1.0]),
    }
    for name, (layer, component, weight) in places.items():
        assert recipe.rule_for(TensorInfo(name, layer, component, ())).parameters["weight"] == weight, name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_get_mergekits_rescaling(method: str) -> None:
    assert mergekit.from_data(ties(merge_method=method), "FILE").rules[0].parameters["rescale"] == "l1"
    off = mergekit.from_data(ties(merge_method=method, parameters={"rescale": False}), "FILE")
    assert off.rules[0].parameters["rescale"] == "none"


def test_int8_mask_is_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert mergekit.from_data(ties(parameters={"int8_mask": True}), "FILE") == read(TIES)
    assert "int8_mask changes no tensor of ties" in caplog.text


def test_names_are_short_and_unique() -> None:
    models = [{"model": name} for name in ("/x/one", "y/one", "z/base", "z/two@v1", "z/two@v1+w/lora", "zoo:x")]
    recipe = mergekit.from_data({"merge_method": "karcher", "models": models, "dtype": "float32"}, "FILE")
    assert list(recipe.models) == ["one", "one-2", "base-model", "two", "two+lora", "x"]
    assert recipe.models["two+lora"] == "z/two@v1+w/lora"


def test_missing_dtypes_are_the_models_own(tmp_path: Path) -> None:
    parents = make_pool(tmp_path, models=2, dtype=("bfloat16", "bfloat16", "float32"))
    text = filled(FILES["base_is_one_more_input"], parents)
    assert read(text).out_dtype == "float32"
    assert read(text + "\n        dtype: float16").out_dtype == "float16"
    narrow = FILES["base_is_one_more_input"].replace(", {model: <b>}", "")
    assert read(filled(narrow, parents)).out_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "o/base"}, "base"),
        ({"tokenizer_source": "o/two"}, "two"),
        ({"tokenizer_source": "model:o/two"}, "two"),
        ({"tokenizer": {"source": "o/one"}}, "one"),
        ({"chat_template": None, "tokenizer": {"source": "union", "tokens": None}}, "union"),
    ],
)
def test_tokenizers(given: dict[str, Any], expected: str) -> None:
    assert mergekit.from_data({**ties(), **given}, "FILE").tokenizer == expected


def test_stack_counts_from_the_first_to_the_last_layer(parents: TinyPool) -> None:
    recipe = read(filled(FILES["stack_of_task_vectors"], parents) + "\n        dtype: float32")
    assert recipe.stack == ({"base": (0, 3), "b": (0, 3)}, {"base": (3, 4), "a": (3, 4), "c": (1, 2)})


# --- what is refused ----------------------------------------------------------------------------------------------


def models(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": f"o/m{number}", "parameters": entry} for number, entry in enumerate(entries)]


SLICES = [{"sources": [{"model": "o/m0", "layer_range": [0, 2]}, {"model": "o/m1", "layer_range": [0, 3]}]}]

REFUSED = {
    "unknown key": (ties(merge_metod="ties"), "unknown key 'merge_metod' in FILE: did you mean 'merge_method'?"),
    "modules": (ties(modules={"text": {}}), "modules in FILE is not supported"),
    "chat template": (ties(chat_template="auto"), "chat_template in FILE is not supported"),
    "mergekit-multi": (ties(name="part"), "name in FILE is not supported: it belongs to mergekit-multi"),
    "mixture": ({"base_model": "o/b", "gate_mode": "hidden", "experts": []}, "mergekit-moe"),
    "token overrides": (ties(tokenizer={"source": "union", "tokens": {"<x>": {}}}), "tokens in FILE, tokenizer is not"),
    "both tokenizers": (ties(tokenizer={"source": "base"}, tokenizer_source="base"), "both given"),
    "a stranger's tokenizer": (ties(tokenizer_source="o/else"), "tokenizer's source o/else is not supported"),
    "unknown method": (ties(merge_method="tiez"), "unknown merge method 'tiez' in FILE: did you mean 'ties'?"),
    "a method of ours": (ties(merge_method="uniform_soup"), "unknown merge method 'uniform_soup'"),
    "missing method": (ties(merge_method=None), "merge_method is missing"),
    "missing base": (ties(base_model=None), "ties needs base_model"),
    "slerp without base": ({"merge_method": "slerp", "models": models({}, {})}, "slerp needs base_model"),
    "unknown parameter": (ties(parameters={"densty": 0.5}), "unknown parameter of ties 'densty' in FILE, param"),
    "parameter of another method": (ties(parameters={"t": 0.5}), "unknown parameter of ties 't'"),
    "shared parameter under a model": (ties(models=models({"normalize": True, "weight": 1})), "give it under"),
    "out of range": (ties(parameters={"density": 1.5}), "density 1.5 in FILE, parameters.density"),
    "no number": (ties(parameters={"density": "much"}), "density 'much' in FILE, parameters.density"),
    "no truth": (ties(parameters={"normalize": "maybe"}), "normalize 'maybe'"),
    "out of range where nothing matches": (
        ties(parameters={"density": [{"value": 0.5}, {"filter": "nothing", "value": [0.5, 7]}]}),
        "density 7 in FILE, parameters.density.1",
    ),
    "gradient of truths": (ties(parameters={"normalize": [True, False]}), "is a gradient, which only numbers can be"),
    "empty gradient": (ties(parameters={"density": []}), "FILE, parameters.density is []"),
    "missing weight": (ties(models=models({"weight": 1}, {})), "weight of o/m1 is missing"),
    "missing t": ({"merge_method": "slerp", "base_model": "o/b", "models": models({})}, "t is missing"),
    "condition without value": (ties(parameters={"density": [{"filter": "mlp"}]}), "parameters.density.0 has no value"),
    "key of a condition": (ties(parameters={"density": [{"filtr": "x", "value": 1}]}), "did you mean 'filter'?"),
    "unknown key of a model": (ties(models=[{"modl": "x"}]), "did you mean 'model'?"),
    "layer_range of a model": (ties(models=[{"model": "x", "layer_range": [0, 1]}]), "unknown key 'layer_range'"),
    "residual weight": (ties(models=None, slices=[{"sources": [], "residual_weight": 1.0}]), "residual_weight in"),
    "models and slices": (ties(slices=SLICES), "give one of models and slices"),
    "neither": (ties(models=None), "give one of models and slices"),
    "plain strings": (ties(models=["o/one"]), "models is ['o/one']: give a list of mappings"),
    "one model twice": (ties(models=[*models({"weight": 1}), *models({"weight": 1})]), "o/m0 is named twice"),
    "unequal ranges": (ties(models=None, slices=SLICES), "layer_range of the sources are [[0, 2], [0, 3]]"),
    "float64": (ties(dtype="float64"), "dtype 'float64' is not supported: use float32, bfloat16, float16"),
    "the base alone": ({"merge_method": "ties", "base_model": "b", "models": [{"model": "b"}]}, "no model beside"),
    "two bases": (
        {"merge_method": "slerp", "slices": [{**SLICES[0], "base_model": "o/m0"}, {**SLICES[0], "base_model": "o/m1"}]},
        "different base_model of slices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        mergekit.from_data(data, "FILE")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_many_filters_are_refused() -> None:
    conditions = [{"filter": f"word{number}", "value": 0.5} for number in range(11)]
    with pytest.raises(UserError, match="11 different filters"):
        mergekit.from_data(ties(parameters={"density": conditions}), "FILE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[3, 5]", "[2, 4]", "layers.3."), r"filter 'layers.3.' names a layer"),
        (("- {model: <base>, layer_range: [3, 5]}", "", ""), "base_model .* is not among the sources"),
    ],
)
def test_refused_in_stacks(change: tuple[str, str, str], message: str, parents: TinyPool) -> None:
    old, new, pattern = change
    text = FILES["stack_of_task_vectors"].replace(old, new).replace("filter: mlp", f"filter: {pattern or 'mlp'}")
    with pytest.raises(UserError, match=message):
        read(filled(text, parents) + "\n        dtype: float32")


def test_base_behind_the_sources_that_the_head_is_made_of(parents: TinyPool) -> None:
    text = """
        merge_method: ties
        base_model: <base>
        slices:
        - sources: [{model: <base>, layer_range: [0, 2]}, {model: <b>, layer_range: [0, 2]}]
        - sources:
          - {model: <a>, layer_range: [2, 5]}
          - {model: <b>, layer_range: [2, 5]}
          - {model: <base>, layer_range: [2, 5]}
        parameters: {weight: 1.0}
        dtype: float32"""
    with pytest.raises(UserError, match="list it first"):
        read(filled(text, parents))


def test_formats_are_told_apart(tmp_path: Path, parents: TinyPool) -> None:
    theirs_, native = tmp_path / "theirs.yaml", tmp_path / "native.yaml"
    theirs_.write_text(filled(FILES["nearswap"], parents) + "\n        dtype: float32", encoding="utf-8")
    recipe = mergekit.read_any(theirs_)
    native.write_text(recipe.to_yaml(), encoding="utf-8")
    assert mergekit.read_any(native) == recipe


def test_several_documents_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "multi.yaml"
    file.write_text(f"{TIES}---{TIES}", encoding="utf-8")
    with pytest.raises(UserError, match="holds 2 documents, which belongs to mergekit-multi"):
        mergekit.read_any(file)


def test_the_methods_shared_with_mergekit_are_here_and_there() -> None:
    need_mergekit()
    from mergekit.merge_methods import get

    from mergesearch.mergekit.known import METHODS

    assert set(METHODS) <= set(methods.names())
    assert all(get(name) is not None for name in METHODS)
    with pytest.raises(Exception, match="uniform_soup"):
        get("uniform_soup")
