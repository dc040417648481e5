"""The form in which a model will be served: weights of linear layers in 8 or 4 bits, by torchao.

A candidate is merged as any other; then each linear layer's weights, but the head's, are quantised and taken back, so
that the live model computes with the numbers that will be served (weights alone are quantised: what flows through the
layers stays as it is). Which layers and how: `torchao`'s configurations, as transformers applies them to the export.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergesearch.config.served import is_filed
from mergesearch.engine.gguf.form import check_filed
from mergesearch.errors import UserError
from mergesearch.recipe import DType

# numbers of a group that have a scale of their own, with 4 bits
_GROUP = 32


def check_served(form: str | None) -> None:
    """Refuses a form that cannot be had here, before anything is loaded.

    Raises:
        UserError: torchao, or what makes and reads files for llama.cpp, is not installed.
    """
    if is_filed(form):
        check_filed(form)
    elif form is not None and importlib.util.find_spec("torchao") is None:
        raise UserError(f"score_as is {form}, which needs torchao: pip install 'mergesearch[torchao]'")


class Served:
    """Weights as a form will have them.

    Args:
        form: `int8`, a scale for each row; `int4`, a scale for each 32 numbers of a row; `fp8`, e4m3 with a scale for
            each tensor.

    Raises:
        UserError: torchao is not installed.
    """

    def __init__(self, form: str):
        check_served(form)
        self.form = form

    def layers(self, model: Any) -> dict[str, nn.Linear]:
        """The layers that are quantised, by the live name of their weights; not the head, nor what no form can have."""
        head = model.get_output_embeddings()
        linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        return {n: m for n, m in linear.items() if self.form != "int4" or m.in_features % _GROUP == 0}

    @torch.no_grad()
    def taken_back(self, weight: Tensor) -> Tensor:
        """A layer's weights (out, in) as they will be computed with, in their own dtype."""
        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        holder[0].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        _torchao().quantize_(holder, self._config())
        quantised: Any = holder[0].weight
        return quantised.dequantize().to(weight.dtype)

    def write(self, checkpoint: Path, dtype: DType, trust_remote_code: bool = False) -> Path:
        """Writes a checkpoint in this form into a folder inside it, for `from_pretrained`; returns that folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

        told: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": getattr(torch, dtype)}
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, **told)
        mine = {name.removesuffix(".weight") for name in self.layers(plain)}
        others = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n not in mine]
        del plain
        quantisation = TorchAoConfig(self._config(), modules_to_not_convert=others)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantisation, **told)
        out = checkpoint / self.form
        model.save_pretrained(out)
        if (checkpoint / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code).save_pretrained(out)
        return out

    def _config(self) -> Any:
        ao = _torchao()
        if self.form == "int8":
            return ao.Int8WeightOnlyConfig(version=2)
        if self.form == "fp8":
            return ao.Float8WeightOnlyConfig()
        return ao.IntxWeightOnlyConfig(weight_dtype=cast(Any, torch).int4, granularity=ao.PerGroup(_GROUP))


def _torchao() -> Any:
    """An extra, and so not there for everyone, type checkers among them."""
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    return quantization
