"""From a recipe to files: a complete checkpoint with its recipe and its model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergesearch import zoo
from mergesearch.checkpoints import Pool, check_shard_size, copy_processor, new_folder, save
from mergesearch.engine.accounts import accounts, to_csv
from mergesearch.engine.live import Engine
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe
from mergesearch.results.markdown import block, plain, table
from mergesearch.results.origin import Origin
from mergesearch.results.record import Record

SAMPLES = "lm_eval_samples.json"
# what became of every tensor of every parent
TENSORS = "tensors.csv"
# ends the name of what there is to tell of a file for llama.cpp
FILE_NOTES = ".txt"
# lm_eval takes several folders of tasks from a file alone: of --include_path it takes one
FOLDERS = "lm_eval.yaml"


@dataclass(frozen=True)
class Asking:
    """How the search asked lm_eval.

    Attributes:
        task_folders: absolute paths of the user's folders with tasks.
        zoo: whether a task of the demo zoo is among the tasks.
        batch_size: requests at once.
        apply_chat_template, fewshot_as_multiturn, system_instruction, trust_remote_code, confirm_run_unsafe_code: as
            lm_eval's options.
        model_args: what --model_args says beside the checkpoint and its dtype.
        loaded: whether `lm_eval --model hf` loads a checkpoint of this architecture.
    """

    task_folders: tuple[str, ...] = ()
    zoo: bool = False
    batch_size: int = 1
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    model_args: Mapping[str, Any] = field(default_factory=dict)
    loaded: bool = True

    @property
    def folders(self) -> list[str]:
        """Every folder with tasks; a later one's tasks win over those of the same name before."""
        return [*([str(zoo.folder() / "tasks")] if self.zoo else []), *self.task_folders]

    def options(self) -> str:
        """As a shell takes them."""
        parts = [self._folders(), _option("--batch_size", self.batch_size)]
        parts += ["--apply_chat_template"] * self.apply_chat_template
        parts += ["--fewshot_as_multiturn"] * self.fewshot_as_multiturn
        parts += [_option("--system_instruction", self.system_instruction)] if self.system_instruction else []
        parts += ["--trust_remote_code"] * self.trust_remote_code
        parts += ["--confirm_run_unsafe_code"] * self.confirm_run_unsafe_code
        return " ".join(filter(None, parts))

    def _folders(self) -> str:
        if len(self.folders) > 1:
            return _option("--config", FOLDERS)
        if self.zoo:  # it is elsewhere on another machine
            return '--include_path "$(mergesearch zoo)/tasks"'
        return "".join(_option("--include_path", folder) for folder in self.folders)


def _option(name: str, value: object) -> str:
    """An option with its value, as a shell takes it."""
    text = str(value)
    return shlex.quote(f"{name}={text}") if text.startswith("-") else f"{name} {shlex.quote(text)}"


@dataclass(frozen=True)
class Story:
    """What the model card tells beside the recipe.

    Attributes:
        title: its heading.
        versions: libraries and device.
        records: whose scores to show: the candidate first, then those it should be compared with.
        tasks: names of lm_eval's tasks with their number of few-shot examples (None: the task's own).
        samples: the documents the scores were measured on, as `lm_eval --samples` takes them.
        asking: how lm_eval is to be asked for the same scores.
        holdout: what the report on the holdout found, in Markdown; None where there is none.
        changes: what was changed since the scores were measured, a sentence each.
        gen_kwargs: of the tasks that set some, what changes their generation.
        origin: whose weights it is made of; None where that was not looked up.
        served: the form that was scored, a folder of the checkpoint; None for the checkpoint itself.
    """

    title: str
    versions: Mapping[str, str]
    records: Sequence[Record] = ()
    tasks: Mapping[str, int | None] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    asking: Asking = Asking()
    holdout: str | None = None
    changes: Sequence[str] = ()
    gen_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: Origin | None = None
    served: str | None = None


