"""Configurations of mergekit-evolve and mergenetic, as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import mergesearch

from mergesearch import config as configuration
from mergesearch import load_run
from mergesearch.commands.foreign import convert, program_of, read_config
from mergesearch.errors import UserError

# in the form of mergekit's docs/evolve.md
EVOLVE: dict[str, Any] = {
    "genome": {
        "models": ["zoo:order", {"model": {"path": "zoo:letters"}}, "zoo:base"],
        "merge_method": "dare_ties",
        "base_model": "zoo:base",
        "tokenizer_source": "base",
        "layer_granularity": 2,
        "normalize": False,
        "allow_negative_weights": True,
        "filters": ["self_attn", "mlp", "strange"],
    },
    "tasks": [{"name": "zoo_order", "weight": 0.5, "metric": "exact_match,none"}, "zoo_letters"],
    "limit": 20,
    "num_fewshot": 2,
    "apply_chat_template": False,
}
# in the form of mergenetic's published experiments
MERGENETIC: dict[str, Any] = {
    "pop_size": 5,
    "n_iter": 4,
    "run_id": "multi lang",
    "mode": "gmpirt",
    "seed": 420,
    "n_samples": 20,
    "langs": ["it"],
    "device": "cpu",
    "dtype": "float16",
    "eval_batch_size": 8,
    "models": {"it": "zoo:order", "base": "zoo:letters", "en": "zoo:base"},
    "base_model": "zoo:base",
    "metric": "acc",
    "load_in_4bit": True,
    "tasks": {"search": {"it": "zoo_letters", "en": "zoo_letters"}, "test": {"it": "zoo_both"}},
    "surprise": 1,
}


def _file(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_mergekit_evolve(tmp_path: Path) -> None:
    converted = convert(_file(tmp_path, EVOLVE))
    made = configuration.from_data(converted.data, tmp_path / "ours.yaml")
    assert made.models == {"zoo-order": "zoo:order", "zoo-letters": "zoo:letters"}
    assert [(t.task, t.metric, t.weight, t.limit, t.num_fewshot) for t in made.tasks] == [
        ("zoo_order", "exact_match", 0.5, 20, 2),
        ("zoo_letters", "acc", 1.0, 20, 2),
    ]
    # the zoo's base has 4 layers
    assert made.space.layer_groups == 2 and made.space.components == ["attention", "mlp", "other"]
    assert made.space.methods == ["dare_ties"] and made.space.weight == (-1.0, 1.0)
    assert (made.objective.scale, made.search.strategy, made.search.trials) == ("raw", ["study"], 100)
    said = " ".join(converted.notes)
    for word in ("strange", "zoo:base is the base", "normalize", "held out", "--max-fevals"):
        assert word in said
    assert "apply_chat_template" not in said and not made.apply_chat_template


def test_mergenetic(tmp_path: Path) -> None:
    converted = convert(_file(tmp_path, MERGENETIC))
    made = configuration.from_data(converted.data, tmp_path / "ours.yaml")
    assert made.name == "multi-lang" and made.models == {"it": "zoo:order", "base-model": "zoo:letters"}
    assert [task.task for task in made.tasks] == ["zoo_letters"]
    assert [task.task for task in made.report.tasks] == ["zoo_both"]
    assert (made.search.trials, made.search.seed, made.batch_size, made.dtype) == (20, 420, 8, "float16")
    said = " ".join(converted.notes)
    for word in ("gmpirt", "quantised", "surprise", "generations of 5", "zoo:base is the base"):
        assert word in said
    assert "langs" not in said


def test_the_verb_writes_a_file_that_is_ours(tmp_path: Path) -> None:
    theirs, ours = _file(tmp_path, EVOLVE), tmp_path / "ours.yaml"
    done = mergesearch("convert", theirs, ours)
    assert done.status == 0 and "note: " in done.out
    assert configuration.read(ours) == read_config(theirs, say=lambda _: None).model_copy(update={"name": "theirs"})
    assert ours.read_text().startswith("# Converted from mergekit-evolve.\n# ")
    printed = mergesearch("convert", theirs).out
    assert printed == ours.read_text()
    again = mergesearch("convert", theirs, ours)
    assert again.status == 2 and "exists already" in again.err


def test_run_takes_them_as_they_are(tmp_path: Path) -> None:
    said: list[str] = []
    made = read_config(_file(tmp_path, MERGENETIC), ["search.trials=3"], said.append)
    assert made.search.trials == 3 and said[0].endswith("is a configuration of mergenetic")
    plain = {"base_model": "zoo:base", "models": {"a": "zoo:order"}, "tasks": [{"task": "zoo_order"}]}
    assert read_config(_file(tmp_path, plain), say=said.append).models == {"a": "zoo:order"}


@pytest.mark.parametrize("change, why", [
    ({"genome": {"models": ["a"], "merge_method": "linear"}}, "base_model"),
    ({"genome": {"merge_method": "ties", "base_model": "b"}}, "models"),
    ({"genome": {"models": ["b"], "merge_method": "ties", "base_model": "b"}}, "beside the base"),
    ({"genome": {"models": ["a"], "base_model": "b"}}, "merge_method"),
    ({"tasks": []}, "tasks"),
])  # fmt: skip
def test_what_a_search_needs_and_is_not_there(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        convert(_file(tmp_path, {**EVOLVE, **change}))


def test_what_is_no_search(tmp_path: Path) -> None:
    assert program_of({"merge_method": "ties"}) is None and program_of([1]) is None
    done = mergesearch("convert", _file(tmp_path, {"merge_method": "ties", "models": []}))
    assert done.status == 2 and "mergesearch merge" in done.err


def test_check_and_score_take_their_files(tmp_path: Path) -> None:
    theirs = {**EVOLVE, "tasks": [{"name": "zoo_letters", "weight": 1.0, "metric": "acc,none"}], "limit": 4}
    del theirs["num_fewshot"]  # which the task sets itself
    path = _file(tmp_path, theirs)
    sets = ["--set", "dtype=float32", "--set", f"output={tmp_path / 'run'}"]
    done = mergesearch("check", path, *sets)
    assert done.status == 0, done.err
    assert "is a configuration of mergekit-evolve" in done.err and "100 trials" in done.out
    done = mergesearch("score", "zoo:letters", "--config", path, *sets)
    assert done.status == 0, done.err
    assert "is a configuration of mergekit-evolve" in done.err and "zoo_letters acc: " in done.out


def test_a_search_begins_with_their_file(tmp_path: Path) -> None:
    theirs = {**EVOLVE, "tasks": [{"name": "zoo_letters", "weight": 1.0, "metric": "acc,none"}], "limit": 4}
    del theirs["num_fewshot"]  # which the task sets itself
    path, out = _file(tmp_path, theirs), tmp_path / "run"
    settings = {"dtype": "float32", "output": out, "search.strategy": "random", "search.trials": 1,
                "search.defaults": "false"}  # fmt: skip
    done = mergesearch("run", path, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")))
    assert done.status == 0, done.err
    assert "is a configuration of mergekit-evolve" in done.err
    run = load_run(out)
    # base, both models, the average, and the one trial, of their method
    assert [record.name for record in run.records[:4]] == ["base", "zoo-order", "zoo-letters", "average"]
    assert len(run.records) == 5 and run.records[4].state == "complete"
    assert {rule["method"] for rule in (run.records[4].recipe or {})["rules"]} == {"dare_ties"}
    assert (out / "best" / "recipe.yaml").is_file()
