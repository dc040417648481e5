"""`mergesearch init`: a configuration for the user's models, from options and from answers on a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch import zoo
from mergesearch.commands.choosing import ChosenTasks, include_path_of
from mergesearch.commands.given import FILE, Given
from mergesearch.commands.inputs import splits
from mergesearch.commands.proposals import (
    Parent,
    base_of,
    compare,
    differs,
    dtype_for,
    limit_for,
    look,
    name_of,
    seconds_of,
    written,
)
from mergesearch.commands.questions import Questions
from mergesearch.config import Config, SearchConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.tasks import Task
from mergesearch.schema import parse_yaml, validate

ALL = "all"
_TRIALS: int = SearchConfig.model_fields["trials"].default
# so that a run which shall end by the clock does not end by the number before
_MANY = 1000
_MODEL = re.compile(r"([\w-]+)=(.+)")


@dataclass
class Draft:
    """A configuration on its way: what was found of base, models and tasks, and what was chosen."""

    given: Given
    base: Parent
    models: Mapping[str, Parent]
    include_path: Sequence[str]
    tasks: Sequence[Task]
    data: dict[str, Any] = field(default_factory=dict)


def write_configuration(
    given: Given, file: Path, questions: Questions | None, say: Callable[[str], None]
) -> Mapping[str, Any]:
    """Finds out what `given` leaves open, writes the file, and returns what it states.

    Args:
        questions: asks for the rest; None takes what is proposed.
        say: told what is being done, and what the user should know.

    Raises:
        UserError: a reference, a task or a value will not do, or nothing is proposed for what is missing.
        KeyboardInterrupt, EOFError: the user had enough; nothing was written.
    """
    models = _models(given, questions, say)
    base = _base(given, models, questions, say)
    named = _named(models, base, questions)
    for name, model in named.items():
        compare(base, model, f"models.{name}")
        if differs(model, base):
            say(f"note: {name} says that it was trained on {model.trained_on}")
    include_path = include_path_of(given, questions)
    tasks = ChosenTasks(include_path, str(base.source.path.absolute()), questions, say).choose(given, base.reference)
    draft = Draft(given, base, named, include_path, tasks)
    draft.data = _data(draft, file)
    config = validate(Config, _absolute(draft), str(file))
    _limits(draft, config, questions, say)
    _budget(draft, questions)
    text = "\n".join(_lines(draft, config, file)) + "\n"
    validate(Config, parse_yaml(text, str(file)), str(file))
    file.write_text(text, encoding="utf-8")
    return draft.data


# --- base and models ----------------------------------------------------------------------------------------------


def _models(given: Given, questions: Questions | None, say: Callable[[str], None]) -> list[tuple[str | None, Parent]]:
    """The models, those that were named with their names."""
    found: list[tuple[str | None, Parent]] = []

    def add(typed: str) -> None:
        split = _MODEL.fullmatch(typed)
        name, reference = split.groups() if split else (None, typed)
        where = f"models.{name}" if name else f"model {len(found) + 1}"
        if any(other.reference == reference or (name and other_name == name) for other_name, other in found):
            raise UserError(f"{where}: {typed} is there already: give each model once, each with a name of its own")
        if name:
            _check_name(name, reference)
        _tell_download(reference, say)
        found.append((name, look(reference, where)))

    for typed in given.models:
        add(typed)
    if not found and (given.base or "").startswith("zoo:"):
        names = zoo.names()[1:]
        if questions is None or questions.yes(f"Merge the demo models {', '.join(names)}?"):
            for name in names:
                add(f"{name}=zoo:{name}")
    if not found and questions is not None:
        questions.say(
            "\nThe models to merge, one by one: the folder of a model or of a LoRA adapter, a hub id (owner/name), or "
            "zoo:NAME. An empty line ends the list."
        )

        def one(typed: str) -> bool:
            if not typed and not found:
                raise UserError("one model at least: give the folder or the hub id of a fine-tuned model")
            if typed:
                add(typed)
            return bool(typed)

        while questions.text(f"  model {len(found) + 1}", one):
            pass
    return found


def _tell_download(reference: str, say: Callable[[str], None]) -> None:
    for part in reference.rsplit("+", 1):
        if not part.startswith("zoo:") and not Path(part).expanduser().exists() and part.count("/") == 1:
            say(f"fetching {part} from the hub, unless it is in the cache")


def _base(
    given: Given,
    models: Sequence[tuple[str | None, Parent]],
    questions: Questions | None,
    say: Callable[[str], None],
) -> Parent:
    """The base, which every model fits."""

    def check(typed: str) -> Parent:
        if not typed:
            raise UserError("a base is needed: what all the models were fine-tuned from")
        _tell_download(typed, say)
        base = look(typed, "base_model")
        for position, (name, model) in enumerate(models, start=1):
            compare(base, model, f"models.{name}" if name else f"model {position}, {model.reference}")
        return base

    proposed = base_of(model for _, model in models)
    if given.base:
        return check(given.base)
    if questions is not None:
        return questions.text("\nThe base that they were fine-tuned from", check, proposed or "")
    if proposed is None:
        raise UserError("the models do not say what they were fine-tuned from: give --base")
    say(f"the base is {proposed}, which the models name")
    return check(proposed)


def _named(models: Sequence[tuple[str | None, Parent]], base: Parent, questions: Questions | None) -> dict[str, Parent]:
    taken = [name for name, _ in models if name]
    for name, model in models:
        if name is None:
            taken.append(name_of(model.reference, base.reference, taken))
    proposed = iter(taken[sum(1 for name, _ in models if name) :])
    names = [name or next(proposed) for name, _ in models]
    if questions is not None and any(name is None for name, _ in models):
        names = questions.text(
            "Their names in tables, in this order", lambda typed: _names(typed, models), ", ".join(names)
        )
    return dict(zip(names, (model for _, model in models), strict=True))


def _names(typed: str, models: Sequence[tuple[str | None, Parent]]) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", typed) if name]
    if len(names) != len(models) or len(set(names)) != len(names):
        raise UserError(f"{typed!r} is not {len(models)} different names: separate them by commas")
    for name, (_, model) in zip(names, models, strict=True):
        _check_name(name, model.reference)
    return names


def _check_name(name: str, reference: str) -> None:
    """Raises the configuration's own `UserError` for what cannot name a model."""
    validate(Config, {"base_model": "base", "models": {name: reference}, "tasks": [{"task": "any"}]}, "the name")


