"""README and docs/: what they say of the code is what the code says, and every link leads somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support.snippets import blocks
from support.tiny_models import ARCHITECTURES

from mergesearch import methods
from mergesearch.commands.inputs import load_tasks
from mergesearch.config import Config
from mergesearch.schema import validate
from scripts import docs, real_result

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = docs.pages()
LINKED = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path, language: str) -> list[str]:
    return [block.text for block in blocks(page, language)]


# --- what is generated ---


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.filled(text) == text, f"{_name(page)} is behind the code: run python -m scripts.docs"


def test_every_block_stands_somewhere_and_is_closed() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    opened = re.findall(r"<!-- ([\w-]+): python -m scripts\.docs -->", text)
    assert sorted(opened) == sorted(docs.BLOCKS)
    assert sorted(re.findall(r"<!-- end of ([\w-]+) -->", text)) == sorted(opened)


@pytest.mark.parametrize("block", ["configuration", "strategies", "methods", "recipe", "commands"])
def test_nothing_is_left_without_a_meaning(block: str) -> None:
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", docs.BLOCKS[block](), re.MULTILINE)
    assert rows and [name for name, meaning in rows if not meaning.strip()] == []


def test_every_key_of_a_configuration_is_there() -> None:
    stated = set(re.findall(r"^\| `([\w.]+)` \|", docs.configuration(), re.MULTILINE))
    given = {"base_model": "b", "models": {"a": "a"}, "tasks": [{"task": "t"}]}
    dumped = Config.model_validate(given).dump()
    keys = set(dumped) | {f"{part}.{key}" for part in ("space", "search", "objective") for key in dumped[part]}
    assert keys | {"tasks.N.limit", "guard.N.max_drop", "racing.blocks", "search.learned_soup.per"} <= stated


# --- what is written by hand ---


def test_the_readme_is_short_and_in_order() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    places = [text.index(f"\n## {heading}\n") for heading in (
        "The first command", "Your own models", "What the winner is worth", "How it compares", "What it needs",
        "Where to read on",
    )]  # fmt: skip
    assert (
        text.index("](results/search-real.png)") < places[0] < text.index("](docs/pictures/terminal.svg)") < places[1]
    )
    assert places == sorted(places)


def test_the_two_commands() -> None:
    first, second = [block.strip() for block in _blocks(README, "") if block.startswith("python3 -m venv")]
    assert first.endswith(" run configs/quickstart.yaml")
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readmes_configuration_has_six_lines_and_is_valid() -> None:
    (block,) = _blocks(README, "yaml")
    assert len(block.splitlines()) == 6
    assert validate(Config, yaml.safe_load(block), "README.md").name == "mine"


def test_the_task_of_ones_own_is_read_as_it_stands(tmp_path: Path) -> None:
    task, chosen = _blocks(ROOT / "docs" / "tasks.md", "yaml")
    there = str(tmp_path)
    (tmp_path / "capitals.yaml").write_text(task.replace("/home/me/tasks", there), encoding="utf-8")
    line = json.dumps({"country": "France", "capital": "Paris"})
    (tmp_path / "capitals.jsonl").write_text(f"{line}\n" * 4, encoding="utf-8")
    run = {"name": "mine", "base_model": "zoo:base", "models": {"a": "zoo:order", "b": "zoo:letters"}}
    config = validate(Config, {**run, **yaml.safe_load(chosen.replace("/home/me/tasks", there))}, "tasks.md")
    (loaded,) = load_tasks(config)
    assert (loaded.label, loaded.metric, loaded.size) == ("capitals", "exact_match", 4)
    assert loaded.leaves["capitals"].doc_to_text({"country": "France"}) == "The capital of France is"


def test_numbers_of_things() -> None:
    assert f"over {len(methods.names())} methods" in README.read_text(encoding="utf-8")
    models = " ".join((ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").split())
    listed = re.search(r"of these architectures: (.*?)\. For each", models)
    assert listed is not None
    assert re.findall(r"\w+", listed[1].replace("and with experts", "")) == list(ARCHITECTURES)


def test_the_pictures_words_are_its_figures() -> None:
    result = real_result.read()
    found = re.search(r"!\[(.*?)\]\(results/search-real\.png\)", README.read_text(encoding="utf-8"))
    assert found is not None
    shown = [result.winner, result.defaults[0], result.average, result.models[0]]
    assert re.findall(r"\d\.\d+", found[1]) == [real_result.rounded(candidate.holdout) for candidate in shown]


# --- links ---


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            lost.append(target)
    assert lost == []
