"""`mergesearch init`: what it writes, what it asks, what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import Done, mergesearch
from support.tiny_models import TinyPool, make_model, words
from typer.testing import CliRunner

from mergesearch import cli, zoo
from mergesearch import config as configuration
from mergesearch.commands import proposals
from mergesearch.commands.init import _scalar
from mergesearch.config import Config
from mergesearch.schema import parse_yaml

Pools = Callable[..., TinyPool]


@pytest.fixture
def project(tiny_pool: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `pool/base`, `pool/a`, `pool/b` and `quizzes`: `plain` has one metric, `quiz` two."""
    tiny_pool()
    write_quizzes(tmp_path / "quizzes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_quizzes(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir()
    documents = [
        {"q": " ".join(rng.choices(words(), k=4)), "choices": rng.sample(words(), 3), "answer": rng.randrange(3)}
        for _ in range(60)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, metrics in {"plain": ["acc"], "quiz": ["acc", "acc_norm"]}.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def adapter(folder: Path, base: str) -> Path:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def init(*arguments: object) -> Done:
    return mergesearch("init", *arguments)


QUIZ = ("--task", "plain", "--include-path", "quizzes")
PARENTS = ("--base", "pool/base", "--model", "pool/a", "--model", "second=pool/b")


def stated(path: Path) -> dict[str, Any]:
    return parse_yaml(path.read_text(), str(path))


# --- by options ---


def test_options_alone_write_a_file_that_runs_from_another_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "conf").mkdir()
    done = init("conf/mine.yaml", *PARENTS, *QUIZ, "--limit", 10, "--trials", 1)
    assert done.status == 0, done.err
    assert "conf/mine.yaml is written." in done.out and "budget: 1 trials" in done.out
    assert done.out.splitlines()[-1] == "Next: mergesearch run conf/mine.yaml"
    data = stated(project / "conf" / "mine.yaml")
    dtype = {"dtype": "float32"} if proposals.dtype_for("auto") == "float32" else {}
    assert data == {
        "name": "mine",
        "base_model": "../pool/base",
        "models": {"a": "../pool/a", "second": "../pool/b"},
        "tasks": [{"task": "plain", "limit": 10}],
        "include_path": "../quizzes",
        "search": {"trials": 1},
        **dtype,
    }
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    few = ["--set", "dtype=float32", "--set", "search.strategy=study", "--set", "search.defaults=false"]
    ran = mergesearch("run", "../conf/mine.yaml", *few)
    assert ran.status == 0, ran.err
    assert (project / "elsewhere" / "results" / "mine" / "best" / "recipe.yaml").is_file()


def test_no_key_repeats_a_default(project: Path) -> None:
    assert init(*PARENTS, *QUIZ, "--limit", "all", "--trials", 40, "--no-check").status == 0
    path = project / "mergesearch.yaml"
    data = stated(path)
    usual = {name: f.get_default(call_default_factory=True) for name, f in Config.model_fields.items()}
    assert all(value != usual[key] for key, value in data.items())
    assert "name" not in data and "limit" not in data["tasks"][0] and "search" not in data
    config = configuration.read(path)
    assert config.base_model == str(project / "pool" / "base") and config.include_path == [str(project / "quizzes")]


def test_the_name_names_the_file(project: Path) -> None:
    done = init("--name", "verses", *PARENTS, *QUIZ, "--limit", 5, "--no-check")
    assert done.status == 0 and "budget" not in done.out
    assert stated(project / "verses.yaml")["name"] == "verses"


def test_hours_alone_are_not_cut_short_by_the_usual_number(project: Path) -> None:
    assert init(*PARENTS, *QUIZ, "--limit", 5, "--hours", 2, "--no-check").status == 0
    assert stated(project / "mergesearch.yaml")["search"] == {"trials": 1000, "hours": 2}


def test_nothing_is_overwritten_unasked(project: Path) -> None:
    (project / "mergesearch.yaml").write_text("precious: true\n")
    refused = init(*PARENTS, *QUIZ, "--limit", 5, "--no-check")
    assert refused.status == 2 and "exists already" in refused.err and "--force" in refused.err
    assert (project / "mergesearch.yaml").read_text() == "precious: true\n"
    assert init(*PARENTS, *QUIZ, "--limit", 5, "--no-check", "--force").status == 0
    assert "precious" not in (project / "mergesearch.yaml").read_text()


def test_the_demo_needs_no_more_than_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = init("demo.yaml", "--base", "zoo:base", "--yes", "--limit", 12)
    assert done.status == 0, done.err
    data = stated(tmp_path / "demo.yaml")
    assert data["models"] == {name: f"zoo:{name}" for name in zoo.names()[1:]}
    tasks = sorted(path.stem for path in (zoo.folder() / "tasks").glob("*.yaml"))
    assert data["tasks"] == [{"task": name, "limit": 12} for name in tasks]


def test_a_limit_is_proposed(project: Path) -> None:
    done = init(*PARENTS, *QUIZ, "--yes", "--no-check")
    assert done.status == 0 and "documents to score on: all take a candidate about a second here" in done.err
    assert "limit" not in stated(project / "mergesearch.yaml")["tasks"][0]


def test_adapters_propose_their_base(project: Path) -> None:
    adapter(project / "pool" / "rhymes", "pool/base")
    done = init("--model", "pool/rhymes", *QUIZ, "--limit", 5, "--yes")
    assert done.status == 0, done.err
    assert "the base is pool/base" in done.err
    assert stated(project / "mergesearch.yaml")["base_model"] == "./pool/base"
    assert stated(project / "mergesearch.yaml")["models"] == {"rhymes": "./pool/rhymes"}


def test_an_adapter_of_another_base_is_told(project: Path) -> None:
    adapter(project / "pool" / "rhymes", "someone/other-base")
    done = init("--base", "pool/base", "--model", "pool/rhymes", *QUIZ, "--limit", 5, "--no-check")
    assert done.status == 0 and "note: rhymes says that it was trained on someone/other-base" in done.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no terminal", "--base", "--model", "--task"]),
        (["--yes"], ["propose", "--base", "--model", "--task"]),
        (["--base", "pool/base", "--model", "pool/a"], ["no terminal", "--task"]),
        (["--base", "pool/base", "--model", "./nowhere", *QUIZ], ["./nowhere", "no folder"]),
        (["--base", "pool/base", "--model", "pickled", *QUIZ], ["pickled", "safetensors"]),
        (["--base", "pool/base", "--model", "model.gguf", *QUIZ], ["model.gguf", "is a file"]),
        (["--base", "pool/base", "--model", "pool/base", *QUIZ], ["is the base itself"]),
        (["--base", "pool/base", "--model", "average=pool/a", *QUIZ], ["'average' cannot name a model"]),
        (["--base", "pool/base", "--model", "x=pool/a", "--model", "x=pool/b", *QUIZ], ["models.x", "there already"]),
        (["--base", "zoo:base", "--model", "pool/a", *QUIZ], ["merge models of one", "pool/a"]),
        ([*PARENTS, "--task", "quiz", "--include-path", "quizzes"], ["acc, acc_norm", "--task quiz:acc"]),
        ([*PARENTS, "--task", "plain:ac", "--include-path", "quizzes"], ["'ac'", "'acc'"]),
        ([*PARENTS, "--task", "plain", "--include-path", "quizes"], ["'quizes'"]),
        ([*PARENTS, *QUIZ, "--limit", "few"], ["'few'", "all"]),
        ([*PARENTS, *QUIZ, "--limit", "5", "--hours", "-1"], ["hours", "(0, 1000000]"]),
        ([*PARENTS, *QUIZ, "--device", "gpu"], ["'gpu'", "auto"]),
        (["nowhere/mine.yaml", *PARENTS, *QUIZ], ["no folder nowhere"]),
        (["pool", *PARENTS, *QUIZ], ["pool is a folder"]),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    project: Path, arguments: Sequence[str], parts: Sequence[str]
) -> None:
    (project / "pickled").mkdir()
    (project / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (project / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (project / "model.gguf").write_bytes(b"GGUF")
    before = sorted(project.iterdir())
    done = init(*arguments, "--no-check")
    assert done.status == 2, done.err
    sentence = done.err.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and all(part in sentence for part in parts), sentence
    assert sorted(project.iterdir()) == before


def test_what_check_refuses_is_said_and_the_file_stays(project: Path) -> None:
    assert init("--name", "mine", *PARENTS, *QUIZ, "--limit", 5).status == 0
    (project / "results" / "mine").mkdir(parents=True)
    (project / "results" / "mine" / "thesis.tex").write_text("important")
    done = init("--name", "mine", *PARENTS, *QUIZ, "--limit", 5, "--force")
    assert done.status == 2 and "mine.yaml is written and cannot be run yet" in done.err
    assert (project / "mine.yaml").is_file()


# --- on a terminal ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `init` as on a terminal, with one answer a line."""
    monkeypatch.setattr(cli, "_on_terminal", lambda: True)

    def run(answers: Sequence[str], *arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["init", *arguments], input="".join(f"{line}\n" for line in answers))

    return run


def test_a_conversation_with_wrong_answers(project: Path, asked: Callable[..., Any]) -> None:
    adapter(project / "pool" / "tiny-rhymes", "pool/base")
    answers = [
        *("", "./nowhere", "pool/a", "pool/a", "pool/tiny-rhymes", ""),  # models
        *("pool/a", ""),  # the base: a model, then what the adapter names
        *("one", "base, two", "", ""),  # names, then the folder of tasks: none
        *("quiz",),  # no such task without its folder: the conversation ends with the input
    ]
    done = asked(answers, "--include-path", "quizzes", "--no-check")
    said = " ".join(done.output.split())
    assert "one model at least" in said
    assert "no folder './nowhere'" in said and "is there already" in said
    assert "pool/a is the base itself" in said and "(pool/base)" in said
    assert "'one' is not 2 different names" in said and "'base' cannot name a model" in said
    assert "Score candidates on plain, quiz?" in said
    assert done.exit_code == 1 and not (project / "mergesearch.yaml").exists()


def test_a_conversation_writes_what_was_answered(project: Path, asked: Callable[..., Any]) -> None:
    answers = [
        *("pool/a", "pool/b", "", "pool/base", "first, second"),
        *("nowhere", "quizzes", "n"),  # the folder of tasks, and not all that are in it
        *("quiz", "f1", "acc_norm", "plain:acu", "plain", "plain", ""),
        *("lots", "25", "soon", "1.5h"),
    ]
    done = asked(answers, "mine.yaml")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "which metric of quiz counts?" in said and "Please select one of the available options" in said
    assert "did you mean 'acc'" in said and "list each task once" in said
    assert "the limit is 'lots'" in said and "'soon' is no budget" in said
    assert "ends after 1.5 h" in said and said.endswith("Next: mergesearch run mine.yaml")
    data = stated(project / "mine.yaml")
    assert data["models"] == {"first": "./pool/a", "second": "./pool/b"}
    assert data["tasks"] == [{"task": "quiz", "metric": "acc_norm", "limit": 25}, {"task": "plain", "limit": 25}]
    assert data["search"] == {"trials": 1000, "hours": 1.5}


def test_a_real_terminal_asks_at_once_and_ctrl_c_is_polite(project: Path) -> None:
    lines = on_terminal(["init", "mine.yaml"], [("model 1", "pool/a\n"), ("model 2", "\x03")])
    assert "A few questions, then mine.yaml is written." in lines
    assert "interrupted; mine.yaml was not written" in lines and "Traceback" not in lines
    assert not (project / "mine.yaml").exists()


# a terminal whose first process ends may lose what was printed last: this one waits until that is read
HELD_OPEN = 'trap : INT; "$@"; echo "status $?"; read -r _'


def on_terminal(arguments: Sequence[str], answers: Sequence[tuple[str, str]]) -> str:
    """What the real command shows on a terminal of its own; each answer is typed once its question is there."""
    ours, theirs = pty.openpty()
    command = ["sh", "-c", HELD_OPEN, "sh", sys.executable, "-m", "mergesearch", *arguments]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown, waiting = "", list(answers)
    for piece in _pieces(ours):
        shown += piece
        if waiting and shown.rstrip().endswith(f"{waiting[0][0]}:"):
            os.write(ours, waiting.pop(0)[1].encode())
        if shown.endswith("status 1\r\n"):
            os.write(ours, b"\n")
    os.close(ours)
    process.wait(60)
    assert "status 1\r\n" in shown and not waiting
    return shown


def _pieces(terminal: int) -> Iterator[str]:
    while select.select([terminal], [], [], 120)[0]:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end was closed
            return
        if not piece:
            return
        yield piece.decode()


# --- what is proposed ---


@pytest.mark.parametrize(
    ("reference", "base", "taken", "name"),
    [
        ("./llama-math", "./llama-base", [], "math"),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct@main", "Qwen/Qwen2.5-1.5B", [], "math-instruct"),
        ("runs/code/checkpoint-500", "./base", [], "code"),
        ("runs/code/final", "./base", ["code"], "code-2"),
        ("zoo:letters", "zoo:base", [], "letters"),
        ("owner/model+./adapters/haiku", "owner/model", [], "haiku"),
        ("./base", "./llama", [], "base-2"),
        ("./Schöne Verse.v2", "./llama", [], "sch-ne-verse-v2"),
    ],
)
def test_names_are_guessed(reference: str, base: str, taken: list[str], name: str) -> None:
    assert proposals.name_of(reference, base, taken) == name


def test_references_are_written_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here/models/a", "here/conf", "far/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path / "here")
    assert proposals.written("models/a", Path(".")) == "./models/a"
    assert proposals.written("models/a", Path("conf")) == "../models/a"
    assert proposals.written("models/a", Path("linked")) == "../../here/models/a"
    assert proposals.written("owner/model+models/a", Path("conf")) == "owner/model+../models/a"
    for kept in (str(tmp_path / "here" / "models" / "a"), "zoo:base", "owner/model@v1"):
        assert proposals.written(kept, Path("conf")) == kept


def test_a_limit_lets_a_candidate_take_about_a_minute() -> None:
    assert proposals.limit_for({"a": 0.1, "b": 0.2}, {"a": 1000, "b": 1000}) == (200, pytest.approx(60))
    assert proposals.limit_for({"a": 1.0}, {"a": 1000}) == (50, pytest.approx(50))
    assert proposals.limit_for({"a": 100.0}, {"a": 1000}) == (20, pytest.approx(2000))
    assert proposals.limit_for({"a": 0.1}, {"a": 40}) == (None, pytest.approx(4))


@pytest.mark.parametrize(
    "text", ["plain", "./a b", "no", "1", "a: b", "a, b", "exact_match,strict-match", "#x", "~", ""]
)
def test_scalars_are_read_back(text: str) -> None:
    assert parse_yaml(f"{{k: {_scalar(text)}}}", "test") == {"k": text}
    assert parse_yaml(f"k: {_scalar(text)}", "test") == {"k": text}
