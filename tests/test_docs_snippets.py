"""Every command and snippet of the pages: run where that is quick, else held against the parser and the schemas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support import fake_hub
from support.commands import mergesearch
from support.snippets import Block, blocks, inline_commands

from mergesearch import zoo
from mergesearch.cli import app
from mergesearch.commands.foreign import convert, program_of
from mergesearch.commands.usage import sentence
from mergesearch.config import Config, from_data
from mergesearch.recipe import Recipe
from mergesearch.schema import validate
from scripts import docs

ROOT = Path(__file__).parent.parent
PAGES = [*docs.pages(), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
DOCS = ROOT / "docs"
# a page's models by the demo zoo's: a base and two of its fine-tunes
NAMES = {"llama-base": "base", "llama-math": "order", "llama-code": "letters"}
# what stands for something in a usage
USAGE = re.compile(r"[\[\]|<>]|\.\.\.")
WHOLE: dict[str, Any] = {
    "name": "mine",
    "base_model": "./llama-base",
    "models": {"math": "./llama-math", "code": "./llama-code"},
    "tasks": [{"task": "gsm8k"}],
}
SMALL = """
dtype: float32
search: {strategy: random, trials: 1, defaults: false}
"""


def _name(thing: Any) -> str:
    return str(thing.relative_to(ROOT)) if isinstance(thing, Path) else str(thing)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the pages speak of, which are those of the demo zoo."""
    base = tmp_path / "llama-base"
    for name, model in NAMES.items():
        # an adapter is found over its base as the tutorial's own models are
        (tmp_path / name).symlink_to(zoo.folder() / "models" / model)
    assert base.is_dir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- commands ---------------------------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> None:
    """Has the parser take a command as far as it would go before it runs."""
    group: Any = typer.main.get_command(app)
    if arguments[0].startswith("-"):
        group.make_context("mergesearch", list(arguments), resilient_parsing=True)
        return
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])
    keys = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
    if keys:
        from_data({**WHOLE}, Path("mine.yaml"), [key for key in keys if not USAGE.search(key) and key != "KEY=VALUE"])


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_are_taken_by_the_parser(page: Path, home: Path) -> None:
    shown = [command for block in blocks(page) for command in block.commands()]
    for command in [*shown, *inline_commands(page)]:
        if USAGE.search(" ".join(command)) or "[OPTIONS]" in command:
            continue  # a usage line; scripts/docs.py makes it from the parser
        if command[0] not in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
            pytest.fail(f"{_name(page)}: no verb {command[0]!r}")
        if len(command) == 1:
            continue  # running text names the verb alone
        try:
            _parse(command)
        except Exception as error:
            why = sentence(error) if hasattr(error, "format_message") else error
            pytest.fail(f"{_name(page)}: mergesearch {' '.join(command)}: {why}")


