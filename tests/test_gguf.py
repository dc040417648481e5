"""Candidates as files for llama.cpp: what is written, what it answers, and what a report says of it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from support.commands import mergesearch
from support.tiny_models import fine_tune, make_model, make_pool, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergesearch.config.served import Filed, file_type, is_filed
from mergesearch.engine.gguf.form import FileForm, check_filed
from mergesearch.engine.gguf.vocabulary import FileVocabulary, vocabulary_of
from mergesearch.engine.gguf.writing import check_writable, write
from mergesearch.engine.live import Engine
from mergesearch.engine.served import check_served
from mergesearch.errors import UserError
from mergesearch.recipe import single_rule
from mergesearch.results.card import Story, file_notes, write_checkpoint

_MISSING = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
# neither the tests' environment nor CI has it, as it is compiled for many minutes: pip install -e '.[gguf]' does it
llama = pytest.mark.skipif(bool(_MISSING), reason="needs the extra gguf, which compiles llama.cpp for many minutes")
writer = pytest.mark.skipif("gguf" in _MISSING, reason="needs gguf")

TOKENS = torch.tensor([[3, 5, 7, 11, 13, 2, 4, 33, 21, 9]])
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "llama, embedding as head": ("llama", {"tie_word_embeddings": True}),
    "llama, slowed as llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, slowed linearly": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, slowed linearly": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, narrow heads": ("qwen3", {"head_dim": 8}),
}


def bytes_tokenizer(merges: Sequence[tuple[str, str]] = (("h", "e"), ("l", "l"))) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's: all bytes, a few merges, two tokens of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


def answer(file: Path, model: Any, exact: bool = False) -> Any:
    from mergesearch.engine.gguf.model import FileModel

    opened = FileModel(model.config, model.generation_config, exact)
    opened.open(file)
    return opened


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_llama_cpp_it_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = r"score_as is gguf:Q4_K_M, which needs llama-cpp-python and gguf: pip install 'mergesearch\[gguf\]'"
    for check in (check_filed, check_served):
        with pytest.raises(UserError, match=wanted):
            check("gguf:Q4_K_M")


def test_a_form_names_its_type() -> None:
    assert all(is_filed(form) and f"gguf:{file_type(form)}" == form for form in get_args(Filed))
    assert not is_filed("int8") and not is_filed(None)


@writer
@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "gpt2", "mixtral"])
def test_other_architectures_are_refused_by_name(architecture: str) -> None:
    with pytest.raises(
        UserError, match=rf"models of type {architecture} are not written as GGUF here \(known: llama, "
    ):
        check_writable(make_model(architecture))


@writer
@pytest.mark.parametrize(
    ("architecture", "asked", "words"),
    [
        ("mistral", {"sliding_window": 8}, "attention to a sliding window is not written"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not what llama.cpp computes"),
        ("qwen3", {"attention_bias": True}, "attention_bias of a qwen3 model is not what llama.cpp computes"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3' of a qwen2 model is not written"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(architecture: str, asked: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_writable(make_model(architecture, **asked))


# --- what is written --------------------------------------------------------------------------------------------------


@writer
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_file_holds_the_weights_as_they_are(dtype: str, tmp_path: Path) -> None:
    import gguf

    model = make_model("qwen2", dtype=dtype, **SIZES)
    write(model, FileVocabulary(), tmp_path / "model.gguf", "a name", {"mergesearch.recipe": "of this"})
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    held = {tensor.name: tensor for tensor in read.tensors}
    assert len(held) == len(dict(model.named_parameters()))
    assert read.fields["mergesearch.recipe"].contents() == "of this"
    assert read.fields["general.name"].contents() == "a name"
    matrix = held["blk.1.ffn_down.weight"]
    assert matrix.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    wanted = model.model.layers[1].mlp.down_proj.weight
    found = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
    assert np.array_equal(found, wanted.detach().float().numpy())
    assert held["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_tokenizer_of_another_kind_is_left_out() -> None:
    vocabulary = vocabulary_of(make_tokenizer(), lambda file, text: [])
    assert not vocabulary.tokens and "it holds no tokenizer" in vocabulary.note


@writer
def test_a_rule_that_cuts_otherwise_is_told() -> None:
    vocabulary = vocabulary_of(bytes_tokenizer(), lambda file, text: [1, 2, 3])
    assert vocabulary.tokens and "other tokens than the tokenizer beside it" in vocabulary.note


@llama
@pytest.mark.parametrize("merges", [(("h", "e"), ("l", "l"), ("Ġ", "t")), ()])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(merges: Any, tmp_path: Path) -> None:
    from mergesearch.engine.gguf.llama import tokenize

    tokenizer = bytes_tokenizer(merges)
    model = make_model("llama", vocab_size=300)
    FileForm("gguf:F32").write(model, tokenizer, tmp_path / "model.gguf")
    text = "hello, the 123 well-known tests:\n\tcafé 東京!"
    assert tokenize(tmp_path / "model.gguf", text) == tokenizer(text).input_ids


# --- what llama.cpp answers -------------------------------------------------------------------------------------------


@llama
@pytest.mark.parametrize("name", MODELS)
def test_in_float32_the_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Within what sums in another order leave of float32: 1e-5 where logits are about 2."""
    architecture, asked = MODELS[name]
    model = fine_tune(make_model(architecture, **{**SIZES, **asked}), 1)
    FileForm("gguf:F32").write(model, make_tokenizer(), tmp_path / "model.gguf")
    opened = answer(tmp_path / "model.gguf", model, exact=True)
    with torch.no_grad():
        wanted = model(TOKENS).logits
    assert wanted.abs().max() > 0.5
    assert torch.allclose(opened(TOKENS).logits, wanted, rtol=0, atol=1e-5)
    opened.close()


