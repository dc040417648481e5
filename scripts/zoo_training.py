"""Training for zoos of small byte-level models: a base, then what is fine-tuned from it; resumable, deterministic."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = 256  # the token that ends a text; a byte is its own token
PAD = END + 1
IGNORED = -100  # a target that is not learned
CHECKPOINT = 100  # steps
ARROW = b" ->"


@dataclass(frozen=True)
class Stage:
    """One training run: `mix` is the share of rows from each skill.

    Attributes:
        start: the stage whose weights it begins from; None begins from chance.
        adapter: whether it trains LoRA adapters, or all weights.
    """

    name: str
    start: str | None
    steps: int
    rate: float
    mix: Mapping[str, float]
    rows: int = 24
    seed: int = 0
    adapter: bool = False


@dataclass(frozen=True)
class Plan:
    """A zoo: the stages in order, of models of one configuration.

    Attributes:
        config: the models'.
        stages: each begins from one before it.
        lora: settings of the adapters.
        dtype: of the base that is written; adapters are made for a base that is rounded to it.
    """

    config: LlamaConfig
    stages: tuple[Stage, ...]
    lora: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16

    def described(self, stage: Stage) -> str:
        """What a checkpoint must agree with to be gone on from."""
        before = "" if stage.start is None else self.described(next(s for s in self.stages if s.name == stage.start))
        return before + json.dumps(asdict(stage), sort_keys=True)


def llama(width: int, layers: int, heads: int, inner: int) -> LlamaConfig:
    """A byte-level Llama with tied embeddings and 512 positions."""
    return LlamaConfig(
        vocab_size=PAD + 1, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip


def lora(rank: int) -> dict[str, Any]:
    """LoRA on every matrix of every layer, its scale 2."""
    return {
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip


class Rows:
    """Training rows: windows of `length` + 1 tokens from each skill's stream.

    Rows of lines begin at a line's start, as their tasks' prompts do; source code and prose begin anywhere.

    Args:
        streams: skill -> its text in one piece.
        lines: the skills whose texts are lines.
        length: bytes that a row predicts.
        answers: learn only what follows the arrow of a line, with the line's end.
    """

    def __init__(self, streams: Mapping[str, bytes], lines: Collection[str], length: int, answers: bool = False):
        self.skills, self.length = tuple(streams), length
        self.tokens = {skill: self.encode(data) for skill, data in streams.items()}
        self.targets = {
            skill: answer_targets(data) if answers else self.tokens[skill] for skill, data in streams.items()
        }
        self.lines = {skill: torch.nonzero(self.tokens[skill] == ord("\n"))[:, 0] + 1 for skill in lines}

    @staticmethod
    def encode(data: bytes) -> Tensor:
        """int64 tokens; byte 0 stands for END."""
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        return torch.where(tokens == 0, END, tokens)

    def row(self, skill: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = int(torch.randint(len(self.tokens[skill]) - 4 * self.length, (1,), generator=generator))
        if skill in self.lines:
            lines = self.lines[skill]
            start = int(lines[torch.searchsorted(lines, start)])
        window = slice(start, start + self.length + 1)
        return self.tokens[skill][window], self.targets[skill][window]

    def batch(self, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, targets), int64[rows, length + 1], and bool[rows]: which of them the stage learns from."""
        shares = torch.tensor([stage.mix.get(skill, 0.0) for skill in self.skills])
        picks = torch.multinomial(shares, stage.rows, replacement=True, generator=generator)
        everything = torch.ones(stage.rows, dtype=torch.bool)
        learned = picks == self.skills.index(stage.name) if stage.adapter else everything
        tokens, targets = zip(*(self.row(self.skills[int(p)], generator) for p in picks), strict=True)
        return torch.stack(tokens), torch.stack(targets), learned


def answer_targets(data: bytes) -> Tensor:
    """int64 tokens of lines, IGNORED up to each line's arrow."""
    targets, start = Rows.encode(data).clone(), 0
    for line in data.splitlines(keepends=True):
        targets[start : start + line.index(ARROW) + len(ARROW)] = IGNORED
        start += len(line)
    return targets


