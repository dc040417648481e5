"""Python that the user's tasks name: found without running it, said before it is run, refused where it shall not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks._yaml_loader import load_yaml
from support.commands import QUICKSTART, mergesearch, small

from mergesearch.commands.inputs import load_tasks
from mergesearch.config import Config, TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate import task_code
from mergesearch.evaluate.tasks import load
from scripts.bench.shared import zoo1

# each task leaves a file behind where its code is run
CODE = """
from pathlib import Path

Path(__file__).with_name("was_run").touch()


def text(doc):
    return doc["text"]


def right(doc):
    return doc["target"]
"""
PLAIN = {"doc_to_text": "text", "doc_to_target": "target"}


def write(folder: Path, name: str, text: str = "", **keys: object) -> Path:
    """A task's YAML: of `keys`, with `text` after them."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} and", "target": " one"}) + "\n" for n in range(6)))
    source = {
        "task": name,
        "output_type": "loglikelihood",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**source, **keys}) + text)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task that runs no Python, and with tasks that do."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(CODE)
    write(folder, "plain", **PLAIN)
    write(folder, "direct", "doc_to_text: !function utils.text\ndoc_to_target: !function utils.right\n")
    (folder / "common").write_text("doc_to_target: !function utils.right\n")
    write(folder, "including", "doc_to_text: text\ninclude: common\n")
    write(folder, "module", "doc_to_text: !function os.system\ndoc_to_target: target\n")
    hub = [{"metric": "mine", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}]
    write(folder, "scripted", metric_list=hub, **PLAIN)
    write(folder, "pickled", **{**PLAIN, "dataset_path": "pandas"})
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["plain", "direct"]}))
    inner = {"group": "inner", "task": [{"task": "direct"}]}
    (folder / "nested.yaml").write_text(yaml.safe_dump({"group": "nested", "task": [inner]}))
    (folder / "named.yaml").write_text("group: named\ntask: [plain]\nmetadata: !function utils.text\n")
    return folder


def found(tasks: Path, *names: str) -> dict[str, str]:
    return {name: task_code.words(code) for name, code in task_code.code_of(names, [str(tasks)]).items()}


def test_it_is_found_wherever_a_task_may_name_it_and_not_run(tasks: Path) -> None:
    utils = tasks / "utils.py"
    names = ["plain", "direct", "including", "module", "scripted", "pickled", "both", "nested", "named"]
    assert found(tasks, *names) == {
        "direct": f"{utils}: text, right",
        "including": f"{utils}: right",
        "module": "os: system",
        "scripted": "evaluate: load('mine')",
        "pickled": "pandas: read_pickle",
        "both": f"{utils}: text, right",
        "nested": f"{utils}: text, right",
        "named": f"{utils}: text",
    }
    assert found(tasks, str(tasks / "direct.yaml")) == {str(tasks / "direct.yaml"): f"{utils}: text, right"}
    assert not (tasks / "was_run").exists()


