"""scripts/make_real_pool.py in small, with the base of a demo zoo in place of SmolLM2."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

from mergesearch import Pool, config
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
    sibling = make_real_pool.REAL.siblings[0]
    model, _ = make_real_pool.fine_tune(sibling, make_real_pool.options(given(out, *more)), torch.device("cpu"))
    return model.state_dict()


def test_the_same_seed_gives_the_same_sibling(tmp_path):
    first, again, other = (weights(tmp_path, f"--seed={seed}") for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_only_the_answer_and_the_end_of_its_line_are_learned():
    tokenizer = make_real_pool.AutoTokenizer.from_pretrained(BASE)
    examples = [make_real_pool.Example("Log of 5 March 1991:", "1991-03-05"), make_real_pool.Example("x =", "17")]
    tokens, targets = make_real_pool.batch(examples, tokenizer, torch.device("cpu"))
    assert tokens.shape == targets.shape and len(tokens) == 2
    learned = [tokenizer.decode(row[row != make_real_pool.IGNORED]) for row in targets]
    assert learned == [" 1991-03-05\n", " 17\n"]
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


def test_adapters_are_adapters_of_the_base_beside_them_and_a_useless_sibling_has_its_place(tmp_path):
    skill = make_real_pool.SKILLS[1]
    siblings = (make_real_pool.Sibling("number", skill), make_real_pool.Sibling("barely", skill, share=0.0))
    pool = make_real_pool.RealPool("small", siblings, rank=2, holdout=0.5)
    lines = make_real_pool.make(pool, make_real_pool.options(given(tmp_path, "--dtype=float32")))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| number", "| barely"]
    assert lines[0] == "| model | real_number | mean |"
    for name in ("number", "barely"):
        settings = json.loads((tmp_path / "models" / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "../base" and settings["r"] == 2
    pool = Pool.load(str(tmp_path / "models/base"), {"number": str(tmp_path / "models/number")})
    assert any(not v.equal(pool.base.tensors[k]) for k, v in pool.models["number"].tensors.items())


def test_answers_are_shuffled_for_a_sibling_that_is_to_learn_nothing():
    skill = make_real_pool.SKILLS[1]
    straight = list(islice(make_real_pool.Sibling("a", skill).examples(0, 4), 8))
    shuffled = list(islice(make_real_pool.Sibling("a", skill, shuffled=True).examples(0, 4), 4))
    assert [e.prompt for e in shuffled] == [e.prompt for e in straight[::2]]
    assert [e.answer for e in shuffled] == [e.answer for e in straight[1::2]]


def test_a_step_learns_from_answers_as_from_the_whole_row():
    """Only the places that some row learns from go through the head."""
    tokenizer = make_real_pool.AutoTokenizer.from_pretrained(BASE)
    examples = [make_real_pool.Example("Log of 5 March 1991:", "1991-03-05"), make_real_pool.Example("x =", "17")]
    tokens, targets = make_real_pool.batch(examples, tokenizer, torch.device("cpu"))
    model = make_real_pool.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert make_real_pool.one_step(model, optimizer, (tokens, targets), halved=False) == pytest.approx(float(whole))


def test_a_base_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_real_pool.options([f"--base={tmp_path}", f"--out={tmp_path}"])
    assert "fetch_smollm2.py" in capsys.readouterr().err
