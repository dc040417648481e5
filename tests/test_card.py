"""The model card's lm_eval commands, as a shell and lm_eval's own parser take them."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from markdown_it import MarkdownIt

from mergesearch import zoo
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, single_rule
from mergesearch.results.card import Asking, Story, lm_eval_commands, model_card, write_words
from mergesearch.results.markdown import block, code, plain, table
from mergesearch.results.origin import Origin
from mergesearch.results.record import Record

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


HOSTILE = "a`b|c<img src=x onerror=alert(1)>[d](javascript:e)\n```\n# $(id)"


def test_a_shell_runs_nothing_that_a_name_says(tmp_path: Path) -> None:
    """The commands as a card has them, in a real shell: each piece is one word, as it was written."""
    asking = Asking(task_folders=(f"/{HOSTILE}; touch ran",), system_instruction=f"$(touch ran) `touch ran` {HOSTILE}")
    told = story(asking, **{HOSTILE: 1, "x; touch ran": 2, "-n $(touch ran)": 3})
    for command in lm_eval_commands(told, "bfloat16"):
        script = f"lm_eval() {{ printf '%s\\0' lm_eval \"$@\"; }}\n{command}\n"
        words = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True).stdout.decode()
        assert words.split("\0")[:-1] == shlex.split(command) and list(tmp_path.iterdir()) == []


def record(task: str, error: str = "") -> Record:
    scores = {task: TaskScore(value=0.5, stderr=None, documents=4, metric="a|b")}
    return Record(number=3, name=HOSTILE, state="complete", objective=0.5, stderr=None, scores=scores, error=error)


def structure(text: str) -> list[tuple[str, str]]:
    """What is more than text in a page of Markdown: (type, tag or content) of every token that a parser finds."""
    flat: list[tuple[str, str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for each in token.children or [token]:
            if each.type not in ("text", "softbreak"):
                flat.append((each.type, each.tag))
    return flat


def test_a_card_shows_names_and_is_shaped_by_none() -> None:
    def page(task: str, reference: str, note: str) -> str:
        recipe = Recipe(base=reference, models={"a": reference}, rules=single_rule("linear"))
        told = Story(
            "title", {"torch": note}, records=[record(task)], tasks={task: None}, samples={task: [0]}, holdout="Known.",
            origin=Origin.of(recipe, licences={"base": reference, "a": reference}, hashes={"a": note}),
        )  # fmt: skip
        return model_card(recipe, told, [note])

    hostile, harmless = page(HOSTILE, HOSTILE, HOSTILE), page("task", "reference", "note")
    assert structure(hostile.split("\n---\n", 1)[1]) == structure(harmless.split("\n---\n", 1)[1])
    # what begins the page is YAML, which is read back as it was
    assert yaml.safe_load(hostile.split("---\n")[1])["license"] == HOSTILE


@pytest.mark.parametrize(
    "text", [HOSTILE, "``", "`", "\\|", "\\`<", "a\\", "]]((", "|||", "<!-- x -->", "&lt;|", " ` "]
)
def test_text_comes_back_to_the_letter(text: str) -> None:
    def shown(page: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(page)
        return ["".join(c.content for c in t.children or []) for t in tokens if t.type == "inline"]

    line = " ".join(text.split())
    assert shown(f"x {plain(text)} y") == [f"x {line} y"]
    drawn = table(["a", plain(f"x {text} y")], [["c", plain(f"x {text} y")]])
    assert shown(drawn) == ["a", f"x {line} y", "c", f"x {line} y"]
    assert [part.strip() for part in shown(code(text))] == [line]
    (fence,) = MarkdownIt("commonmark").parse(block(text))
    assert fence.type == "fence" and fence.content == f"{text}\n"
