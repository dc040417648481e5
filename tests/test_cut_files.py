"""A parent's file cut short while it is mapped: a sentence, not a bus error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergesearch import crashes
from mergesearch.checkpoints import new_folder
from mergesearch.engine import streaming
from mergesearch.engine.live import Engine
from mergesearch.errors import CutError
from mergesearch.recipe import Rule

SAID = r"b/model.safetensors had [\d,]+ bytes when it was opened and has 1,000 now: put the whole file back"


def cut(folder: str) -> None:
    os.truncate(Path(folder) / "model.safetensors", 1000)


def test_a_candidate_of_a_run_is_not_made_of_what_is_gone(tiny_pool) -> None:
    """On the CPU the parents of a run are mapped as well."""
    tiny = tiny_pool()
    engine = Engine(tiny.load(), "float32")
    engine.load(tiny.recipe())
    cut(tiny.models["b"])
    with pytest.raises(CutError, match=SAID):
        engine.load(tiny.recipe(Rule(method="linear", parameters={"weight": [0.5, 0.1]})))


def test_no_candidate_is_blamed() -> None:
    """A search records what is an `Exception` as the candidate's failure and goes on."""
    assert not issubclass(CutError, Exception)


def test_a_merge_from_file_to_file_ends_and_leaves_nothing(tiny_pool, tmp_path: Path) -> None:
    tiny = tiny_pool()
    pool = tiny.load(residency="mapped")
    cut(tiny.models["b"])
    with pytest.raises(CutError, match=SAID), new_folder(tmp_path / "out") as folder:
        streaming.stream(tiny.recipe(), pool, folder, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["pool"]


def test_a_file_cut_in_the_middle_of_a_merge(tiny_pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_pool()
    pool, merged = tiny.load(residency="mapped"), []
    merge = streaming._merge

    def then_cut(*arguments):
        merged.append(merge(*arguments))
        if len(merged) == 3:
            cut(tiny.models["b"])
        return merged[-1]

    monkeypatch.setattr(streaming, "_merge", then_cut)
    # the thread that reads ahead would be at it as the file is cut
    monkeypatch.setattr(streaming._Reading, "_run", lambda self: None)
    with pytest.raises(CutError, match=SAID), new_folder(tmp_path / "out") as folder:
        streaming.stream(tiny.recipe(), pool, folder, {})
    assert len(merged) == 3 and not (tmp_path / "out").exists()


def test_files_replaced_or_removed_are_still_mapped(tiny_pool) -> None:
    tiny = tiny_pool()
    engine = Engine(tiny.load(), "float32")
    file = Path(tiny.models["b"]) / "model.safetensors"
    file.unlink()
    engine.load(tiny.recipe())
    file.write_bytes(b"another file")
    engine.load(tiny.recipe(Rule(method="linear", parameters={"weight": [0.5, 0.1]})))


BUS = """
import mmap, os, sys
from mergesearch import crashes
crashes.explain()
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 0)
if len(sys.argv) > 2:
    os.truncate(sys.argv[1], 0)
print(mapped[100000])
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGBUS")
def test_where_it_cannot_be_caught_another_process_says_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 200000)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONFAULTHANDLER"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BUS, str(file), *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    whole = run()
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, "120\n", "")
    ended = run("cut")
    assert ended.returncode == -signal.SIGBUS and ended.stderr == crashes.SAID + "\n"
