"""What the harness found in none of the package's known weak places, each as a case of its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import yaml
from support.commands import mergesearch
from support.tiny_models import TinyPool

from mergesearch.checkpoints import Pool
from mergesearch.commands import story
from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError, of_system
from mergesearch.recipe import Recipe
from mergesearch.results.record import Record
from mergesearch.search.store import RunFolder


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EACCES, "permissions"), (errno.EIO, "check the disk")]
)
def test_what_the_system_refuses_is_one_sentence(number: int, remedy: str, tmp_path: Path) -> None:
    refused = OSError(number, os.strerror(number), str(tmp_path / "recipe.yaml"))
    with mock.patch("mergesearch.commands.inputs.read_recipe", side_effect=refused):
        done = mergesearch("merge", tmp_path / "recipe.yaml", tmp_path / "out")
    assert done.status == 1 and len(done.err.strip().splitlines()) == 1
    assert str(tmp_path / "recipe.yaml") in done.err and os.strerror(number) in done.err and remedy in done.err
    assert "DEBUG" not in done.err


def test_a_refusal_without_a_file_names_none() -> None:
    said = of_system(OSError(errno.EMFILE, "Too many open files"))
    assert said.startswith("a file cannot be used (Too many open files)") and "ulimit" in said


def test_a_name_that_is_too_long_is_the_users(tmp_path: Path) -> None:
    recipe = {"base": "x" * 5000, "models": {"a": "y" * 5000}, "rules": [{"method": "linear"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = mergesearch("merge", tmp_path / "recipe.yaml", tmp_path / "out")
    assert done.status == 2 and "too long" in done.err and len(done.err) < 500 and not (tmp_path / "out").exists()


def test_parameters_that_are_no_mapping_are_a_whole_sentence(tmp_path: Path) -> None:
    stated = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": 3}
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(stated))
    done = mergesearch("merge", tmp_path / "mergekit.yaml", tmp_path / "out")
    assert done.status == 2 and done.err.endswith("give a mapping\n")


def test_a_winner_that_cannot_be_merged_once_more_is_named(tiny_pool: Callable[..., TinyPool]) -> None:
    tiny = tiny_pool()
    engine = Engine(Pool.load(tiny.base, tiny.models, device="cpu"), "float32")
    rules = [{"method": "linear", "parameters": {"weight": 1.0}}]
    data = {"base": tiny.base, "models": tiny.models, "out_dtype": "float32", "rules": rules}
    recipe = Recipe.from_data(data, "a recipe")
    for fault, kind in ((RuntimeError("no kernel"), CandidateError), (MemoryError(), MemoryError)):
        with mock.patch.object(Engine, "load", side_effect=fault), pytest.raises(kind) as refused:
            engine.rebuild(recipe)
        assert kind is MemoryError or f"{recipe.id} cannot be merged once more (no kernel)" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"sections": 3}', '{"sections": [{}]}', "[" * 3000, "{} {}"])
def test_a_damaged_report_is_named(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    story.report_file(folder).parent.mkdir()
    story.report_file(folder).write_text(text)
    with pytest.raises(UserError, match="mergesearch report") as refused:
        story._holdout(folder, Record(0, "base", "complete"))
    assert str(story.report_file(folder)) in str(refused.value)
