"""`mergesearch push` against a hub on this machine, and what the model card says of a merge's parents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from support import fake_hub
from support.commands import mergesearch

from mergesearch import Config, run_search, zoo
from mergesearch.checkpoints.hub import check_id, hub_ids, licence_of
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe, single_rule
from mergesearch.results.card import Story, model_card
from mergesearch.results.origin import Metric, Origin


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    with fake_hub.here(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a base whose card states a licence, and two models of which one states another."""
    home = tmp_path_factory.mktemp("push")
    for name, licence in (("base", "apache-2.0"), ("order", "llama3"), ("letters", None)):
        shutil.copytree(zoo.folder() / "models" / name, home / name)
        if licence:
            (home / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n", encoding="utf-8")
    given: dict[str, Any] = {
        "name": "tiny",
        "output": str(home / "run"),
        "base_model": str(home / "base"),
        "models": {"order": str(home / "order"), "letters": str(home / "letters")},
        "tasks": [{"task": "zoo_letters", "metric": "acc", "limit": 4}],
        "dtype": "float32",
        "scoring": "lm_eval",
        "search": {"strategy": "random", "trials": 0, "defaults": False},
    }
    run_search(Config(**given))
    return home / "run"


def _front(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_the_winner_is_uploaded_as_it_lies_there(run: Path, hub: fake_hub.Hub) -> None:
    done = mergesearch("push", run, "me/merged", "--private", "--message", "a first one")
    assert done.status == 0, done.err
    assert "/me/merged/commit/" in done.out
    assert hub.repositories["me/merged"]["visibility"] == "private"
    assert hub.commits == [("main", "a first one")]
    best = {file.name: file.read_bytes() for file in (run / "best").iterdir() if file.name != "digests.json"}
    assert hub.files == best and {"model.safetensors", "recipe.yaml", "tensors.csv"} <= set(best)


def test_the_card_names_parents_licences_and_figures(run: Path, hub: fake_hub.Hub) -> None:
    done = mergesearch("push", run, "me/merged", "--trial", 3, "--revision", "third")
    assert done.status == 0, done.err
    assert hub.branches == ["third"] and hub.commits[0][0] == "third"
    assert not list(run.glob(".push-*"))  # what was exported for it is gone
    card, front = hub.files["README.md"].decode(), _front(hub.files["README.md"])
    # folders of this machine are nobody's base on the hub
    assert "base_model" not in front and "license" not in front and front["base_model_relation"] == "merge"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "zoo_letters" and result["metrics"][0]["type"] == "acc"
    assert model_index_to_eval_results(front["model-index"])[1][0].dataset_split == "search documents"
    digests = [line.rsplit("`", 2)[1] for line in card.splitlines() if line.startswith("- ") and ", weights " in line]
    assert len(set(digests)) == 3 and all(int(digest, 16) for digest in digests)
    assert "licences differ" in card and "llama3: order" in card
    assert "No licence is stated by letters" in card


def test_what_the_hub_refuses_is_one_sentence(run: Path, hub: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    done = mergesearch("push", run, "stranger/merged")
    assert done.status == 2 and "use an owner and a token that may" in done.err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = mergesearch("push", run, "me/merged")
    assert done.status == 2 and "hf auth login" in done.err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = mergesearch("push", run, "me/merged")
    assert done.status == 2 and "HF_HUB_OFFLINE" in done.err
    asked = len(hub.asked)
    for name in ("merged", "me/../merged", "a--b/c", f"me/{'x' * 100}"):
        done = mergesearch("push", run, name)
        assert done.status == 2 and "OWNER/NAME" in done.err
    assert len(hub.asked) == asked and not hub.files


def test_hub_ids_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub_ids("owner/base") == ["owner/base"] and hub_ids("owner/base@0123") == ["owner/base"]
    assert hub_ids("owner/base+owner/lora@main") == ["owner/base", "owner/lora"]
    for folder in ("./owner/base", "/owner/base", "~/base", "zoo:base", "here/model", "base", "a/b/c"):
        assert hub_ids(folder) == []
    check_id("owner/name-1.5_b")
    with pytest.raises(UserError, match="OWNER/NAME"):
        check_id("owner")


def test_licences_are_read_from_cards(tmp_path: Path) -> None:
    def stated(head: str) -> str | None:
        (tmp_path / "README.md").write_text(head, encoding="utf-8")
        return licence_of(tmp_path)

    assert licence_of(tmp_path) is None
    assert stated("---\nlicense: MIT\n---\n") == "mit"
    assert stated("---\nlicense: other\nlicense_name: house-1\n---\n") == "house-1"
    assert stated("---\nlicense: [mit]\n---\n") == "mit"
    for head in ("no head", "---\nlicense: {a: b\n---\n", "---\n- 1\n---\n", "---\n"):
        assert stated(head) is None


def _origin(**licences: str | None) -> Origin:
    recipe = Recipe(base="o/base", models={"a": "o/a@0123", "b": "/home/b"}, rules=single_rule("linear"))
    return Origin.of(recipe, licences=licences)


def test_one_licence_is_the_merges() -> None:
    origin = _origin(base="mit", a="mit", b="mit")
    assert origin.conflict() is None
    assert origin.front() == {"license": "mit", "base_model": ["o/base", "o/a"], "base_model_relation": "merge"}


def test_a_conflict_of_licences_is_said() -> None:
    both = _origin(base="apache-2.0", a="gpl-3.0", b="cc-by-nc-4.0")
    said = str(both.conflict())
    assert both.licence is None and "conflict" in said and "gpl-3.0 and cc-by-nc-4.0" in said
    one = str(_origin(base="apache-2.0", a="mit", b="gpl-3.0").conflict())
    assert "differ" in one and "conflict" not in one
    assert "No licence is stated by b" in str(_origin(base="mit", a="mit", b=None).conflict())


def test_metrics_are_in_the_hubs_form() -> None:
    recipe = Recipe(base="o/base", models={"a": "o/a"}, rules=single_rule("linear"))
    origin = Origin.of(recipe, metrics=[Metric("gsm8k", "exact_match", 0.5, "holdout")])
    front = _front(model_card(recipe, Story("a title", {}, origin=origin)).encode())
    (result,) = model_index_to_eval_results(front["model-index"])[1]
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("gsm8k", "holdout", 0.5)
    assert json.dumps(front)