@pytest.mark.parametrize(
    "wrong", ["export results/mine OUT --fromat mergekit", "export results/mine", "run a --set x.y=1"]
)
def test_wrong_commands_are_seen(wrong: str, home: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|missing|unknown key 'x'"):
        _parse(wrong.split())


# --- files ------------------------------------------------------------------------------------------------------------

YAML = [block for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{_name(block.page)}:{block.text.splitlines()[0][:30]}")
def test_yaml_is_valid(block: Block, home: Path) -> None:
    data = yaml.safe_load(block.text)
    where = block.page.name
    if program_of(data) is not None:
        file = home / "theirs.yaml"
        file.write_text(block.text, encoding="utf-8")
        from_data(convert(file).data, file)
    elif isinstance(data, dict) and "output_type" in data:
        assert {"task", "dataset_path", "metric_list"} <= set(data)  # loaded below, or in test_docs.py
    elif isinstance(data, dict) and ("rules" in data or "base" in data):
        whole = {"base": "./llama-base", "models": WHOLE["models"]}
        Recipe.from_data({**whole, **data}, where)
    else:
        validate(Config, {**WHOLE, **data}, where)


# --- troubleshooting --------------------------------------------------------------------------------------------------


def _said_by_the_code() -> str:
    """Every text of the package, with parts of one sentence that stand on several lines joined."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "mergesearch").rglob("*.py")))
    return re.sub(r'"\s*\n\s*(?:\+\s*)?[bf]?"', "", text)


def test_every_message_of_the_page_is_one_of_ours() -> None:
    said = _said_by_the_code()
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15
    assert [message for message in rows if message not in said] == []


# --- sessions that are run --------------------------------------------------------------------------------------------


def test_the_tutorial_from_its_first_line_to_its_last(home: Path) -> None:
    page = DOCS / "tutorial.md"
    for block in blocks(page):
        if block.title is not None:
            file = home / block.title
            file.parent.mkdir(exist_ok=True)
            # one trial of a random search in place of the twenty
            text = block.text.replace("search: {trials: 20}\n", SMALL)
            file.write_text(text, encoding="utf-8")
    typed = [command for block in blocks(page) for command in block.commands()]
    assert [command[0] for command in typed] == [
        "init", "doctor", "check", "run", "watch", "table", "report", "export", "score",
    ]  # fmt: skip
    for command in typed:
        done = mergesearch(*command)
        assert done.status == 0, f"{command}: {done.err}"
    assert (home / "results" / "mine" / "page.html").is_file() and (home / "mine.html").is_file()
    assert (home / "merged" / "model.safetensors").is_file() and (home / "asked.yaml").is_file()


@pytest.fixture
def configured(home: Path) -> Path:
    """The same with what the Python snippets read: a configuration, and the repository's recipes."""
    (home / "configs").symlink_to(ROOT / "configs")
    (home / "mine.yaml").write_text(
        "name: mine\nbase_model: ./llama-base\nmodels: {math: ./llama-math, code: ./llama-code}\n"
        f"tasks: [{{task: zoo_letters, metric: acc, limit: 4}}]\nreport: {{documents: 4}}\n{SMALL}",
        encoding="utf-8",
    )
    return home


def test_python_runs_word_for_word(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = blocks(DOCS / "python.md", "python")
    assert len(shown) >= 4
    names: dict[str, Any] = {}
    for block in shown:
        text = block.text.replace('"search.trials=20"', '"search.trials=1"')
        exec(compile(text, _name(block.page), "exec"), names)
    said = capsys.readouterr().out
    assert "average" in said or "random" in said
    assert (configured / "mine.html").is_file() and (configured / "merged" / "recipe.yaml").is_file()


# what no test here runs, and why: a part of the command -> the reason
ELSEWHERE = {
    "dashboard": "serves until it is stopped: test_face.py",
    "proxy": "serves until it is stopped: test_proxy.py",
    "--ray": "needs a cluster: test_ray.py",
    "--workers": "starts a process for each: test_crew.py",
    "run theirs.yaml": "a hundred trials: test_foreign.py, with one",
    "init": "the tutorial's first command: above",
}
MEANT = {"RUN": "results/mine", "CONFIG": "mine.yaml", "OTHER": "results/mine", "WHAT": "documents", "NEW": "forked"}
THEIRS = {
    # of mergekit, and of mergekit-evolve
    "merge": "{merge_method: linear, base_model: llama-base, dtype: float32, "
    "models: [{model: llama-base, parameters: {weight: 1}}, "
    "{model: llama-math, parameters: {weight: 1}}, {model: llama-code, parameters: {weight: 1}}]}",
    "convert": "{genome: {models: [llama-math, llama-code], merge_method: ties, base_model: llama-base}, "
    "tasks: [{name: zoo_letters, weight: 1.0, metric: 'acc,none'}], limit: 4, apply_chat_template: false}",
}


def _as_typed(command: list[str], number: int) -> list[str]:
    """A page's command with files of the test's for what only stands for one."""
    meant = {**MEANT, "FILE": "data.csv" if "--out" in command else "mine.yaml", "OUT": f"out{number}",
             "OUT.yaml": f"out{number}.yaml", "OWNER/NAME": "me/mine"}  # fmt: skip
    words = [meant.get(word, word) for word in command]
    return [*words[:-1], f"out{number}.yaml"] if command[0] == "convert" else words


def test_every_command_that_ends_by_itself_is_run(configured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [command for page in docs.pages() for block in blocks(page) for command in block.commands()]
    shown += [command for page in docs.pages() for command in inline_commands(page)]
    every = dict.fromkeys(" ".join(c) for c in shown if len(c) > 1 and not USAGE.search(" ".join(c)))
    mine = [command.split() for command in every if not any(part in command for part in ELSEWHERE)]
    assert all(any(part in command for command in every) for part in ELSEWHERE)
    assert {"run", "report", "export", "push", "convert", "check", "table", "merge", "score", "watch"} <= {
        command[0] for command in mine
    }
    recipe = {"base": "./llama-base", "models": WHOLE["models"], "rules": [{"method": "ties"}], "out_dtype": "float32"}
    (configured / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with fake_hub.here(monkeypatch) as hub:
        for number, command in enumerate([["run", "mine.yaml"], ["report", "RUN"], *mine]):
            (configured / "theirs.yaml").write_text(THEIRS["merge" if command[0] == "merge" else "convert"], "utf-8")
            done = mergesearch(*_as_typed(command, number))
            assert done.status == 0, f"mergesearch {' '.join(command)}: {done.err}"
    assert "model.safetensors" in hub.files


def test_python_stands_on_pages_that_are_run() -> None:
    pages = {block.page.name for page in docs.pages() for block in blocks(page, "python")}
    assert pages <= {"python.md"}
