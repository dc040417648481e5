"""The strategies of a run: each says what to score next from what was found so far, and knows when it has ended.

A strategy keeps no state of its own: everything is read from the study's trials, so that any worker can go on where any
other stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.search.history import History
from mergesearch.search.strategies.base import WAIT, Proposal, Strategy, Wait, Wanted, wanted
from mergesearch.search.strategies.baselines import Baselines
from mergesearch.search.strategies.greedy_soup import GreedySoup
from mergesearch.search.strategies.learned_soup import ClosedForm, LearnedSoups
from mergesearch.search.strategies.random_control import RandomControl
from mergesearch.search.strategies.stages import Stages
from mergesearch.search.strategies.warm_start import WarmStart

LEARNED = ("learned_soup", "fisher", "regmean")
# these go on as long as the budget does
OPEN_ENDED = ("study", "random")


def strategies_of(
    config: Config,
    stages: Stages,
    learns: bool = False,
    warm: Sequence[Recipe] = (),
    began: int = 0,
    gradients: Callable[[], bool] = lambda: True,
) -> list[Strategy]:
    """The strategies of a configuration, in order.

    Args:
        config: the run's configuration.
        stages: the study.
        learns: whether soups can be learned here.
        warm: recipes of other runs to try first.
        began: how many trials there were when this worker began.
        gradients: whether soups can be learned by them.
    """
    made = {
        "baselines": Baselines(config, began),
        "greedy_soup": GreedySoup(config),
        "learned_soup": LearnedSoups(config, gradients),
        "fisher": ClosedForm("fisher", config),
        "regmean": ClosedForm("regmean", config),
        "study": stages,
        "random": RandomControl(),
    }
    found: list[Strategy] = [made[name] for name in config.search.strategies if name not in LEARNED or learns]
    if warm:
        found.insert(1, WarmStart(warm))
    if config.search.random_control:
        found.append(RandomControl(like_others=True))
    stages.later = found[found.index(stages) + 1 :] if stages in found else []
    return found


def notes(config: Config, history: History) -> list[str]:
    """What the strategies have to say about what they found."""
    if "greedy_soup" not in config.search.strategies:
        return []
    return [text for text in [GreedySoup(config).words(history)] if text]


__all__ = ["OPEN_ENDED", "WAIT", "Proposal", "Strategy", "Wait", "Wanted", "notes", "strategies_of", "wanted"]
