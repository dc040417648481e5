"""The study: Optuna proposes, in one stage or several, each with its own sampler and space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.config.search import AUTO
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search import standstill, store
from mergesearch.search.budget import Budget
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.paying import LEAST, Return, ahead_of, latest_half
from mergesearch.search.samplers import FIXED_SPACE, Choice, distributions
from mergesearch.search.strategies.base import Proposal, Sampled, Stated, Strategy, Surroundings, Wait
from mergesearch.search.strategies.learned_soup import LearnedSoups
from mergesearch.search.trials import Trial
from mergesearch.space import OneMethod, RefineSpace, Space, TogetherSpace, split_rules
from mergesearch.space.knobs import subsets_of

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
# where the study notes that there is none behind a learned soup
_LEFT_OUT = "study:left out"
# the stages, as their trials note them
FIRST, COARSE, REFINE = "study", "coarse", "refine"

Sampler = Literal["auto", "tpe", "cmaes", "gp", "nsga2", "random"]
Ends = Literal["auto", "pays", "budget"]


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


@register
class Study(Strategy):
    """Optuna over `space`, until the budget ends; what later strategies may need is left to them.

    A named `sampler` has one stage, over the whole space. `auto` has two: TPE chooses among methods, models and
    numbers; then the numbers of the best recipe so far, of whichever strategy, are refined by CMA-ES where the budget
    lasts for several of its generations, and by a Gaussian process where it does not. CMA-ES knows no categories, so
    the method is fixed by then. Of a recipe with more than 120 numbers, as a soup per tensor is, those of each model
    are moved together. With `space.grow` the first stage has one group for the whole model, and the second starts from
    the best recipe restated for each group. Where parameters vary over depth otherwise (control points, a split), the
    second stage starts from the best recipe that is a point of the space, and has all points with its method.

    As a part of `auto` it ends a stage that does not pay: where the latest half of its proposals, 12 at least, raised
    the best score by less than a quarter of its standard error, the next as many are not expected to bring more. And it
    does not begin, or go on, behind a learned soup that is ahead of all else by more than a quarter of the difference's
    standard error: proposals that know nothing of the soup do not come near it, and what is refined of it is better on
    the search documents alone. What is left of the budget is not spent then. `study_ends: budget` spends it.
    """

    name = "study"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "sampler": (Sampler, Field(default="auto", description="of the study; `auto`: TPE, then CMA-ES or a GP")),
        "study_ends": (
            Ends,
            Field(
                default="auto",
                description="`pays`: once its latest half brought less than noise, and in `strategy: auto` before it "
                "begins where a learned soup is ahead of all else; `budget`: with the budget; `auto`: `pays` where "
                "`strategy` is `auto`, else `budget`",
            ),
        ),
    }
    auto: ClassVar[int | None] = 4
    open_ended = True

    def __init__(self, run: Surroundings):
        super().__init__(run)
        self._refine: RefineSpace | OneMethod | None = None

    @classmethod
    def refuse(cls, config: Config) -> None:
        space, sampler = config.space, sampler_of(config)
        if sampler in FIXED_SPACE and (len(space.methods) > 1 or space.stack or _chooses_models(config)):
            raise UserError(
                f"search.sampler is {sampler}, which chooses no methods or models ({', '.join(space.methods)}): name "
                "one method that takes all models, or set sampler to auto"
            )
        if config.objective.pareto and sampler == "cmaes":
            raise UserError(
                f"search.sampler is {sampler}, which takes one objective: with pareto use auto, tpe, gp, nsga2 or "
                "random"
            )

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} proposal{'s' * (count > 1)}" if count else "a proposal"

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        config = outlook.config
        single = sampler_of(config) != "auto" or config.objective.pareto or config.space.stack is not None
        refines = not single or config.space.grow
        # the second stage begins with the best recipe so far, which is scored already
        mine = outlook.of(cls.name)
        begun = any(trial.key.get("stage") == REFINE for trial in mine)
        last = begun or not refines
        if outlook.history is not None and mine and last and _is_over(outlook.history, mine[-1].key["stage"]):
            return []
        if outlook.history is not None and _left_out(outlook.history) is not None:
            return []
        unless = "a learned soup is ahead of all else by then" if _may_be_left_out(outlook) else ""
        return [*[Ahead(1, copies=True)] * (refines and not begun), Ahead(None, unless=unless)]

    @classmethod
    def words(cls, history: History) -> list[str]:
        if not _counts_returns(history.config):
            return []
        stages = dict.fromkeys(trial.key["stage"] for trial in history.of(cls.name))
        found = [(stage, brought) for stage in stages if (brought := ended(history, stage)) is not None]
        left_out = _left_out(history) if _LEFT_OUT in history.notes and not found else None
        if left_out is not None:
            return [left_out]
        return [f"study: stage {stage} ended: {brought.words()}: as many more would bring less than noise"
                for stage, brought in found]  # fmt: skip

    # --- which stage ---

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        if _left_out(history) is not None:
            if _LEFT_OUT not in history.notes:  # a run whose budget ended before did not come to that
                store.note(self.run.study, _LEFT_OUT, True)
            return None
        stage = self.stage(history, budget)
        if ended(history, stage.label) is not None:
            return None
        key = {"stage": stage.label, "sampler": stage.sampler}
        begun = any(trial.key["stage"] == stage.label for trial in history.of(self.name))
        if not begun and isinstance(stage.space, (RefineSpace, OneMethod)):
            return Stated(stage.space.origin, key=key)  # where it begins is known, and scored already
        return self._sampled(stage.space, key)

    def again(self, trial: Trial, history: History) -> Sampled:
        return self._sampled(self.known_in(trial, history), trial.key)

    def known_in(self, trial: Trial, history: History) -> Space:
        if trial.key["stage"] == REFINE:
            return self._refined(history) or self.run.space
        return self.run.coarse if trial.key["stage"] == COARSE and self.run.coarse else self.run.space

    def _sampled(self, space: Space, key: Mapping[str, Any]) -> Sampled:
        if key["sampler"] not in FIXED_SPACE:
            return Sampled(space, Choice(key["sampler"]), key)
        start = space.start if isinstance(space, (RefineSpace, OneMethod)) else {}
        return Sampled(space, Choice(key["sampler"], distributions(space), start, key["stage"]), key)

    def stage(self, history: History, budget: Budget) -> Stage:
        """The stage that the next proposal belongs to."""
        first = self._first(history, budget)
        begun = store.has_note(self.run.study, FIXED)
        new = history.new_of(self.name)
        done = history.is_exhausted(self.name) or _is_over(history, first.label)
        # where the second begins is noted for good, so what comes before has to be through by then
        if not begun and (first.until is None or budget.early or (new < first.until and not done)):
            return first
        if not begun:
            self._fix(history, budget)
        space = self._refined(history)
        return first if space is None else Stage(REFINE, space, store.noted(self.run.study, FIXED)["sampler"])

    def _first(self, history: History, budget: Budget) -> Stage:
        sampler = sampler_of(self.config)
        space = self.run.coarse or self.run.space
        label = COARSE if self.run.coarse else FIRST
        if sampler == "auto":
            single = self.config.objective.pareto or self.config.space.stack is not None
            return Stage(label, space, "tpe", None if single else self._share(history, budget))
        return Stage(label, space, sampler, self._share(history, budget) if self.run.coarse else None)

    def _share(self, history: History, budget: Budget) -> int:
        """Half of what the study may propose goes to the choice of method; nothing where there is no choice."""
        others = history.proposals - history.new_of(self.name)
        mine = max(0, budget.affordable - others)
        choices = len(getattr(self.run.space, "methods", ())) > 1 or self.run.coarse is not None
        return min(MOST_CHOOSING, mine // 2 if choices else mine // 4)

    def _finisher(self, dimension: int, history: History, budget: Budget) -> str:
        sampler = sampler_of(self.config)
        if sampler != "auto":
            return sampler
        population = 4 + int(3 * math.log(dimension))
        left = budget.affordable - history.proposals
        return "cmaes" if left >= GENERATIONS * population or dimension > MOST_FOR_GP else "gp"

    # --- the space around the best ---

    def _refined(self, history: History) -> RefineSpace | OneMethod | None:
        """The space around the best recipe when the first stage ended; the same for every worker and every start."""
        if self._refine is None:
            fixed = store.noted(self.run.study, FIXED)
            self._refine = self._around(Recipe.from_data(fixed["recipe"], FIXED)) if fixed else None
        return self._refine

    def _around(self, recipe: Recipe) -> RefineSpace | OneMethod | None:
        """The numbers of a recipe; where parameters vary over depth otherwise than by groups, those of the space."""
        if self.config.space.depth == "groups":
            space = RefineSpace(self.config, recipe)
            return space if space.dimension <= MOST_NUMBERS else TogetherSpace(self.config, recipe)
        try:
            return OneMethod(self.config, recipe, self.run.infos, self.run.layers)
        except LookupError:
            return None

    def _fix(self, history: History, budget: Budget) -> None:
        """Notes where the second stage begins and who proposes in it."""
        for trial in history.complete():
            recipe = trial.recipe
            if recipe.stack is not None:
                continue
            if self.config.space.depth == "groups":
                recipe = split_rules(recipe, self.config, self.run.infos, self.run.layers)
            space = self._around(recipe)
            if space is not None and space.dimension:
                sampler = self._finisher(space.dimension, history, budget)
                store.note(self.run.study, FIXED, {"recipe": recipe.dump(), "sampler": sampler, "from": trial.number})
                return


def _counts_returns(config: Config) -> bool:
    """Whether stages that do not pay end."""
    ends = config.search.key("study_ends", str)
    return not config.objective.pareto and (ends == "pays" or (ends == "auto" and AUTO in config.search.strategy))


def _may_be_left_out(outlook: Outlook) -> bool:
    """Whether soups are still to come, one of which may leave no study to begin."""
    if not _heeds_soups(outlook.config) or LearnedSoups.name not in outlook.config.search.strategies:
        return False
    learning = any(not trial.state.ended for trial in outlook.of(LearnedSoups.name))
    return learning or bool(LearnedSoups.expects(outlook))


def _heeds_soups(config: Config) -> bool:
    """Whether a learned soup that is ahead of all else leaves no study to begin."""
    return AUTO in config.search.strategy and _counts_returns(config)


def _left_out(history: History) -> str | None:
    """Why there is no study, or no more of it, in words; None where there is.

    results/search.md, "what the study makes of a learned soup": nothing on documents held out, for a fifth of the run.
    One that is at work on the soup has trials near it, and goes on.
    """
    if not _heeds_soups(history.config):
        return None
    complete = history.complete()
    soup = next(iter(complete), None)
    rival = next((trial for trial in complete if trial.strategy != LearnedSoups.name and trial.feasible), None)
    if soup is None or rival is None or soup.strategy != LearnedSoups.name or history.objective is None:
        return None
    # without documents the error is that of scores on different ones, far above the paired one
    ahead, noise = ahead_of(soup, rival, history)
    if not noise or ahead <= LEAST * noise:
        return None
    what = "ended" if history.of(Study.name) else "left out"
    return (
        f"study: {what}: trial {soup.number}, a learned soup, is {ahead:.4f} ahead of all else, and what a study makes "
        "of one is seldom better on other documents; search.study_ends: budget runs it all the same"
    )


def ended(history: History, stage: str) -> Return | None:
    """What the latest half of a stage brought, where that does not pay; None where it goes on."""
    if not _counts_returns(history.config):
        return None
    mine = [trial for trial in history.of(Study.name) if trial.key["stage"] == stage]
    brought = latest_half(mine, history)
    return None if brought is None or brought.pays else brought


def _is_over(history: History, stage: str) -> bool:
    """Whether a stage has ended before its budget did."""
    return ended(history, stage) is not None or standstill.ended(history, Study.name, stage) is not None


def sampler_of(config: Config) -> str:
    """`search.sampler`."""
    return config.search.key("sampler", str)


def _chooses_models(config: Config) -> bool:
    models = tuple(config.models)
    return any(len(subsets_of(methods.get(name, "space.methods"), models)) > 1 for name in config.space.methods)
