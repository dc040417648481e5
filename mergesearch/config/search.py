"""`search`: which strategies are run, in what order, and how long. Their own keys are the strategies'."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from mergesearch import registry
from mergesearch.errors import nearest
from mergesearch.schema import ONE_OR_MORE, Strict

# stands for the strategies that say so, in their order
AUTO = "auto"
T = TypeVar("T")


class PatienceConfig(Strict):
    """How long a search may go on without finding what is better beyond noise."""

    trials: int | None = Field(
        default=None, ge=5, le=1_000_000, description="so many candidates of a strategy in a row; at least one of both"
    )
    documents: int | None = Field(
        default=None,
        ge=1,
        le=10**15,
        description="so many document evaluations of a strategy in a row; whichever comes first",
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> PatienceConfig:
        if self.trials is None and self.documents is None:
            raise ValueError("it says neither trials nor documents: give one of them, or leave patience out")
        return self


class SearchConfig(Strict):
    """What is run, in what order, and how long. Further keys are the strategies' own, see `mergesearch strategies`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    strategy: Annotated[list[str], ONE_OR_MORE] = Field(
        default=[AUTO], min_length=1, description="one or a list, each starting from what the earlier ones found"
    )
    trials: int = Field(
        default=40,
        ge=0,
        le=1_000_000,
        description="how many candidates, those of the baselines and the sweep not counted",
    )
    hours: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="hours of work, over all starts and workers; where the run ends with the report "
        "(`report.at_end`), what that is expected to take is kept back, at most half",
    )
    documents: int | None = Field(
        default=None,
        ge=1,
        le=10**15,
        description="document evaluations, the baselines' too; in learning a backward pass counts as two more. The "
        "first of the three budgets to be used up ends the run",
    )
    patience: PatienceConfig | None = Field(
        default=None,
        description="ends a strategy whose latest candidates raised the best expected score by less than the standard "
        "error of that, for all workers, and says what going on would have brought; later strategies then have their "
        "turn",
    )
    trial_timeout: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="seconds after which a candidate is given up that is still being built and scored, or a soup whose "
        "next step is not there; its worker ends, since a library may never return, and `mergesearch run` starts it "
        "again",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of samplers, soups and random masks")

    @classmethod
    def further(cls) -> type[Strict]:
        """The keys that strategies add, as a model of their own."""
        keys: dict[str, Any] = {}
        for strategy in registry.strategies().values():
            keys |= strategy.keys
        return pydantic.create_model("StrategyKeys", __base__=Strict, **keys)

    @field_validator("strategy")
    @classmethod
    def _strategies_are_known(cls, value: list[str]) -> list[str]:
        known = [AUTO, *(name for name, strategy in registry.strategies().items() if strategy.named)]
        for name in value:
            if name not in known and name in registry.strategies():
                raise ValueError(f"{name!r} is not named here: it joins where its own key asks for it, search.{name}")
            if name not in known:
                close = nearest(name, known)
                hint = f"did you mean {close!r}? " if close else ""
                raise ValueError(f"{name!r} is no strategy: {hint}(known: {', '.join(known)})")
        return value

    @model_validator(mode="after")
    def _strategies_keys_are_valid(self) -> SearchConfig:
        given = self.model_extra
        if given is not None:  # of a model that takes further keys it never is
            valid = self.further().model_validate(given)
            given.clear()
            given.update({name: getattr(valid, name) for name in type(valid).model_fields})
        return self

    @model_validator(mode="after")
    def _what_never_ends_is_last(self) -> SearchConfig:
        known = registry.strategies()
        there = [name for name in self.strategies if known[name].open_ended]
        if len(there) > 1:
            raise ValueError(
                f"strategy {there[0]} goes on until the budget ends, so {there[1]} would never begin: leave one of "
                "them out"
            )
        return self

    @property
    def strategies(self) -> list[str]:
        """The strategies in order, `auto` written out, and with those that join by themselves."""
        known = registry.strategies()
        auto = sorted((place, name) for name, each in known.items() if (place := each.auto) is not None)
        named = [name for given in self.strategy for name in ([n for _, n in auto] if given == AUTO else [given])]
        joined = [name for name, strategy in known.items() if strategy.joins(self)]
        return sorted(dict.fromkeys([*named, *joined]), key=lambda name: known[name].order)

    def key(self, name: str, kind: type[T]) -> T:
        """The value of a key that a strategy adds.

        Raises:
            KeyError: no strategy adds it.
            TypeError: it is of another kind.
        """
        value = (self.model_extra or {})[name]
        if not isinstance(value, kind):
            raise TypeError(f"search.{name} is {type(value).__name__}, not {kind.__name__}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        mine = handler.resolve_ref_schema(handler(schema))
        keys = handler.resolve_ref_schema(handler(cls.further().__pydantic_core_schema__))
        mine["properties"] = {**mine.get("properties", {}), **keys.get("properties", {})}
        mine["additionalProperties"] = False
        return mine
