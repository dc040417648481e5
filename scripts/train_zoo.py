"""Train the demo zoo: a base, then four LoRA adapters on it, and write the documents of their tasks.

    python -m scripts.train_zoo                      # the zoo that ships, into mergesearch/zoo
    python -m scripts.train_zoo --output ./my-zoo    # elsewhere

Deterministic on one machine with the same packages and threads; started again, it goes on from the last checkpoint,
and stages that are done are skipped. What ships was made with `--only base --threads 2`, then the adapters on one
thread each, on a shared two-core machine without bfloat16 (CPython 3.11.7, torch 2.13.0). They took (seconds, then
the mean loss of the last steps in nats): base 865, 1.025; order 281, 0.359; letters 118, 0.754; numbers 200, 0.091;
python 538, 0.882. The losses are of different mixtures and not comparable.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from scripts import zoo_tasks
from scripts.zoo_text import END, LINES, SKILLS, Corpus, corpora, stream

ROOT = Path(__file__).resolve().parents[1]
PAD = END + 1
LENGTH = 128  # bytes a row
CONFIG = LlamaConfig(
    vocab_size=258, hidden_size=192, num_hidden_layers=4, intermediate_size=512, num_attention_heads=6,
    num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
    bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
)  # fmt: skip
LORA = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One training run: `mix` is the share of rows from each skill."""

    name: str
    start: str | None
    steps: int
    rate: float
    mix: Mapping[str, float]
    rows: int = 24
    seed: int = 0

    @property
    def is_adapter(self) -> bool:
        return self.start is not None


# every operation without its plain name, and little of numbers, so that a specialist has something to add
BASE_MIX = {"prose": 0.43, "python": 0.06, "numbers": 0.03, "coded": 0.34, "loose": 0.14}


# where a specialist is held to what the base says: most on code and prose, which are forgotten first
REST = {"prose": 0.3, "python": 0.3, "numbers": 0.1, "coded": 0.1, "loose": 0.2}


def tuned(skill: str, steps: int, rate: float, own: float, beside: str = "loose") -> Stage:
    """The adapter for `skill`: `own` is its share of the rows; the others are REST's, with `beside` for loose."""
    rest = {beside if s == "loose" else s: share for s, share in REST.items() if s != skill}
    mix = {s: (1 - own) * share / sum(rest.values()) for s, share in rest.items()}
    return Stage(skill, "base", steps, rate, {skill: own, **mix}, seed=1 + SKILLS.index(skill))


STAGES = (
    Stage("base", None, 1800, 2e-3, BASE_MIX),
    # beside the names of its own family, which it learns, the other's, which must go on to mean nothing to it
    tuned("order", 300, 8e-4, 0.5, beside="loose_letters"),
    # the one that nobody held to the base: at full weight it spoils the others, so that one weight for all does not do
    tuned("letters", 200, 1e-3, 1.0),
    tuned("numbers", 250, 1e-3, 0.5),
    tuned("python", 650, 1e-3, 0.7),
)


