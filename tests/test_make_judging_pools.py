"""scripts/make_judging_pools.py in small: a zoo in seconds, of either kind, the same again and taken up again."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from mergesearch import Pool, config
from scripts import make_judging_pools, zoo_training
from scripts.bench import search
from scripts.make_judging_pools import DOCUMENTS, ORDER, REALS, ZOOS
from scripts.zoo_training import IGNORED, Rows, llama

COUNT, FEW = 400, 6


def small(name: str, steps: int = 2):
    zoo = ZOOS[name]
    stages = tuple(replace(stage, steps=steps, rows=2) for stage in zoo.plan.stages[:3])
    return replace(zoo, plan=replace(zoo.plan, stages=stages, config=llama(16, 1, 2, 16)), skills=zoo.skills[:2])


def made(name: str, out, steps: int = 2) -> list[str]:
    chosen = argparse.Namespace(check=2)
    return make_judging_pools.make_zoo(name, small(name, steps), out, chosen, COUNT, FEW)


def weights(out, name: str, zoo: str) -> dict:
    skills = [skill.name for skill in small(zoo).skills]
    pool = Pool.load(str(out / "models/base"), {skill: str(out / "models" / skill) for skill in skills})
    return {"base": pool.base, **pool.models}[name].tensors


@pytest.mark.parametrize("name", ZOOS)
def test_a_zoo_is_written_whole_and_the_same_again(tmp_path, name):
    lines = made(name, tmp_path / "a")
    skills = [skill.name for skill in small(name).skills]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", *(f"| {skill}" for skill in skills)]
    written = config.read(tmp_path / "a/search.yaml")
    assert list(written.models) == skills and written.name == name
    made(name, tmp_path / "b")
    for model in ("base", *skills):
        first, again = (weights(tmp_path / folder, model, name) for folder in "ab")
        assert all(again[key].equal(value) for key, value in first.items()), model
    base, first = weights(tmp_path / "a", "base", name), weights(tmp_path / "a", skills[0], name)
    assert any(not value.equal(base[key]) for key, value in first.items())
    adapter = (tmp_path / "a/models" / skills[0] / "adapter_config.json").is_file()
    assert adapter is small(name).plan.stages[1].adapter


def test_a_zoo_that_was_cut_short_goes_on_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_training, "CHECKPOINT", 2)
    made("judge_zoo_a", tmp_path / "whole", steps=3)
    run, asked = zoo_training.Run, []
    step = run.one_step

    def cut(self, rows):
        asked.append(self.stage.name)
        if asked.count("modulo") == 3:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(run, "one_step", cut)
    with pytest.raises(KeyboardInterrupt):
        made("judge_zoo_a", tmp_path / "cut", steps=3)
    assert not (tmp_path / "cut/models/modulo").exists()
    made("judge_zoo_a", tmp_path / "cut", steps=3)
    assert asked.count("base") == asked.count("reverse") == 3 and asked.count("modulo") == 4
    for model in ("base", "modulo", "reverse"):
        whole, again = (weights(tmp_path / folder, model, "judge_zoo_a") for folder in ("whole", "cut"))
        assert all(again[key].equal(value) for key, value in whole.items()), model


def test_a_pool_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    (tmp_path / "judge_zoo_b").mkdir()
    (tmp_path / "judge_zoo_b/table.md").write_text("| made |\n")
    assert make_judging_pools.main(["--only", "judge_zoo_b", "--out", str(tmp_path)]) == 0
    assert "made before" in capsys.readouterr().out
    assert [file.name for file in tmp_path.rglob("*.*")] == ["table.md"]


def test_only_answers_are_learned():
    zoo = ZOOS["judge_zoo_b"]
    streams = zoo.streams(50, FEW)
    rows = Rows(streams, streams, 32, answers=True)
    for name, data in streams.items():
        targets = rows.targets[name]
        learned = "".join(chr(t) if t != IGNORED else "_" for t in targets.tolist())
        lines = data.decode().split("\n")[:-1]
        assert [line.rpartition("_")[2] for line in learned.split("\n")[:-1]] == [x.partition(" ->")[2] for x in lines]


def test_what_the_base_of_the_second_zoo_reads_is_no_documents_answer():
    """It learns every skill under another name, and under the skills' names all four of them by turns."""
    zoo = ZOOS["judge_zoo_b"]
    streams = {name: data.decode().split("\n")[:-1] for name, data in zoo.streams(3000).items()}
    assert {line.partition(":")[0] for line in streams["coded"]} == set(zoo.names.values())
    read = set(streams["coded"]) | set(streams["loose"])
    for skill in zoo.skills:
        documents = skill.documents(zoo.seed, DOCUMENTS)
        assert not read & {f"{e.prompt} {e.answer}" for e in documents}
        own = sum(line in set(streams[skill.name]) for line in set(streams["loose"]) if line.startswith(skill.name))
        assert own < 0.4 * sum(line.startswith(skill.name) for line in set(streams["loose"]))


def test_every_pool_is_one_that_searches_can_name_and_that_is_counted():
    judging = {name for name, pool in search.POOLS.items() if pool.judging}
    assert judging == set(ORDER) == {*ZOOS, *REALS}
    for name in judging:
        assert search.POOLS[name].config == make_judging_pools.OUT / name / "search.yaml"
        assert name in str(search.POOLS[name].make)


def test_there_are_a_hundred_documents_to_search_on_and_twice_as_many_held_out(tmp_path):
    from mergesearch.commands import inputs

    pool, _ = REALS["judge_real_seven"]
    make_judging_pools.write_tasks(tmp_path / "tasks", pool.skills, 0, DOCUMENTS)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/email").mkdir()
    file = make_judging_pools.write_config(
        tmp_path, pool.name, ["email"], pool.skills, made_by="", dtype="float32", holdout=pool.holdout
    )
    written = config.read(file)
    parts = inputs.splits(written, inputs.load_tasks(written))
    assert len(parts) == 5
    assert {(len(part.search), len(part.holdout)) for part in parts.values()} == {(100, 200)}


def test_the_seven_have_two_that_are_of_no_use():
    pool, training = REALS["judge_real_seven"]
    assert len(pool.siblings) == 7
    assert [s.name for s in pool.siblings if s.shuffled or s.share == 0] == ["shuffled", "barely"]
    assert json.dumps(training) != json.dumps(REALS["judge_real_adapters"][1])
