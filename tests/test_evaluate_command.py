"""The figures against the `lm_eval` command on an exported checkpoint, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

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

    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(tmp_path / "tasks")]
    command += ["--tasks", ",".join(EVERY), "--samples", json.dumps(lm_eval_samples(tasks, documents))]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    for task in tasks:
        ours, theirs = scores.tasks[task.label], results[task.label]
        assert ours.value == theirs[f"{task.metric},{task.filter}"], task.label
        if task.aggregation == "mean":
            assert ours.stderr == theirs[f"{task.metric}_stderr,{task.filter}"], task.label
