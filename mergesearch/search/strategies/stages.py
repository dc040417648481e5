"""The study: Optuna proposes, in one stage or several, each with its own sampler and space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from mergesearch.config import Config
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.search.history import History, recipe_of
from mergesearch.search.samplers import FIXED_SPACE, Choice, distributions
from mergesearch.search.strategies.base import Proposal, Strategy, Wanted, wanted
from mergesearch.space import OneMethod, RefineSpace, Space, TogetherSpace, split_rules

# with so many trials for each of its generations, CMA-ES learns the shape of the space
GENERATIONS = 6
# more numbers than this are no local search one by one, and move together
MOST_NUMBERS = 120
# after so many trials TPE has chosen a method, if ever
MOST_CHOOSING = 40
# a Gaussian process says little in more dimensions with a few dozen trials
MOST_FOR_GP = 40
# where the study notes what its second stage begins with
FIXED = "stage:refine"


@dataclass(frozen=True)
class Stage:
    """A part of the study.

    Attributes:
        label: noted on its trials.
        space: what it proposes from.
        sampler: who proposes.
        until: how many proposals of the study have been made when it ends; None: when the budget ends.
    """

    label: str
    space: Space
    sampler: str
    until: int | None = None


class Stages:
    """The stages of a study.

    A named sampler has one stage, over the whole space. `auto` has two: TPE chooses among methods, models and numbers;
    then the numbers of the best recipe so far, of whichever strategy, are refined by CMA-ES where the budget lasts for
    several of its generations, and by a Gaussian process where it does not. CMA-ES knows no categories, so the method
    is fixed by then. Of a recipe with more than 120 numbers, as a soup per tensor is, those of each model are moved
    together. With `space.grow` the first stage has one group for the whole model, and the second starts from
    the best recipe restated for each group. Where parameters vary over depth otherwise (control points, a split), the
    second stage starts from the best recipe that is a point of the space, and has all points with its method.

    Args:
        config: the run's configuration.
        space: all that may be proposed.
        coarse: the same with one group for the whole model, where the space grows.
        infos, layers: of the pool.
    """

    name = "study"
    budgeted = True

    def __init__(
        self, config: Config, space: Space, coarse: Space | None, infos: Sequence[TensorInfo] = (), layers: int = 0
    ):
        self.config, self.space, self.coarse = config, space, coarse
        self.infos, self.layers = infos, layers
        self.later: Sequence[Strategy] = ()  # the strategies after it, to which it leaves a part of the budget
        self._refine: RefineSpace | OneMethod | None = None

    def wants(self, history: History) -> Wanted:
        return Wanted()

    # --- which stage ---

    def next(self, history: History) -> Proposal | None:
        stage = self.stage(history)
        attributes = {"stage": stage.label, "sampler": stage.sampler}
        mine = [t for t in history.ended(self.name) if t.user_attrs.get("stage") == stage.label]
        if not mine and isinstance(
            stage.space, (RefineSpace, OneMethod)
        ):  # where it begins is known, and scored already
            return Proposal(stage.space.origin, attributes=attributes)
        return Proposal(attributes=attributes)

    def stage(self, history: History) -> Stage:
        """The stage that the next proposal belongs to."""
        first = self._first(history)
        begun = FIXED in history.study.user_attrs
        if not begun and (first.until is None or len(history.ended(self.name)) < first.until):
            return first
        space = self._refined(history)
        return first if space is None else Stage("refine", space, history.study.user_attrs[FIXED]["sampler"])

    def _first(self, history: History) -> Stage:
        sampler = self.config.search.sampler
        space = self.coarse or self.space
        label = "coarse" if self.coarse else "study"
        if sampler == "auto":
            single = self.config.objective.pareto or self.config.space.stack is not None
            return Stage(label, space, "tpe", None if single else self._share(history))
        return Stage(label, space, sampler, self._share(history) if self.coarse else None)

    def _share(self, history: History) -> int:
        """Half of what the study may propose goes to the choice of method; nothing where there is no choice."""
        others = history.proposals - len(history.ended(self.name))
        mine = max(0, self._affordable(history) - others)
        choices = len(getattr(self.space, "methods", ())) > 1 or self.coarse is not None
        return min(MOST_CHOOSING, mine // 2 if choices else mine // 4)

    def _affordable(self, history: History) -> int:
        """How many proposals the budget allows until the study ends, should each be scored on every document."""
        kept, search = wanted(self.later, history), self.config.search
        trials = search.trials - kept.trials
        if search.documents is None or not history.documents_each:
            return trials
        left = search.documents - history.documents - history.kept(*kept)
        return min(trials, history.proposals + max(0, left) // history.documents_each)

    def _finisher(self, dimension: int, history: History) -> str:
        sampler = self.config.search.sampler
        if sampler != "auto":
            return sampler
        population = 4 + int(3 * math.log(dimension))
        left = self._affordable(history) - history.proposals
        return "cmaes" if left >= GENERATIONS * population or dimension > MOST_FOR_GP else "gp"

    # --- the space around the best ---

    def _refined(self, history: History) -> RefineSpace | OneMethod | None:
        """The space around the best recipe when the first stage ended; the same for every worker and every start."""
        if self._refine is None:
            if FIXED not in history.study.user_attrs:
                self._fix(history)
            fixed = history.study.user_attrs.get(FIXED)
            self._refine = self._around(Recipe.from_data(fixed["recipe"], FIXED)) if fixed else None
        return self._refine

    def _around(self, recipe: Recipe) -> RefineSpace | OneMethod | None:
        """The numbers of a recipe; where parameters vary over depth otherwise than by groups, those of the space."""
        if self.config.space.depth == "groups":
            space = RefineSpace(self.config, recipe)
            return space if space.dimension <= MOST_NUMBERS else TogetherSpace(self.config, recipe)
        try:
            return OneMethod(self.config, recipe, self.infos, self.layers)
        except LookupError:
            return None

    def _fix(self, history: History) -> None:
        """Notes where the second stage begins and who proposes in it."""
        for trial in history.complete():
            recipe = recipe_of(trial)
            if recipe.stack is not None:
                continue
            if self.config.space.depth == "groups":
                recipe = split_rules(recipe, self.config, self.infos, self.layers)
            space = self._around(recipe)
            if space is not None and space.dimension:
                sampler = self._finisher(space.dimension, history)
                fixed = {"recipe": recipe.dump(), "sampler": sampler, "from": trial.number}
                history.study.set_user_attr(FIXED, fixed)
                return

    # --- what a trial of the study is proposed with ---

    def space_of(self, trial: FrozenTrial, history: History) -> Space:
        """The space that a trial was, or is to be, proposed from; of other strategies', that of the first stage."""
        label = trial.user_attrs.get("stage")
        if label == "refine":
            return self._refined(history) or self.space
        return self.space if label in ("study", "random") or not self.coarse else self.coarse

    def choice(self, trial: FrozenTrial, history: History) -> Choice:
        """The sampler that proposes a trial."""
        name = trial.user_attrs.get("sampler", "random")
        if name not in FIXED_SPACE:
            return Choice(name)
        space = self.space_of(trial, history)
        start = space.start if isinstance(space, (RefineSpace, OneMethod)) else {}
        return Choice(name, distributions(space), start)
