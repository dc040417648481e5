from __future__ import annotations

from pathlib import Path

import pytest

from mergesearch.errors import UserError
from mergesearch.paths import absolute, absolute_path, absolute_reference


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A file's folder with the checkpoints `model`, `owner/model` and `lora`, and the caller's folder with `mine`."""
    for name in ("file/model", "file/owner/model", "file/lora", "caller/mine", "caller/owner/mine"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "caller")
    return tmp_path / "file", tmp_path / "caller"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("model", "FILE/model"),
        ("./model", "FILE/model"),
        ("../file/model", "FILE/model"),
        ("owner/model", "FILE/owner/model"),
        ("model+lora", "FILE/model+FILE/lora"),
        ("zoo:base", "zoo:base"),
        ("zoo:base+./lora", "zoo:base+FILE/lora"),
        ("meta/llama", "meta/llama"),
        ("meta/llama@main", "meta/llama@main"),
        ("meta/llama+lora", "meta/llama+FILE/lora"),
        ("nowhere", "nowhere"),
        ("/no/such", "/no/such"),
    ],
)
def test_references_that_are_paths_become_absolute(places: tuple[Path, Path], reference: str, expected: str) -> None:
    file, _ = places
    assert absolute_reference(reference, file, "a.yaml: base_model") == expected.replace("FILE", str(file))


@pytest.mark.parametrize("reference", ["mine", "./mine", "owner/mine", "zoo:base+mine"])
def test_what_only_the_callers_folder_has_is_refused(places: tuple[Path, Path], reference: str) -> None:
    file, caller = places
    with pytest.raises(UserError) as caught:
        absolute_reference(reference, file, "a.yaml: base_model")
    message = str(caught.value)
    assert message.startswith("a.yaml: base_model: ") and f"not in {file} " in message and str(caller) in message


def test_a_relative_path_that_nobody_has_is_named_with_its_folder(places: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=rf"models\.a: no folder '\./none' in {places[0]}:"):
        absolute_reference("./none", places[0], "a.yaml: models.a")


def test_a_users_home_is_theirs(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(places[1]))
    assert absolute_reference("~/mine", places[0], "x") == str(places[1] / "mine")


def test_paths_become_absolute_whether_they_are_there_or_not(places: tuple[Path, Path]) -> None:
    file, _ = places
    assert absolute_path("model", file, "x") == str(file / "model")
    assert absolute_path("none", file, "x") == str(file / "none")
    with pytest.raises(UserError, match="relative to the file"):
        absolute_path("mine", file, "a.yaml: include_path")


def test_the_folder_above_a_linked_one_is_where_the_file_system_has_it(tmp_path: Path) -> None:
    (tmp_path / "real" / "configs").mkdir(parents=True)
    (tmp_path / "real" / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "configs")
    assert absolute("../model", tmp_path / "link") == tmp_path / "real" / "model"