# --- documents and budget -----------------------------------------------------------------------------------------


def _data(draft: Draft, file: Path) -> dict[str, Any]:
    """What the file states, in its order, before documents and budget are chosen."""
    given, folder = draft.given, file.parent
    stem = given.name or ("" if file.name == FILE else re.sub(r"[^\w.-]", "-", file.stem))
    dtype = dtype_for(given.device)
    keys: dict[str, Any] = {
        "name": stem,
        "base_model": written(draft.base.reference, folder),
        "models": {name: written(model.reference, folder) for name, model in draft.models.items()},
        "tasks": [task.config.model_dump(exclude_defaults=True) for task in draft.tasks],
        "include_path": [written(path, folder) for path in draft.include_path],
        "device": given.device,
        "dtype": dtype,
        "trust_remote_code": given.trust_remote_code,
    }
    usual = {key: Config.model_fields[key].get_default(call_default_factory=True) for key in keys}
    return {key: value for key, value in keys.items() if value != usual[key] and value != ""}


def _absolute(draft: Draft) -> dict[str, Any]:
    """The same with what was typed in place of what the file states: for the folder that the command runs in."""
    typed = {"base_model": draft.base.reference, "models": {n: m.reference for n, m in draft.models.items()}}
    return {**draft.data, **typed, "include_path": list(draft.include_path)}


def _limits(draft: Draft, config: Config, questions: Questions | None, say: Callable[[str], None]) -> None:
    """Sets how many documents of each task a candidate is scored on, where a task has more."""
    there = {label: len(part.search) for label, part in splits(config, draft.tasks).items()}
    if draft.given.limit is not None:
        limit = _limit(draft.given.limit)
    else:
        say("estimating how long a document takes")
        seconds = seconds_of(config, draft.tasks, draft.base.source)
        limit, whole = limit_for(seconds, there)
        words = f"{limit} of each task" if limit else "all"
        takes = f"{words} take a candidate about {_about(whole)} here"
        if questions is None:
            say(f"documents to score on: {takes}")
        else:
            questions.say("")
            limit = questions.text(
                f"Documents of each task to score candidates on, a number or {ALL}; {takes}", _limit, str(limit or ALL)
            )
    for task, stated in zip(draft.tasks, draft.data["tasks"], strict=True):
        if limit is not None and limit < there[task.label]:
            stated["limit"] = limit


