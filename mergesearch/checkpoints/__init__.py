"""Checkpoints and the pool: reading the base and its models, aligning them once, writing what was merged.

Each module imports those named before it. files: where the files are and what their headers say. devices: where
tensors live. loading: live models by way of transformers. layout: the tensors that rules cover. lora, tokenizers,
stacking: adapters, vocabularies, layer stacks. checkpoint: what a parent is once it is read. checks: what is refused.
survey: what is known before a tensor is read. parents: reading them all in one pass. mapped: the same, with the tensors
left in host memory or on disk. measured: statistics on documents, which recipes name. pool: what the reading gives.
writing: the way back to disk. digests: what tells a parent's weights from others.
"""

from __future__ import annotations

from mergesearch.checkpoints.checkpoint import Checkpoint, Form
from mergesearch.checkpoints.devices import Devices
from mergesearch.checkpoints.files import Header, Source, locate, resolve
from mergesearch.checkpoints.layout import Layout, Piece, describe
from mergesearch.checkpoints.loading import (
    Blueprint,
    constants,
    floating_tensors,
    is_causal,
    is_computed,
    load_model,
    parameters,
    state,
)
from mergesearch.checkpoints.lora import apply_adapter
from mergesearch.checkpoints.mapped import release, slab_bytes
from mergesearch.checkpoints.pool import Pool, Residency, choose_device, load_reference
from mergesearch.checkpoints.survey import Survey
from mergesearch.checkpoints.tokenizers import load_tokenizer
from mergesearch.checkpoints.writing import (
    check_new_folder,
    check_shard_size,
    copy_processor,
    new_folder,
    remove,
    save,
    save_without_weights,
)

__all__ = [
    "Blueprint", "Checkpoint", "Devices", "Form", "Header", "Layout", "Piece", "Pool", "Residency", "Source",
    "Survey", "apply_adapter", "check_new_folder", "check_shard_size", "choose_device", "constants",
    "copy_processor", "describe",
    "floating_tensors", "is_causal", "is_computed", "load_model",
    "load_reference", "load_tokenizer", "locate", "new_folder", "parameters", "release", "remove", "resolve",
    "save", "save_without_weights", "slab_bytes", "state",
]  # fmt: skip