def write_checkpoint(
    recipe: Recipe, engine: Engine, out: str | Path, story: Story, max_shard_size: str = "5GB"
) -> Path:
    """Builds the recipe's candidate in the engine's live model and writes it: config, generation config, tokenizer,
    safetensors shards that carry the recipe, recipe.yaml, README.md; where candidates are served in another form, that
    form in a folder of its name, or in a file for llama.cpp that carries the recipe too.

    Raises:
        UserError: the recipe does not fit the pool, or `out` is not a new folder.
        CandidateError: the merge failed, or came out with NaN or infinity, or llama.cpp cannot make its file.
    """
    check_shard_size(max_shard_size)
    with new_folder(out) as folder:
        with engine.as_merged():
            engine.rebuild(recipe)
            save(engine.model, engine.pool.tokenizer, folder, metadata_of(recipe), max_shard_size)
            _write_file(engine, recipe, folder, story)
        if engine.served is not None:
            engine.served.write(folder, recipe.out_dtype, engine.pool.trust_remote_code)
        write_words(recipe, folder, story, [*engine.pool.notes, *file_notes(folder)], engine.pool)
    return Path(out)


def file_notes(checkpoint: Path) -> list[str]:
    """What there is to tell of a checkpoint's files for llama.cpp."""
    return [file.read_text(encoding="utf-8").strip() for file in sorted(checkpoint.glob(f"*.gguf{FILE_NOTES}"))]


def _write_file(engine: Engine, recipe: Recipe, folder: Path, story: Story) -> None:
    """Writes the live model into a file for llama.cpp too, where one is asked for, and what there is to tell of it."""
    form = engine.filed
    if form is None:
        return
    carried = {key.replace("_", ".", 1): text for key, text in metadata_of(recipe).items()}
    found = form.write(engine.model, engine.pool.tokenizer, folder / form.name, story.title, carried)
    told = f"{form.name} is the same model for llama.cpp, in {form.type}: {'; '.join(found)}"
    (folder / f"{form.name}{FILE_NOTES}").write_text(f"{told}\n", encoding="utf-8")


def metadata_of(recipe: Recipe) -> dict[str, str]:
    """What each safetensors file of a checkpoint carries."""
    return {"mergesearch_recipe": recipe.to_yaml(), "mergesearch_recipe_id": recipe.id}


def write_words(recipe: Recipe, folder: Path, story: Story, notes: Sequence[str], pool: Pool | None = None) -> None:
    """Writes what a checkpoint says of itself: recipe.yaml, README.md, the documents that it was scored on, and what
    became of every tensor of the pool's parents."""
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if story.samples:
        (folder / SAMPLES).write_text(json.dumps(story.samples) + "\n", encoding="utf-8")
        if len(story.asking.folders) > 1:
            folders = yaml.safe_dump({"include_path": story.asking.folders}, width=1000, allow_unicode=True)
            (folder / FOLDERS).write_text(folders, encoding="utf-8")
    if pool is not None:
        copy_processor(pool.base.folder, folder)
        (folder / TENSORS).write_text(to_csv(accounts(recipe, pool)), encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, story, notes), encoding="utf-8")


def lm_eval_commands(story: Story, dtype: str) -> list[str]:
    """The commands that score the checkpoint by hand, run inside its folder: one for each number of examples and each
    way to generate."""
    commands = []
    asked = {task: (shots, json.dumps(story.gen_kwargs.get(task, {}))) for task, shots in story.tasks.items()}
    for shots, generation in dict.fromkeys(asked.values()):
        names = [task for task, how in asked.items() if how == (shots, generation)]
        samples = SAMPLES if len(names) == len(story.tasks) else _only(story.samples, names)
        parts = [
            f"lm_eval --model hf --model_args {_model_args(story, dtype)}",
            _option("--tasks", ",".join(names)),
            _option("--samples", samples),
            *([_option("--num_fewshot", shots)] if shots is not None else []),
            *([_option("--gen_kwargs", generation)] if generation != "{}" else []),
            story.asking.options(),
        ]
        commands.append(" ".join(filter(None, parts)))
    return commands


