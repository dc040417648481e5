"""Tiny models, a byte-level tokenizer and lm-eval tasks of every request type, for tests of mergesearch.evaluate."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty", "knoll", "larch"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{letter: number for number, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHAT)


def make_model(seed: int) -> LlamaForCausalLM:
    """Random weights, large enough that answers differ between prompts."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32).eval()


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    ids = tokenizer.encode(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-tokens:])


def write_tasks(folder: Path) -> Path:
    """Tasks of each request type and variants, in `folder/tasks`; model 0 is right on about every other document."""
    rng, tasks = random.Random(5), folder / "tasks"
    tasks.mkdir(parents=True)
    model, tokenizer = make_model(0), make_tokenizer()
    sentence = lambda n: " ".join(rng.choices(WORDS, k=n))  # noqa: E731
    choice = [
        {"question": sentence(rng.randint(2, 9)), "choices": rng.sample(WORDS, 4), "answer": rng.randrange(4)}
        for _ in range(24)
    ]
    choice[3]["question"] = sentence(70)  # longer than the model's 256 positions
    last_word = [{"text": sentence(4), "last": f" {rng.choice(WORDS)}"} for _ in range(12)]
    for number in range(0, 12, 2):
        last_word[number]["last"] = greedy(model, tokenizer, last_word[number]["text"], 1)
    copying = [{"prompt": f"copy: {sentence(rng.randint(1, 5))} ->"} for _ in range(12)]
    for number, document in enumerate(copying):
        document["target"] = greedy(model, tokenizer, document["prompt"], 4) if number % 2 else rng.choice(WORDS)
    passages = [{"text": sentence(rng.choice([3, 8, 30, 60]))} for _ in range(12)]
    data = {"choice": choice, "shown": choice[16:], "last": last_word, "copy": copying, "passages": passages}
    for name, documents in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, config in _configs().items():
        write_task(folder, name, **config)
    return tasks


def write_task(folder: Path, name: str, data: str, shown: str | None = None, **config: object) -> None:
    """A task's YAML; `data` and `shown` are JSONL files in `folder`, given by their stems."""
    files = {"test": str(folder / f"{data}.jsonl"), **({"train": str(folder / f"{shown}.jsonl")} if shown else {})}
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **({"training_split": "train", "fewshot_split": "train"} if shown else {}),
    }
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**source, **config}))


def metric(name: str, higher_is_better: bool = True, aggregation: str = "mean") -> dict:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def _configs() -> dict[str, dict]:
    choices = {
        "data": "choice",
        "shown": "shown",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [metric("acc"), metric("acc_norm")],
    }
    first_word = {"function": "regex", "regex_pattern": r"(\S+)"}
    copying = {
        "data": "copy",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "metric_list": [metric("exact_match")],
    }
    return {
        "tiny_choice": choices,
        "tiny_shots": {**choices, "num_fewshot": 2},
        "tiny_fixed": {**choices, "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}},
        "tiny_zero": {**choices, "num_fewshot": 0},
        "tiny_mcc": {**choices, "metric_list": [metric("mcc", aggregation="matthews_corrcoef")]},
        "tiny_last": {
            "data": "last",
            "output_type": "loglikelihood",
            "doc_to_text": "text",
            "doc_to_target": "last",
            "target_delimiter": "",
            "metric_list": [metric("acc"), metric("perplexity", False, "perplexity")],
        },
        "tiny_copy": {
            **copying,
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False},
            "filter_list": [
                {"name": "whole", "filter": [{"function": "take_first"}]},
                {"name": "word", "filter": [first_word, {"function": "take_first"}]},
            ],
        },
        "tiny_vote": {
            **copying,
            "repeats": 3,
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 0.2},
            "filter_list": [{"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]}],
        },
        "tiny_passages": {
            "data": "passages",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                metric("bits_per_byte", False, "bits_per_byte"),
                metric("byte_perplexity", False, "weighted_perplexity"),
                metric("word_perplexity", False, "weighted_perplexity"),
            ],
        },
    }


def write_group(folder: Path, name: str, members: list, metric_name: str = "acc", by_size: bool = True) -> None:
    aggregate = [{"metric": metric_name, "weight_by_size": by_size}]
    config = {"group": name, "task": members, "aggregate_metric_list": aggregate}
    (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(config))
