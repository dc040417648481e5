from __future__ import annotations

from pathlib import Path

import pytest

from mergesearch import config
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.schema import read_yaml

ROOT = Path(__file__).parent.parent
SMALL = """
name: small
base_model: zoo:base
models: {one: me/one, two: me/two}
tasks:
  - {task: quiz, metric: acc, limit: 200}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def test_what_is_left_out_has_its_default(path: Path) -> None:
    read = config.read(path)
    assert read.holdout == 0.5 and read.objective.scale == "parents" and read.search.sampler == "auto"
    assert read.search.strategies == ["baselines", "sweep", "learned_soup", "greedy_soup", "study"]
    assert read.folder == Path("results/small")


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs" / "search").glob("*.yaml")),
    ids=lambda f: f.name,
)
def test_shipped_configurations_are_valid(file: Path) -> None:
    config.read(file)


def test_round_trip(path: Path) -> None:
    read = config.read(path, ["space={methods: [ties], t: [0.2, 0.8], lambda: 1.0}"])
    path.write_text(read.to_yaml())
    assert config.read(path) == read
    assert read.space.ranges() == {"t": (0.2, 0.8), "lambda": (1.0, 1.0)}


def test_overrides_reach_lists_and_new_keys(path: Path) -> None:
    read = config.read(path, ["search.trials=7", "tasks.0.limit=null", "models.third=me/third"])
    assert read.search.trials == 7 and read.tasks[0].limit is None and read.models["third"] == "me/third"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("serch.trials=3", ["'serch'", "did you mean 'search'"]),
        ("tasks.0.limt=3", ["'limt'", "tasks.0", "did you mean 'limit'"]),
        ("search.sampler=tpee", ["search.sampler", "'tpee'", "'tpe'"]),
        ("holdout=1.5", ["holdout", "1.5", "[0, 1)"]),
        ("tasks.0.weight=0", ["tasks.0.weight", "0", "[1e-06, 1000000]"]),
        ("tasks.0.weight=1e308", ["tasks.0.weight", "'1e308'", "[1e-06, 1000000]"]),
        ("tasks.0.weight=1e-300", ["tasks.0.weight", "[1e-06, 1000000]"]),
        ("space.lambda=[-1.0e+300, 1.0e+300]", ["space: lambda: [-1e+300, 1e+300]", "beyond 10,000"]),
        ("space.epsilon=[0, 1.0e+300]", ["space: epsilon", "beyond 10,000"]),
        ("space.ranges_for=[{weight: [0, 1.0e+9]}]", ["space.ranges_for.0: weight", "beyond 10,000"]),
        ("space.stack={scale: [0, 1.0e+300]}", ["space.stack: scale", "beyond 10,000"]),
        ("space.stack={repeats: [1, 1000000000]}", ["repeats: [1, 1000000000]", "at most 64"]),
        ("space.control_points=1000000000", ["control_points is 1000000000", "[2, 1000]"]),
        ("space.lambda=[false, true]", ["space.lambda", "give two numbers"]),
        ("space.layer_groups=true", ["space: layer_groups is true: give a whole number"]),
        ("tasks.0.weight=true", ["tasks.0: weight is true: give a number"]),
        ("batch_size=1000000000000000000000", ["batch_size", "[1, 1000000]"]),
        (f"batch_size={'9' * 4000}", ["batch_size: 9999", "9...:"]),
        ("name=..", ["name", "'..' cannot name a run folder", "not dots alone"]),
        ("name=.", ["'.' cannot name a run folder"]),
        ("name=a/b", ["'a/b' cannot name a run folder", "use letters, digits"]),
        (f"name={'a' * 300}", ["name", "at most 200 characters"]),
        ('base_model="a\\0b"', ["base_model", "no character of a text"]),
        ("search.trials=many", ["search.trials", "'many'"]),
        ("space.weight=[2, 1]", ["weight", "[2.0, 1.0]"]),
        ("space.components=[mlp, mlp]", ["'mlp'", "twice"]),
        ("guard=[{task: g}]", ["guard.0.max_drop", "is missing"]),
        ("guard=[{task: g, maxdrop: 0}]", ["'maxdrop'", "guard.0", "did you mean 'max_drop'"]),
        ("guard=[{task: g, max_drop: -1}]", ["guard.0.max_drop", "-1"]),
        ("guard=[{task: g, max_drop: 0, agianst: base}]", ["'agianst'", "did you mean 'against'"]),
        ("guard=[{task: g, max_drop: 0, against: bast}]", ["against", "'bast'", "'base'"]),
        ("guard=[{task: g, max_drop: 0}, {task: g, max_drop: 1}]", ["'g'", "twice"]),
        ("guard=[{task: quiz, max_drop: 0, limit: 3}]", ["'quiz'", "limit", "set it there"]),
        ("guard=[{task: quiz, max_drop: 0, metric: acc}]", ["'quiz'", "metric", "set it there"]),
        ("guard=[{task: quiz, max_drop: 0, metric: length, limit: 3}]", ["'quiz'", "limit", "set it there"]),
        ("objective.tie_break=god_prob", ["objective.tie_break", "'god_prob'", "'gold_prob'"]),
        ("models={base: me/one}", ["'base'", "cannot name a model"]),
        ("tasks=[{task: a}, {task: a}]", ["'a'", "twice"]),
        ("tasks.5.limit=3", ["'5'", "list of 1"]),
        ("trials", ["'trials'", "key=value"]),
        ("name=a/b", ["name", "'a/b'"]),
    ],
)
def test_mistakes_get_one_sentence(path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.read(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [1", "line 1"), ("- a", "not a mapping"), ("name: a\nname: b", "given twice"), ("name: x", "is missing")],
)
def test_broken_files_get_one_sentence(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        config.read(file)
    assert "broken.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_guards_are_scored_beside_the_tasks(path: Path) -> None:
    read = config.read(path, ["guard=[{task: quiz, max_drop: 0.1}, {task: other, metric: acc, max_drop: 0}]"])
    assert [(task.task, task.metric) for task in read.scored] == [("quiz", "acc"), ("other", "acc")]
    assert read.guard[0].against == "base"
    # the tokens of a task's answers are counted beside its own metric
    (guard,) = config.read(path, ["guard=[{task: quiz, metric: length, max_drop: 5}]"]).guard
    assert guard.metric == "length"


def test_only_budget_and_machine_may_change_in_a_run_folder(path: Path) -> None:
    first = config.read(path)
    assert first.differences(config.read(path, ["search.trials=99", "device=cpu", "batch_size=8"])) == []
    assert first.differences(config.read(path, ["search.seed=1"])) == ["search.seed: 0, there 1"]
    assert isinstance(Config.model_validate(first.dump()), Config)


# --- paths ---

PATHS = """
base_model: ./base
models: {a: a, b: ../far/b, hub: owner/name, zoo: "zoo:base"}
tasks: [{task: quiz}]
include_path: tasks
search: {warm_start: [old, /abs/old]}
"""


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with relative paths; the caller is in another folder."""
    for name in ("file/base", "file/a", "far/b", "caller/c", "caller/owner/only"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file" / "paths.yaml").write_text(PATHS)
    monkeypatch.chdir(tmp_path / "caller")
    return tmp_path / "file" / "paths.yaml"


def test_paths_in_a_file_are_relative_to_the_file(placed: Path) -> None:
    read, folder = config.read(placed), placed.parent
    assert read.base_model == str(folder / "base")
    assert read.models == {
        "a": str(folder / "a"),
        "b": str(folder.parent / "far" / "b"),
        "hub": "owner/name",
        "zoo": "zoo:base",
    }
    assert read.include_path == [str(folder / "tasks")]
    assert read.search.warm_start == [str(folder / "old"), "/abs/old"]


def test_what_is_set_is_relative_to_the_caller(placed: Path) -> None:
    sets = ["models.a=c", "include_path=[t, u]", "search.warm_start=w", "output=out", "storage=sqlite:///s.db"]
    read, caller = config.read(placed, sets), Path.cwd()
    assert read.models["a"] == str(caller / "c") and read.base_model == str(placed.parent / "base")
    assert read.include_path == [str(caller / "t"), str(caller / "u")]
    assert read.search.warm_start == [str(caller / "w")]
    assert read.output == "out" and read.storage == f"sqlite:///{caller / 's.db'}"
    whole = config.read(placed, ["models={a: c}"])
    assert whole.models == {"a": str(caller / "c")}


def test_other_storages_stay_as_they_are(placed: Path) -> None:
    for url in ("mysql://user@host/name", "sqlite:////abs/s.db", "sqlite:///${RUNS}/s.db", "redis://localhost"):
        assert config.read(placed, [f"storage='{url}'"]).storage == url


@pytest.mark.parametrize(
    ("change", "key"),
    [("base_model: ./base", "base_model"), ("a: a", "models.a"), ("include_path: tasks", "include_path")],
)
@pytest.mark.parametrize("there", ["c", "owner/only"])
def test_what_only_the_callers_folder_has_is_refused(placed: Path, change: str, key: str, there: str) -> None:
    placed.write_text(PATHS.replace(change, f"{change.partition(':')[0]}: {there}"))
    with pytest.raises(UserError) as caught:
        config.read(placed)
    message = str(caught.value)
    assert f"{placed}: {key}: {there!r}" in message and f"not in {placed.parent} " in message
    assert str(Path.cwd()) in message and "\n" not in message


def test_a_path_of_the_wrong_type_is_a_sentence_too(placed: Path) -> None:
    for override in ("models=7", "models.a=7", "include_path=7", "search=7", "base_model=[x]"):
        with pytest.raises(UserError) as caught:
            config.read(placed, [override])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tasks=[quiz]", r"tasks.0 is 'quiz': it must be keys and values, as in \{task: ...\} \(known: task, metric, "),
        ("search=auto", r"search is 'auto': it must be keys and values, as in \{strategy: ...\} \(known: strategy, "),
        ("models=7", r"models is 7: it must be keys and values, as in \{NAME: VALUE\}"),
    ],
)
def test_where_keys_belong_it_says_which(path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.read(path, [override])


def test_what_is_stored_means_the_same_from_anywhere(placed: Path, tmp_path: Path) -> None:
    read = config.read(placed)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text(read.to_yaml())
    assert config.read(tmp_path / "elsewhere" / "config.yaml") == read


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("search.trials=true", ["search: trials is true: give a whole number"]),
        ("search.seed=false", ["search: seed is false"]),
        ("search.trials=1000000000000000000000000000000", ["search.trials", "[0, 1000000]"]),
        ("search.documents=true", ["search: documents is true"]),
        ("racing={blocks: 1000000000}", ["racing.blocks", "[2, 1000]"]),
        ("racing={blocks: true}", ["racing: blocks is true"]),
    ],
)
def test_numbers_that_nobody_means_are_refused(placed: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.read(placed, [override])
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
