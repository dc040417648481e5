"""What tells weights and documents from others, and what a run says where they were changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import QUICKSTART, mergesearch, sets, small
from support.tiny_models import make_model, write

from mergesearch.checkpoints import Source, digests, locate
from mergesearch.checkpoints.digests import Digest, Memory
from mergesearch.commands import score
from mergesearch.config import Config, TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.digests import document_digests
from mergesearch.results.loading import DIGESTS
from mergesearch.search import store
from scripts.bench.shared import zoo1

NOTHING = Memory(None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(make_model(), tmp_path / "model")


def read(folder: Path) -> Digest:
    return digests.digest(locate(str(folder), "models.a"), "models.a", NOTHING)


def differs(folder: Path, noted: Digest, memory: Memory = NOTHING) -> str | None:
    return digests.difference(locate(str(folder), "models.a"), "models.a", noted, memory)


def change(folder: Path, place: int = 0, name: str = "model.embed_tokens.weight", stem: str = "model") -> None:
    """Another number in one tensor; the file keeps its size and its time of writing."""
    file = folder / f"{stem}.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors[name].view(-1)[place] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_same_weights_in_other_files_are_the_same(model: Path, tmp_path: Path) -> None:
    """Shards, metadata, dates and the order in the file say nothing of the numbers."""
    noted = read(model)
    sharded = write(make_model(), tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tensors = load_file(model / "model.safetensors")
    save_file(dict(reversed(tensors.items())), model / "model.safetensors", metadata={"format": "pt", "by": "me"})
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    os.utime(model / "model.safetensors", (1, 1))
    assert differs(model, noted) is None and differs(sharded, noted) is None
    assert noted == read(sharded) == Digest.from_data(json.loads(json.dumps(noted.to_data())))


@pytest.mark.parametrize("place", [0, 500, 1023])
def test_another_number_is_another_model(model: Path, place: int) -> None:
    noted = read(model)
    change(model, place)
    assert differs(model, noted) == "their numbers are others"


def test_a_number_between_the_sampled_blocks_is_found(tmp_path: Path) -> None:
    folder = write(make_model(hidden_size=128, intermediate_size=512), tmp_path / "model")
    noted, name = read(folder), "model.layers.0.mlp.up_proj.weight"
    change(folder, 2000, name)
    source = locate(str(folder), "models.a")
    assert digests._read(source, "models.a", whole=False).blocks == noted.blocks
    assert differs(folder, noted) == "their numbers are others"


def test_a_number_in_a_shard_and_in_an_adapter_is_found(tmp_path: Path) -> None:
    sharded = write(make_model(), tmp_path / "sharded", max_shard_size="20KB")
    noted, file = read(sharded), sorted(sharded.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert differs(sharded, noted)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora_A": torch.ones(2, 4)}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q", "v"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    noted = read(adapter)
    moved = {**settings, "base_model_name_or_path": "y", "target_modules": ["v", "q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(moved, indent=1))
    assert differs(adapter, noted) is None
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 16}))
    assert differs(adapter, noted) == "they are other tensors"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    change(adapter, name="lora_A", stem="adapter_model")
    assert differs(adapter, noted) == "their numbers are others"
    over = Source("model+adapter", sharded, adapter)
    assert digests.digest(over, "models.b", NOTHING) not in (read(sharded), read(adapter))


def test_other_shapes_and_dtypes_are_other_tensors(model: Path, tmp_path: Path) -> None:
    noted = read(model)
    assert differs(write(make_model(dtype="bfloat16"), tmp_path / "half"), noted) == "they are other tensors"
    assert differs(write(make_model(hidden_size=48), tmp_path / "wide"), noted) == "they are other tensors"


def test_a_truncated_file_is_one_sentence(model: Path) -> None:
    noted, file = read(model), model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"models\.a: .* is truncated or corrupt"):
        differs(model, noted)


# --- what is remembered -----------------------------------------------------------------------------------------------


def reads(patch: pytest.MonkeyPatch) -> list[bool]:
    """Each reading, whether of all bytes."""
    seen: list[bool] = []
    real = digests._read

    def watched(source: Source, where: str, whole: bool) -> Digest:
        seen.append(whole)
        return real(source, where, whole)

    patch.setattr(digests, "_read", watched)
    return seen


def test_settled_files_are_read_once_and_their_change_is_seen(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    seen, memory, source = reads(monkeypatch), Memory(tmp_path / "memory.json"), locate(str(model), "models.a")
    noted = digests.digest(source, "models.a", memory)
    assert digests.digest(source, "models.a", memory) == noted and differs(model, noted, memory) is None
    assert seen == [True]
    change(model, 500)  # as large and as old as before, as `cp -p` leaves it
    assert differs(model, noted, memory)
    (tmp_path / "memory.json").write_text('{"')
    assert differs(model, noted, memory)


def test_of_files_just_written_nothing_is_remembered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes again within what the file system's times resolve leaves the same stamp: here it is forged."""
    memory, source = Memory(tmp_path / "memory.json"), locate(str(model), "models.a")
    stamp = digests.stamps(source, "models.a")
    monkeypatch.setattr(digests, "stamps", lambda *_: stamp)
    noted = digests.digest(source, "models.a", memory)
    change(model)
    assert differs(model, noted, memory) == "their numbers are others"
    # times ahead of this machine's clock are settled at no time
    ahead = {file: [1, 1, 2**62, 2**62] for file in stamp}
    memory.keep(ahead, 1e9, noted)
    assert memory.recall(ahead) is None and not (tmp_path / "memory.json").exists()


