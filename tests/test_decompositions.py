"""What is made of the parents' matrices: made once, kept in memory and on disk, and never other bytes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor

from mergesearch import methods
from mergesearch.engine import decomposing, kernels
from mergesearch.engine.kernels import decompositions, notices
from mergesearch.engine.kernels.kept_files import KeptFiles
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import merge, plan
from mergesearch.methods import knots, task_vector
from mergesearch.methods.listening import listening
from mergesearch.recipe import single_rule

# those whose decompositions hang on the parents alone
KEPT = ("tsv", "star", "resmerge", "regmean_free", "knots", "knots_dare")
MATRICES = [name for name in methods.names() if methods.get(name).matrices]


def operands(count: int = 3, shape: tuple[int, int] = (20, 12), seed: int = 0) -> kernels.Operands:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g).bfloat16()
    models = tuple((base + 0.1 * torch.randn(shape, generator=g)).bfloat16() for _ in range(count))
    names = tuple((f"parent {i}", seed) for i in range(count + 1))
    return kernels.Operands(base, models, names, tuple(methods.mask_key(0, f"m{i}", "w") for i in range(count)))


def runner(kept: decompositions.Decompositions) -> kernels.Runner:
    statistics = kernels.Statistics(2**24, 2**24)
    return kernels.Runner(statistics, kernels.Compiler("never"), decompositions=kept)


def made(run: kernels.Runner, name: str, given: kernels.Operands, **parameters: Any) -> Tensor:
    method = methods.get(name)
    out = torch.empty(given.models[0].shape)
    complete = method.complete(parameters, [f"m{i}" for i in range(len(given.models))], "the test")
    run.run(kernels.MethodCall(method, complete), [kernels.TensorMerge(given, out, "w")])
    return out


def defined(name: str, given: kernels.Operands, **parameters: Any) -> Tensor:
    method = methods.get(name)
    complete = method.complete(parameters, [f"m{i}" for i in range(len(given.models))], "the test")
    assert given.base is not None
    return method(given.base.float(), [m.float() for m in given.models], complete, given.masks)


@pytest.mark.parametrize("name", KEPT)
def test_kept_decompositions_give_the_same_bytes(name, tmp_path):
    """From nothing, from memory, from disk in another process's place, with other weights: the plain definition."""
    given, files = operands(), KeptFiles(tmp_path)
    first = decompositions.Decompositions(2**24, files, least=0)
    again = decompositions.Decompositions(2**24, KeptFiles(tmp_path), least=0)
    for number, kept in enumerate((first, first, again)):
        for weights in ([1.0, 1.0, 1.0], [0.2, 0.7, 0.4]):
            assert torch.equal(made(runner(kept), name, given, weight=weights), defined(name, given, weight=weights))
        assert kept.made == (0 if number == 2 else 3 if name == "star" else 1)
    assert list(tmp_path.glob("*/about.json"))


@pytest.mark.parametrize("compiled", ["never", "now"])
@pytest.mark.parametrize("name", ["knots", "knots_dare"])
def test_what_is_merged_in_a_basis_is_made_by_a_kernel(name, compiled, monkeypatch):
    """To the bit what the plain definition gives, which runs on no tensor; each matrix has its own statistics."""
    matrices = [operands(shape=(40, 90), seed=seed) for seed in range(2)]
    settings = [
        {"density": density, "weight": weight, "lambda": 1.1}
        for density in ([0.3, 0.6, 1.0], 0.5)
        for weight in ([0.2, 0.7, -0.4], [1.0, 1.0, 1.0])
    ]
    wanted = [defined(name, one, **how) for how in settings for one in matrices]
    ran: list[bool] = []

    def watched(weighted: Any) -> Any:
        ran.append(any(isinstance(one, Tensor) for one in weighted))
        return elect(weighted)

    elect = task_vector.elect
    monkeypatch.setattr(task_vector, "elect", watched)
    kept = decompositions.Decompositions(2**24)
    run = kernels.Runner(kernels.Statistics(2**24, 2**24), kernels.Compiler(compiled), decompositions=kept)
    found = [made(run, name, one, **how) for how in settings for one in matrices]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert ran and not any(ran) and not run.compiler.failed