def _model_args(story: Story, dtype: str) -> str:
    if not story.asking.model_args:
        return f"pretrained={story.served or '.'},dtype={dtype}"
    return shlex.quote(json.dumps({"pretrained": story.served or ".", "dtype": dtype, **story.asking.model_args}))


def _only(samples: Mapping[str, Any], names: Sequence[str]) -> str:
    return json.dumps({name: samples[name] for name in names if name in samples}, separators=(",", ":"))


def model_card(recipe: Recipe, story: Story, notes: Sequence[str] = ()) -> str:
    """README.md for a merged checkpoint; `notes` say what the parents did not have in common."""
    origin = story.origin or Origin.of(recipe)
    front = {"library_name": "transformers", "tags": ["merge", "mergesearch"], **origin.front()}
    if origin.metrics:
        front["model-index"] = origin.model_index(story.title)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {plain(story.title)}",
        f"A merge made by mergesearch, recipe `{recipe.id}`: {', '.join(recipe.methods)} over "
        f"{len(recipe.models)} models, {recipe.dtype} arithmetic, {recipe.out_dtype} weights.",
        origin.words(),
        *(["\n".join(f"- {plain(note)}" for note in notes)] if notes else []),
        *([_changes(story.changes)] if story.changes else []),
        *([_scores(story.records)] if story.records else []),
        *([_by_hand(story, recipe.out_dtype)] if story.samples else []),
        *([_holdout(story.holdout)] if story.holdout else []),
        f"## Recipe\n\n{block(recipe.to_yaml().strip(), 'yaml')}",
        "## Versions\n\n" + "\n".join(f"- {plain(f'{name}: {version}')}" for name, version in story.versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _changes(changes: Sequence[str]) -> str:
    lines = "\n".join(f"- {plain(change)}" for change in changes)
    return f"**Changed since.** The figures here need not be this model's:\n\n{lines}"


def _scores(records: Sequence[Record]) -> str:
    tasks = list(records[0].scores)
    expects = records[0].expected is not None
    head = [
        "candidate",
        "objective",
        *["expected elsewhere"] * expects,
        *(plain(f"{task} ({records[0].scores[task].metric})") for task in tasks),
    ]
    rows = []
    for position, record in enumerate(records):
        label = "**this model**" if position == 0 else plain(record.name or f"trial {record.number}")
        figures = [_number(record.objective, record.stderr), *[_elsewhere(record)] * expects]
        rows.append([label, *figures, *(_cell(record.shown.get(t)) for t in tasks)])
    note = "Measured on the documents that the search saw, ± one standard error: the winner's score is biased upwards."
    if expects:
        note += (
            " Expected elsewhere: the objective on documents that no search saw, as far as all trials of the search "
        )
        note += "together tell, with its 95 % interval; the winner was chosen by it."
    if any(record.by_lm_eval for record in records):
        note += " The tasks' figures are those of lm-eval's own model; the objective is what the search saw, by token"
        note += " tries or vLLM."
    return "## Scores\n\n" + note + "\n\n" + table(head, rows)


def _by_hand(story: Story, dtype: str) -> str:
    if not story.asking.loaded:
        return (
            "`lm_eval --model hf` does not load a model of this type, for which transformers has no class of a causal "
            "language model. The same figures by hand, in this folder, with the run's configuration:\n\n"
            + block("mergesearch score . --config RUN.yaml")
        )
    commands = "\n".join(lm_eval_commands(story, dtype))
    return f"The same figures by hand, in this folder:\n\n{block(commands)}"


def _holdout(figures: str) -> str:
    return f"## Holdout\n\nMeasured on documents that the search never saw.\n\n{figures}"


def _elsewhere(record: Record) -> str:
    known = record.expected
    return "-" if known is None else f"{known.value:.4f} [{known.low:.4f}, {known.high:.4f}]"


def _cell(score: TaskScore | None) -> str:
    return _number(score.value, score.stderr) if score else "-"


def _number(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
