"""The figures against the `lm_eval` command on an exported checkpoint."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from support.commands import lm_eval
from support.evaluate_tiny import make_model, make_tokenizer, metric, write_task, write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergesearch.config import TaskConfig
from mergesearch.evaluate.scoring import Scorer, lm_eval_samples
from mergesearch.evaluate.tasks import load, split

EVERY = {
    "tiny_choice": "acc_norm",
    "tiny_shots": "acc",
    "tiny_word": "acc",
    "tiny_copy": "exact_match,word",
    "tiny_passages": "bits_per_byte",
}


def test_one_command_for_every_request_type(tmp_path):
    write_tasks(tmp_path)
    config = {"output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": "last", "target_delimiter": ""}
    write_task(tmp_path, "tiny_word", "last", **config, metric_list=[metric("acc")])
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    tasks = load([TaskConfig(task=name, metric=chosen) for name, chosen in EVERY.items()], [str(tmp_path / "tasks")])
    documents = {task.label: split(task, 0.5, seed=0).search for task in tasks}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    scores = Scorer(model, tokenizer, tasks, documents, batch_size=4).score()

    command = ["run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(tmp_path / "tasks")]
    command += ["--tasks", ",".join(EVERY), "--samples", json.dumps(lm_eval_samples(tasks, documents))]
    command += ["--output_path", str(tmp_path / "out")]
    lm_eval(*command, cwd=tmp_path)

    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    for task in tasks:
        ours, theirs = scores.tasks[task.label], results[task.label]
        assert ours.value == theirs[f"{task.metric},{task.filter}"], task.label
        if task.aggregation == "mean":
            assert ours.stderr == theirs[f"{task.metric}_stderr,{task.filter}"], task.label


def test_one_command_with_what_users_set(tmp_path):
    """gen_kwargs, code that runs, a tag, thinking, attention: the card's options, and the figures beside them."""
    write_tasks(tmp_path)
    source = "def process_results(doc, results):\n    scope = {}\n    exec(f'answer = {results[0]!r}', scope)\n"
    source += "    return {'ran': float(len(scope['answer']))}\n"
    (tmp_path / "tasks" / "running.py").write_text(source)
    how = {"output_type": "generate_until", "doc_to_text": "prompt", "doc_to_target": "target", "tag": ["tiny_tag"]}
    how["generation_kwargs"] = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    for name in ("tiny_code", "tiny_code_too"):
        write_task(tmp_path, name, "copy", **how, unsafe_code=True, metric_list=[metric("ran")])
        path = tmp_path / "tasks" / f"{name}.yaml"
        path.write_text(path.read_text() + "process_results: !function running.process_results\n")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}"
    make_model(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generation = {"max_gen_toks": 9, "until": ["q"]}
    config = TaskConfig(task="tiny_tag", metric="ran", gen_kwargs=generation)
    tasks = load([config], [str(tmp_path / "tasks")], unsafe_code=True)
    documents = {"tiny_tag": [0, 1, 2, 3, 13, 14, 20]}
    thinking = {"attn_implementation": "eager", "enable_thinking": True, "think_end_token": "e"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chat = {"apply_chat_template": True, **thinking}
    scorer = Scorer(model, AutoTokenizer.from_pretrained(tmp_path / "model"), tasks, documents, batch_size=4, **chat)
    scores = scorer.score()

    command = ["run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", json.dumps({"pretrained": str(tmp_path / "model"), **thinking})]
    command += ["--include_path", str(tmp_path / "tasks"), "--tasks", "tiny_tag", "--apply_chat_template"]
    command += ["--samples", json.dumps(lm_eval_samples(tasks, documents)), "--gen_kwargs", json.dumps(generation)]
    command += ["--confirm_run_unsafe_code", "--output_path", str(tmp_path / "out"), "--log_samples"]
    lm_eval(*command, cwd=tmp_path)
    logged = {}
    for name in ("tiny_code", "tiny_code_too"):
        for line in next((tmp_path / "out").rglob(f"samples_{name}_2*.jsonl")).read_text().splitlines():
            sample = json.loads(line)
            logged[tasks[0].offset(name) + sample["doc_id"]] = sample["ran"]
    ours = scores.documents["tiny_tag"]
    assert dict(zip(ours.ids, ours.values.tolist(), strict=True)) == logged
    assert len(set(logged.values())) > 1 and max(ours.length) <= 9