@llama
def test_answers_are_generated_as_transformers_does(tmp_path: Path) -> None:
    """Rows of several lengths, padded on the left; greedy, and a second call after another text."""
    model = fine_tune(make_model("llama", **SIZES), 1)
    FileForm("gguf:F32").write(model, make_tokenizer(), tmp_path / "model.gguf")
    opened = answer(tmp_path / "model.gguf", model, exact=True)
    asked = torch.tensor([[1, 1, 1, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "use_cache": True}
    for rows in (slice(0, 2), slice(1, 2), slice(0, 1)):
        told = {"input_ids": asked[rows], "attention_mask": mask[rows]}
        assert torch.equal(opened.generate(**told, **how), model.generate(**told, **how))
        opened(TOKENS)
    opened.close()


@llama
@pytest.mark.parametrize("form", get_args(Filed))
def test_every_type_is_made_and_answers(form: str, tmp_path: Path) -> None:
    """Fewer bits are further away; rows of 256 have the type itself."""
    model = make_model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=4)
    (told,) = [note for note in FileForm(form).write(model, make_tokenizer(), tmp_path / "x.gguf") if "tensors" in note]
    opened = answer(tmp_path / "x.gguf", model)
    with torch.no_grad():
        wanted = model(TOKENS).logits
    off = float((opened(TOKENS).logits - wanted).abs().max() / wanted.abs().max())
    assert off < (0.02 if file_type(form) in ("F32", "F16", "BF16") else 1.5), told
    if file_type(form) not in ("F32", "F16", "BF16"):
        assert not told.startswith("of its tensors 0") and off > 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    opened.close()


@llama
def test_a_checkpoint_carries_the_file_of_what_was_merged(tmp_path: Path) -> None:
    tiny = make_pool(tmp_path, models=2, **SIZES)
    engine = Engine(tiny.load(), "float32", filed=FileForm("gguf:F32"))
    recipe = tiny.recipe(*single_rule("task_arithmetic", None, weight=[0.6, 0.5]))
    out = write_checkpoint(recipe, engine, tmp_path / "out", Story("a test", {}))
    opened = answer(out / "model-F32.gguf", engine.model, exact=True)
    with torch.no_grad():
        assert torch.allclose(opened(TOKENS).logits, engine.model(TOKENS).logits, rtol=0, atol=1e-5)
    opened.close()
    (told,) = file_notes(out)
    assert told.startswith("model-F32.gguf is the same model for llama.cpp, in F32")
    assert told in (out / "README.md").read_text().replace("\\", "")


# --- a run ------------------------------------------------------------------------------------------------------------

RUN = {
    "name": "files",
    "base_model": "zoo:base",
    "models": {"order": "zoo:order", "letters": "zoo:letters"},
    "tasks": [{"task": "zoo_order", "limit": 24}, {"task": "zoo_both", "limit": 12}],
    "search": {"trials": 1, "strategy": "random"},
    "report": {"finalists": 1, "documents": 6},
    "device": "cpu",
    "dtype": "float32",
}


@llama
def test_a_run_ends_with_both_figures(tmp_path: Path) -> None:
    """The file is in best/, and the report, the card and the page have both."""
    from mergesearch.commands.page import write_page
    from mergesearch.commands.report import report_run
    from mergesearch.results.report import render
    from mergesearch.results.report.data import Report

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**RUN, "score_as": "gguf:Q8_0", "output": str(tmp_path / "run")}))
    done = mergesearch("run", config)
    assert done.status == 0, done.err
    best = tmp_path / "run" / "best"
    assert (best / "model-Q8_0.gguf").is_file()
    report = report_run(tmp_path / "run")
    served = report.served
    assert served is not None and served.form == "gguf:Q8_0"
    assert served.names == ("objective", "zoo_order", "zoo_both")
    assert [row.trial for row in served.rows] == [row.trial for row in report.sections[0].rows]
    for row, section in zip(served.rows, report.sections[0].rows, strict=True):
        assert row.error is None and section.holdout is not None
        assert row.merged[0] == pytest.approx(section.holdout.value)
        assert row.served[0] == pytest.approx(row.merged[0], abs=0.35)
    assert Report.from_data(json.loads(json.dumps(report.to_data()))) == report
    title = "As served in gguf:Q8_0, on the holdout (as merged in brackets)"
    for told in (str(render(report)), str(render(report, "md"))):
        assert title in told.replace("\\", "")
    card = (best / "README.md").read_text().replace("\\", "")
    assert title in card and "model-Q8_0.gguf is the same model for llama.cpp" in card
    write_page(tmp_path / "run", tmp_path / "page.html")
    assert title in (tmp_path / "page.html").read_text()
    left = [file.name for file in (tmp_path / "run" / "holdout").iterdir() if "gguf" in file.name]
    assert not left
    # nothing is scored twice
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "holdout").glob("*Q8_0*")}
    assert before and report_run(tmp_path / "run").served == served
    assert before == {file: file.stat().st_mtime_ns for file in before}
