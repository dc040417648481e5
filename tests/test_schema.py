"""YAML and JSON as people and programs get them wrong: one sentence each, with the file and the line."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from mergesearch.checkpoints.files import read_config
from mergesearch.errors import UserError
from mergesearch.schema import parse_yaml, read_json, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("? [a, b]\n: 1\n", "f.yaml: the key in line 1 is a list"),
        ("x: 1\ny: {{a: 1}: 2}\n", "f.yaml: the key in line 2 is a mapping"),
        ("[" * 3000 + "]" * 3000, "f.yaml goes more than 64 levels deep"),
        ("[" * 3000, "f.yaml goes more than 64 levels deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(3000)), "f.yaml goes more than 64 levels deep"),
        ("[" * 65 + "]" * 65, "f.yaml goes more than 64 levels deep"),
        ("a: &a [*a]", "f.yaml goes more than 64 levels deep"),
        (LAUGHS, "f.yaml states more than 1,000,000 values"),
        ("a: 1\na: 2\n", "f.yaml: key 'a' is given twice, again in line 2"),
        ("a: 1\nb: {<<: 3}\n", "f.yaml, line 2, column 9 is not valid YAML: expected a mapping"),
        ('a: 1\nb: "x\\0y"\n', r"f.yaml, line 2: 'x\x00y' holds what is no character"),
        ('"x\\0y": 1', "f.yaml, line 1:"),
        ('a: "\\ud800"', r"'\ud800' holds what is no character"),
        ("a: 2024-99-99", "f.yaml holds a value that is none (month must be in 1..12)"),
        (f"a: {'9' * 5000}", "f.yaml holds a value that is none"),
        ("a: \x01", "f.yaml is not valid YAML: special characters are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_what_no_file_of_ours_means_is_a_sentence(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    assert part in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_merge_keys_take_over_what_an_alias_has() -> None:
    text = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: [*a, *b], x: 3}\nd: {<<: *b, y: 4}\n"
    assert parse_yaml(text, "f.yaml") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 3, "y": 2},
        "d": {"x": 1, "y": 4},
    }


def test_what_is_deep_enough_is_read() -> None:
    assert json.dumps(parse_yaml("[" * 63 + "]" * 63, "f.yaml")) == "[" * 63 + "]" * 63
    assert parse_yaml("", "f.yaml") is None
    assert parse_yaml("a: 2024-01-02", "f.yaml") == {"a": datetime.date(2024, 1, 2)}


def test_a_path_that_is_none() -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_yaml("a\0b")


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "[" * 100_000, "{", '"\\ud8', "\xff"])
def test_json_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        read_json(file, "remove it")
    assert str(file) in str(caught.value) and str(caught.value).endswith(": remove it")
    with pytest.raises(UserError) as caught:
        read_config(tmp_path, "base_model")
    assert str(file) in str(caught.value) and "base_model" in str(caught.value)
