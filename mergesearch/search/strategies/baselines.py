"""Baselines: the parents first, since they fix the scale of the objective; then what anybody would try."""

from __future__ import annotations

from optuna.trial import TrialState

from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.search.baselines import SLERP, baselines, slerp_of
from mergesearch.search.history import History
from mergesearch.search.strategies.base import WAIT, Proposal, Wait, Wanted


class Baselines:
    """The base, every model, the plain average, and each method's published defaults."""

    name = "baselines"
    budgeted = False

    def __init__(self, config: Config, began: int = 0):
        self.config = config
        self._recipes = baselines(config)
        self._began = began

    def next(self, history: History) -> Proposal | Wait | None:
        """A baseline that failed is scored again by the next start, unless the objective is fixed."""
        again = 0 if history.objective is not None else self._began
        failed = {t.number for t in history.trials if t.state == TrialState.FAIL and t.number < again}
        there = {t.user_attrs.get("name") for t in history.trials if t.number not in failed}
        for name, recipe in self._recipes.items():
            if name not in there:
                return self._proposal(name, recipe)
        if history.objective is None:
            return WAIT
        return self._slerp(history) if self._wants_slerp(there) else None

    def wants(self, history: History) -> Wanted:
        return Wanted()

    def _wants_slerp(self, there: set[str | None]) -> bool:
        # with two models the sphere's middle is what slerp's own range begins with, and still a baseline
        return self.config.search.defaults and len(self.config.models) >= 2 and SLERP not in there

    def _slerp(self, history: History) -> Proposal | Wait | None:
        scored = [(history.named(name), name) for name in self.config.models]
        if any(t is not None and not t.state.is_finished() for t, _ in scored):
            return WAIT
        done = [(history.value(t), name) for t, name in scored if t is not None and history.value(t) is not None]
        if len(done) < 2:
            return None
        best = sorted(done, key=lambda pair: -pair[0])[:2]
        return self._proposal(SLERP, slerp_of(self.config, *(name for _, name in best)))

    def _proposal(self, name: str, recipe: Recipe) -> Proposal:
        return Proposal(recipe, name)
