"""Parents without a tokenizer, parents that are there twice, embeddings of other sizes: told, and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.commands import mergesearch
from support.tiny_models import TinyPool, file_tensors, fine_tune, make_model, make_tokenizer, same_bits, words, write
from transformers import AutoModelForCausalLM

from mergesearch.checkpoints import Pool
from mergesearch.errors import UserError


def without_tokenizers(pool: TinyPool) -> TinyPool:
    for folder in (pool.base, *pool.models.values()):
        for file in [*Path(folder).glob("tokenizer*"), *Path(folder).glob("special_tokens*")]:
            file.unlink()
    return pool


def recipe_file(folder: Path, pool: TinyPool, **changes: object) -> Path:
    data = {"base": pool.base, "models": pool.models, "rules": [{"method": "linear"}], "out_dtype": "float32"}
    stated = {key: value for key, value in {**data, **changes}.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(stated))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("has_base", [True, False])
def test_weights_are_merged_without_a_tokenizer(architecture: str, has_base: bool, tiny_pool, tmp_path: Path) -> None:
    """From file to file, and by way of a live model where the files hold experts one by one."""
    whole = tiny_pool(architecture)
    changes = {} if has_base else {"base": None}
    assert (
        mergesearch("merge", recipe_file(tmp_path, whole, **changes), tmp_path / "whole", "--device", "cpu").err == ""
    )
    pool = without_tokenizers(whole)
    done = mergesearch("merge", recipe_file(tmp_path, pool, **changes), tmp_path / "out", "--device", "cpu")
    assert done.status == 0, done.err
    place = "base_model" if has_base else "models.a"
    assert f"note: {place}: " in done.out and "has no tokenizer, so the weights alone are merged" in done.out
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [n for n in names if "token" not in n]
    expected, found = file_tensors(tmp_path / "whole"), file_tensors(tmp_path / "out")
    assert expected.keys() == found.keys() and all(same_bits(expected[name], found[name]) for name in expected)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert "has no tokenizer, so the weights alone" in (tmp_path / "out" / "README.md").read_text()


def test_who_asks_for_a_tokenizer_or_scores_needs_one(tiny_pool) -> None:
    pool = without_tokenizers(tiny_pool())
    for options in ({"weights_alone": True, "tokenizer": "union"}, {"weights_alone": True, "tokenizer": "a"}, {}):
        with pytest.raises(UserError, match=r"base_model: \S+ has no tokenizer that transformers can load: add"):
            pool.load(**options)


def test_a_model_that_is_there_twice_is_told(tiny_pool, tmp_path: Path) -> None:
    pool = tiny_pool()
    (tmp_path / "link").symlink_to(pool.models["a"])
    assert pool.load().notes == ()
    models = {**pool.models, "again": str(tmp_path / "link"), "base_too": pool.base}
    again, base_too = Pool.load(pool.base, models, device="cpu").notes
    assert again.startswith(f"models.again: {tmp_path / 'link'} is models.a once more, so what it says counts twice")
    assert base_too.startswith(f"models.base_too: {pool.base} is base_model once more, so its task vector is zero")
    # a recipe without a base has none that a model could be
    assert Pool.load(None, pool.models, device="cpu").notes == ()


def test_rows_that_are_left_out_are_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(words(20))
    for name, rows in (("base", 23), ("a", 30), ("b", 23)):
        model = make_model(vocab_size=rows)
        write(fine_tune(model, 1) if name != "base" else model, tmp_path / name, tokenizer)
    pool = TinyPool(str(tmp_path / "base"), {name: str(tmp_path / name) for name in "ab"})
    (note,) = pool.load(allow_unrelated=True).notes
    assert note == (
        "models.a: its embedding has 30 rows, the result's 23, for the same tokens: its last 7 rows are left out, and "
        "no token of the tokenizer has them"
    )
    (note,) = TinyPool(pool.models["a"], {"b": pool.models["b"]}).load(allow_unrelated=True).notes
    assert note.startswith("models.b: its embedding has 23 rows, the result's 30, for the same tokens: rows of the ")