def test_files_that_are_written_while_they_are_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = digests._read

    def meanwhile(source: Source, where: str, whole: bool) -> Digest:
        found = real(source, where, whole)
        shutil.copy(model / "model.safetensors", model / "new")
        (model / "new").replace(model / "model.safetensors")
        return found

    monkeypatch.setattr(digests, "_read", meanwhile)
    with pytest.raises(UserError, match="are being written"):
        read(model)


# --- documents --------------------------------------------------------------------------------------------------------


def task(documents: list[Any], examples: list[Any] | None = None, shots: int = 0) -> Any:
    leaf = SimpleNamespace(
        eval_docs=documents, get_config=lambda key: shots, sampler=SimpleNamespace(df=examples or [])
    )
    return SimpleNamespace(label="quiz", size=len(documents), leaves={"quiz": leaf})


def digest_of(*arguments: Any) -> Any:
    return document_digests([task(*arguments)])["quiz"]


def test_documents_are_told_apart_by_their_fields() -> None:
    first = digest_of([{"question": "2+2", "answer": 4}, {"question": "1+1", "answer": 2}])
    assert first == digest_of([{"answer": 4, "question": "2+2"}, {"question": "1+1", "answer": 2}])
    assert first != digest_of([{"question": "2+2", "answer": 5}, {"question": "1+1", "answer": 2}])
    assert first != digest_of([{"question": "1+1", "answer": 2}, {"question": "2+2", "answer": 4}])
    assert digest_of([{"x": object()}, {"x": b"1"}]) == digest_of([{"x": object()}, {"x": b"1"}])
    assert digest_of([{"x": 1}], [{"x": 2}], 1) != digest_of([{"x": 1}], [{"x": 3}], 1)
    assert digest_of([{"x": 1}], [{"x": 2}], 0) == digest_of([{"x": 1}], [{"x": 3}], 0)


def test_a_score_says_that_the_storage_is_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "damaged.db").write_text("no database " * 100)
    config = Config(
        base_model="b",
        models={"a": "a"},
        tasks=[TaskConfig(task="quiz")],
        output=str(tmp_path),
        storage=f"sqlite:///{tmp_path}/damaged.db",
    )
    said: list[str] = []
    assert score._noted(config, said.append) == {}
    assert len(said) == 1 and said[0].startswith("note: whether models and documents are still those of the run")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run over models of its own; the options that go on with it."""
    folder = tmp_path_factory.mktemp("run")
    zoo = zoo1.FOLDER / "models"
    models = {}
    for name in ("base", "code", "names"):
        shutil.copytree(zoo / name, folder / name)
        models[name] = folder / name
    options = [*small(folder / "out", 2, 4), *sets(base_model=models["base"], device="cpu")]
    options += ["--set", f"models={json.dumps({n: str(p) for n, p in models.items() if n != 'base'})}"]
    ended = mergesearch("run", QUICKSTART, *options)
    assert ended.status == 0, ended.err
    return folder, options


def test_a_model_that_was_changed_is_refused_by_name_or_told(done: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, options = done
    file = folder / "names" / "model.safetensors"
    before, out = file.read_bytes(), folder / "out"
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    try:
        export = ("export", out, tmp_path / "export", "--trial", "2")
        verbs = [
            ("run", QUICKSTART, *options),
            export,
            ("export", out, tmp_path / "m.yaml", "--format", "mergekit"),
            ("report", out),
            ("score", folder / "names", "--config", QUICKSTART, *options),
        ]
        for verb in verbs:
            refused = mergesearch(*verb)
            assert refused.status == 2, verb
            assert "models.names" in refused.err and "--allow-changed" in refused.err and "Traceback" not in refused.err
        assert not (tmp_path / "export").exists() and not (tmp_path / "m.yaml").exists()
        assert mergesearch("score", folder / "code", "--config", QUICKSTART, *options).status == 0
        let = mergesearch(*export, "--allow-changed")
        assert let.status == 0 and "warning: models.names" in let.err
        assert "models.names" in (tmp_path / "export" / "README.md").read_text()
        reported = mergesearch("report", out, "--allow-changed", "--documents", 4, "--format", "json")
        assert reported.status == 0 and any("models.names" in note for note in json.loads(reported.out)["notes"])
    finally:
        file.write_bytes(before)
    assert mergesearch("export", out, tmp_path / "again", "--trial", "2").status == 0
    assert "Changed since" not in (tmp_path / "again" / "README.md").read_text()


def test_going_on_with_changed_documents_is_refused_or_stands_in_the_card(done: tuple[Path, list[str]]) -> None:
    """The last of this run: what is let through here stays in its study."""
    folder, options = done
    config, study = store.open_run(folder / "out")
    noted = store.noted(study, DIGESTS)
    label = config.tasks[0].task
    changed = {**noted["tasks"], label: {**noted["tasks"][label], "digest": "0"}}
    store.note(study, DIGESTS, {**noted, "tasks": changed})
    for verb in (("run", QUICKSTART, *options), ("score", folder / "code", "--config", QUICKSTART, *options)):
        refused = mergesearch(*verb)
        assert refused.status == 2 and f"task '{label}': its documents" in refused.err
    assert mergesearch("run", QUICKSTART, *options, "--allow-changed").status == 0
    table = mergesearch("table", folder / "out")
    assert table.out.count(f"task '{label}': its documents") == 1
    assert mergesearch("export", folder / "out", folder / "let", "--trial", "1").status == 0
    assert f"task '{label}': its documents" in (folder / "let" / "README.md").read_text()

    # a run that is older than such notes goes on and has them from then on
    store.note(study, DIGESTS, {})
    older = mergesearch("run", QUICKSTART, *options)
    assert older.status == 0
    assert store.noted(store.open_run(folder / "out")[1], DIGESTS) == noted
