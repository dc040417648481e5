"""Every file of configs/recipes builds as it stands over the demo zoo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.mergekit_runs import need_mergekit, ours, theirs, units_apart
from support.tiny_models import make_pool

from mergesearch import mergekit, zoo
from mergesearch.checkpoints import Pool
from mergesearch.mergekit.placement import references
from mergesearch.recipe import Recipe
from mergesearch.schema import read_yaml

FOLDER = Path(__file__).parent.parent / "configs" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
LAYERS = json.loads((zoo.path("base") / "config.json").read_text())["num_hidden_layers"]
# what each file is made of: methods, and how many rules; a gradient makes one for each layer, and one for the rest
EXPECTED = {
    "breadcrumbs": (["breadcrumbs"], 2),
    "breadcrumbs_ties": (["breadcrumbs_ties"], 1),
    "dare_linear": (["dare_linear"], 1),
    "dare_ties": (["dare_ties"], 1),
    "della": (["della"], 1),
    "della_linear": (["della_linear"], 1),
    "groups": (["slerp", "linear", "ties", "task_arithmetic"], 4),
    "linear": (["linear"], LAYERS + 1),
    "model_stock": (["model_stock"], 1),
    "nearswap": (["nearswap"], 1),
    "nuslerp": (["nuslerp"], 1),
    "sce": (["sce"], 1),
    "slerp": (["slerp"], 2 * LAYERS + 1),
    "stack": (["passthrough"], 1),
    "task_arithmetic": (["task_arithmetic"], 2),
    "ties": (["ties"], 2 * LAYERS + 1),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
DETERMINISTIC = [path for path in FILES if mergekit.is_mergekit(read_yaml(path)) and path.stem not in RANDOM]


def stem(path: Path) -> str:
    return path.stem


def test_the_seed_methods_are_all_there() -> None:
    assert sorted(path.stem for path in FILES) == sorted(EXPECTED)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool.load("zoo:base", {name: f"zoo:{name}" for name in zoo.names() if name != "base"}, device="cpu")


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_builds_over_the_zoo(path: Path, pool: Pool) -> None:
    recipe = mergekit.read_any(path)
    assert (recipe.methods, len(recipe.rules)) == EXPECTED[path.stem]
    made = ours(recipe)
    assert all(tensor.isfinite().all() for tensor in made.values())
    base = pool.base.tensors
    assert made.keys() == base.keys() or path.stem == "stack"
    trained = {n for n, t in base.items() if any(not torch.equal(t, m.tensors[n]) for m in pool.models.values())}
    changed = {name for name in trained & made.keys() if not torch.equal(made[name], base[name].to(made[name].dtype))}
    assert trained and len(changed) > 0.9 * len(trained)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_says_what_it_shows(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") and len(line) <= 120 for line in lines[:2]) and not lines[2].startswith("#")


def test_the_stack_has_six_layers() -> None:
    made = ours(mergekit.read_any(FOLDER / "stack.yaml"))
    assert max(int(name.split(".")[2]) for name in made if ".layers." in name) == 5


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """float32 models of the zoo's depth: in bfloat16 many magnitudes are equal, and what a tie at the cut does is
    undefined in mergekit."""
    base, *models = zoo.names()
    parents = make_pool(tmp_path_factory.mktemp("parents"), models=len(models), num_hidden_layers=LAYERS)
    return {base: parents.base, **dict(zip(models, parents.models.values(), strict=True))}


@pytest.mark.parametrize("path", DETERMINISTIC, ids=stem)
def test_mergekit_makes_the_same_of_its_files(path: Path, stand_ins: dict[str, str], tmp_path: Path) -> None:
    need_mergekit()
    text = path.read_text(encoding="utf-8")
    # the stand-ins are no adapters, so what they lie over goes
    text = re.sub(r"(?:zoo:base\+)?zoo:(\w+)", lambda found: stand_ins[found[1]], text)
    one, other = ours(mergekit.from_data(yaml.safe_load(text), path.name)), theirs(text, tmp_path / "out")
    assert one.keys() == other.keys()
    assert max(int(units_apart(one[name], other[name]).max()) for name in one) <= 1


def test_every_recipe_names_its_parents_for_mergekit() -> None:
    recipe = Recipe.from_data(read_yaml(FOLDER / "groups.yaml"), "groups")
    assert all(Path(folder).is_absolute() for folder in references(recipe).values())
