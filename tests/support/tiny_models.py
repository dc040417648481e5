"""Tiny random checkpoints of every architecture, written to disk as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_NAMED_HEADS = {**_GROUPED, "head_dim": 4}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _NAMED_HEADS,
    "gemma2": {**_NAMED_HEADS, "sliding_window": 8},
    "gemma3_text": {**_NAMED_HEADS, "sliding_window": 8},
    "phi3": _GROUPED,
    "gpt2": _GPT2,
    "gpt_neox": _SIZES,
    "olmo2": _GROUPED,
    "falcon": _SIZES,
    "mixtral": {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_NAMED_HEADS,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 1,
    },
}
MOE = ("mixtral", "qwen3_moe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def words(count: int = VOCABULARY - 4) -> list[str]:
    return [f"w{number}" for number in range(count)]


def make_tokenizer(vocabulary: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A word tokenizer: `<s>` is 0, `</s>` 1, `<unk>` 2, then the words; 64 tokens less one by default."""
    tokens = ["<s>", "</s>", "<unk>", *(words() if vocabulary is None else vocabulary)]
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def make_model(architecture: str = "llama", seed: int = 0, dtype: str = "float32", **config: Any) -> nn.Module:
    """A random model in evaluation mode; `config` overrides the tiny configuration. Norms and biases are random too."""
    made = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(DTYPES[dtype]).eval()


def fine_tune(model: nn.Module, seed: int, scale: float = 0.02) -> nn.Module:
    """Moves every parameter of `model` a little, in place."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def write(model: nn.Module, folder: Path, tokenizer: Any | None = None, **options: Any) -> Path:
    """Saves model and tokenizer; `max_shard_size="20KB"` makes shards."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@dataclass
class TinyPool:
    """A base and models fine-tuned from it, on disk: `base` and `models` are what configurations and recipes name."""

    base: str
    models: dict[str, str]

    def load(self, **options: Any) -> Any:
        from mergesearch.checkpoints import Pool

        return Pool.load(self.base, self.models, **{"device": "cpu", **options})

    def recipe(self, *rules: Any, **fields: Any) -> Any:
        """A recipe over this pool: the given rules, or the plain average."""
        from mergesearch.recipe import Recipe, Rule

        return Recipe(
            base=self.base,
            models=self.models,
            rules=rules or (Rule(method="linear"),),
            **{"out_dtype": "float32", **fields},
        )


def make_pool(
    folder: Path,
    architecture: str = "llama",
    models: int = 2,
    dtype: str | Sequence[str] = "float32",
    edit: Callable[[str, nn.Module], None] | None = None,
    **config: Any,
) -> TinyPool:
    """Writes `base` and the models `a`, `b`, ... below `folder`.

    Args:
        dtype: of all parents, or one for the base and each model.
        edit: called with each parent's name and model before it is written.
        config: overrides the architecture's tiny configuration.
    """
    names = ["base", *"abcdefgh"[:models]]
    dtypes = [dtype] * len(names) if isinstance(dtype, str) else list(dtype)
    for number, name in enumerate(names):
        model = make_model(architecture, **config)
        model = (fine_tune(model, number) if number else model).to(DTYPES[dtypes[number]])
        if edit is not None:
            edit(name, model)
        write(model, folder / name)
    return TinyPool(str(folder / "base"), {name: str(folder / name) for name in names[1:]})


def file_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes; unlike `torch.equal`, 0.0 is not -0.0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
