"""scripts/make_real_pool.py in small, with the demo zoo's base in place of SmolLM2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mergesearch import config

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "mergesearch" / "zoo" / "models" / "base"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_real_pool

        yield make_real_pool
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(autouse=True)
def no_settings_of_the_whole_process(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def given(script, out, *more):
    return [f"--base={BASE}", f"--out={out}", "--steps=2", "--documents=4", "--check=2", "--device=cpu", *more]


def weights(script, out, *more):
    skill = script.SKILLS[0]
    model, _ = script.fine_tune(skill, script.options(given(script, out, *more)), torch.device("cpu"))
    return model.state_dict()


def test_the_same_seed_gives_the_same_sibling(script, tmp_path):
    first, again, other = (weights(script, tmp_path, f"--seed={seed}") for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_answer_and_the_end_of_its_line_are_learned(script):
    tokenizer = script.AutoTokenizer.from_pretrained(BASE)
    examples = iter([script.Example("Log of 5 March 1991:", "1991-03-05"), script.Example("x =", "17")] * 8)
    tokens, targets = script.batch(examples, tokenizer, torch.device("cpu"))
    assert tokens.shape == targets.shape and len(tokens) == script.ROWS
    learned = [tokenizer.decode(row[row != script.IGNORED]) for row in targets]
    assert learned[:2] == [" 1991-03-05\n", " 17\n"]
    kept = targets != script.IGNORED
    assert torch.equal(tokens[kept], targets[kept])


def test_the_pool_is_written_and_taken_up_again(script, tmp_path, capsys):
    assert script.main(given(script, tmp_path)) == 0
    written = config.read(tmp_path / "search.yaml")
    assert list(written.models) == [skill.name for skill in script.SKILLS]
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("base", *written.models))
    assert "loss" in capsys.readouterr().out
    script.main(given(script, tmp_path))
    assert "loss" not in capsys.readouterr().out


def test_a_base_that_is_not_there_is_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.options([f"--base={tmp_path}", f"--out={tmp_path}"])
    assert "fetch_smollm2.py" in capsys.readouterr().err
