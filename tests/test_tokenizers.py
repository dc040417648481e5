"""Tokenizers and vocabularies: equal, refused with how they differ, or aligned by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import TinyPool, file_tensors, fine_tune, make_model, make_tokenizer, same_bits, words, write
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mergesearch import config
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.recipe import Rule
from mergesearch.results.card import Story, write_checkpoint

STORY = Story("a test", {"python": "3"})
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = Rule(method="linear")


def parent(folder: Path, tokenizer: Any, rows: int, seed: int, architecture: str = "llama", **options: Any) -> str:
    """A model with random embeddings of `rows` rows, everything else fine-tuned from one base."""
    model = make_model(architecture, vocab_size=rows, **options)
    reference = make_model(architecture, **options)
    state = {n: t for n, t in reference.state_dict().items() if t.shape == model.state_dict()[n].shape}
    model.load_state_dict(state, strict=False)
    return str(write(fine_tune(model, seed) if seed else model, folder, tokenizer))


def pool_of(tmp_path: Path, vocabularies: dict[str, list[str]], padding: dict[str, int] | None = None) -> TinyPool:
    """One parent for each vocabulary, `base` first; `padding` gives some of them further rows."""
    folders = {}
    for seed, (name, vocabulary) in enumerate(vocabularies.items()):
        tokenizer = make_tokenizer(vocabulary)
        folders[name] = parent(tmp_path / name, tokenizer, len(tokenizer) + (padding or {}).get(name, 0), seed)
    base = folders.pop("base")
    return TinyPool(base, folders)


def row(tensors: dict[str, torch.Tensor], name: str, tokenizer: Any, token: str) -> torch.Tensor:
    return tensors[name][tokenizer.get_vocab()[token]]


BASE_WORDS = words(20)
EXTENDED = [*BASE_WORDS, "new0", "new1"]
SHUFFLED = [*reversed(BASE_WORDS), "other"]


def test_equal_tokenizers_need_nothing(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    pool = written.load()
    assert pool.tokenizer.get_vocab() == make_tokenizer(BASE_WORDS).get_vocab()
    assert same_bits(pool.models["a"].tensors[EMBED], file_tensors(written.models["a"])[EMBED])


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (EXTENDED, r"models.a: the tokenizer of \S+/a has 25 tokens, the base's 23, and 2 differ, first 'new0' \(23"),
        (SHUFFLED, r"has 24 tokens, the base's 23, and 21 differ, first '\w+' \(\d+ there, \d+ in the base\)"),
        (BASE_WORDS[:-1], r"has 22 tokens, the base's 23, and 1 differ, first 'w19' \(absent there, 22 in the base\)"),
    ],
)
def test_a_refusal_says_how_they_differ(vocabulary: list[str], said: str, tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "b": BASE_WORDS, "a": vocabulary})
    with pytest.raises(UserError, match=said) as error:
        written.load()
    assert "set tokenizer: union" in str(error.value)


def test_union_aligns_every_row_by_token(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": EXTENDED, "b": SHUFFLED})
    pool = written.load(tokenizer="union")
    vocab = pool.tokenizer.get_vocab()
    assert set(vocab) == {"<s>", "</s>", "<unk>", *BASE_WORDS, "new0", "new1", "other"}
    assert {t: vocab[t] for t in BASE_WORDS} == {t: i + 3 for i, t in enumerate(BASE_WORDS)}
    own = {"base": make_tokenizer(BASE_WORDS), "a": make_tokenizer(EXTENDED), "b": make_tokenizer(SHUFFLED)}
    files = {"base": file_tensors(written.base), **{n: file_tensors(p) for n, p in written.models.items()}}
    for matrix in (EMBED, HEAD):
        for name in ("base", "a", "b"):
            aligned = pool.parent(name).tensors[matrix]
            assert aligned.shape[0] == len(vocab) == 26
            for token, place in vocab.items():
                have = {p for p in own if token in own[p].get_vocab()}
                source = name if name in have else "base" if "base" in have else next(iter(have))
                assert same_bits(aligned[place], row(files[source], matrix, own[source], token)), (matrix, name, token)


def test_a_row_that_the_base_lacks_is_the_mean_of_those_that_have_it(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": EXTENDED, "b": [*BASE_WORDS, "new1"], "c": BASE_WORDS})
    pool = written.load(tokenizer="union")
    place = pool.tokenizer.get_vocab()["new1"]
    a = row(file_tensors(written.models["a"]), EMBED, make_tokenizer(EXTENDED), "new1")
    b = row(file_tensors(written.models["b"]), EMBED, make_tokenizer([*BASE_WORDS, "new1"]), "new1")
    assert same_bits(pool.models["a"].tensors[EMBED][place], a)
    for name in ("base", "c"):
        torch.testing.assert_close(pool.parent(name).tensors[EMBED][place], (a + b) / 2)


def test_the_union_is_exported_and_encodes(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": EXTENDED, "b": SHUFFLED})
    pool = written.load(tokenizer="union")
    engine = Engine(pool, "float32")
    recipe = written.recipe(Rule(method="task_arithmetic"), tokenizer="union")
    out = write_checkpoint(recipe, engine, tmp_path / "out", STORY)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 26
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 26
    assert tokenizer("w3 new1 other").input_ids == [6, 24, 25]
    # only a has new1, so base + (a - base) + (b - base) is a's row
    a = row(file_tensors(written.models["a"]), EMBED, make_tokenizer(EXTENDED), "new1")
    torch.testing.assert_close(model.get_input_embeddings().weight[24], a)
    assert same_bits(model(torch.tensor([[6, 24, 25]])).logits, engine.model(torch.tensor([[6, 24, 25]])).logits)


def test_a_named_source(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": SHUFFLED, "b": BASE_WORDS})
    pool = written.load(tokenizer="a")
    engine = Engine(pool, "float32")
    out = write_checkpoint(written.recipe(LINEAR, tokenizer="a"), engine, tmp_path / "out", STORY)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == make_tokenizer(SHUFFLED).get_vocab()
    merged = file_tensors(out)
    own = {"a": make_tokenizer(SHUFFLED), "b": make_tokenizer(BASE_WORDS), "base": make_tokenizer(BASE_WORDS)}
    files = {"base": file_tensors(written.base), **{n: file_tensors(p) for n, p in written.models.items()}}
    for token in ("w0", "w19", "<s>"):
        expected = (row(files["a"], HEAD, own["a"], token) + row(files["b"], HEAD, own["b"], token)) / 2
        torch.testing.assert_close(row(merged, HEAD, tokenizer, token), expected)
    # b and the base lack it: a's row stands in for both
    torch.testing.assert_close(row(merged, HEAD, tokenizer, "other"), row(files["a"], HEAD, own["a"], "other"))


def test_a_named_source_brings_its_chat_template(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    chatty = AutoTokenizer.from_pretrained(written.models["a"])
    chatty.chat_template = "{{ messages[0].content }}!"
    chatty.save_pretrained(written.models["a"])
    engine = Engine(written.load(tokenizer="a"), "float32")
    out = write_checkpoint(written.recipe(LINEAR, tokenizer="a"), engine, tmp_path / "out", STORY)
    messages = [{"role": "user", "content": "w1"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(messages, tokenize=False) == "w1!"


def test_special_tokens_follow_the_named_source(tmp_path: Path) -> None:
    tokens = [*BASE_WORDS, "<|end|>"]
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": tokens})
    for name in ("config.json", "generation_config.json"):
        path = Path(written.models["a"]) / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 23}))
    engine = Engine(written.load(tokenizer="a"), "float32")
    out = write_checkpoint(written.recipe(LINEAR, tokenizer="a"), engine, tmp_path / "out", STORY)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 23
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 23


def test_padding_rows_of_one_tokenizer(tmp_path: Path) -> None:
    """Equal tokenizers and embeddings padded to different sizes: the base's size and padding stay."""
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS, "b": BASE_WORDS}, {"base": 9, "a": 41})
    pool = written.load()
    base, a, b = (file_tensors(folder) for folder in (written.base, *written.models.values()))
    assert pool.base.tensors[EMBED].shape[0] == 32
    assert same_bits(pool.base.tensors[EMBED], base[EMBED])
    for name, own in (("a", a), ("b", b)):
        assert same_bits(pool.models[name].tensors[EMBED][:23], own[EMBED][:23])
        assert same_bits(pool.models[name].tensors[EMBED][23:], base[EMBED][23:])
    engine = Engine(pool, "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32


def test_the_union_moves_into_the_padding_of_the_base(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": EXTENDED}, {"base": 9})
    pool = written.load(tokenizer="union")
    assert pool.tokenizer.get_vocab()["new1"] == 24
    assert pool.base.tensors[EMBED].shape[0] == 32
    a = row(file_tensors(written.models["a"]), EMBED, make_tokenizer(EXTENDED), "new1")
    assert same_bits(pool.base.tensors[EMBED][24], a)
    assert same_bits(pool.base.tensors[EMBED][25:], file_tensors(written.base)[EMBED][25:])


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox"])
def test_tied_and_named_otherwise(architecture: str, tmp_path: Path) -> None:
    folders = {}
    for seed, (name, vocabulary) in enumerate({"base": BASE_WORDS, "a": EXTENDED}.items()):
        tokenizer = make_tokenizer(vocabulary)
        folders[name] = parent(tmp_path / name, tokenizer, len(tokenizer), seed, architecture)
    written = TinyPool(folders.pop("base"), folders)
    engine = Engine(written.load(tokenizer="union"), "float32")
    out = write_checkpoint(written.recipe(tokenizer="union"), engine, tmp_path / "out", STORY)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.vocab_size == 25
    assert model(torch.tensor([[6, 24]])).logits.shape[-1] == 25
    assert file_tensors(out).keys() == file_tensors(written.base).keys()


def byte_pairs(merges: list[tuple[str, str]], added: list[AddedToken] | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    made.add_tokens(added or [])
    return made


def test_the_union_of_byte_pair_tokenizers_knows_both_merges_and_added_tokens(tmp_path: Path) -> None:
    base = byte_pairs([("a", "b")])
    chat = byte_pairs([("a", "b"), ("c", "d")], [AddedToken("<|im_start|>", special=True), AddedToken("<tool>")])
    folders = {
        name: parent(tmp_path / name, tokenizer, len(tokenizer), seed)
        for seed, (name, tokenizer) in enumerate({"base": base, "a": chat}.items())
    }
    written = TinyPool(folders.pop("base"), folders)
    engine = Engine(written.load(tokenizer="union"), "float32")
    out = write_checkpoint(written.recipe(tokenizer="union"), engine, tmp_path / "out", STORY)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab().items() >= base.get_vocab().items()
    assert tokenizer.get_vocab().keys() == chat.get_vocab().keys()
    assert tokenizer.tokenize("abcd<|im_start|>ab<tool>") == ["ab", "cd", "<|im_start|>", "ab", "<tool>"]
    assert tokenizer.decode(tokenizer("<|im_start|>abcd").input_ids, skip_special_tokens=True) == "abcd"


def test_the_union_of_different_kinds_is_refused(tmp_path: Path) -> None:
    pairs = byte_pairs([])
    folders = {
        "base": parent(tmp_path / "base", make_tokenizer(BASE_WORDS), 23, 0),
        "a": parent(tmp_path / "a", pairs, len(pairs), 1),
    }
    written = TinyPool(folders.pop("base"), folders)
    with pytest.raises(UserError, match=r"models.a: .*union cannot join a BPE tokenizer to the base's WordLevel"):
        written.load(tokenizer="union")


def test_a_model_without_tokenizer_has_the_bases(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    for file in Path(written.models["a"]).glob("tokenizer*"):
        file.unlink()
    pool = written.load()
    assert pool.tokenizers["a"] is pool.tokenizer


def test_a_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    for file in Path(written.base).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"base_model: \S+ has no tokenizer .*: add the tokenizer's files"):
        written.load()


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    (Path(written.models["a"]) / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"models.a: the tokenizer in \S+ cannot be loaded"):
        written.load()


def test_a_recipe_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    with pytest.raises(UserError, match=r"has tokenizer 'union', the models were aligned to 'base'"):
        Engine(written.load(), "float32").load(written.recipe(tokenizer="union"))


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    written = pool_of(tmp_path, {"base": BASE_WORDS, "a": BASE_WORDS})
    with pytest.raises(UserError, match=r"tokenizer is 'b': use base, union or one of a"):
        written.load(tokenizer="b")
    path = tmp_path / "run.yaml"
    path.write_text("base_model: x\nmodels: {a: y}\ntasks: [{task: t}]\ntokenizer: b\n")
    with pytest.raises(UserError, match=r"tokenizer is 'b': use base, union or one of a"):
        config.read(path)
    path.write_text("base_model: x\nmodels: {a: y}\ntasks: [{task: t}]\ntokenizer: union\n")
    assert config.read(path).tokenizer == "union"
