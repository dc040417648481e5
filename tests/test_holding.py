"""Where commands hold what they work on: no weights for a check, a batch size that fits, a pool larger than memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from support.tiny_models import file_tensors, make_pool

from mergesearch import config, load_run, memory
from mergesearch.checkpoints import Pool, Survey, loading, mapped, parents
from mergesearch.commands import holding as holdings
from mergesearch.commands.check import preview
from mergesearch.commands.imagined import imagined
from mergesearch.commands.merge import merge_recipe
from mergesearch.engine.residency import Needs, needs_of, residency
from mergesearch.evaluate import batch_size
from mergesearch.evaluate.batch_size import Length, appetite, settle
from mergesearch.recipe import Rule, read
from mergesearch.schema import validate
from scripts.bench.shared import pools


def test_a_winner_without_room_is_told_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_pool(tmp_path, "llama")
    data = {"name": "small", "base_model": given.base, "models": given.models, "tasks": [{"task": "any"}]}
    settings = validate(config.Config, {**data, "output": str(tmp_path / "run")}, "here")
    survey = holdings.survey_of(settings)
    assert holdings.winners_room(settings, survey) is None
    monkeypatch.setattr(holdings.disks, "free", lambda path: 2**10)
    lacking = holdings.winners_room(settings, survey)
    assert lacking is not None and f"{tmp_path / 'run'} has 0.0 GiB left: free some" in lacking


def test_check_reads_no_weights_and_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_pool(tmp_path, "qwen3_moe")
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny.recipe(Rule(components=("experts",), method="ties"), Rule(method="linear")).to_yaml())

    def read_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(parents, "read_model", read_weights)
    monkeypatch.setattr(mapped, "mapped_tensors", read_weights)
    monkeypatch.setattr(loading, "read_model", read_weights)
    said = dict(preview(file))
    # as `merge` holds them: experts that are fused in memory cannot be written one by one
    assert "parents read from their files, the candidate in memory on cpu; peak" in said["memory"]
    assert said["rule all.experts"].startswith("ties of a, b: 18 tensors")
    assert said["tokenizer"] == "the base's 63 tokens, the same in every model"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "that is more than there is: use fewer models or another device" in dict(preview(file))["memory"]


def test_check_says_of_a_recipe_how_merge_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for no candidate, and what is written tensor by tensor needs none."""
    tiny = make_pool(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny.recipe(Rule(method="linear")).to_yaml())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    said = dict(preview(file))["memory"]
    assert said.endswith("candidate: parents read from their files, the result written to its own tensor by tensor")
    merge_recipe(read(file), tmp_path / "out", "cpu")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_imagined_pool_is_a_pool(tmp_path: Path) -> None:
    tiny = make_pool(tmp_path, "mixtral")
    survey = Survey(tiny.base, tiny.models, False)
    room = residency(holdings.alike(needs_of(survey, torch.float32)), "cpu", "device")
    engine = holdings.engine_of(imagined(Pool.outline(survey), room.devices), "float32", room)
    engine.load(tiny.recipe(Rule(method="ties")))
    with torch.no_grad():
        assert torch.isfinite(engine.model(torch.arange(5)[None]).logits).all()


def test_what_scoring_takes_grows_with_what_is_asked() -> None:
    text = SimpleNamespace(
        num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        vocab_size=128256, head_dim=128,
    )  # fmt: skip
    llama = SimpleNamespace(get_text_config=lambda: text)
    short, long = (appetite(llama, 2, Length(tokens), "cuda") for tokens in (100, 200))
    assert long.row == pytest.approx(2 * short.row, rel=0.01) and short.packed == short.learning == 0
    assert 200 * 2 * 2 * 128256 < long.row < 2 * 200 * 2 * 2 * 128256  # most of it is logits and their log-softmax
    generated = appetite(llama, 2, Length(0, 1000), "cuda")
    assert generated.row > 1000 * 2 * 2 * 2 * 32 * 8 * 128  # the cache, which grows by copying
    eager = SimpleNamespace(**vars(text), _attn_implementation="eager")
    assert appetite(SimpleNamespace(get_text_config=lambda: eager), 2, Length(200), "cuda").row > long.row
    learns = appetite(llama, 2, Length(100), "cuda", documents=16, largest=10**6)
    assert learns.learning > appetite(llama, 2, Length(100), "cuda", documents=16, checkpointing=True).learning > 0
    assert Needs(0, 0, row=10).fitting(95) == 8 and Needs(0, 0, row=10).fitting(5) == 1 and Needs(0, 0).fitting(0) == 64


def test_a_batch_size_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = SimpleNamespace(batch_size_per_gpu=0, model=SimpleNamespace(device=torch.device("cpu")))
    scorer: Any = SimpleNamespace(language_model=lm)
    tried: list[int] = []

    def full(_: Any, rows: int) -> None:
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_size, "_attempt", full)
    assert settle(scorer, 64) == 8 == lm.batch_size_per_gpu and tried == [64, 32, 16, 8]
    monkeypatch.setattr(batch_size, "_attempt", lambda _, rows: (_ for _ in ()).throw(MemoryError()))
    assert settle(scorer, 64) == 1


