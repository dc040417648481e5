"""What becomes of every tensor of every parent in a merge: no tensor is lost in silence."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from mergesearch.checkpoints import Header, Pool, is_computed
from mergesearch.engine.plan import Job, form_of, plan
from mergesearch.recipe import BASE, Recipe

# before the name that a tensor has in a stack
_MOVED = " -> "
_LAID = "laid over the model below before it was merged"


# of a summary that say by which rule
MOST_LINES = 6


@dataclass(frozen=True)
class Account:
    """What became of one tensor of one parent.

    Attributes:
        parent: `base`, or a model's name.
        tensor: its name in the parent's files.
        shape: there, as `32x16`.
        layer, component: where it stands in the model; empty for what is no part of it.
        became: `merged by rule 1 (ties), layers0-3.attention`.
    """

    parent: str
    tensor: str
    shape: str
    layer: str
    component: str
    became: str


def accounts(recipe: Recipe, pool: Pool) -> list[Account]:
    """An entry for every tensor of every parent's files, in the parents' order."""
    return _Accounts(recipe, pool).entries()


class _Accounts:
    """The plan of a merge, read from its parents' side."""

    def __init__(self, recipe: Recipe, pool: Pool):
        self.recipe, self.pool = recipe, pool
        self.infos = {info.name: info for info in pool.form.layout.infos}
        self.modules: dict[str, str] = {}
        for name in self.infos:
            self.modules.setdefault(name.rpartition(".")[0], name)
        # by parent and tensor, and by tensor alone: what it takes part in
        self.taken: dict[tuple[str, str], list[Job]] = {}
        self.made: dict[str, list[Job]] = {}
        for job in plan(recipe, pool, form_of(recipe, pool)):
            based = [(BASE, job.base)] if job.base is not None else []
            parts = dict.fromkeys([*based, *zip(job.step.models, job.parents, strict=True)])
            for parent, name in parts:
                self.taken.setdefault((parent, name), []).append(job)
            for name in dict.fromkeys(name for _, name in parts):
                self.made.setdefault(name, []).append(job)

    def entries(self) -> list[Account]:
        parents = [*([BASE] if self.recipe.base is not None else []), *self.recipe.models]
        return [
            self._entry(parent, name, header)
            for parent in parents
            for name, header in self.pool.files.get(parent, {}).items()
        ]

    def _entry(self, parent: str, name: str, header: Header) -> Account:
        info = self.infos.get(name)
        mine, others = self.taken.get((parent, name), []), self.made.get(name, [])
        if mine:
            became = "; ".join(dict.fromkeys(_became(parent, job, self.recipe) for job in mine))
            if info is not None and info.shape != header.shape:
                became += f"; resized to {_times(info.shape)} by token"
        elif others:
            by = "; ".join(dict.fromkeys(f"{_how(j, self.recipe)} of {', '.join(j.step.models)}" for j in others))
            became = f"takes no part: {by}"
        elif info is not None:
            became = "left out: the stack takes no layer like it"
        else:
            became = self._outside(parent, name, header)
        layer, component = (str(info.layer), info.component) if info is not None else ("", "")
        return Account(parent, name, _times(header.shape), layer, component, became)

    def _outside(self, parent: str, name: str, header: Header) -> str:
        """Of a tensor that the plan does not know by this name."""
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain != name:  # an adapter's
            while plain and plain not in self.infos and plain not in self.modules:
                plain = plain.rpartition(".")[0]
            return f"laid over {self.modules.get(plain, plain) or 'the model'} before it was merged"
        if name in self.pool.constants:
            return "copied" if parent == BASE else "as in the base, whose table the result has"
        if is_computed(name, header):
            return "left out, as the configuration gives it anew"
        config = self.pool.form.blueprint.config.get_text_config()
        if getattr(config, "tie_word_embeddings", False) and "head" in name:
            return "tied to the embedding, and merged with it"
        return "renamed when it was read, and merged under its new name"


def _became(parent: str, job: Job, recipe: Recipe) -> str:
    if parent == BASE and job.base is not None and BASE not in job.step.models:
        text = f"the base of what is {_how(job, recipe)}"
    else:
        text = _how(job, recipe)
    moved = job.info.name not in (job.base, *job.parents)
    return f"{text}{_MOVED}{job.info.name}" if moved else text


def _how(job: Job, recipe: Recipe) -> str:
    """`merged by rule 1 (ties), layers0-3.attention`."""
    rule = next((number for number, rule in enumerate(recipe.rules, 1) if rule.covers(job.info)), None)
    step = job.step
    if rule is None:
        return "copied, as no rule names towers"
    word = "copied" if step.copies else "averaged" if _equal_weights(job) else "merged"
    return f"{word} by rule {rule} ({step.method.name}), {recipe.rules[rule - 1].label}"


def _equal_weights(job: Job) -> bool:
    weights = job.step.parameters.get("weight")
    alone = len(job.step.models) < 2
    if alone or job.step.method.name != "linear" or not job.step.parameters.get("normalize", True):
        return False
    values = list(weights.values()) if isinstance(weights, Mapping) else weights
    return not isinstance(values, (list, tuple)) or len(set(values)) <= 1


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def to_csv(entries: Iterable[Account]) -> str:
    """The entries as comma-separated values, one a line, with a head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Account)])
    writer.writerows(astuple(entry) for entry in entries)
    return text.getvalue()


def summary(entries: Sequence[Account]) -> list[str]:
    """How many tensors became what, a line each: `merged by rule 1 (ties), all: 38 of a, 38 of b`.

    A recipe with a rule for each tensor would have as many lines: of the rules' only the first few are said.
    """
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        alike = _LAID if entry.became.startswith("laid over ") else entry.became.split(_MOVED)[0]
        counts.setdefault(alike, Counter())[entry.parent] += 1
    lines = {
        became: f"{became}: {', '.join(f'{count} of {parent}' for parent, count in by.items())}"
        for became, by in counts.items()
    }
    ruled = [became for became in lines if " by rule " in became]
    left_out = set(ruled[MOST_LINES:])
    told = [line for became, line in lines.items() if became not in left_out]
    return [*told, f"and {len(left_out)} lines more of that kind"] if left_out else told