def _limit(typed: str) -> int | None:
    if typed == ALL:
        return None
    if not typed.isdigit() or int(typed) < 2:
        raise UserError(f"the limit is {typed!r}: give a number of documents, 2 or more, or {ALL}")
    return int(typed)


def _about(seconds: float) -> str:
    """A time as roughly as it is known."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    if seconds < 2:
        return "a second"
    return f"{seconds:.0f} seconds" if seconds < 10 else f"{round(seconds, -1):.0f} seconds"


def _budget(draft: Draft, questions: Questions | None) -> None:
    given = draft.given
    chosen: dict[str, Any] = {"trials": given.trials, **({"hours": given.hours} if given.hours is not None else {})}
    if given.hours is not None and given.trials is None:
        chosen["trials"] = _MANY
    if questions is not None and given.trials is None and given.hours is None:
        chosen = questions.text(
            "Candidates to try beside the base, the models and the published defaults; or hours, as 2h",
            _parsed_budget,
            str(_TRIALS),
        )
    search = {key: value for key, value in chosen.items() if value is not None and (key, value) != ("trials", _TRIALS)}
    if search:
        draft.data["search"] = search


def _parsed_budget(typed: str) -> dict[str, Any]:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(h|hours?)", typed)
    if number and float(number[1]) > 0:
        return {"trials": _MANY, "hours": float(number[1])}
    if not typed.isdigit():
        raise UserError(f"{typed!r} is no budget: give a number of candidates, or hours, for example 2h")
    return {"trials": int(typed)}


# --- the file -----------------------------------------------------------------------------------------------------


def _lines(draft: Draft, config: Config, file: Path) -> Iterator[str]:
    data = draft.data
    yield f"# Search for the best merge of these models: mergesearch run {file.name}"
    yield f"# What that may cost: mergesearch check {file.name}. Paths are relative to this file."
    if "name" in data:
        yield f"name: {_scalar(data['name'])}  # what is found lies in results/{data['name']}"
    yield f"base_model: {_scalar(data['base_model'])}  # what the models were fine-tuned from"
    yield "models:"
    yield from (f"  {_scalar(name)}: {_scalar(reference)}" for name, reference in data["models"].items())
    yield "tasks:  # what a merge shall be good at; their mean counts"
    for task, stated in zip(draft.tasks, data["tasks"], strict=True):
        parts = splits(config, [task])[task.label]
        there, kept = len(parts.search), len(parts.holdout)
        used = f"{stated['limit']} of {there}" if "limit" in stated else f"all {there}"
        yield f"  - {_flow(stated)}  # {task.metric} on {used} search documents; {kept} are kept for the report"
    if "include_path" in data:
        paths = [_scalar(path) for path in data["include_path"]]
        yield f"include_path: {paths[0] if len(paths) == 1 else '[' + ', '.join(paths) + ']'}  # tasks of your own"
    if "search" in data:
        yield f"search: {_flow(data['search'])}  # beside the base, the models and published defaults"
    else:
        yield f"# {_TRIALS} candidates are tried; for more, or for an end: search: {{trials: 100, hours: 2}}"
    if "device" in data:
        yield f"device: {_scalar(data['device'])}"
    if "dtype" in data:
        yield f"dtype: {data['dtype']}  # this machine is slow in bfloat16, the usual one"
    if "trust_remote_code" in data:
        yield "trust_remote_code: true  # run code from the models' folders"


def _flow(data: Mapping[str, Any]) -> str:
    pairs = (
        f"{key}: {_scalar(value) if isinstance(value, str) else format(value, 'g')}" for key, value in data.items()
    )
    return f"{{{', '.join(pairs)}}}"


def _scalar(text: str) -> str:
    """A text as YAML states it, in quotes where it would be read as something else."""
    try:
        plain = parse_yaml(f"[{text}]", text) == [text] and parse_yaml(f"{text}: {text}", text) == {text: text}
    except UserError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
