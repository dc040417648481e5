"""scripts/bench/generation.py measures generating, and not the reading of prompts alone."""

from __future__ import annotations

import re

import pytest
from support.evaluate_tiny import make_model, make_tokenizer

from scripts.bench import generation


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Runs the bench on a tiny model; gives the rows of its page."""
    words = make_tokenizer().get_vocab()
    monkeypatch.setattr(generation, "subjects", lambda arguments: [("tiny", make_model(0), make_tokenizer())])
    monkeypatch.setattr(generation, "plain_words", lambda: [each for each in words if each.isalpha()] * 40)

    def run(*options: str) -> list[list[str]]:
        out = tmp_path / "page.md"
        few = ["--documents", "4", "--shots", "1", "--repeats", "1", "--most", "6", "--out", str(out)]
        monkeypatch.setattr("sys.argv", ["generation", *few, *options])
        assert generation.main() == 0
        return [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| tiny")]

    return run


def test_the_ways_that_are_named_are_measured_beside_lm_evals_own(page):
    rows = page("--ways", "batches", "--batch-sizes", "3", "--device", "cpu")
    assert any("batch size 3" in row[2] for row in rows)
    assert {re.sub(",.*", "", row[2]) for row in rows} == {"lm-eval", "batches"}


def test_no_answer_ends_for_what_every_text_has(page):
    # of a text that is nowhere, the limit alone ends an answer, and the page says so
    rows = page("--ways", "batches", "--stop", "no such text")
    assert all(row[-2].endswith("to 6") for row in rows)
    asked = generation.prompts(4, 1, 256, "x")  # of the defaults
    assert all(request.args[1]["until"] == ["x"] for request in asked)
