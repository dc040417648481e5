"""Whose weights a merge is made of, as its model card says: parents, their hashes and licences, figures for the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesearch.checkpoints.hub import hub_ids
from mergesearch.recipe import BASE, Recipe
from mergesearch.results.markdown import code, plain

# licences that let a merge have another one, as long as their notices stay; all others have terms that bind it
_PERMISSIVE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
    "unlicense", "wtfpl", "afl-3.0", "ecl-2.0", "artistic-2.0", "postgresql", "ncsa", "odc-by", "pddl",
    "cdla-permissive-1.0", "cdla-permissive-2.0",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One figure of a merge as the hub keeps it.

    Attributes:
        task: as lm_eval names it.
        metric: likewise.
        value: the figure.
        split: on which documents it was measured.
    """

    task: str
    metric: str
    value: float
    split: str


@dataclass(frozen=True)
class Origin:
    """The parents of a merge.

    Attributes:
        parents: what the recipe calls them, `base` first, to references.
        hashes: of the parents' weights, by the same names, as far as they are known.
        licences: that their cards state, by the same names; None of a card that states none.
        metrics: what was measured of the merge.
    """

    parents: Mapping[str, str]
    hashes: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str | None] = field(default_factory=dict)
    metrics: Sequence[Metric] = ()

    @classmethod
    def of(cls, recipe: Recipe, **known: Any) -> Origin:
        """Of a recipe's parents."""
        return cls({**({BASE: recipe.base} if recipe.base else {}), **recipe.models}, **known)

    def front(self) -> dict[str, Any]:
        """What the card's head says of them. A folder on somebody's disk is no model that the hub could link to."""
        ids = list(dict.fromkeys(name for reference in self.parents.values() for name in hub_ids(reference)))
        licence = self.licence
        return {
            **({"license": licence} if licence else {}),
            **({"base_model": ids} if ids else {}),
            "base_model_relation": "merge",
        }

    @property
    def licence(self) -> str | None:
        """The one that every parent has; None where they differ, or one of them states none."""
        stated = {self.licences.get(name) for name in self.parents}
        return next(iter(stated)) if len(stated) == 1 else None

    def conflict(self) -> str | None:
        """A sentence on parents whose licences differ, or are not stated; None where all agree."""
        if not self.licences:
            return None
        by_licence: dict[str, list[str]] = {}
        for name in self.parents:
            by_licence.setdefault(self.licences.get(name) or "", []).append(name)
        silent = by_licence.pop("", [])
        sentences = []
        if len(by_licence) > 1:
            told = "; ".join(f"{licence}: {', '.join(names)}" for licence, names in by_licence.items())
            binding = [licence for licence in by_licence if licence not in _PERMISSIVE]
            sentences.append(
                f"The parents' licences conflict ({told}): {' and '.join(binding)} each have terms of their own, and "
                "whoever shares this model has to meet all of them."
                if len(binding) > 1
                else f"The parents' licences differ ({told}): whoever shares this model has to meet all of them."
            )
        if silent:
            sentences.append(f"No licence is stated by {', '.join(silent)}: ask before you share this model.")
        return " ".join(sentences) or None

    def words(self) -> str:
        """The parents as a part of the card."""
        lines = []
        for name, reference in self.parents.items():
            more = [f"licence {plain(licence)}"] if (licence := self.licences.get(name)) else []
            more += [f"weights {code(known)}"] if (known := self.hashes.get(name)) else []
            lines.append(f"- {plain(name)}: {code(reference)}{''.join(f', {part}' for part in more)}")
        conflict = self.conflict()
        parts = ["## Parents", "\n".join(lines)]
        parts += ["The hashes are of the tensors' names, shapes, dtypes and bytes."] * bool(self.hashes)
        parts += [f"**Licences.** {plain(conflict)}"] if conflict else []
        return "\n\n".join(parts)

    def model_index(self, name: str) -> list[dict[str, Any]]:
        """The figures in the form of the hub's `model-index`."""
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": metric.task, "type": metric.task, "split": metric.split},
                "metrics": [{"type": metric.metric, "name": metric.metric, "value": metric.value}],
            }
            for metric in self.metrics
        ]
        return [{"name": name, "results": results}]
