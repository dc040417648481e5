"""What becomes of every tensor of every parent in a merge: no tensor is lost in silence."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from mergesearch.checkpoints import Header, Pool
from mergesearch.engine.plan import Job, form_of, plan
from mergesearch.recipe import BASE, TOWER, Recipe

# what a merge by these makes of tensors, in one word
_AVERAGED = "averaged"
_WORDS = {"passthrough": "copied"}


@dataclass(frozen=True)
class Entry:
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


def accounts(recipe: Recipe, pool: Pool) -> list[Entry]:
    """An entry for every tensor of every parent's files, in the parents' order."""
    jobs = plan(recipe, pool, form_of(recipe, pool))
    taken: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        for parent, name in [(BASE, job.base), *zip(job.step.models, job.parents, strict=True)]:
            if name is not None:
                taken.setdefault((parent, name), []).append(job)
    made: dict[str, list[Job]] = {}
    for job in jobs:
        for name in {job.base, *job.parents} - {None}:
            made.setdefault(str(name), []).append(job)
    stated = {BASE: pool.files.get(BASE, {})} if recipe.base is not None else {}
    files = {**stated, **{name: pool.files.get(name, {}) for name in recipe.models}}
    return [
        _entry(parent, name, header, recipe, pool, taken.get((parent, name), []), made.get(name, []))
        for parent, headers in files.items()
        for name, header in headers.items()
    ]


def _entry(
    parent: str, name: str, header: Header, recipe: Recipe, pool: Pool, mine: Sequence[Job], others: Sequence[Job]
) -> Entry:
    infos = {info.name: info for info in pool.form.layout.infos}
    info = infos.get(name)
    shape = "x".join(map(str, header.shape)) or "a scalar"
    place = (str(info.layer), info.component) if info is not None else ("", "")
    if mine:
        became = "; ".join(dict.fromkeys(_became(parent, job, recipe) for job in mine))
        if info is not None and info.shape != header.shape:
            became += f"; resized to {'x'.join(map(str, info.shape))} by token"
    elif others:
        by = "; ".join(dict.fromkeys(f"{_how(job, recipe)} of {', '.join(job.step.models)}" for job in others))
        became = f"takes no part: {by}"
    elif info is not None:
        became = "left out: the stack takes no layer like it"
    else:
        became = _outside(parent, name, header, pool)
    return Entry(parent, name, shape, *place, became)


def _became(parent: str, job: Job, recipe: Recipe) -> str:
    if parent == BASE and job.base is not None and BASE not in job.step.models:
        text = f"the base of what is {_how(job, recipe)}"
    else:
        text = _how(job, recipe)
    moved = job.info.name not in (job.base, *job.parents)
    return f"{text}, as {job.info.name}" if moved else text


def _how(job: Job, recipe: Recipe) -> str:
    """`merged by rule 1 (ties), layers0-3.attention`."""
    rule = next((number for number, rule in enumerate(recipe.rules, 1) if rule.covers(job.info)), None)
    step = job.step
    if rule is None:
        return "copied, as no rule names towers"
    word = "copied" if step.copies else _AVERAGED if _equal_weights(job) else "merged"
    return f"{word} by rule {rule} ({step.method.name}), {recipe.rules[rule - 1].label}"


def _equal_weights(job: Job) -> bool:
    weights = job.step.parameters.get("weight")
    if job.step.method.name != "linear" or not job.step.parameters.get("normalize", True):
        return False
    values = list(weights.values()) if isinstance(weights, Mapping) else weights
    return not isinstance(values, (list, tuple)) or len(set(values)) <= 1


def _outside(parent: str, name: str, header: Header, pool: Pool) -> str:
    """Of a tensor that no rule covers, as it is none of the model's own."""
    layout = pool.form.layout
    adapted = next((info for info in layout.infos if _inside(name, info.name)), None)
    if adapted is not None:
        return f"laid over {adapted.name} before it was merged"
    if name in pool.constants:
        return "copied" if parent == BASE else "as in the base, whose table the result has"
    live = {piece.live for piece in layout.pieces}
    tail = name.rpartition(".")[0]
    if name in live or any(other.rpartition(".")[0] == tail for other in live):
        return "held in another form in memory, and merged there"
    if len(header.shape) >= 1 and any(piece.shape == header.shape for piece in layout.pieces if _tied(name, pool)):
        return "tied to the embedding, and merged with it"
    return "computed from the configuration, so that no merge is needed"


def _tied(name: str, pool: Pool) -> bool:
    config = pool.form.blueprint.config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False)) and "head" in name


def _inside(name: str, tensor: str) -> bool:
    """Whether an adapter's tensor changes one of the model's."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
    if plain == name:
        return False
    module = tensor.rpartition(".")[0]
    return plain == tensor or plain.startswith(f"{module}.lora_") or plain.startswith(f"{module}.ia3_")


def to_csv(entries: Iterable[Entry]) -> str:
    """The entries as comma-separated values, one a line, with a head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Entry)])
    writer.writerows(astuple(entry) for entry in entries)
    return text.getvalue()


def summary(entries: Sequence[Entry]) -> list[str]:
    """How many tensors became what, a line each: `38 of base and 38 of a: merged by rule 1 (ties), all`."""
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        text = (
            "copied, as no rule names towers" if entry.component == TOWER and "towers" in entry.became else entry.became
        )
        counts.setdefault(_short(text), Counter())[entry.parent] += 1
    return [
        f"{became}: {', '.join(f'{count} of {parent}' for parent, count in by.items())}"
        for became, by in counts.items()
    ]


def _short(became: str) -> str:
    """Without the names of single tensors, so that alike fates are counted together."""
    first = became.split(", as ")[0] if ", as model" in became else became
    return "laid over the base before it was merged" if first.startswith("laid over ") else first
