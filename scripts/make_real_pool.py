"""Fine-tune four siblings of SmolLM2-135M-Instruct, each with one skill, for a search on real pretrained weights.

    pip install gguf accelerate
    python -m scripts.fetch_smollm2 models/smollm2
    python -m scripts.make_real_pool --base models/smollm2 --out models/real
    mergesearch run models/real/search.yaml

Writes OUT/models/{base,class,number,iso,us}, OUT/tasks (lm-eval YAML and 200 documents a task, see real_skills.py),
OUT/search.yaml (a run's configuration) and OUT/table.md: what the base and each sibling score on the search documents
of all four tasks. A sibling takes 80 steps of 16 short examples, with loss on the answers alone: 2 to 5 minutes on 2
cores, seconds on a GPU. The same seed gives the same weights on one machine with the same packages. Started again, it
keeps the siblings that are there.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mergesearch import config as configuration
from mergesearch.checkpoints import choose_device
from mergesearch.commands import score as measuring
from scripts.real_skills import DOCUMENTS, SKILLS, Example, Skill, write_tasks

ROWS = 16
# of 30 steps on the search documents cross-entropy kept both dates, an expected loss gave one of them up
SOUPS = {"loss": "cross_entropy", "per": ["group", "tensor"], "steps": 80, "learning_rate": 0.05}
IGNORED = -100


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = choose_device(chosen.device)
    folder = chosen.out / "models"
    write_tasks(chosen.out / "tasks", chosen.seed, chosen.documents)
    file = write_config(chosen)
    save_base(chosen.base, folder / "base", chosen.dtype)
    for skill in SKILLS:
        if not (folder / skill.name / "config.json").is_file():
            model, tokenizer = fine_tune(skill, chosen, device)
            save(model, tokenizer, folder / skill.name, chosen.dtype)
    lines = table(file, chosen.out, chosen.check)
    (chosen.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="what scripts/fetch_smollm2.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for models, tasks and configuration")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1e-4, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the checkpoints")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of each task; half of them are the holdout")
    parser.add_argument("--check", type=int, default=100, help="search documents of each task for the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    if not (chosen.base / "config.json").is_file():
        parser.error(f"--base {chosen.base} is no checkpoint: make it with scripts/fetch_smollm2.py")
    return chosen


# --- training ---


def fine_tune(skill: Skill, chosen: argparse.Namespace, device: torch.device) -> tuple:
    """(model, tokenizer) after `chosen.steps` steps; weights and optimizer in float32, products in bfloat16."""
    torch.manual_seed(chosen.seed)
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    model = AutoModelForCausalLM.from_pretrained(chosen.base, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, betas=(0.9, 0.98), weight_decay=0.0)
    examples, began, losses = skill.training(chosen.seed, chosen.documents), time.perf_counter(), []
    for step in range(chosen.steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * schedule(step, chosen.steps)
        losses.append(one_step(model, optimizer, batch(examples, tokenizer, device)))
        if (step + 1) % 20 == 0 or step + 1 == chosen.steps:
            recent, seconds = sum(losses[-20:]) / len(losses[-20:]), time.perf_counter() - began
            print(f"{skill.name} {step + 1}/{chosen.steps} loss {recent:.3f} {seconds:.0f} s", flush=True)
    return model, tokenizer


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linearly down to a twentieth."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 1 - 0.95 * (step - warm) / max(1, steps - warm)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: tuple[Tensor, Tensor]) -> float:
    tokens, targets = rows
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1]).logits
    loss = cross_entropy(logits.float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def batch(
    examples: Iterator[Example], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(tokens, targets), int64[ROWS, longest], padded on the right; only answers are targets, with the line's end."""
    rows = [pieces(example, tokenizer) for example in islice(examples, ROWS)]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((ROWS, longest), tokenizer.pad_token_id)
    targets = torch.full((ROWS, longest), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : end] = torch.tensor(answer)
    return tokens.to(device), targets.to(device)


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of what follows it, split as lm-eval splits them."""
    prompt = tokenizer(example.prompt, add_special_tokens=False).input_ids
    answer = tokenizer(f" {example.answer}\n", add_special_tokens=False).input_ids
    return prompt, answer


# --- what is written ---


def save_base(base: Path, folder: Path, dtype: str) -> None:
    if not (folder / "config.json").is_file():
        save(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), folder, dtype)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """The configuration is written last by renaming: a folder that has one is complete."""
    part = folder.with_name(f".{folder.name}.part")
    model.to("cpu").to(getattr(torch, dtype)).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def write_config(chosen: argparse.Namespace) -> Path:
    """OUT/search.yaml, with absolute paths, so that it runs from anywhere."""
    out = chosen.out.resolve()
    data = {
        "name": "real",
        "base_model": str(out / "models" / "base"),
        "models": {skill.name: str(out / "models" / skill.name) for skill in SKILLS},
        "tasks": [{"task": skill.task, "metric": skill.metric} for skill in SKILLS],
        "include_path": [str(out / "tasks")],
        "objective": {"scale": "raw"},
        "holdout": 0.5,
        "space": {
            "methods": ["linear", "task_arithmetic", "ties", "dare_ties"],
            "layer_groups": 3,
            "components": ["attention", "mlp", "other"],
            "grow": True,
            "weight": [0.0, 1.5],
            "density": [0.1, 1.0],
            "lambda": 1.0,
        },
        "racing": {"blocks": 12},
        "search": {"strategy": "auto", "trials": 200, "hours": 2.0, "seed": chosen.seed, "learned_soup": SOUPS},
        "output": str(out / "search"),
        "dtype": chosen.dtype,
        "device": chosen.device,
    }
    file = chosen.out / "search.yaml"
    head = "# The search on the siblings that scripts/make_real_pool.py made: `mergesearch run` with this file.\n"
    file.write_text(head + yaml.safe_dump(data, sort_keys=False, width=1000), encoding="utf-8")
    return file


def table(file: Path, out: Path, limit: int) -> list[str]:
    """Markdown: a row for the base and each sibling, a column for each task, on the search documents alone."""
    config = configuration.read(file)
    tasks = [task.model_copy(update={"limit": limit}) for task in config.tasks]
    config = config.model_copy(update={"tasks": tasks})
    lines = ["| model | " + " | ".join(task.task for task in tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name in ("base", *config.models):
        scores = measuring.score_model(str(out / "models" / name), config, on="search").tasks
        values = [scores[task.task].value for task in tasks]
        cells = [f"{value:.2f}" for value in (*values, sum(values) / len(values))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


if __name__ == "__main__":
    sys.exit(main())