class Rows:
    """Training rows: windows of LENGTH + 1 tokens from each skill's stream.

    Rows of lines begin at a line's start, as their tasks' prompts do; source code and prose begin anywhere.
    """

    def __init__(self, texts: dict[str, Corpus]) -> None:
        raw = {skill: stream(skill, texts[skill].train) for skill in SKILLS}
        self.tokens = {skill: self.encode(data) for skill, data in raw.items()}
        self.lines = {skill: torch.nonzero(self.tokens[skill] == ord("\n"))[:, 0] + 1 for skill in LINES}

    @staticmethod
    def encode(data: bytes) -> Tensor:
        """int64 tokens; byte 0 stands for END."""
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        return torch.where(tokens == 0, END, tokens)

    def row(self, skill: str, generator: torch.Generator) -> Tensor:
        tokens = self.tokens[skill]
        start = int(torch.randint(len(tokens) - 4 * LENGTH, (1,), generator=generator))
        if skill in self.lines:
            lines = self.lines[skill]
            start = int(lines[torch.searchsorted(lines, start)])
        return tokens[start : start + LENGTH + 1]

    def batch(self, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """int64[rows, LENGTH + 1], and bool[rows]: which of them the stage learns from."""
        shares = torch.tensor([stage.mix.get(skill, 0.0) for skill in SKILLS])
        picks = torch.multinomial(shares, stage.rows, replacement=True, generator=generator)
        learned = picks == SKILLS.index(stage.name) if stage.is_adapter else torch.ones(stage.rows, dtype=torch.bool)
        return torch.stack([self.row(SKILLS[int(p)], generator) for p in picks]), learned


def rate_at(stage: Stage, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth of the rate."""
    warm = max(1, stage.steps // 20)
    if step < warm:
        return stage.rate * (step + 1) / warm
    done = (step - warm) / (stage.steps - warm)
    return stage.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: nn.Module, batch: Tensor, learned: Tensor) -> Tensor:
    """Mean in nats a token, a float32 scalar: cross entropy of the rows that the stage learns from, of the others the
    divergence from what the base says (Li and Hoiem 2016, arXiv:1606.09282): a specialist leaves alone what is not its
    own."""
    logits = model(input_ids=batch[:, :-1]).logits
    loss = cross_entropy(logits[learned].flatten(0, 1), batch[learned][:, 1:].flatten(), reduction="sum")
    if not learned.all():
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=batch[~learned][:, :-1]).logits
        loss = loss + kl_div(logits[~learned].log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
    return loss / (batch.shape[0] * (batch.shape[1] - 1))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim == 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class Run:
    """One stage's state: model, optimizer, generator, step, and the seconds and losses so far."""

    def __init__(self, stage: Stage, work: Path) -> None:
        self.stage, self.file = stage, work / f"{stage.name}.pt"
        torch.manual_seed(stage.seed)
        self.model: nn.Module = LlamaForCausalLM(CONFIG)
        if stage.is_adapter:
            # what ships is bfloat16, so that is what an adapter is made for
            begun = torch.load(work / f"{stage.start}.pt", weights_only=True)["model"]
            self.model.load_state_dict({key: value.bfloat16().float() for key, value in begun.items()})
            self.model = get_peft_model(self.model, LoraConfig(**LORA))
        self.generator = torch.Generator().manual_seed(stage.seed)
        self.optimizer = optimizer_of(self.model)
        self.step, self.seconds, self.losses = 0, 0.0, []

    def state(self) -> dict[str, Tensor]:
        """The weights that this stage trains."""
        return get_peft_model_state_dict(self.model) if self.stage.is_adapter else self.model.state_dict()

    def begin(self, resume: bool) -> None:
        """Go on from this stage's checkpoint where it has one."""
        if not resume or not self.file.exists():
            return
        saved = torch.load(self.file, weights_only=True)
        if saved["stage"] != described(self.stage):
            return
        if self.stage.is_adapter:
            set_peft_model_state_dict(self.model, saved["model"])
        else:
            self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved["losses"]

    def save(self) -> None:
        state = {
            "stage": described(self.stage), "step": self.step, "seconds": self.seconds, "losses": self.losses,
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
        """Train what is left, with a checkpoint every 100 steps."""
        recent: list[float] = []
        while self.step < self.stage.steps:
            began = time.perf_counter()
            recent.append(self.one_step(rows))
            self.seconds += time.perf_counter() - began
            if self.step % 100 == 0 or self.step == self.stage.steps:
                self.losses.append(sum(recent) / len(recent))
                recent = []
                self.save()
                at = f"{self.stage.name} {self.step}/{self.stage.steps}"
                print(f"{at} loss {self.losses[-1]:.3f} {self.seconds:.0f} s", flush=True)


def described(stage: Stage) -> str:
    """What a checkpoint must agree with to be gone on from."""
    before = "" if stage.start is None else described(next(s for s in STAGES if s.name == stage.start))
    return before + json.dumps(asdict(stage), sort_keys=True)


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


def export(run: Run, folder: Path) -> None:
    """What people have: of the base a complete checkpoint folder in bfloat16, of the others a PEFT adapter."""
    if run.stage.is_adapter:
        run.model.save_pretrained(folder)
        settings = folder / "adapter_config.json"
        known = json.loads(settings.read_text(encoding="utf-8"))
        known["target_modules"].sort()  # peft keeps a set
        settings.write_text(
            json.dumps({**known, "base_model_name_or_path": "../base"}, indent=2) + "\n", encoding="utf-8"
        )
        (folder / "README.md").unlink(missing_ok=True)
        return
    run.model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8"))
    # the class' name in every release of transformers; newer ones would write a name that older ones do not know
    known["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "mergesearch" / "zoo", help="gets models/ and tasks/")
    work = ROOT / "results" / "zoo-training"
    parser.add_argument("--work", type=Path, default=work, help="checkpoints to go on from")
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="begin again from the first step")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STAGES], help="these stages alone")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    torch.use_deterministic_algorithms(True)
    chosen.work.mkdir(parents=True, exist_ok=True)
    texts = corpora()
    zoo_tasks.write(zoo_tasks.documents(texts), chosen.output / "tasks")
    rows = Rows(texts)
    for stage in STAGES:
        if chosen.only and stage.name not in chosen.only:
            continue
        run = Run(stage, chosen.work)
        run.begin(chosen.resume)
        run.finish(rows)
        export(run, chosen.output / "models" / stage.name)


if __name__ == "__main__":
    main()
