"""The model card's lm_eval commands, as a shell and lm_eval's own parser take them."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from mergesearch import zoo
from mergesearch.recipe import Recipe, single_rule
from mergesearch.results.card import Asking, Story, lm_eval_commands, write_words

ZOO = str(zoo.folder() / "tasks")
RECIPE = Recipe(base="base", models={"a": "a"}, rules=single_rule("linear"))


def asked(command: str) -> argparse.Namespace:
    """What lm_eval reads in a command, after a shell."""
    program, *arguments = shlex.split(command.replace("$(mergesearch zoo)", str(zoo.folder())))
    assert program == "lm_eval"
    return HarnessCLI()._parser.parse_args(["run", *arguments])


def story(asking: Asking, **tasks: int | None) -> Story:
    return Story("title", {}, tasks=tasks, samples={task: [0, 2] for task in tasks}, asking=asking)


def test_every_piece_comes_through_a_shell() -> None:
    asking = Asking(
        task_folders=("/my tasks/$HOME's",),
        batch_size=8,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction='-- Don\'t "explain"; $(rm -r /) `x`',
        trust_remote_code=True,
    )
    (command,) = lm_eval_commands(story(asking, **{"a b": None, "it's": None}), "bfloat16")
    read = asked(command)
    assert read.tasks == ["a b", "it's"] and read.include_path == "/my tasks/$HOME's"
    assert read.system_instruction == asking.system_instruction and read.batch_size == "8"
    assert read.apply_chat_template is True and read.fewshot_as_multiturn is True and read.trust_remote_code is True
    assert read.model_args == {"pretrained": ".", "dtype": "bfloat16"} and read.samples == "lm_eval_samples.json"


def test_tasks_with_examples_of_their_own_get_a_command_each() -> None:
    commands = lm_eval_commands(story(Asking(), **{"quiz": 5, "it's": None}), "float32")
    first, second = map(asked, commands)
    assert (first.tasks, first.num_fewshot, first.samples) == (["quiz"], 5, {"quiz": [0, 2]})
    assert (second.tasks, second.num_fewshot, second.samples) == (["it's"], None, {"it's": [0, 2]})


@pytest.mark.parametrize(
    ("asking", "folders"),
    [
        (Asking(), []),
        (Asking(zoo=True), [ZOO]),
        (Asking(task_folders=("/a b",)), ["/a b"]),
        (Asking(task_folders=("/a b",), zoo=True), [ZOO, "/a b"]),
        (Asking(task_folders=("/a b", "/c"), system_instruction="x"), ["/a b", "/c"]),
    ],
)
def test_lm_eval_gets_all_folders(
    asking: Asking, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm_eval 0.4.13 has it, a second --include_path replaces the first, and "a:b" is one folder."""
    told = story(asking, quiz=None)
    write_words(RECIPE, tmp_path, told, ())
    monkeypatch.chdir(tmp_path)
    (command,) = lm_eval_commands(told, "bfloat16")
    given: Any = EvaluatorConfig.from_cli(asked(command)).include_path or []
    assert ([given] if isinstance(given, str) else given) == folders
    assert command in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "lm_eval_samples.json").read_text()) == {"quiz": [0, 2]}
    if len(folders) > 1:
        assert yaml.safe_load((tmp_path / "lm_eval.yaml").read_text()) == {"include_path": folders}