def test_a_part_that_is_given_other_tensors_runs_plainly():
    """What no decomposition gave has no name to keep statistics by."""
    given = operands()
    asked: list[Any] = []
    kept = decompositions.Decompositions(2**24)
    answer = kept.listener(given, lambda *called: asked.append(called))(given.base, given.models)
    rows = [torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    with listening(answer):
        found = knots.trimmed_and_elected(None, rows, density=0.5)
        _, turned = knots.shared_basis(given.base, given.models)
        knots.trimmed_and_elected(None, list(turned), density=0.5)
    assert torch.equal(found, knots.trimmed_and_elected(None, rows, density=0.5))
    ((_, tensors, named, names),) = asked
    assert named == {"density": 0.5} and len(set(map(repr, names))) == len(tensors) == 3


def test_other_parents_are_other_decompositions(tmp_path):
    """What is kept goes by the parents' bytes, whatever they are called, and by the numbers that it was made with."""
    kept = decompositions.Decompositions(2**24, KeptFiles(tmp_path), least=0)
    first, second = operands(seed=0), operands(seed=1)
    renamed = kernels.Operands(second.base, second.models, first.names, ())
    made(runner(kept), "tsv", first)
    fresh = decompositions.Decompositions(2**24, KeptFiles(tmp_path), least=0)
    assert torch.equal(made(runner(fresh), "tsv", renamed), defined("tsv", renamed))
    assert fresh.made == 1
    assert torch.equal(made(runner(kept), "tsv", first, rank=0.5), defined("tsv", first, rank=0.5))
    assert kept.made == 2


def test_memory_is_bounded_and_the_disk_is_read_again(tmp_path):
    kept = decompositions.Decompositions(2**11, KeptFiles(tmp_path), least=0)
    many = [operands(seed=seed) for seed in range(4)]
    for _ in range(2):
        for one in many:
            assert torch.equal(made(runner(kept), "tsv", one), defined("tsv", one))
    assert kept.held.nbytes <= 2**11 and kept.made == 4
    without = decompositions.Decompositions(0)
    for _ in range(2):
        assert torch.equal(made(runner(without), "tsv", many[0]), defined("tsv", many[0]))
    assert without.made == 2


def test_what_is_damaged_is_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "mergesearch")
    given = operands()
    made(runner(decompositions.Decompositions(2**24, KeptFiles(tmp_path), least=0)), "tsv", given)
    place = next(tmp_path.iterdir())
    whole = (place / "0.npy").read_bytes()
    for broken in (whole[:-8] + b"damaged!", whole[: len(whole) // 2], b""):
        (place / "0.npy").write_bytes(broken)
        kept = decompositions.Decompositions(2**24, KeptFiles(tmp_path), least=0)
        assert torch.equal(made(runner(kept), "tsv", given), defined("tsv", given))
        assert kept.made == 1 and (place / "0.npy").read_bytes() == whole
    assert len([r for r in caplog.records if "made anew" in r.getMessage()]) >= 1


def test_a_disk_without_room_keeps_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "mergesearch")
    blocked = tmp_path / "file"
    blocked.write_text("")
    kept = decompositions.Decompositions(2**24, KeptFiles(blocked / "folder"), least=0)
    assert torch.equal(made(runner(kept), "tsv", operands()), defined("tsv", operands()))
    assert ["not kept" in r.getMessage() for r in caplog.records] == [True]


def test_old_files_go(tmp_path):
    """What was used longest ago goes first, where all take more than the limit; what nothing used for 90 days goes."""
    files = KeptFiles(tmp_path, limit=40_000)
    for number in range(8):
        files.write(f"{number}", [torch.full((1000,), float(number))])
        about = tmp_path / f"{number}" / "about.json"
        if about.exists():
            os.utime(about, (1e9 + number, 1e9 + number) if number == 0 else None)
    assert files.read("0") is None
    found = files.read("7")
    assert found is not None and torch.equal(found[0], torch.full((1000,), 7.0))
    small = KeptFiles(tmp_path, limit=9_000)
    small.write("new", [torch.zeros(1000)])
    assert small.read("new") is not None and sum(1 for _ in tmp_path.iterdir()) <= 2


def test_threads_do_not_change_the_bytes():
    """One or two threads: decompositions are each made on one."""
    given = [operands(shape=(90, 70), seed=seed) for seed in range(3)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = runner(decompositions.Decompositions(2**26))
            outs = [torch.empty(90, 70, dtype=torch.float64) for _ in given]
            for name in ("tsv", "iso"):
                method = methods.get(name)
                call = kernels.MethodCall(method, method.complete({}, ["a", "b", "c"], "the test"))
                run.run(call, [kernels.TensorMerge(g, out, "w") for g, out in zip(given, outs, strict=True)])
                results.append((name, [out.clone() for out in outs]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in ("tsv", "iso"):
        one, two = (outs for label, outs in results if label == name)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[tiny_models.TinyPool, Any]:
    pool = tiny_models.make_pool(tmp_path_factory.mktemp("matrices"), "llama", models=3)
    return pool, pool.load()


@pytest.mark.parametrize("name", [*MATRICES, "ties+svc", "tsv+lines"])
def test_the_live_model_is_the_plain_definition(name, loaded):
    """Every tensor; embeddings and head are averaged unless asked for, and each layer has its depth."""
    tiny, pool = loaded
    engine = Engine(pool, "float32")
    for embeddings in (False, True):
        recipe = tiny.recipe(*single_rule(name, None, embeddings=embeddings))
        engine.load(recipe)
        jobs = plan(recipe, pool)
        for job in jobs:
            left_out = job.info.component in ("embedding", "head") and not embeddings
            assert (job.step.method.name != name) == left_out
            if "depth" in job.step.parameters:
                inside = job.piece.live.startswith(pool.form.layout.prefix)
                assert job.step.parameters["depth"] == (job.info.layer / (pool.layers - 1) if inside else -1)
        dtypes = {live: tensor.dtype for live, tensor in pool.base.live.items()}
        live = dict(engine.model.named_parameters())
        for job, wanted in merge(jobs, pool, 0, dtypes):
            assert torch.equal(job.piece.view(live), wanted), job.info.name


def test_files_are_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MERGESEARCH_STATISTICS", str(tmp_path / "there"))
    assert KeptFiles.usual().folder == tmp_path / "there"
    monkeypatch.delenv("MERGESEARCH_STATISTICS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert KeptFiles.usual().folder == Path(tmp_path / "mergesearch" / "statistics")


def test_what_it_will_take_is_said(loaded):
    """`check` names what the parents take once and a candidate afterwards, of a recipe and of a space."""
    tiny, pool = loaded
    step = plan(tiny.recipe(*single_rule("tsv")), pool)[-2].step
    small, large = (decomposing.expected(step.method, step.parameters, pool.infos * n, 3) for n in (1, 50))
    assert small.kept * 50 == pytest.approx(large.kept, rel=0.01) and small.kept > 0
    assert large.once > 5 * small.once > 0 and large.each > 0
    assert "once for the parents" in str(large) and "a candidate" in str(large)
    iso = plan(tiny.recipe(*single_rule("iso")), pool)[-2].step
    assert str(decomposing.expected(iso.method, iso.parameters, pool.infos, 3)).startswith("about")
