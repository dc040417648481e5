"""llama.cpp by its C functions: a file quantised, loaded, and asked for logits."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergesearch.errors import CandidateError

log: logging.Logger = logging.getLogger(__name__)

# tokens of one call
_BATCH = 512
# a context has room for a multiple of this
_ROOM = 256
# what it last complained of, for the reason of a failure
_complaints: deque[str] = deque(maxlen=3)
_ERROR = 4


@functools.cache
def library() -> Any:
    """llama.cpp's functions; what it tells goes to this module's log.

    An extra, and so not there for everyone, type checkers among them.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]

    @llama_cpp.llama_log_callback
    def told(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        log.debug("llama.cpp: %s", line)
        if level == _ERROR and line:
            _complaints.append(line)

    llama_cpp.mergesearch_told = told  # what C calls has to stay
    llama_cpp.llama_log_set(told, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _failed(what: str) -> CandidateError:
    why = f" ({'; '.join(_complaints)})" if _complaints else ""
    _complaints.clear()
    return CandidateError(f"llama.cpp {what}{why}")


def quantize(source: Path, out: Path, kind: str) -> None:
    """Writes a file whose matrices are of a type, where their rows are long enough for it; as llama.cpp chooses else.

    Args:
        source: a file with plain numbers.
        out: the new file.
        kind: the type, as `Q4_K_M`.

    Raises:
        CandidateError: llama.cpp cannot do it.
    """
    lib = library()
    asked = lib.llama_model_quantize_default_params()
    asked.ftype = getattr(lib, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    asked.nthread = torch.get_num_threads()
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(asked)):
        raise _failed(f"could not make {kind} of the candidate")


def tokenize(file: Path, text: str) -> list[int]:
    """The tokens of a text by the vocabulary of a file, without any that begin or end it; none where it cannot be
    read."""
    lib = library()
    model = _loaded(file, vocabulary_alone=True)
    if model is None:
        return []
    try:
        held, words = (lib.llama_token * (4 * len(text) + 16))(), text.encode()
        count = lib.llama_tokenize(lib.llama_model_get_vocab(model), words, len(words), held, len(held), False, False)
        return list(held[: max(0, count)])
    finally:
        lib.llama_model_free(model)


def _loaded(file: Path, vocabulary_alone: bool = False) -> Any:
    lib = library()
    asked = lib.llama_model_default_params()
    asked.vocab_only, asked.n_gpu_layers = vocabulary_alone, 0
    return lib.llama_model_load_from_file(str(file).encode(), asked)


class LoadedFile:
    """A GGUF file that llama.cpp has loaded.

    Args:
        file: its path.
        exact: attend in float32; as llama.cpp does by itself, keys and values in float16, without it.

    Raises:
        CandidateError: it cannot be loaded.
    """

    def __init__(self, file: Path, exact: bool = False):
        lib = library()
        self._context: Any = None
        self._exact = exact
        self._slots, self._length = 0, 0
        self._held: list[list[int]] = []
        self._model: Any = _loaded(file)
        if self._model is None:
            raise _failed("could not load the candidate's file")
        self.vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch: Any = lib.llama_batch_init(_BATCH, 0, 1)

    def close(self) -> None:
        """Lets it go."""
        lib = library()
        if self._context is not None:
            lib.llama_free(self._context)
        if self._model is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_model_free(self._model)
        self._context = self._model = None

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits after each token of a text: (tokens, vocabulary), float32."""
        self._room(1, len(tokens))
        self._forget(0, 0)
        return self._decode([(token, place, 0, True) for place, token in enumerate(tokens)])

    def last(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits after the last token of each text: (texts, vocabulary), float32.

        What a text has in common with the one in its place in the call before is not computed again.
        """
        self._room(len(texts), max(map(len, texts)))
        asked = []
        for slot, tokens in enumerate(texts):
            known = _common(self._held[slot], tokens)
            self._forget(slot, known)
            asked += [(tokens[p], p, slot, p == len(tokens) - 1) for p in range(known, len(tokens))]
        return self._decode(asked)

    def _room(self, slots: int, length: int) -> None:
        """A context with so many texts of at most so many tokens each."""
        if slots <= self._slots and length <= self._length:
            return
        lib = library()
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None
        # longer texts come one token at a time
        self._slots = max(slots, self._slots)
        self._length = max(self._length, (length * 5 // 4 // _ROOM + 1) * _ROOM)
        asked = lib.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = self._slots * self._length, self._slots
        asked.n_batch = asked.n_ubatch = _BATCH
        asked.n_threads = asked.n_threads_batch = torch.get_num_threads()
        asked.kv_unified = False
        if self._exact:
            asked.type_k = asked.type_v = 0  # float32 in ggml
            asked.flash_attn_type = 0  # not by what computes in float16
        self._context = lib.llama_init_from_model(self._model, asked)
        if self._context is None:
            self._slots = self._length = 0
            raise _failed(f"has no room for {slots} texts of {length} tokens")
        self._held = [[] for _ in range(self._slots)]

    def _forget(self, slot: int, known: int) -> None:
        """All of a text but its first tokens."""
        lib = library()
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), slot, known, -1)
        self._held[slot] = self._held[slot][:known]

    def _decode(self, asked: Sequence[tuple[int, int, int, bool]]) -> torch.Tensor:
        """Reads (token, place, slot, whether its logits are wanted) one after another; returns the logits."""
        lib, batch, found = library(), self._batch, []
        for start in range(0, len(asked), _BATCH):
            part = asked[start : start + _BATCH]
            batch.n_tokens = len(part)
            for i, (token, place, slot, wanted) in enumerate(part):
                batch.token[i], batch.pos[i] = token, place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
                batch.logits[i] = wanted
                self._held[slot].append(token)
            if lib.llama_decode(self._context, batch):
                self._slots = self._length = 0  # nothing is certain of what it holds
                raise _failed("could not compute")
            count = sum(wanted for *_, wanted in part)
            if count:
                rows = np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(count, self.vocabulary))
                found.append(torch.from_numpy(rows.copy()))
        return torch.cat(found)


def _common(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many first tokens two texts share, the last one of `tokens` left out: its logits are still to be had."""
    most = min(len(held), len(tokens) - 1)
    return next((place for place in range(most) if held[place] != tokens[place]), most)
