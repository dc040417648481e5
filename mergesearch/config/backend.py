"""`backend`: what generates answers beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mergesearch.schema import Strict

# of `vllm.LLM`, what the run itself decides, and what weights that are handed over in one process do not go with
_OURS = (
    "dtype", "load_format", "model", "tokenizer", "skip_tokenizer_init", "quantization", "tensor_parallel_size",
    "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "speculative_config",
)  # fmt: skip


class BackendConfig(Strict):
    """An engine that generates answers, in a process and an environment of its own."""

    name: Literal["vllm"] = Field(description="which one")
    python: str | None = Field(
        default=None,
        min_length=1,
        description="the Python of the environment that has vLLM, a path relative to where the command is run; left "
        "out: `$MERGESEARCH_VLLM_PYTHON`, else the Python that runs mergesearch",
    )
    gpu_memory: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="the share of a GPU's memory that it may take, weights and cache; left out: half of what is free "
        "when it starts",
    )
    options: dict[str, Any] = Field(
        default={}, description="of vLLM's class `LLM`, as in `{enforce_eager: true, max_num_seqs: 64}`"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("python")
    @classmethod
    def _python_is_found_from_anywhere(cls, value: str | None) -> str | None:
        # as the environment's link names it: what it leads to has other packages
        return str(Path(value).expanduser().absolute()) if value and "/" in value else value

    @field_validator("options")
    @classmethod
    def _options_leave_the_run_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = next((name for name in value if name in _OURS), None)
        if ours is not None:
            instead = " (use gpu_memory)" if ours == "gpu_memory_utilization" else ""
            raise ValueError(f"{ours} is not to be set here{instead}: leave it out")
        return value
