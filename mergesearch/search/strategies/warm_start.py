"""Warm start: the best recipes of other runs, tried first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mergesearch.config import Config, SearchConfig
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.schema import ONE_OR_MORE
from mergesearch.search import store
from mergesearch.search.budget import Budget, Wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.strategies.base import Proposal, Stated, Strategy, Surroundings, Wait, learned_by_answers

# of each run, so many of its best proposals
MOST = 3
# where the study notes the recipes that it began with, and which of them were learned by answers
_NOTE, _LEARNED = "warm_start", "warm_start_learned"


@register
class WarmStart(Strategy):
    """The three best proposals of each run that `search.warm_start` names, tried first."""

    name = "warm_start"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "warm_start": (
            Annotated[list[str], ONE_OR_MORE],
            Field(
                default=[],
                description="run folders of the same base and models: the three best of each are tried first",
            ),
        )
    }
    paths: ClassVar[tuple[str, ...]] = ("warm_start",)
    named = False
    order = -1

    def __init__(self, run: Surroundings):
        super().__init__(run)
        if not store.has_note(run.study, _NOTE):
            found = warm_recipes(run.config)
            store.note(run.study, _LEARNED, [recipe.id for recipe, learned in found if learned])
            store.note(run.study, _NOTE, [recipe.dump() for recipe, _ in found])
        self.recipes: list[Recipe] = [
            Recipe.from_data(data, "search.warm_start") for data in store.noted(run.study, _NOTE)
        ]

    @classmethod
    def joins(cls, search: SearchConfig) -> bool:
        return bool(search.key("warm_start", list))

    @classmethod
    def refuse(cls, config: Config) -> None:
        study = store.begun(config)
        if study is None or not store.has_note(study, _NOTE):  # else the runs may have gone on, or away
            warm_recipes(config)

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        noted = None if outlook.history is None else store.noted(outlook.history.study, _NOTE)
        there = len(noted) if noted is not None else MOST * len(outlook.config.search.key("warm_start", list))
        return [Ahead(max(0, there - len(outlook.of(cls.name))))]

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        left = self._left(history)
        if not left:
            return None
        learned = left[0].id in (store.noted(self.run.study, _LEARNED) or ())
        return Stated(left[0], key={"by_answers": True} if learned else {})

    def wants(self, history: History) -> Wanted:
        return Wanted(len(self._left(history)))

    def _left(self, history: History) -> list[Recipe]:
        there = {trial.recipe_id for trial in history.of(self.name)}
        return [recipe for recipe in self.recipes if recipe.id not in there]


def warm_recipes(config: Config) -> list[tuple[Recipe, bool]]:
    """The best recipes of the runs that `search.warm_start` names, restated for this run's seed and dtype, and whether
    each was learned by how probable right answers are, which may be those of this run's documents.

    Raises:
        UserError: a run that is none, or is one of other parents.
    """
    recipes: dict[str, tuple[Recipe, bool]] = {}
    for run in config.search.key("warm_start", list):
        theirs, study = store.open_run(run)
        if (theirs.base_model, theirs.models, theirs.tokenizer) != (config.base_model, config.models, config.tokenizer):
            raise UserError(
                f"search.warm_start: {run} merges other models ({', '.join(theirs.models.values())}) or another base: "
                "name a run of the same ones"
            )
        proposals = [trial for trial in History(study, theirs).complete() if trial.name is None]
        for trial in proposals[:MOST]:
            recipe = trial.recipe.model_copy(update={"seed": config.search.seed, "out_dtype": config.dtype})
            recipes[recipe.id] = recipe, learned_by_answers(trial)
    return list(recipes.values())
