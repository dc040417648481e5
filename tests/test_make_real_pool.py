"""scripts/make_real_pool.py in small, with the base of a demo zoo in place of SmolLM2."""

from __future__ import annotations

import pytest
import torch

from mergesearch import config
from scripts import make_real_pool
from scripts.bench.shared import zoo1

BASE = zoo1.BASE


@pytest.fixture(autouse=True)
def no_settings_of_the_whole_process(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def given(out, *more):
    return [f"--base={BASE}", f"--out={out}", "--steps=2", "--documents=4", "--check=2", "--device=cpu", *more]


def weights(out, *more):
    skill = make_real_pool.SKILLS[0]
    model, _ = make_real_pool.fine_tune(skill, make_real_pool.options(given(out, *more)), torch.device("cpu"))
    return model.state_dict()


def test_the_same_seed_gives_the_same_sibling(tmp_path):
    first, again, other = (weights(tmp_path, f"--seed={seed}") for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_answer_and_the_end_of_its_line_are_learned():
    tokenizer = make_real_pool.AutoTokenizer.from_pretrained(BASE)
    examples = iter(
        [make_real_pool.Example("Log of 5 March 1991:", "1991-03-05"), make_real_pool.Example("x =", "17")] * 8
    )
    tokens, targets = make_real_pool.batch(examples, tokenizer, torch.device("cpu"))
    assert tokens.shape == targets.shape and len(tokens) == make_real_pool.ROWS
    learned = [tokenizer.decode(row[row != make_real_pool.IGNORED]) for row in targets]
    assert learned[:2] == [" 1991-03-05\n", " 17\n"]
    kept = targets != make_real_pool.IGNORED
    assert torch.equal(tokens[kept], targets[kept])


@pytest.mark.slow
def test_the_pool_is_written_and_taken_up_again(tmp_path, capsys):
    assert make_real_pool.main(given(tmp_path)) == 0
    written = config.read(tmp_path / "search.yaml")
    assert list(written.models) == [skill.name for skill in make_real_pool.SKILLS]
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("base", *written.models))
    assert "loss" in capsys.readouterr().out
    make_real_pool.main(given(tmp_path))
    assert "loss" not in capsys.readouterr().out


def test_a_base_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_real_pool.options([f"--base={tmp_path}", f"--out={tmp_path}"])
    assert "fetch_smollm2.py" in capsys.readouterr().err
