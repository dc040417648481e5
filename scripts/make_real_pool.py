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
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mergesearch.checkpoints import choose_device
from scripts.pool_files import write_config, write_table
from scripts.real_skills import SKILLS
from scripts.skills import DOCUMENTS, Example, Skill, write_tasks
from scripts.zoo_training import IGNORED, lora, write_adapter

ROWS = 16


@dataclass(frozen=True)
class Sibling:
    """One fine-tune of the base.

    Attributes:
        name: of the model.
        skill: what it is trained on.
        share: of the steps that it gets.
        shuffled: each prompt has another one's answer, so that nothing can be learned.
    """

    name: str
    skill: Skill
    share: float = 1.0
    shuffled: bool = False

    def examples(self, seed: int, documents: int) -> Iterator[Example]:
        found = self.skill.training(seed, documents)
        if not self.shuffled:
            return found
        return (Example(one.prompt, other.answer) for one, other in zip(found, found, strict=False))


@dataclass(frozen=True)
class RealPool:
    """Siblings of one base.

    Attributes:
        name: of the search's configuration.
        siblings: the models.
        rank: of their LoRA adapters; None trains all weights.
        holdout: share of the documents that a search does not see.
    """

    name: str
    siblings: tuple[Sibling, ...]
    rank: int | None = None
    holdout: float = 0.5

    @property
    def skills(self) -> list[Skill]:
        """What is tested: each skill once."""
        return list({sibling.skill.name: sibling.skill for sibling in self.siblings}.values())


REAL = RealPool("real", tuple(Sibling(skill.name, skill) for skill in SKILLS))


def main(arguments: Sequence[str] | None = None) -> int:
    print("\n".join(make(REAL, options(arguments))))
    return 0


def make(pool: RealPool, chosen: argparse.Namespace, made_by: str = "scripts/make_real_pool.py") -> list[str]:
    """Makes what is missing of a pool; returns the table's lines."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = choose_device(chosen.device)
    folder = chosen.out / "models"
    write_tasks(chosen.out / "tasks", pool.skills, chosen.seed, chosen.documents)
    file = write_config(
        chosen.out,
        pool.name,
        [sibling.name for sibling in pool.siblings],
        pool.skills,
        made_by=made_by,
        dtype=chosen.dtype,
        device=chosen.device,
        seed=chosen.seed,
        holdout=pool.holdout,
    )
    save_base(chosen.base, folder / "base", chosen.dtype)
    for sibling in pool.siblings:
        if not any((folder / sibling.name / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            model, tokenizer = fine_tune(sibling, chosen, device, pool.rank)
            save(model, tokenizer, folder / sibling.name, chosen.dtype)
    return write_table(file, chosen.check)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="what scripts/fetch_smollm2.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for models, tasks and configuration")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1e-4, help="the largest learning rate")
    parser.add_argument("--rows", type=int, default=ROWS, help="examples a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the checkpoints")
    products = "of matrix products in training; float32 is much faster where a CPU has no bfloat16"
    parser.add_argument("--products", choices=("float32", "bfloat16"), default="bfloat16", help=products)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of each task; half of them are the holdout")
    parser.add_argument("--check", type=int, default=100, help="search documents of each task for the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    if not (chosen.base / "config.json").is_file():
        parser.error(f"--base {chosen.base} is no checkpoint: make it with scripts/fetch_smollm2.py")
    return chosen


# --- training ---


def fine_tune(
    sibling: Sibling, chosen: argparse.Namespace, device: torch.device, rank: int | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) after the sibling's share of `chosen.steps`; weights and optimizer in float32."""
    torch.manual_seed(chosen.seed)
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    model = AutoModelForCausalLM.from_pretrained(chosen.base, dtype=torch.float32).to(device).train()
    if rank is not None:
        model = get_peft_model(model, LoraConfig(**lora(rank)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=chosen.rate, betas=(0.9, 0.98), weight_decay=0.0)
    examples, began, losses = sibling.examples(chosen.seed, chosen.documents), time.perf_counter(), []
    steps = max(1, round(sibling.share * chosen.steps))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * schedule(step, steps)
        rows = batch(list(islice(examples, chosen.rows)), tokenizer, device)
        losses.append(one_step(model, optimizer, rows, chosen.products == "bfloat16"))
        if (step + 1) % 20 == 0 or step + 1 == steps:
            recent, seconds = sum(losses[-20:]) / len(losses[-20:]), time.perf_counter() - began
            print(f"{sibling.name} {step + 1}/{steps} loss {recent:.3f} {seconds:.0f} s", flush=True)
    return model, tokenizer


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linearly down to a twentieth."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 1 - 0.95 * (step - warm) / max(1, steps - warm)


def one_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: tuple[Tensor, Tensor], halved: bool
) -> float:
    tokens, targets = rows
    wanted = targets[:, 1:]
    places = (wanted != IGNORED).any(0).nonzero()[:, 0]  # the head is a fifth of the work, and most places ask nothing
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=halved):
        logits = model(input_ids=tokens[:, :-1], logits_to_keep=places).logits
    loss = cross_entropy(logits.float().flatten(0, 1), wanted[:, places].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(tokens, targets), int64[examples, longest], padded on the right; only answers are targets, with the line's
    end."""
    rows = [pieces(example, tokenizer) for example in examples]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
    targets = torch.full((len(rows), longest), IGNORED)
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


def save(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """A folder that is there is complete: it gets its name last."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.to("cpu").to(getattr(torch, dtype))
    if isinstance(model, PeftModel):
        write_adapter(model, part)
    else:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(folder)


if __name__ == "__main__":
    sys.exit(main())