def rate_at(stage: Stage, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth of the rate."""
    warm = max(1, stage.steps // 20)
    if step < warm:
        return stage.rate * (step + 1) / warm
    done = (step - warm) / (stage.steps - warm)
    return stage.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: nn.Module, batch: Tensor, targets: Tensor, learned: Tensor) -> Tensor:
    """Mean in nats a token, a float32 scalar: cross entropy of the rows that the stage learns from, of the others the
    divergence from what the base says (Li and Hoiem 2016, arXiv:1606.09282): a specialist leaves alone what is not its
    own."""
    logits = model(input_ids=batch[:, :-1]).logits
    wanted = targets[learned][:, 1:].flatten()
    loss = cross_entropy(logits[learned].flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
    if not learned.all():
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=batch[~learned][:, :-1]).logits
        loss = loss + kl_div(logits[~learned].log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
    return loss / (targets[:, 1:] != IGNORED).sum()


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim == 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class Run:
    """One stage's state: model, optimizer, generator, step, and the seconds and losses so far."""

    def __init__(self, plan: Plan, stage: Stage, work: Path) -> None:
        self.plan, self.stage, self.file = plan, stage, work / f"{stage.name}.pt"
        torch.manual_seed(stage.seed)
        self.model: nn.Module = LlamaForCausalLM(plan.config)
        if stage.start is not None:
            # what is written is rounded, so that is what a fine-tune begins from
            begun = torch.load(work / f"{stage.start}.pt", weights_only=True)["model"]
            self.model.load_state_dict({key: value.to(plan.dtype).float() for key, value in begun.items()})
        if stage.adapter:
            self.model = get_peft_model(self.model, LoraConfig(**plan.lora))
        self.generator = torch.Generator().manual_seed(stage.seed)
        self.optimizer = optimizer_of(self.model)
        self.step, self.seconds, self.losses = 0, 0.0, []

    def state(self) -> dict[str, Tensor]:
        """The weights that this stage trains."""
        return get_peft_model_state_dict(self.model) if self.stage.adapter else self.model.state_dict()

    def begin(self, resume: bool) -> None:
        """Go on from this stage's checkpoint where it has one."""
        if not resume or not self.file.exists():
            return
        saved = torch.load(self.file, weights_only=True)
        if saved["stage"] != self.plan.described(self.stage):
            return
        if self.stage.adapter:
            set_peft_model_state_dict(self.model, saved["model"])
        else:
            self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved["losses"]

    def save(self) -> None:
        state = {
            "stage": self.plan.described(self.stage), "step": self.step, "seconds": self.seconds, "losses": self.losses,
            "model": self.state(), "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def one_step(self, rows: Rows) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.stage, self.step)
        loss = loss_of(self.model, *rows.batch(self.stage, self.generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def finish(self, rows: Rows) -> None:
        """Train what is left, with a checkpoint every CHECKPOINT steps."""
        recent: list[float] = []
        while self.step < self.stage.steps:
            began = time.perf_counter()
            recent.append(self.one_step(rows))
            self.seconds += time.perf_counter() - began
            if self.step % CHECKPOINT == 0 or self.step == self.stage.steps:
                self.losses.append(sum(recent) / len(recent))
                recent = []
                self.save()
                at = f"{self.stage.name} {self.step}/{self.stage.steps}"
                print(f"{at} loss {self.losses[-1]:.3f} {self.seconds:.0f} s", flush=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a byte is its own token, then the end and the padding."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    end, pad = "<|endoftext|>", "<|pad|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=end, eos_token=end, pad_token=pad, model_max_length=512,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_adapter(model: PeftModel, folder: Path) -> None:
    """A PEFT adapter of the base beside it."""
    model.save_pretrained(str(folder))
    settings = folder / "adapter_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    known["target_modules"].sort()  # peft keeps a set
    settings.write_text(json.dumps({**known, "base_model_name_or_path": "../base"}, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def export(run: Run, folder: Path) -> None:
    """What people have: a complete checkpoint folder, or a PEFT adapter of the base beside it."""
    if isinstance(run.model, PeftModel):
        write_adapter(run.model, folder)
        return
    run.model.to(run.plan.dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    # the class' name in every release of transformers; newer ones would write a name that older ones do not know
    known["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def train(plan: Plan, rows: Rows, work: Path, models: Path, resume: bool = True, only: Collection[str] = ()) -> None:
    """Trains and writes the stages, each into MODELS/NAME, from their checkpoints in `work` where they have some."""
    work.mkdir(parents=True, exist_ok=True)
    for stage in plan.stages:
        if only and stage.name not in only:
            continue
        run = Run(plan, stage, work)
        run.begin(resume)
        run.finish(rows)
        export(run, models / stage.name)