def test_limits_of_the_process_and_its_group_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**50))
    monkeypatch.setattr(memory, "_of_group", lambda: [3 * 2**40])
    assert memory.free_on_host() == 3 * 2**40
    held = psutil.Process().memory_info()
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: held.data + 2**30}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    assert 0 < memory.free_on_host() <= 2**30
    folder = tmp_path / "group"
    folder.mkdir()
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 1\ninactive_file 50",
    }.items():
        (folder / name).write_text(text)
    assert memory._left_of(folder, "memory.max", "memory.current") == [350]
    (folder / "memory.max").write_text("max")
    assert memory._left_of(folder, "memory.max", "memory.current") == []


def test_a_noted_batch_size_and_residency_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_pool(tmp_path)
    base = config.Config(base_model=tiny.base, models=tiny.models, tasks=[{"task": "x"}], dtype="float32", device="cpu")
    survey, length = Survey(tiny.base, tiny.models, False), Length(20)
    assert base.batch_size == "auto" and holdings.holding_of(base, survey, length).rows == 64
    assert holdings.holding_of(base, survey, length, {"batch_size": 16}).rows == 16
    asked = base.model_copy(update={"batch_size": 5})
    assert holdings.holding_of(asked, survey, length, {"batch_size": 16}).rows == 5
    assert holdings.holding_of(base.model_copy(update={"memory": "mapped"}), survey).mode == "mapped"
    holding = holdings.holding_of(base, survey, length)
    monkeypatch.setattr(holdings, "settle", lambda scorer, rows: rows // 2)
    found = holdings.settled_with(base, None, holding, {})  # type: ignore[arg-type]
    assert found == {"residency": "device", "batch_size": 32}
    assert holdings.settled_with(base, None, replace(holding, mode="mapped"), found) == found  # type: ignore[arg-type]


_LIMITED = """
    import json, resource, sys
    from pathlib import Path
    import psutil, torch
    from mergesearch import config as configuration
    from mergesearch.commands import run as runs, report, export, score, inputs, holding
    from transformers import AutoConfig, AutoModelForCausalLM
    from lm_eval.models import huggingface

    torch.set_num_threads(1)
    folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
    given = configuration.read(folder / "run.yaml", [f"output={folder}/out", "batch_size=4", "tasks.0.limit=4"])
    tasks = inputs.load_tasks(given)  # what libraries load once counts no more
    small = AutoConfig.for_model("llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                                 num_attention_heads=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(small)(torch.zeros((1, 2), dtype=torch.long))
    limit = psutil.Process().memory_info().data + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    session = runs.prepare(given, say=lambda line: print(line, file=sys.stderr))
    session.search.run()
    print(json.dumps({"states": [r.state for r in session.read().records], "settled": session.read().settled}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not hold a process to the limit")
def test_a_pool_larger_than_memory_runs_from_its_files(tmp_path: Path) -> None:
    """400 MB of parents in a process that may have 300 MiB more: a candidate of 40 MB is made of mapped files."""
    file = pools.make(tmp_path, models=9, width=448, layers=4)
    parents_size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    most = 300
    assert parents_size > most * 2**20
    code = textwrap.dedent(_LIMITED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file.parent), str(most)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parents read from their files, the candidate in memory on cpu" in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["states"]) == {"complete"} and told["settled"]["residency"] == "mapped"


_LIMITED_COMMAND = """
    import resource, sys
    import psutil, torch
    from pathlib import Path
    from mergesearch import cli, config as configuration
    from mergesearch.commands import run, report, export, score, inputs
    from transformers import AutoConfig, AutoModelForCausalLM
    from lm_eval.models import huggingface

    torch.set_num_threads(1)
    inputs.load_tasks(configuration.read(Path(sys.argv[1])))  # what libraries load once counts no more
    small = AutoConfig.for_model("llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                                 num_attention_heads=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(small)(torch.zeros((1, 2), dtype=torch.long))
    limit = psutil.Process().memory_info().data + int(sys.argv[2]) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = ["mergesearch", *sys.argv[3:]]
    cli.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not hold a process to the limit")
def test_each_command_makes_candidates_of_a_pool_larger_than_memory(tmp_path: Path) -> None:
    """400 MB of parents in a process that may have 350 MiB more, which is the search's 300 and room for the command's
    own libraries and the winner's export."""
    file = pools.make(tmp_path, models=9, width=448, layers=4)
    most = 350
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) > most * 2**20
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run, out = str(tmp_path / "out"), str(tmp_path / "exported")

    def told(*command: str) -> str:
        program = [sys.executable, "-c", textwrap.dedent(_LIMITED_COMMAND), str(file), str(most), *command]
        done = subprocess.run(program, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (command, done.stderr[-3000:])
        return done.stdout + done.stderr

    changes = (f"output={run}", "batch_size=4", "tasks.0.limit=4", "holdout=0.5")
    begun = told("run", str(file), *(f"--set={change}" for change in changes))
    assert "parents read from their files, the candidate in memory on cpu" in begun
    recorded = load_run(run)
    assert {record.state for record in recorded.records} == {"complete"}
    assert recorded.settled["residency"] == "mapped"
    assert "holdout" in told("report", run, "--documents", "4")
    told("export", run, out, "--trial", "12")
    assert file_tensors(out).keys() == file_tensors(tmp_path / "base").keys()
    assert "zoo_names acc" in told("score", f"{out}/recipe.yaml", "--config", str(Path(run) / "config.yaml"))
