"""Pools of random models of a chosen size, with the tokenizer of the zoo of version 0.1: for what measures memory."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from scripts.bench.shared import zoo1

_NOISE = 0.002


def make(folder: Path, models: int, width: int, layers: int, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a base, models near it and a run's configuration below a folder; returns the configuration's path."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo1.BASE)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        names = ["base", *(f"model{number}" for number in range(models))]
        for name in names:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(_NOISE * torch.randn_like(parameter))
    run = {
        "name": "memory",
        "base_model": "base",
        "models": {name: name for name in names[1:]},
        "include_path": str(zoo1.TASKS),
        "tasks": [{"task": "zoo_names", "metric": "acc", "limit": 16}],
        "search": {"strategy": "baselines", "trials": 1},
        "report": {"at_end": False},
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    return path
