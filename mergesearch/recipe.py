"""Recipe: the frozen statement of one merge, and its YAML."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mergesearch.errors import UserError
from mergesearch.schema import Strict, read_yaml, validate

# what is no part of the language model: vision and audio towers with what projects from them
TOWER = "tower"
COMPONENTS = ("embedding", "attention", "mlp", "norm", "head", "router", "experts", TOWER)
DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
# what `stack`, `freeze` and `tokenizer` call the base; no model may have this name
BASE = "base"
# what `freeze` and the tables call the plain average of all models; no model may have this name
AVERAGE = "average"
# what `tokenizer` calls the base's vocabulary with every other model's tokens after it
UNION = "union"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands in the model.

    Attributes:
        name: its name in the checkpoint's files; experts that transformers keeps fused are apart, as in the files.
        layer: 0 for the first decoder layer. Embeddings and towers count as layer 0, the final norm and the head as the
            last.
        component: one of `COMPONENTS`.
        shape: its shape.
    """

    name: str
    layer: int
    component: str
    shape: tuple[int, ...]


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML takes for a line's end outside quotes, so that every name comes back as it was."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


class Rule(Strict):
    """A group of tensors, and the method with its parameters that merges them.

    The group is what all of `layers`, `components` and `tensors` select; left out, each selects everything but towers,
    which a rule covers only where its `components` or `tensors` name them.

    >>> from mergesearch import Rule
    >>> Rule(method="ties", layers=(0, 3), components=("attention",)).label
    'layers0-3.attention'
    """

    layers: tuple[int, int] | None = Field(default=None, description="first and last layer, both included")
    components: tuple[str, ...] | None = Field(default=None, description="`attention`, `mlp` and so on")
    tensors: str | None = Field(default=None, description="a pattern over tensor names, with *, ? and [...]")
    method: str = Field(description="the merge method, see `mergesearch methods`")
    models: tuple[str, ...] | None = Field(
        default=None, description="the models that take part, in order; default: all"
    )
    parameters: dict[str, Any] = Field(
        default={},
        description="the method's; one for each model as one value for all, a list in the models' order, or by name",
    )

    @field_validator("layers")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"{list(value)}: give the first and the last layer, counted from 0")
        return value

    @field_validator("components")
    @classmethod
    def _known_components(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in COMPONENTS:
                raise ValueError(f"unknown component {name!r}: use {', '.join(COMPONENTS)}")
        return value

    def covers(self, tensor: TensorInfo) -> bool:
        """Whether the tensor belongs to this rule's group."""
        if tensor.component == TOWER and self.components is None and self.tensors is None:
            return False
        if self.layers is not None and not self.layers[0] <= tensor.layer <= self.layers[1]:
            return False
        if self.components is not None and tensor.component not in self.components:
            return False
        return self.tensors is None or fnmatch.fnmatchcase(tensor.name, self.tensors)

    @property
    def label(self) -> str:
        """The group in words: `layers0-1.attention`."""
        layers = f"layers{self.layers[0]}-{self.layers[1]}" if self.layers else "all"
        return ".".join(
            [layers, *(["+".join(self.components)] if self.components else []), *filter(None, [self.tensors])]
        )


class Measured(Strict):
    """Statistics of the models on documents, which a rule's method goes by: files, named by what is in them."""

    kind: Literal["inputs", "squares"] = Field(
        description="`inputs`: Gram matrices of the inputs of linear layers; `squares`: squared gradients"
    )
    folder: str = Field(description="where the files are")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the index of the files, which has theirs")
    documents: dict[str, dict[str, str]] = Field(
        default={}, description="for each model the numbers of the documents of each task that it was measured on"
    )


class Recipe(Strict):
    """One merge: the same recipe gives the same tensors everywhere (ARCHITECTURE.md, law 1).

    `dtype` is the dtype of the arithmetic, `out_dtype` of the result, rounded to once. `seed` keys the masks of random
    methods. Rules are tried in order for each tensor, and the first that covers it merges it.

    With `stack` the result's layers are taken from ranges of the parents' layers, one row after another, and rules
    speak of the result's layers. A row with several sources is merged by the rule that covers it, over the row's
    models; a row that does not name `base` takes the base's layers where the row's first source has them.

    >>> from mergesearch import Recipe, Rule
    >>> rules = (Rule(method="ties", parameters={"density": 0.5}),)
    >>> Recipe(base="zoo:base", models={"order": "zoo:order", "letters": "zoo:letters"}, rules=rules).methods
    ['ties']
    """

    base: str | None = Field(
        default=None, description="the checkpoint that the models were fine-tuned from, where a method needs it"
    )
    models: dict[str, str] = Field(min_length=1, description="the fine-tuned models, each under a name of your choice")
    rules: tuple[Rule, ...] = Field(
        min_length=1, description="tried in order for each tensor; the first that covers it merges it"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the masks of random methods")
    dtype: Literal["float32"] = Field(default="float32", description="of the arithmetic")
    out_dtype: DType = Field(default="bfloat16", description="of the result, which is rounded to it once")
    tokenizer: str = Field(default=BASE, description="`base`, `union`, or the model whose tokenizer the result gets")
    stack: tuple[dict[str, tuple[int, int]], ...] | None = Field(
        default=None, description="the layers of the result, row upon row: for each source its first and last layer"
    )

    statistics: Measured | None = Field(
        default=None, description="what methods go by that need documents; a strategy measures and states it"
    )

    @model_validator(mode="after")
    def _stack_is_sound(self) -> Recipe:
        for position, row in enumerate(self.stack or ()):
            lengths = {last - first + 1 for first, last in row.values()}
            if len(lengths) != 1 or min(lengths) < 1 or any(first < 0 for first, _ in row.values()):
                raise ValueError(f"stack.{position} {row}: give each source the same number of layers, counted from 0")
            for name in row:
                if name != BASE and name not in self.models:
                    raise ValueError(f"stack.{position} names {name!r}, not among base, {', '.join(self.models)}")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        for position, rule in enumerate(self.rules):
            for name in rule.models or ():
                if name not in self.models:
                    raise ValueError(f"rules.{position}.models names {name!r}, not among {', '.join(self.models)}")
        if self.tokenizer not in (BASE, UNION, *self.models):
            raise ValueError(f"tokenizer is {self.tokenizer!r}: use base, union or one of {', '.join(self.models)}")
        return self

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that depend on everything the recipe states and on nothing else."""
        canonical = json.dumps(self.dump(), separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def rule_for(self, tensor: TensorInfo) -> Rule:
        """The first rule that covers a tensor.

        Raises:
            UserError: no rule does.
        """
        for rule in self.rules:
            if rule.covers(tensor):
                return rule
        raise UserError(
            f"no rule of recipe {self.id} covers tensor {tensor.name!r} (layer {tensor.layer}, {tensor.component}): "
            "end the rules with one that has neither layers nor components"
        )

    @property
    def methods(self) -> list[str]:
        """The methods it uses, each once, in the order of the rules."""
        return list(dict.fromkeys(rule.method for rule in self.rules))

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, without what is left at None."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        return yaml.dump(self.dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)

    @classmethod
    def from_data(cls, data: dict[str, Any], where: str) -> Recipe:
        """A recipe from plain data; `UserError` says what is wrong in it."""
        return validate(cls, data, where)


def read(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        UserError: what is wrong with the file, in one sentence.
    """
    return Recipe.from_data(read_yaml(path), str(path))


def single_rule(method: str, models: Sequence[str] | None = None, **parameters: Any) -> tuple[Rule, ...]:
    """The rules of a recipe that merges every tensor alike."""
    return (Rule(method=method, models=tuple(models) if models is not None else None, parameters=parameters),)
