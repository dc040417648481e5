"""What llama.cpp has loaded, in the place of a transformers model: lm-eval's own model asks it as any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mergesearch.engine.gguf.llama import LoadedFile


class FileModel(PreTrainedModel, GenerationMixin):
    """A causal language model without weights of its own, which answers from the GGUF file that was opened last.

    Tokens go in and logits come out, so that tokenizing, batching, what ends an answer and what is sampled stay
    lm-eval's and transformers'. Texts that are generated grow in llama.cpp's memory, a token for each step.

    Args:
        config: of the candidate that the file was written of.
        generation_config: likewise.
        exact: as for `LoadedFile`.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Any, generation_config: Any = None, exact: bool = False):
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        super().__init__(config)
        if generation_config is not None:
            self.generation_config = copy.deepcopy(generation_config)
        self._file: LoadedFile | None = None
        self._exact = exact

    def open(self, file: Path) -> None:
        """Answers from another file from now on.

        Raises:
            CandidateError: llama.cpp cannot load it.
        """
        self.close()
        self._file = LoadedFile(file, self._exact)

    def close(self) -> None:
        """Lets the file go."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # llama.cpp has its own

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""

    def get_output_embeddings(self) -> None:
        """There are none."""

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 1, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole text at each step: `forward` finds out what is new of it."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits of texts (rows, tokens), padded on the left where a mask says so: (rows, tokens, vocabulary), or those
        of the last token alone, (rows, 1, vocabulary)."""
        assert self._file is not None
        rows = [_unpadded(row, attention_mask, place) for place, row in enumerate(input_ids)]
        if logits_to_keep == 1:
            return CausalLMOutput(logits=self._file.last(rows).unsqueeze(1))
        logits = torch.zeros((*input_ids.shape, self._file.vocabulary))
        for place, row in enumerate(rows):
            logits[place, -len(row) :] = self._file.logits(row)
        return CausalLMOutput(logits=logits)


def _unpadded(row: Tensor, mask: Tensor | None, place: int) -> list[int]:
    """A row's tokens; one that is padding alone keeps a token, as there is nothing else to continue."""
    tokens = row.tolist() if mask is None else row[mask[place].bool()].tolist()
    return tokens or row[-1:].tolist()
