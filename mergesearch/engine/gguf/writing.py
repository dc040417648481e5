"""A live model as a GGUF file that llama.cpp loads, its weights as they were merged.

The format and the names are those of the `gguf` package; what llama.cpp expects of an architecture (which tensors,
which keys, in which order the rows of queries and keys stand) is what its loader reads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesearch.engine.gguf.vocabulary import FileVocabulary
from mergesearch.errors import UserError


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp knows an architecture.

    Attributes:
        name: its own name for it.
        neighbours: whether its rotary embedding turns neighbouring rows of a head; transformers turns row i with row
            i + half.
        biased: whether attention may have biases where the configuration asks for them.
    """

    name: str
    neighbours: bool
    biased: bool = False


# by transformers' model_type
_ARCHITECTURES = {
    "llama": _Architecture("llama", neighbours=True, biased=True),
    "mistral": _Architecture("llama", neighbours=True),
    "qwen2": _Architecture("qwen2", neighbours=False),
    "qwen3": _Architecture("qwen3", neighbours=False),
}
# numbers as a dtype of torch -> the type of a tensor and of a file, as the gguf package names them
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}


def check_writable(model: Any) -> None:
    """Refuses a model that cannot be written for llama.cpp here, before any weight is read.

    Args:
        model: a transformers causal language model, its weights on any device or on none.

    Raises:
        UserError: its architecture, or what its configuration asks for.
    """
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(_ARCHITECTURES)
        raise _refused(f"models of type {config.model_type} are not written as GGUF here (known: {known})")
    scaling = _rope(config).get("rope_type", "default")
    scalings = ["default", "linear", *(["llama3"] if architecture.name == "llama" else [])]
    if scaling not in scalings:
        raise _refused(f"rope_type {scaling!r} of a {config.model_type} model is not written as GGUF here")
    if _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("a rotary embedding of a part of each head is not written as GGUF here")
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise _refused(f"hidden_act {config.hidden_act!r} is not what llama.cpp computes")
    if getattr(config, "attention_bias", False) and not architecture.biased:
        raise _refused(f"attention_bias of a {config.model_type} model is not what llama.cpp computes")
    if _slides(config):
        raise _refused("attention to a sliding window is not written as GGUF here")
    for name in _tensors(model):
        _name(name, config)


def _refused(what: str) -> UserError:
    return UserError(f"score_as: {what}: leave score_as out, or use int8, int4 or fp8")


def _slides(config: Any) -> bool:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return True
    window = getattr(config, "sliding_window", None)
    return config.model_type == "mistral" and window is not None and window < config.max_position_embeddings


def write(
    model: Any, vocabulary: FileVocabulary, out: Path, name: str = "", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a live model into a GGUF file: matrices in the dtype they have, all else in float32.

    Args:
        model: a transformers causal language model; its configuration says how deep it is.
        vocabulary: of its tokenizer.
        out: the new file.
        name: the model's.
        metadata: texts by key, carried by the file beside what llama.cpp reads.

    Raises:
        UserError: as for `check_writable`.
    """
    import gguf

    check_writable(model)
    config, tensors = model.config, _tensors(model)
    writer = gguf.GGUFWriter(out, _ARCHITECTURES[config.model_type].name)
    try:
        _describe(writer, model, name)
        vocabulary.describe(writer, config.vocab_size)
        for key, text in (metadata or {}).items():
            writer.add_string(key, text)
        # one tensor after another, so that no more than one is held twice
        for held, tensor in _written(tensors, model):
            kind = gguf.GGMLQuantizationType[_TYPES[tensor.dtype][0]]
            writer.add_tensor_info(held, list(tensor.shape), np.dtype(np.float32), _bytes(tensor), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _written(tensors, model):
            writer.write_tensor_data(tensor.cpu().contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe(writer: Any, model: Any, name: str) -> None:
    """The keys that llama.cpp reads a model's shape from."""
    import gguf

    config, rope = model.config, _rope(model.config)
    if name:
        writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[_TYPES[_dtype(model)][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _dtype(model: Any) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


def _tensors(model: Any) -> dict[str, Tensor]:
    """The model's weights by their names; a head that is the embedding is no weight of its own."""
    held = dict(model.named_parameters())  # those that are shared come once, under the first name
    return {name: tensor.detach() for name, tensor in held.items()}


def _written(tensors: Mapping[str, Tensor], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under llama.cpp's name, as it reads it: every call gives the same in the same order."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    for name, tensor in tensors.items():
        if architecture.neighbours and ".q_proj." in name:
            tensor = _neighbouring(tensor, config.num_attention_heads)
        elif architecture.neighbours and ".k_proj." in name:
            tensor = _neighbouring(tensor, config.num_key_value_heads)
        # what is no matrix is read in float32 alone
        yield _name(name, config), tensor if tensor.dim() > 1 else tensor.float()
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _slowed(model)


def _neighbouring(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * size, ...) in the order in which those that are turned together are neighbours in their head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _slowed(model: Any) -> Tensor:
    """By how much each frequency (size / 2) of the rotary embedding is divided, as the model itself computes it."""
    size, base = _head_size(model.config), _rope(model.config)["rope_theta"]
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    actual = model.get_decoder().rotary_emb.inv_freq.cpu().double()
    return (plain / actual).float()


@functools.cache
def _names(architecture: str, layers: int) -> Any:
    import gguf

    kinds = {found: kind for kind, found in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], layers)


def _name(name: str, config: Any) -> str:
    """llama.cpp's name of a weight.

    Raises:
        UserError: it has none for it.
    """
    known = _names(_ARCHITECTURES[config.model_type].name, config.num_hidden_layers)
    found = known.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise _refused(f"llama.cpp has no tensor for {name} of a {config.model_type} model")
    return found
