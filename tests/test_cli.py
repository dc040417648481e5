"""The command, as its users meet it, over the demo zoo of version 0.1."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.commands import QUICKSTART, Done, mergesearch, small

from mergesearch import __version__, cli, load_run, methods, registry, zoo
from mergesearch import recipe as recipes
from mergesearch.commands import usage
from mergesearch.errors import UserError
from mergesearch.search import store
from scripts.bench.shared import zoo1

TRIALS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run folder, and what the run said."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = mergesearch("run", QUICKSTART, *small(folder, TRIALS, space__methods="[dare_ties, task_arithmetic]"))
    assert done.status == 0, done.err
    return folder, done


def rows(folder: Path) -> list[dict[str, object]]:
    return json.loads(mergesearch("table", folder, "--format", "json").out)


def test_run_says_how_it_goes_and_exports_the_winner(finished: tuple[Path, Done]) -> None:
    folder, done = finished
    assert len(re.findall(r"^\[\d+/12\] trial \d+ ", done.out, flags=re.MULTILINE)) == 6 + TRIALS
    assert "winner: trial" in done.out and done.err == ""
    best = rows(folder)[0]
    assert recipes.read(folder / "best" / "recipe.yaml").id == best["recipe"]


def test_the_table_has_every_candidate(finished: tuple[Path, Done]) -> None:
    found = rows(finished[0])
    assert len(found) == 6 + TRIALS and {row["state"] for row in found} == {"complete"}
    assert {"base", "code", "average"} <= {row["method"] for row in found}
    assert mergesearch("table", finished[0], "--top", 2, "--format", "md").out.count("\n") == 4
    assert "rank" in mergesearch("table", finished[0]).out


def test_the_table_goes_to_a_file_in_every_format(finished: tuple[Path, Done], tmp_path: Path) -> None:
    folder, _ = finished
    for form in ("csv", "md", "json"):
        done = mergesearch("table", folder, "--format", form, "--top", 3, "--out", tmp_path / "table")
        assert done.status == 0 and done.out == ""
        assert (tmp_path / "table").read_text() == mergesearch("table", folder, "--format", form, "--top", 3).out
    assert mergesearch("table", folder, "--out", tmp_path / "table").status == 0
    text = (tmp_path / "table").read_text()
    assert "task_arithmetic" in text and text.splitlines()[-1].startswith("cost: ")
    assert mergesearch("table", folder, "--format", "parquet", "--out", tmp_path / "table").status == 0
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "table"), load_run(folder).frame())
    refused = mergesearch("table", folder, "--format", "parquet")
    assert refused.status == 2 and "--out" in refused.err and len(refused.err.strip().splitlines()) == 1


def test_a_script_reads_a_run(finished: tuple[Path, Done]) -> None:
    folder, _ = finished
    run = load_run(str(folder))
    best = run.best()
    assert run.config.name == "quickstart" and [record.number for record in run.records] == list(range(6 + TRIALS))
    table = run.frame(sort="trial")
    assert list(table["trial"]) == list(range(6 + TRIALS))
    assert best is not None and run.frame(top=1)["trial"].item() == best.number
    with pytest.raises(UserError, match="no run folder"):
        load_run(folder / "best")


def test_the_study_is_opened_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    make = store._local_storage
    monkeypatch.setattr(store, "_local_storage", lambda url: opened.append(url) or make(url))
    done = mergesearch("run", QUICKSTART, *small(tmp_path / "run", trials=0, limit=2))
    assert done.status == 0 and "winner: trial" in done.out and len(opened) == 1


def test_the_same_command_again_scores_nothing_again(finished: tuple[Path, Done]) -> None:
    folder, _ = finished
    before = rows(folder)
    done = mergesearch("run", QUICKSTART, *small(folder, TRIALS, space__methods="[dare_ties, task_arithmetic]"))
    assert done.status == 0 and "going on after 12 trials" in done.out and rows(folder) == before


def test_per_document_scores_lie_beside(finished: tuple[Path, Done]) -> None:
    from mergesearch.evaluate.scores import load_documents

    folder, _ = finished
    for row in rows(folder):
        documents = load_documents(folder / "scores" / f"{row['trial']:05d}.npz")
        assert set(documents) == set(zoo1.METRICS)
        assert sum(documents["zoo_code"].values) / 12 == pytest.approx(row["zoo_code"])


def test_search_and_holdout_never_meet(finished: tuple[Path, Done]) -> None:
    documents = json.loads((finished[0] / "documents.json").read_text())
    for task, ids in documents["search"].items():
        assert len(ids) == 12 and not set(ids) & set(documents["holdout"][task])


@pytest.fixture(scope="module")
def exports(finished: tuple[Path, Done]) -> dict[str, tuple[Path, dict[str, object]]]:
    """The winner, and a DARE candidate, as checkpoints with their rows of the table."""
    folder, _ = finished
    found = rows(folder)
    dare = next(row for row in found if row["method"] == "dare_ties")
    chosen = {"winner": ("best", found[0]), "dare": (str(dare["trial"]), dare)}
    for name, (trial, _) in chosen.items():
        assert mergesearch("export", folder, folder.parent / name, "--trial", trial).status == 0
    return {name: (folder.parent / name, row) for name, (_, row) in chosen.items()}


@pytest.mark.parametrize("which", ["winner", pytest.param("dare", marks=pytest.mark.slow)])
def test_table_score_and_lm_eval_agree_on_the_export(
    finished: tuple[Path, Done], exports: dict[str, tuple[Path, dict[str, object]]], which: str
) -> None:
    out, row = exports[which]
    settings = finished[0] / "config.yaml"
    scored = json.loads(mergesearch("score", out, "--config", settings, "--format", "json").out)
    by_hand = lm_eval(out)
    for task, found in scored["tasks"].items():
        assert found["value"] == row[task]
        assert by_hand[task][f"{found['metric']},none"] == row[task]


def lm_eval(checkpoint: Path) -> dict[str, dict[str, float]]:
    """The results of the model card's own command, run in the checkpoint's folder."""
    card = (checkpoint / "README.md").read_text()
    (line,) = re.findall(r"^lm_eval .*$", card, flags=re.MULTILINE)
    command = line.replace("$(mergesearch zoo)", str(zoo.folder())).replace("lm_eval ", "-m lm_eval ", 1)
    out = checkpoint.parent / f"lm_eval-{checkpoint.name}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    shell = f"{sys.executable} {command} --output_path {out}"
    subprocess.run(shell, shell=True, cwd=checkpoint, env=environment, check=True, capture_output=True)
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def test_a_recipe_file_scores_and_merges_as_its_trial(
    finished: tuple[Path, Done], exports: dict[str, tuple[Path, dict[str, object]]], tmp_path: Path
) -> None:
    out, row = exports["dare"]
    settings = finished[0] / "config.yaml"
    scored = mergesearch("score", out / "recipe.yaml", "--config", settings, "--format", "json")
    assert {task: found["value"] for task, found in json.loads(scored.out)["tasks"].items()} == {
        task: row[task] for task in zoo1.METRICS
    }
    assert mergesearch("merge", out / "recipe.yaml", tmp_path / "merged").status == 0
    ours, theirs = load_file(tmp_path / "merged" / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merge_says_where_the_result_is_and_what_became_of_its_parents(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: zoo:base\nmodels: {{one: 'zoo:{zoo.names()[-1]}'}}\nrules: [{{method: linear}}]\n")
    command = [sys.executable, "-m", "mergesearch", "merge", str(recipe), str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    where, tokens, *tensors = done.stdout.splitlines()
    assert re.fullmatch(r"recipe \w{12} is in \S+out", where)
    assert re.fullmatch(r"tokenizer: the base's [\d,]+ tokens, the same in every model", tokens)
    assert tensors[0].startswith("tensors the base of what is merged by rule 1 (linear), all: ")
    assert re.fullmatch(r"tensors laid over the model below before it was merged: \d+ of one", tensors[-1])


def test_an_export_is_complete(exports: dict[str, tuple[Path, dict[str, object]]]) -> None:
    out, row = exports["winner"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "recipe.yaml", "README.md"} <= {
        file.name for file in out.iterdir()
    }
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata()["mergesearch_recipe_id"] == row["recipe"]
        assert opened.metadata()["mergesearch_recipe"] == (out / "recipe.yaml").read_text()
    card = (out / "README.md").read_text()
    others = {"base", *zoo1.MODELS, "average"} - {row["method"]}
    assert all(f"\n| {name} |" in card for name in others) and "\n| **this model** |" in card
    assert "torch: " in card and "\nbase_model_relation: merge\n" in card


def test_shards_carry_the_recipe_too(finished: tuple[Path, Done], tmp_path: Path) -> None:
    done = mergesearch("export", finished[0], tmp_path / "out", "--max-shard-size", "500KB")
    assert done.status == 0
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert "mergesearch_recipe" in opened.metadata()


def test_score_on_search_holdout_and_all(finished: tuple[Path, Done]) -> None:
    size = sum(1 for _ in (zoo1.TASKS / "zoo_names.jsonl").open())
    held_out = math.ceil(0.05 * size)
    tasks = ["--set", "tasks=[{task: zoo_names, limit: 12}]", "--set", "holdout=0.05"]
    options = ["--config", finished[0] / "config.yaml", *tasks]
    for side, count in {"search": 12, "holdout": held_out, "all": 12 + held_out}.items():
        done = mergesearch("score", zoo1.MODELS["names"], *options, "--on", side, "--format", "json")
        assert json.loads(done.out)["tasks"]["zoo_names"]["documents"] == count
    text = mergesearch("score", zoo1.MODELS["names"], *options).out
    assert re.match(r"zoo_names acc: 0\.\d{4} ± 0\.\d{4} on 12 documents\n", text)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ([], {}),
        (["--help"], {}),
        (["-h"], {}),
        (["init", "-h"], {}),
        (["--version"], {}),
        (["zoo"], {}),
        (["init"], {}),
        (["tabel"], {}),
        ([], {"_MERGESEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "mergesearch methods t", "COMP_CWORD": "2"}),
        ([], {"_MERGESEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "mergesearch strategies s", "COMP_CWORD": "2"}),
    ],
)
def test_what_is_quick_loads_nothing_heavy(arguments: list[str], environment: dict[str, str]) -> None:
    heavy = ("torch", "transformers", "lm_eval", "optuna", "numpy", "pandas", "pyarrow")
    code = (
        "import atexit, sys\nfrom mergesearch import cli\n"
        f"atexit.register(lambda: print([m for m in {heavy!r} if m in sys.modules]))\ncli.status()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_first_page_fits_a_small_terminal_and_names_every_verb_once() -> None:
    bare = mergesearch()
    assert bare.status == 0 and bare.err == ""
    assert mergesearch("-h").out == mergesearch("--help").out == bare.out
    lines = bare.out.splitlines()
    assert lines[0] == "Search for the best way to merge fine-tuned language models."
    assert max(map(len, lines)) <= 80 and "\x1b" not in bare.out
    grouped = [name for names in usage.GROUPS.values() for name in names]
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert len(grouped) == len(set(grouped)) and set(grouped) == verbs
    for name in grouped:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert len(usage.EXAMPLES) == 3 and all(f"    {line}" in lines for _, each in usage.EXAMPLES for line in each)
    assert "Exit status: 0 done" in lines[-1]


def test_the_examples_are_commands_that_there_are() -> None:
    for line in (line for _, lines in usage.EXAMPLES for line in lines):
        command, verb, *options = shlex.split(line)
        assert command == "mergesearch"
        help_of = mergesearch(verb, "-h").out
        assert all(f"{option} " in help_of for option in options if option.startswith("--"))


def test_every_verb_has_help() -> None:
    for name in (name for names in usage.GROUPS.values() for name in names):
        done = mergesearch(name, "-h")
        assert done.status == 0 and done.out.startswith(f"Usage: mergesearch {name} ")
        assert max(map(len, done.out.splitlines())) <= 80


def test_the_version() -> None:
    done = mergesearch("--version")
    assert done.status == 0 and done.out.splitlines()[0] == f"mergesearch {__version__}"
    assert f"torch {torch.__version__}" in done.out


def completed(words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is told at the end of a command line."""
    monkeypatch.setenv("_MERGESEARCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.app(prog_name="mergesearch")
    return out.getvalue().split()


def test_shells_complete_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("mergesearch t", monkeypatch) == ["table"]
    assert sorted(completed("mergesearch methods ", monkeypatch)) == sorted(row["name"] for row in methods.describe())
    assert sorted(completed("mergesearch strategies ", monkeypatch)) == sorted(registry.strategies())
    assert completed("mergesearch score zoo:b", monkeypatch) == ["zoo:base"]
    assert completed("mergesearch methods --format j", monkeypatch) == ["json"]
    assert "--include-path" in completed("mergesearch init --", monkeypatch)


def test_a_script_for_the_shell_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mergesearch", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.returncode == 0 and "_MERGESEARCH_COMPLETE=complete_bash" in done.stdout


def test_ctrl_c_has_the_exit_status_of_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergesearch.commands.zoo.folder", interrupted)
    done = mergesearch("zoo")
    assert done.status == 1 and done.err == "error: interrupted. To go on: mergesearch zoo\n"


def test_zoo_prints_its_folder() -> None:
    assert mergesearch("zoo").out == f"{zoo.folder()}\n"
    found = json.loads(mergesearch("zoo", "--format", "json").out)
    assert found["folder"] == str(zoo.folder()) and list(found["models"]) == [f"zoo:{name}" for name in zoo.names()]
    assert all(Path(folder).is_dir() for folder in found["models"].values())
    assert found["tasks"] and all((zoo.folder() / "tasks" / f"{task}.yaml").is_file() for task in found["tasks"])


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost_and_nothing_scored_twice(tmp_path: Path) -> None:
    options = small(tmp_path / "killed", trials=8, limit=8)
    process = subprocess.Popen(
        [sys.executable, "-m", "mergesearch", "run", QUICKSTART, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith("[9/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    finished = {r.number: r for r in load_run(tmp_path / "killed").records if r.state == "complete"}
    assert 9 <= len(finished) < 14
    written = {number: documents(tmp_path / "killed", number).stat().st_mtime_ns for number in finished}

    assert mergesearch("run", QUICKSTART, *options).status == 0
    after = {r.number: r for r in load_run(tmp_path / "killed").records}
    assert len(after) == 14 and all(record.state == "complete" for record in after.values())
    for number, record in finished.items():
        # what is expected of it elsewhere goes by all trials
        assert replace(after[number], expected=None) == replace(record, expected=None)
        assert documents(tmp_path / "killed", number).stat().st_mtime_ns == written[number]

    assert mergesearch("run", QUICKSTART, *small(tmp_path / "whole", trials=8, limit=8)).status == 0
    for ours, theirs in zip(after.values(), load_run(tmp_path / "whole").records, strict=True):
        assert (ours.recipe_id, ours.objective, ours.scores) == (theirs.recipe_id, theirs.objective, theirs.scores)


def documents(folder: Path, number: int) -> Path:
    return folder / "scores" / f"{number:05d}.npz"


def test_ctrl_c_prints_the_table_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesearch.engine.live import Engine

    load, calls = Engine.load, []

    def interrupted(self: Engine, recipe: recipes.Recipe) -> float:
        calls.append(recipe)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return load(self, recipe)

    monkeypatch.setattr(Engine, "load", interrupted)
    options = small(tmp_path / "run", trials=1, limit=8)
    done = mergesearch("run", QUICKSTART, *options)
    assert done.status == 1
    assert "rank" in done.out and f"To go on: mergesearch run {QUICKSTART} --set dtype=float32" in done.out
    monkeypatch.undo()
    assert mergesearch("run", QUICKSTART, *options).status == 0
    assert len(rows(tmp_path / "run")) == 7


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "none.yaml"], ["none.yaml", "no such file"]),
        (["run", QUICKSTART, "--set", "serch.trials=1"], ["'serch'", "'search'"]),
        (["run", QUICKSTART, "--set", "space.methods=[tise]"], ["'tise'", "'ties'"]),
        (["run", QUICKSTART, "--set", "base_model=zoo:bass"], ["'bass'", "'base'"]),
        (["run", QUICKSTART, "--set", "base_model=./nowhere"], ["base_model", "./nowhere"]),
        (["run", QUICKSTART, "--set", "tasks.0.metric=ac"], ["'ac'", "'acc'"]),
        (["run", QUICKSTART, "--set", "device=cuda:7"], ["cuda:7", "auto"]),
        (["run", QUICKSTART, "--set", "tasks.0.limit=1"], ["zoo_code", "limit"]),
        (["run", QUICKSTART, "--set", "space.layer_groups=9"], ["9", "4 layers"]),
        (["table", "nowhere"], ["nowhere", "no run folder"]),
        (["export", "nowhere", "out"], ["nowhere", "no run folder"]),
        (["merge", "none.yaml", "out"], ["none.yaml", "no such file"]),
        (["score", "./nowhere", "--config", QUICKSTART], ["./nowhere"]),
        (["score", "zoo:base", "--config", QUICKSTART, "--on", "serach"], ["'serach'", "'search'"]),
        (["tabel", "x"], ["unknown verb 'tabel'", "'table'"]),
        (["run"], ["mergesearch run needs CONFIG", "mergesearch run -h"]),
        (["export", "run"], ["mergesearch export needs OUT"]),
        (["score", "zoo:base"], ["mergesearch score needs --config"]),
        (["table", "run", "--formt", "csv"], ["'--formt' in mergesearch table", "'--format'"]),
        (["--versoin"], ["'--versoin'", "'--version'"]),
        (["table", "run", "--top", "many"], ["mergesearch table", "'--top'", "integer", "-h"]),
        (["table", "run", "--top", "0"], ["'--top'", "greater than or equal to 1"]),
        (["table", "run", "--format"], ["'--format'", "requires an argument"]),
        (["zoo", "more"], ["mergesearch zoo", "(more)", "-h"]),
        (["zoo", "--format", "yaml"], ["'yaml'", "json, text"]),
    ],
)
def test_mistakes_end_with_status_2_and_one_sentence(
    arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mergesearch(*arguments)
    assert done.status == 2, done.err
    lines = done.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.err
    for part in parts:
        assert part in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_export_needs_a_new_folder_and_a_trial_that_is_there(finished: tuple[Path, Done], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("important")
    taken = mergesearch("export", finished[0], tmp_path / "full")
    assert taken.status == 2 and "exists already" in taken.err
    missing = mergesearch("export", finished[0], tmp_path / "out", "--trial", "99")
    assert missing.status == 2 and "trials 0 to 11" in missing.err
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused_by_a_run_folder(finished: tuple[Path, Done]) -> None:
    done = mergesearch("run", QUICKSTART, *small(finished[0], TRIALS, holdout=0.25))
    assert done.status == 2 and "holdout: 0.25, there 0.5" in done.err


def test_a_full_disk_at_export_leaves_nothing_half_written(
    finished: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    done = mergesearch("export", finished[0], tmp_path / "out")
    assert done.status == 2 and "disk is full" in done.err and "free space" in done.err
    assert list(tmp_path.iterdir()) == []
