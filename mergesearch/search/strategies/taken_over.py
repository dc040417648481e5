"""Taken over: the trials of another run that still hold in this one, which has other models or tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from mergesearch.checkpoints.digests import Digest
from mergesearch.config import Config, SearchConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import Scores, TaskScore, load_documents
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search import by_lm_eval, store
from mergesearch.search.budget import Budget
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.base import Proposal, Stated, Strategy, Wait, learned_by_answers
from mergesearch.search.strategies.baselines import parents
from mergesearch.search.trials import State, Trial, plain

# where the study notes what it takes over, once its own digests are known
_NOTE = "taken_over"
# what makes other figures of the same recipe and documents
_SAME = (
    ("dtype",), ("tokenizer",), ("scoring",), ("search", "seed"), ("apply_chat_template",), ("fewshot_as_multiturn",),
    ("system_instruction",), ("enable_thinking",), ("think_end_token",), ("attn_implementation",),
    ("backend",),
)  # fmt: skip


@register
class TakenOver(Strategy):
    """The trials of the run that `search.fork` names which still hold, with their scores, before all others.

    A trial holds where the digests of the base and of every model that it merges are those of this run, and where this
    run's tasks are among its own, with the same settings, the same documents and the same search documents among them.
    It costs nothing and counts against no budget. `mergesearch run CONFIG --fork NEW` sets the key.
    """

    name = "taken_over"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "fork": (
            str | None,
            Field(default=None, description="a run folder whose trials are taken over as far as they hold"),
        )
    }
    paths: ClassVar[tuple[str, ...]] = ("fork",)
    named = False
    order = -3
    counts = False
    budgeted = False

    @classmethod
    def joins(cls, search: SearchConfig) -> bool:
        return search.key("fork", object) is not None

    @classmethod
    def refuse(cls, config: Config) -> None:
        study = store.begun(config)
        if study is not None and store.has_note(study, _NOTE):  # else the run may be gone by now
            return
        fork = config.search.key("fork", str)
        theirs, _ = store.open_run(fork)
        other = next((path for path in _SAME if _at(config, path) != _at(theirs, path)), None)
        if other is not None:
            raise UserError(
                f"search.fork: {'.'.join(other)} is {_at(config, other)!r}, in {fork} {_at(theirs, other)!r}, so none "
                "of its trials holds: take that back, or leave fork out"
            )

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        noted = None if outlook.history is None else store.noted(outlook.history.study, _NOTE)
        there = {trial.key["from"] for trial in outlook.of(cls.name)}
        left = sum(each["from"] not in there for each in noted["trials"]) if noted else 0
        return [Ahead(left, copies=True)] if left else []

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} trials taken over" if count else "a trial taken over"

    @classmethod
    def may_race(cls, trial: Trial) -> bool:
        return False

    @classmethod
    def method(cls, trial: Trial) -> str:
        return trial.name or super().method(trial)

    @classmethod
    def words(cls, history: History) -> list[str]:
        noted = store.noted(history.study, _NOTE)
        if not noted:
            return []
        return [f"taken over from {noted['run']}: {len(noted['trials'])} of its {noted['of']} scored trials still hold"
                + (f" ({noted['why']})" if noted["why"] else "")]  # fmt: skip

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        if not store.has_note(self.run.study, _NOTE):
            store.note(self.run.study, _NOTE, find(self.config, history))
        there = {trial.key["from"] for trial in history.of(self.name)}
        for each in store.noted(self.run.study, _NOTE)["trials"]:
            if each["from"] not in there:
                key = {"from": each["from"], "by_answers": each.get("by_answers", False)}
                return Stated(Recipe.from_data(each["recipe"], "search.fork"), each["name"], key)
        return None

    def held(self, trial: Trial) -> Scores | None:
        noted: dict[str, Any] = store.noted(self.run.study, _NOTE) or {"trials": ()}
        mine = next((each for each in noted["trials"] if each["from"] == trial.key["from"]), None)
        if mine is None:
            return None
        tasks = {task: TaskScore(**score) for task, score in mine["scores"].items()}
        try:
            documents = load_documents(RunFolder(noted["path"]).documents(mine["from"]))
        except (OSError, ValueError):  # it is scored anew
            return None
        return Scores(tasks, {task: documents[task] for task in tasks}) if tasks.keys() <= documents.keys() else None


def find(config: Config, history: History) -> dict[str, Any]:
    """What a run takes over, as its study notes it: `run`, `path`, `of` how many scored trials, `trials` with `from`,
    `name`, `by_answers`, `recipe` and `scores`, and `why` others do not hold."""
    fork = config.search.key("fork", str)
    theirs, study = store.open_run(fork)
    there = History(study, theirs)
    scored = [trial for trial in there.trials if trial.scores and trial.state in (State.COMPLETE, State.SCORED)]
    result: dict[str, Any] = {"run": theirs.name, "path": fork, "of": len(scored), "trials": [], "why": ""}
    ours, before = (store.noted(each, store.DIGESTS) or {} for each in (history.study, study))
    why = _other_tasks(config, theirs, ours, before) or _other_ways(history, there)
    same = {name for name in config.models if name in theirs.models and _same(ours, before, f"models.{name}")}
    if not why and not _same(ours, before, "base_model"):
        why = "the base is another one"
    if why:
        return {**result, "why": why}
    known: set[str] = set()
    for trial in scored:
        recipe = restated(trial, config, theirs, same)
        if recipe is None or recipe.id in known:
            continue
        known.add(recipe.id)
        scores = {task.task: trial.scores[task.task] for task in config.scored}
        kept = plain(scores=scores)["scores"]
        what = {"from": trial.number, "name": trial.name, "by_answers": learned_by_answers(trial)}
        result["trials"].append({**what, "recipe": recipe.dump(), "scores": kept})
    gone = [name for name in theirs.models if name not in same]
    return {**result, "why": f"{', '.join(gone)} changed or left" if gone else ""}


def restated(trial: Trial, config: Config, theirs: Config, same: set[str]) -> Recipe | None:
    """The recipe of another run's trial over this run's models; None where it merges one that is not the same.

    Args:
        same: the models that both runs have.
    """
    if trial.name in theirs.parents:
        rules = parents(config).get(trial.name) if trial.name in {"base", *same} else None
        return None if rules is None else config.recipe(rules)
    recipe, every = trial.recipe, tuple(theirs.models)
    rows = {name for row in recipe.stack or () for name in row} - {"base"}
    used = rows.union(*(rule.models or every for rule in recipe.rules))
    if not used <= same:
        return None
    if every == tuple(config.models):
        return recipe.model_copy(update={"base": config.base_model, "models": config.models})
    # the plain average and other baselines are of all models, which are others now
    if trial.name is not None:
        return None
    rules = tuple(rule.model_copy(update={"models": rule.models or every}) for rule in recipe.rules)
    return recipe.model_copy(update={"base": config.base_model, "models": config.models, "rules": rules})


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> bool:
    mine, other = (each.get("parents", {}).get(where) for each in (ours, theirs))
    return bool(mine and other) and Digest.from_data(mine).is_of_the_same(Digest.from_data(other))


def _other_tasks(config: Config, theirs: Config, ours: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Why no trial has the scores that this run needs; empty where it has."""
    known = {task.task: task for task in theirs.scored}
    for task in config.scored:
        if task.task not in known:
            return f"it did not score task {task.task}"
        if task != known[task.task]:
            return f"task {task.task} has other settings"
        mine, other = (each.get("tasks", {}).get(task.task) for each in (ours, before))
        if mine is None or mine != other:
            return f"task {task.task} has other documents"
    searched = RunFolder(theirs.folder).search_documents()
    for label, documents in RunFolder(config.folder).search_documents().items():
        if documents != searched.get(label):
            return f"task {label} is split into other search and holdout documents"
    return ""


def _other_ways(ours: History, theirs: History) -> str:
    mine, other = by_lm_eval.kinds(ours.study) or {}, by_lm_eval.kinds(theirs.study) or {}
    different = [kind for kind in mine.keys() & other.keys() if mine[kind] != other[kind]]
    return f"{different[0]} requests were answered in another way" if different else ""


def _at(config: Config, path: Sequence[str]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value
