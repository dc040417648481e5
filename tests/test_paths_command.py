"""A run with models and tasks of its own, named by relative paths: what comes of it works from any folder.

One task is the package's, which needs no path.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from support.commands import Done, lm_eval, mergesearch

from mergesearch import config, zoo
from mergesearch import recipe as recipes
from mergesearch.results.loading import load_run
from scripts.bench.shared import zoo1

# the first of them: any will do
PACKAGED = min((zoo.folder() / "tasks").glob("*.yaml")).stem
CONFIG = """
name: mine
base_model: models/base
models: {code: ./models/code, names: models/names}
tasks: [{task: my_names, limit: 4}, {task: PACKAGED, limit: 4}]
guard: [{task: more_names, max_drop: 1.0, limit: 4}]
include_path: [my tasks, ../more]
system_instruction: "It's a \\"quiz\\""
holdout: 0.03
space: {methods: [linear]}
search: {strategy: random, trials: 1, defaults: false}
dtype: float32
device: cpu
""".replace("PACKAGED", PACKAGED)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`project/run.yaml`, its models and one folder of tasks beside it, another folder of tasks above."""
    top = tmp_path_factory.mktemp("paths")
    shutil.copytree(zoo1.FOLDER / "models", top / "project" / "models")
    for folder, name in (("project/my tasks", "my_names"), ("more", "more_names")):
        (top / folder).mkdir(parents=True)
        for file in ("utils.py", "zoo_names.jsonl", "zoo_names_fewshot.jsonl"):
            shutil.copy(zoo1.TASKS / file, top / folder)
        task = (zoo1.TASKS / "zoo_names.yaml").read_text().replace("task: zoo_names", f"task: {name}")
        (top / folder / f"{name}.yaml").write_text(task)
    (top / "project" / "run.yaml").write_text(CONFIG)
    (top / "elsewhere").mkdir()
    return top


def at(folder: Path, *arguments: object) -> Done:
    """The command from a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = mergesearch(*arguments)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    """The run folder; `output` is relative to the caller."""
    at(project, "run", "project/run.yaml", "--set", "output=runs/mine")
    return project / "runs" / "mine"


@pytest.fixture(scope="module")
def exported(run: Path, project: Path) -> Path:
    at(project / "elsewhere", "export", "../runs/mine", "out")
    return project / "elsewhere" / "out"


def test_the_run_folder_holds_absolute_paths(run: Path, project: Path) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["base_model"] == str(project / "project" / "models" / "base")
    assert stored["include_path"] == [str(project / "project" / "my tasks"), str(project / "more")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        again = config.read(project / "project" / "run.yaml", ["output=runs/mine"])
    assert again.differences(config.read(run / "config.yaml")) == []


def test_table_and_export_work_from_another_folder(run: Path, project: Path, exported: Path) -> None:
    rows = json.loads(at(project / "elsewhere", "table", "../runs/mine", "--format", "json").out)
    assert len(rows) == 5
    recipe = recipes.read(exported / "recipe.yaml")
    assert recipe.id == rows[0]["recipe"] and Path(recipe.base or "").is_absolute()


def test_the_exports_recipe_merges_from_anywhere(exported: Path, tmp_path: Path) -> None:
    at(tmp_path, "merge", exported / "recipe.yaml", "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_the_cards_command_gives_the_scores_from_inside_the_export(run: Path, exported: Path) -> None:
    """With tasks in several folders, one with a space in its name, and quotes in the system instruction."""
    (line,) = re.findall(r"^lm_eval .*$", (exported / "README.md").read_text(), flags=re.MULTILINE)
    out = exported.parent / "lm_eval"
    lm_eval(*shlex.split(line)[1:], "--device", "cpu", "--output_path", out, cwd=exported)
    (file,) = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    best = load_run(run).best()
    assert best is not None and set(best.scores) == {"my_names", PACKAGED, "more_names"}
    for task, score in best.scores.items():
        assert results[task][f"{score.metric},none"] == score.value


def test_the_report_works_from_another_folder(run: Path, project: Path) -> None:
    done = at(project / "elsewhere", "report", "../runs/mine", "--finalists", 1, "--format", "json")
    assert [s["name"] for s in json.loads(done.out)["sections"]] == ["objective", "my_names", PACKAGED, "more_names"]


def test_a_native_recipes_paths_are_relative_to_its_file(project: Path, tmp_path: Path) -> None:
    file = project / "project" / "recipe.yaml"
    file.write_text("base: models/base\nmodels: {code: ./models/code}\nrules: [{method: linear}]\n")
    at(tmp_path, "merge", file, "out")
    written = recipes.read(tmp_path / "out" / "recipe.yaml")
    assert written.base == str(project / "project" / "models" / "base")
    assert "rule all: linear of code" in at(tmp_path, "check", file).out


def test_a_mergekit_files_paths_are_relative_to_the_caller_as_mergekit_has_them(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "linear.yaml"
    models = "[{model: models/code, parameters: {weight: 1}}, {model: ./models/names, parameters: {weight: 1}}]"
    file.write_text(f"merge_method: linear\nmodels: {models}\ndtype: float32\n")
    at(project / "project", "merge", file, tmp_path / "out")
    written = recipes.read(tmp_path / "out" / "recipe.yaml")
    assert sorted(written.models.values()) == [str(project / "project" / "models" / n) for n in ("code", "names")]


def test_a_path_that_only_the_callers_folder_has_is_one_sentence(project: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "recipe.yaml").write_text("base: models/base\nmodels: {code: models/code}\nrules: [{method: linear}]\n")
    for arguments in (["run", tmp_path / "run.yaml"], ["merge", tmp_path / "recipe.yaml", tmp_path / "out"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project / "project")
            done = mergesearch(*arguments)
        assert done.status == 2 and len(done.err.strip().splitlines()) == 1
        assert "'models/base'" in done.err and str(tmp_path) in done.err and str(project / "project") in done.err
    assert not (tmp_path / "out").exists()
