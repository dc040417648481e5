"""Built kernels on disk: whose they are, whether they are what was built, and what several processes do at once."""

from __future__ import annotations

import ctypes
import grp
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock

from mergesearch.engine.kernels import built, native, notices

ANSWER = 'extern "C" int answer() { return %d; }'
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A folder for built kernels that is not there yet."""
    monkeypatch.setenv("MERGESEARCH_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(built, "counts", type(built.counts)())
    return tmp_path / "kernels"


@pytest.fixture
def said(monkeypatch, caplog):
    """The warnings of a process that has given none yet."""
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "mergesearch")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mergesearch")]


def answer(number: int = 7) -> int:
    """What the library of a source answers, from disk or built."""
    return native.function(ANSWER % number, "answer", [], ctypes.c_int)()


def only(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"*.{kind}")
    return path


def plant(library: Path, number: int = 666) -> None:
    """Puts a library of another source where one is expected. The file is a new one: the old one may be loaded."""
    source = library.parent.parent / "planted.cpp"
    source.write_text(ANSWER % number)
    fresh = library.with_suffix(".planted")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(fresh)], check=True)
    fresh.chmod(0o700)
    os.replace(fresh, library)


@pytest.fixture
def kept(kernels, monkeypatch):
    """A folder with one built library, at a path that this process has loaded nothing from."""
    assert answer() == 7
    moved = kernels.parent / "kept"
    shutil.copytree(kernels, moved)
    monkeypatch.setenv("MERGESEARCH_KERNELS", str(moved))
    built.counts.clear()
    return moved


def test_the_folder_is_private_and_serves_again(kernels, said):
    assert [answer(), answer()] == [7, 7]
    assert built.counts == {"compiled": 1, "found": 1}
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert all(not path.stat().st_mode & 0o022 for path in (only(kernels, "so"), only(kernels, "json")))
    assert said() == []


def test_a_folder_that_others_can_read_is_made_private(kernels, said):
    kernels.mkdir(mode=0o755)
    assert answer() == 7
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    assert said() == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(mode, kernels, said):
    kernels.mkdir()
    kernels.chmod(mode)
    assert answer() == 7
    assert list(kernels.iterdir()) == []
    (line,) = said()
    assert f"not kept in {kernels}: others can write to {kernels}; remove what is there, or name a folder" in line


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_swap_is_refused(mode, kernels, said):
    """Private itself, in a folder where others may rename it and put one with a planted library in its place."""
    kernels.mkdir(mode=0o700)
    kernels.parent.chmod(mode)
    if mode == 0o775:
        os.chown(kernels.parent, -1, 12345) if os.geteuid() == 0 else pytest.skip("only root can give files away")
    assert answer() == 7
    assert list(kernels.iterdir()) == []
    (line,) = said()
    assert (
        f"not kept in {kernels}: others can write to {kernels.parent}; remove what is there, or name a folder" in line
    )


def test_a_folder_like_tmp_is_no_danger(kernels, said):
    """With the sticky bit others may write to a folder, and not rename what is not theirs."""
    kernels.parent.chmod(0o1777)
    assert [answer(), answer()] == [7, 7]
    assert built.counts == {"compiled": 1, "found": 1} and said() == []


def test_a_group_of_ones_own_is_no_danger(kernels, said):
    """Many systems give each user a group, and a umask that lets it write."""
    kernels.parent.chmod(0o775)
    os.chown(kernels.parent, -1, os.getegid())
    mine = grp.getgrgid(os.getegid())
    if mine.gr_name != pwd.getpwuid(os.geteuid()).pw_name or set(mine.gr_mem) > {mine.gr_name}:
        pytest.skip("no group of one's own here")
    assert answer() == 7 and said() == []


@root
def test_a_folder_in_one_of_somebody_else_is_refused(kernels, said):
    kernels.mkdir(mode=0o700)
    os.chown(kernels.parent, 12345, 12345)
    assert answer() == 7
    assert f"{kernels.parent} belongs to another user" in said()[0] and len(said()) == 1


def test_a_link_on_the_way_that_changes_changes_nothing(kernels, monkeypatch, said):
    """What was checked is what is used: the folder that the link led to then."""
    real, planted, link = kernels.parent / "real", kernels.parent / "planted", kernels.parent / "link"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    monkeypatch.setenv("MERGESEARCH_KERNELS", str(link / "kernels"))
    assert answer() == 7
    shutil.copytree(real, planted)
    plant(only(planted / "kernels", "so"))
    link.unlink()
    link.symlink_to(planted)
    assert built.folder() == real / "kernels" and answer() == 7


def test_every_folder_that_is_made_is_private(kernels, monkeypatch, said):
    before = os.umask(0)
    try:
        monkeypatch.setenv("MERGESEARCH_KERNELS", str(kernels / "a" / "b"))
        assert answer() == 7
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (kernels, kernels / "a", kernels / "a" / "b")} == {0o700}
    assert said() == []


@root
def test_a_folder_of_somebody_else_is_refused(kernels, said):
    kernels.mkdir(mode=0o700)
    os.chown(kernels, 12345, 12345)
    assert answer() == 7
    assert list(kernels.iterdir()) == []
    assert f"{kernels} belongs to another user" in said()[0] and len(said()) == 1


@root
def test_a_link_of_somebody_else_is_refused(kernels, said):
    (kernels.parent / "theirs").mkdir(mode=0o700)
    kernels.symlink_to(kernels.parent / "theirs")
    os.chown(kernels, 12345, 12345, follow_symlinks=False)
    assert answer() == 7
    assert f"{kernels} belongs to another user" in said()[0]


def test_a_folder_that_cannot_be_made_is_done_without(kernels, said):
    kernels.write_text("a file")
    assert answer() == 7
    assert "kernels are built anew for this process, in a temporary folder" in said()[0]


def test_a_kept_library_is_found(kept, said):
    assert answer() == 7
    assert built.counts == {"found": 1} and said() == []


def test_a_planted_library_without_a_record_is_not_loaded(kept, said):
    only(kept, "json").unlink()
    plant(only(kept, "so"))
    assert answer() == 7
    assert built.counts == {"compiled": 1}
    assert said() == [f"{only(kept, 'so')} is not what was built there: it is not loaded, and built anew"]
    assert answer() == 7
    assert built.counts == {"compiled": 1, "found": 1}


def test_a_planted_library_beside_a_record_is_not_loaded(kept, said):
    plant(only(kept, "so"))
    assert answer() == 7
    assert built.counts == {"compiled": 1} and len(said()) == 1


def test_a_library_of_another_source_with_its_own_record_is_not_loaded(kept, said):
    """Both files under another key's names: the library's digest is right, the key is not."""
    mine = only(kept, "so")
    assert answer(8) == 8
    theirs = next(path for path in kept.glob("*.so") if path != mine)
    for kind in (".so", ".json"):
        shutil.copy(theirs.with_suffix(kind), mine.with_suffix(".planted"))
        os.replace(mine.with_suffix(".planted"), mine.with_suffix(kind))
    mine.with_suffix(".json").chmod(0o600)
    built.counts.clear()
    assert answer() == 7
    assert built.counts == {"compiled": 1} and len(said()) == 1


def test_a_library_that_was_cut_short_is_not_loaded(kept, said):
    library = only(kept, "so")
    half = library.read_bytes()[:5000]
    library.write_bytes(half)
    assert answer() == 7
    assert built.counts == {"compiled": 1} and len(said()) == 1


@pytest.mark.parametrize("kind", ["so", "json"])
def test_a_file_that_others_can_write_to_is_refused(kind, kept, said):
    path = only(kept, kind)
    path.chmod(0o722)
    before = path.read_bytes()
    assert answer() == 7
    (line,) = said()
    assert f"not kept in {kept}: others can write to {path}; remove what is there, or name a folder" in line
    assert path.read_bytes() == before


@root
def test_a_file_of_somebody_else_is_refused(kept, said):
    plant(only(kept, "so"))
    os.chown(only(kept, "so"), 12345, 12345)
    assert answer() == 7
    assert f"{only(kept, 'so')} belongs to another user" in said()[0] and len(said()) == 1


def test_a_link_in_the_place_of_a_library_is_refused(kept, said):
    library = only(kept, "so")
    os.replace(library, kept.parent / "elsewhere.so")
    library.symlink_to(kept.parent / "elsewhere.so")
    assert answer() == 7
    assert f"{library} is no plain file" in said()[0] and len(said()) == 1


def test_a_build_that_ends_halfway_leaves_nothing_to_load(kernels):
    def halfway(place: Path) -> None:
        place.write_bytes(b"\x7fELF")
        raise RuntimeError("the compiler was killed")

    with pytest.raises(RuntimeError, match="killed"):
        built.load("0" * 32, halfway)
    assert {path.suffix for path in kernels.iterdir()} <= {".lock"}


def test_files_are_private_whatever_the_umask(kernels, said):
    before = os.umask(0)
    try:
        assert [answer(), answer()] == [7, 7]
    finally:
        os.umask(before)
    assert built.counts == {"compiled": 1, "found": 1} and said() == []


def test_another_version_of_the_compiler_builds_anew(kernels, monkeypatch):
    """The key holds source, compiler, version, flags and processor."""
    assert answer() == 7
    command, version = native._compiler(None)
    monkeypatch.setattr(native, "_compiler", lambda _: (command, version + " patched"))
    assert answer() == 7
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    assert answer() == 7
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert answer() == 7
    assert built.counts == {"compiled": 4}


def test_processes_that_start_together_build_once(kernels, tmp_path):
    """Each says on a file when its compiler runs; the compiler is slow, so that they meet."""
    calls, compiler = tmp_path / "calls", tmp_path / "g++-that-counts"
    compiler.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case "$*" in *-shared*) echo built >> {calls}; sleep 2;; esac
        exec g++ "$@"
        """)
    )
    compiler.chmod(0o700)
    code = "from test_built import answer, built; print(answer(), dict(built.counts))"
    environment = {**os.environ, "CXX": str(compiler)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent
        )
        for _ in range(4)
    ]
    printed = sorted(worker.communicate()[0].strip() for worker in workers)
    assert printed == ["7 {'compiled': 1}", *["7 {'found': 1}"] * 3]
    assert calls.read_text() == "built\n"