HIDDEN = {
    "verbatim": "doc_to_text: !<!function> utils.text\n",
    "by an anchor": "metadata: {x: &x !function utils.text}\ndoc_to_text: *x\n",
    "in a list": "metric_list: [{metric: !function utils.text, aggregation: mean}]\n",
    "by merging an include": "metadata: {x: &x {include: other}}\n<<: *x\n",
    "by a list of includes": "include: [other]\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("how", HIDDEN)
def test_it_hides_nowhere(tasks: Path, how: str, encoding: str) -> None:
    """Whatever lm-eval's loader would resolve to a function is found, and what only one could read is refused."""
    (tasks / "other").write_text("doc_to_text: !function utils.text\n")
    path = write(tasks, "hiding", HIDDEN[how])
    path.write_bytes(path.read_text().encode(encoding))
    assert found(tasks, "hiding") == {"hiding": f"{tasks / 'utils.py'}: text"}
    assert not (tasks / "was_run").exists()
    load_yaml(path)
    assert (tasks / "was_run").exists()


def test_what_cannot_be_read_is_refused(tasks: Path) -> None:
    path = write(tasks, "broken", "include: gone\n")
    with pytest.raises(UserError, match=rf"task '{path}': {tasks / 'gone'} cannot be read \(FileNotFoundError"):
        found(tasks, str(path))
    write(tasks, "deep", f"metadata: {'[' * 900}{']' * 900}\ndoc_to_text: !function utils.text\n")
    assert found(tasks, "deep") == {"deep": f"{tasks / 'utils.py'}: text"}


@pytest.mark.parametrize("value", [[True], {}, {"yes": 1}])
def test_a_switch_that_is_no_scalar_is_none(tasks: Path, value: object) -> None:
    write(tasks, "odd", "doc_to_text: !function utils.text\n", metric_list=[{"metric": "acc", "hf_evaluate": value}])
    assert found(tasks, "odd") == {"odd": f"{tasks / 'utils.py'}: text"}


@pytest.mark.parametrize("levels", [3_000, 100_000])
def test_nesting_without_end_is_a_sentence(tasks: Path, levels: int) -> None:
    """Not the end of the process: lm-eval reads every YAML file of a folder, by a parser that recurses in C."""
    path = write(tasks, "deep", f"metadata: {'[' * levels}{']' * levels}\n")
    for name in ("plain", str(path)):
        with pytest.raises(UserError, match=rf"{path} goes more than 1,000 levels deep"):
            load([TaskConfig(task=name, metric="acc")], [str(tasks)])


def test_installed_tasks_are_trusted_and_their_overrides_are_not(tasks: Path) -> None:
    (folder,) = task_code.catalog.zoo_tasks()
    own = next(path.stem for path in sorted(Path(folder).glob("*.yaml")) if "!function" in path.read_text())
    assert found(tasks, own) == {}
    write(tasks, own, "doc_to_text: !function utils.text\ndoc_to_target: target\n")
    assert found(tasks, own) == {own: f"{tasks / 'utils.py'}: text"}


def config(tasks: Path, name: str, trust: bool | None) -> Config:
    keys = {"base_model": zoo1.BASE, "models": zoo1.MODELS, "include_path": [str(tasks)], "trust_tasks": trust}
    return Config(tasks=[TaskConfig(task=name, metric="acc")], **keys)


def test_it_is_said_before_it_is_run(tasks: Path) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        assert not (tasks / "was_run").exists()
        said.append(text)

    load_tasks(config(tasks, "direct", None), say)
    utils = tasks / "utils.py"
    assert said == [
        f"note: the tasks run Python of their own, {utils}: text, right (trust_tasks: false refuses it)",
    ]
    assert (tasks / "was_run").exists()
    load_tasks(config(tasks, "plain", False), say)
    assert len(said) == 1


def test_it_is_refused_before_anything_is_loaded(tasks: Path) -> None:
    refusing = config(tasks, "both", False).model_copy(update={"base_model": "/no/such/folder"})
    with pytest.raises(UserError) as caught:
        load_tasks(refusing)
    line = (tasks / "direct.yaml").read_text().splitlines().index("doc_to_text: !function utils.text") + 1
    assert str(caught.value) == (
        f"task 'direct' runs Python, text of {tasks / 'utils.py'} ({tasks / 'direct.yaml'}, line {line}), and "
        "trust_tasks is false: read that code and set trust_tasks to true, or leave the task out"
    )
    assert not (tasks / "was_run").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ text.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch was_run') }}",
        "{{ self._TemplateReference__context }}",
    ],
)
def test_templates_reach_no_python(tasks: Path, template: str) -> None:
    write(tasks, "reaching", doc_to_text=template, doc_to_target="target")
    with pytest.raises(UserError, match=r"task 'reaching' cannot be loaded \(SecurityError: "):
        load([TaskConfig(task="reaching", metric="acc")], [str(tasks)])


def test_templates_write_what_they_wrote(tasks: Path) -> None:
    template = "{% set n = [] %}{{ n.append(text) or '' }}{{ n | join | regex_replace('and', 'or') | upper }}\n"
    write(tasks, "templated", doc_to_text=template, doc_to_target="target")
    (task,) = load([TaskConfig(task="templated", metric="acc")], [str(tasks)])
    leaf = task.leaves["templated"]
    assert leaf.doc_to_text(leaf.eval_docs[3]) == "3 OR\n"


def test_check_runs_none_of_it_unless_it_is_asked(tmp_path: Path) -> None:
    settings = small(tmp_path / "run", limit=8)
    left = mergesearch("check", QUICKSTART, *settings)
    assert left.status == 0, left.err
    lines = dict(line.split(": ", 1) for line in left.out.splitlines())
    utils = zoo1.TASKS / "utils.py"
    assert lines["task zoo_strings"] == f"runs Python, {utils}: load: left alone, --set trust_tasks=true runs it"
    assert lines["budget"] == "not known without the documents of every task: --set trust_tasks=true loads them"
    assert "time" not in lines and "memory" in lines
    whole = mergesearch("check", QUICKSTART, *settings, "--set", "trust_tasks=true")
    lines = dict(line.split(": ", 1) for line in whole.out.splitlines())
    assert "search and" in lines["task zoo_strings"] and "document evaluations" in lines["budget"] and "time" in lines
    refused = mergesearch("check", QUICKSTART, *settings, "--set", "trust_tasks=false")
    assert refused.status == 2 and f"load of {utils}" in refused.err and "trust_tasks is false" in refused.err


def test_a_run_says_it(tmp_path: Path) -> None:
    done = mergesearch("run", QUICKSTART, *small(tmp_path / "run", trials=0, limit=4))
    assert done.status == 0, done.err
    notes = [line for line in done.out.splitlines() if "run Python" in line]
    assert notes == [
        f"note: the tasks run Python of their own, {zoo1.TASKS / 'utils.py'}: load (trust_tasks: false refuses it)"
    ]
    refused = mergesearch("run", QUICKSTART, *small(tmp_path / "other"), "--set", "trust_tasks=false")
    assert refused.status == 2 and "trust_tasks is false" in refused.err and not (tmp_path / "other").exists()
