"""`best/` in the run folder, with stand-ins for the candidates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergesearch import recipe as recipes
from mergesearch.checkpoints import new_folder
from mergesearch.commands import best
from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.results.loading import Run
from mergesearch.results.record import Record
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.baselines import baselines

CONFIG = Config(base_model="base", models={"a": "a", "b": "b"}, tasks=[{"task": "quiz"}])
RECIPES = list(baselines(CONFIG).values())


def run_with(path: Path, *objectives: float) -> Run:
    """A run of so many complete trials; each has a recipe of its own."""
    records = tuple(
        Record(number, None, "complete", value, recipe=RECIPES[number].dump(), recipe_id=RECIPES[number].id)
        for number, value in enumerate(objectives)
    )
    return Run(path, CONFIG, records, None, ())


class Writer:
    """Stands in for `write_checkpoint`: two files, between which something may happen."""

    def __init__(self, between: Callable[[], Any] = lambda: None):
        self.between = between
        self.wrote: list[Path] = []

    def __call__(self, recipe: Recipe, engine: Any, out: Path, story: Any) -> None:
        self.wrote.append(out)
        with new_folder(out) as folder:
            (folder / "model.safetensors").write_text(recipe.id)
            self.between()
            (folder / "recipe.yaml").write_text(recipe.to_yaml())


def install(patch: pytest.MonkeyPatch, between: Callable[[], Any] = lambda: None) -> Writer:
    writer = Writer(between)
    patch.setattr(best, "write_checkpoint", writer)
    return writer


def held(path: Path) -> str:
    """The id of the recipe in `best/`, which must be whole."""
    folder = path / "best"
    assert sorted(file.name for file in folder.iterdir()) == [best.SEAL, "model.safetensors", "recipe.yaml"]
    found = recipes.read(folder / "recipe.yaml").id
    assert (folder / "model.safetensors").read_text() == found
    return found


def refresh(path: Path, *objectives: float) -> Record | None:
    return best.refresh_best(RunFolder(path), None, lambda: run_with(path, *objectives))


def test_two_workers_that_end_together_write_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one writes, a second one ends too: it must neither write nor fail."""
    results: list[Record | None] = []
    second = threading.Thread(target=lambda: results.append(refresh(tmp_path, 0.5, 0.9)))
    entered = threading.Event()

    def between() -> None:
        if len(writer.wrote) > 1:
            entered.set()
            return
        second.start()
        assert not entered.wait(0.5)

    writer = install(monkeypatch, between)
    results.append(refresh(tmp_path, 0.5, 0.9))
    second.join()
    assert len(writer.wrote) == 1 and [record and record.number for record in results] == [1, 1]
    assert held(tmp_path) == RECIPES[1].id


def test_who_had_to_wait_reads_the_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that read the run before a better trial ended must not put the older winner back."""
    install(monkeypatch)
    scores = [0.5, 0.4]
    lock = RunFolder(tmp_path).lock("best")
    with lock:
        late = threading.Thread(
            target=lambda: best.refresh_best(RunFolder(tmp_path), None, lambda: run_with(tmp_path, *scores))
        )
        late.start()
        scores[1] = 0.9
    late.join()
    assert held(tmp_path) == RECIPES[1].id


def test_the_last_one_stands_whole_until_the_next_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    refresh(tmp_path, 0.5)
    seen = []
    install(monkeypatch, lambda: seen.append(held(tmp_path)))
    refresh(tmp_path, 0.5, 0.9)
    assert seen == [RECIPES[0].id] and held(tmp_path) == RECIPES[1].id
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["best"]


def test_the_same_winner_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = install(monkeypatch)
    refresh(tmp_path, 0.5)
    refresh(tmp_path, 0.5)
    assert len(writer.wrote) == 1


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def overwrite(file: Path) -> None:
    """As many bytes, one of them another."""
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize("damage", [truncate, overwrite, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "recipe.yaml", best.SEAL])
def test_a_damaged_one_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], name: str
) -> None:
    writer = install(monkeypatch)
    refresh(tmp_path, 0.5)
    damage(tmp_path / "best" / name)
    refresh(tmp_path, 0.5)
    assert len(writer.wrote) == 2 and held(tmp_path) == RECIPES[0].id
    refresh(tmp_path, 0.5)
    assert len(writer.wrote) == 2


def test_a_card_of_ones_own_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = install(monkeypatch)
    refresh(tmp_path, 0.5)
    (tmp_path / "best" / best.CARD).write_text("mine")
    refresh(tmp_path, 0.5)
    assert len(writer.wrote) == 1


def test_nothing_half_written_has_the_name_and_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    install(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        refresh(tmp_path, 0.5)
    assert not (tmp_path / "best").exists()
    # what SIGKILL leaves: nothing was cleared up
    (tmp_path / ".best" / ".new.partial-1").mkdir(parents=True)
    install(monkeypatch)
    refresh(tmp_path, 0.5)
    assert held(tmp_path) == RECIPES[0].id and not (tmp_path / ".best").exists()


def test_killed_between_the_two_renames_the_new_one_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = install(monkeypatch)
    refresh(tmp_path, 0.5)
    (tmp_path / ".best").mkdir()
    (tmp_path / "best").rename(tmp_path / ".best" / "old")
    writer(RECIPES[1], None, tmp_path / ".best" / "new", None)
    best._seal(tmp_path / ".best" / "new", RECIPES[1])
    refresh(tmp_path, 0.5, 0.9)
    assert len(writer.wrote) == 2 and held(tmp_path) == RECIPES[1].id and not (tmp_path / ".best").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_interrupted_at_either_rename_it_stands_whole_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    install(monkeypatch)
    refresh(tmp_path, 0.1)
    rename, calls = Path.replace, []

    def interrupted(self: Path, target: Any) -> Any:
        found = rename(self, target)
        if self.name in ("best", "new"):
            calls.append(self.name)
            if len(calls) == at:
                raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refresh(tmp_path, 0.1, 0.2)
    assert held(tmp_path) == RECIPES[1].id and not (tmp_path / ".best").exists()


def test_without_a_winner_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = install(monkeypatch)
    assert refresh(tmp_path) is None and writer.wrote == [] and not (tmp_path / "best").exists()


def test_a_card_written_anew_keeps_the_notes_on_the_parents(tmp_path: Path) -> None:
    note = "models.b: its config.json has rope_theta 500000.0, the base 10000.0; the result has the base's"
    run = replace(run_with(tmp_path / "run", 0.1), notes=(note,))
    run.folder.best.mkdir(parents=True)
    (run.folder.best / "recipe.yaml").write_text(RECIPES[0].to_yaml())
    best._seal(run.folder.best, RECIPES[0])
    best.refresh_card(run, run.records[0])
    assert f"- {note}" in (run.folder.best / "README.md").read_text()