def aged(path: Path, days: float) -> Path:
    then = time.time() - days * 24 * 3600
    os.utime(path, (then, then))
    return path


def entry(folder: Path, key: str, days: float) -> None:
    for kind in ("so", "json", "lock"):
        (folder / f"{key}.{kind}").write_text("a part")
        aged(folder / f"{key}.{kind}", days)


def test_what_was_not_used_for_long_goes(tmp_path):
    entry(tmp_path, "old", 91)
    entry(tmp_path, "new", 89)
    built.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "new.lock", "new.so"]


def test_the_most_recent_stay(tmp_path):
    for number in range(5):
        entry(tmp_path, f"key{number}", number)
    built.prune(tmp_path, most=3)
    assert sorted(path.stem for path in tmp_path.glob("*.so")) == ["key0", "key1", "key2"]


def test_use_keeps_a_library_young(kernels):
    assert answer() == 7
    aged(only(kernels, "json"), 200)
    aged(only(kernels, "so"), 200)
    assert answer() == 7
    built.prune(kernels)
    assert only(kernels, "so").exists()


def test_what_another_process_is_about_to_load_stays(tmp_path):
    entry(tmp_path, "held", 200)
    with FileLock(str(tmp_path / "held.lock")):
        built.prune(tmp_path)
        assert (tmp_path / "held.so").exists()
    built.prune(tmp_path)
    assert not (tmp_path / "held.so").exists()


def test_a_loaded_library_works_without_its_file(kernels):
    loaded = native.function(ANSWER % 9, "answer", [], ctypes.c_int)
    built.prune(kernels, most=0)
    assert list(kernels.glob("*.so")) == []
    assert loaded() == 9


def test_leftovers_of_killed_builds_and_of_earlier_versions_go(tmp_path):
    for name, days in (
        ("building-a", 2),
        ("building-b", 0.1),
        ("inductor", 100),
        ("triton-1.0", 100),
        ("triton-2.0", 1),
    ):
        (tmp_path / name).mkdir()
        aged(tmp_path / name, days)
    (tmp_path / "abc.so").write_text("without a record, as the first version kept them")
    aged(tmp_path / "abc.so", 100)
    built.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["building-b", "triton-2.0"]


def test_a_text_in_the_folder_is_written_anew_where_it_differs(kernels):
    path = built.write("a.py", "mine")
    assert path.read_text() == "mine"
    path.write_text("theirs")
    assert built.write("a.py", "mine").read_text() == "mine"
