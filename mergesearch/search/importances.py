"""Which parameters mattered: Optuna's functional analysis of variance over the trials of each method.

Hutter, Hoos and Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial

from mergesearch.search.history import History
from mergesearch.search.trials import State, Trial

# with fewer trials of one space there is nothing to be said
FEWEST = 8


@dataclass(frozen=True)
class Importance:
    """Of the parameters of one space.

    Attributes:
        method: the merge method, or the stage whose space it is.
        trials: how many it goes by.
        shares: of the objective's variance over them that each parameter accounts for; they add up to 1.
    """

    method: str
    trials: int
    shares: dict[str, float]

    def to_data(self) -> dict[str, object]:
        return asdict(self)


def importances(history: History, seed: int = 0) -> list[Importance]:
    """The importances of every space with enough trials, that with the most trials first.

    Trials are of one space where their parameters have the same names, as those of one method do. A parameter that was
    the same in all of them is left out.

    Args:
        history: of the run.
        seed: of the forest that the analysis grows.
    """
    spaces: dict[frozenset[str], list[Trial]] = {}
    for trial in history.trials:
        if trial.state is State.COMPLETE and trial.params and trial.same_as is None:
            spaces.setdefault(frozenset(trial.params), []).append(trial)
    frozen = {trial.number: trial for trial in history.study.get_trials(deepcopy=False)}
    found = []
    for mine in sorted(spaces.values(), key=len, reverse=True):
        pairs = [(frozen[trial.number], value) for trial in mine if (value := history.value(trial)) is not None]
        if len(pairs) >= FEWEST and len({value for _, value in pairs}) > 1:
            shares = _shares(pairs, seed)
            if shares:
                found.append(Importance(_method(mine[0]), len(pairs), shares))
    return found


def _shares(pairs: list[tuple[FrozenTrial, float]], seed: int) -> dict[str, float]:
    names = [name for name in pairs[0][0].params if len({str(trial.params[name]) for trial, _ in pairs}) > 1]
    if len(names) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial, value in pairs:
        params = {name: trial.params[name] for name in names}
        distributions = {name: trial.distributions[name] for name in names}
        study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=distributions))
    shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    prefix = _common_prefix(list(shares))
    return {name[len(prefix) :]: float(share) for name, share in shares.items()}


def _method(trial: Trial) -> str:
    recipe = trial.recipe_data or {}
    methods = "+".join(dict.fromkeys(rule["method"] for rule in recipe.get("rules", ())))
    stage = trial.key.get("stage")
    return f"{methods or 'recipe'}, {stage}" if stage and stage != trial.strategy else methods or "recipe"


def _common_prefix(names: list[str]) -> str:
    """What all names begin with, up to a dot: a recipe of one group says `layers0-3.ties.` before each of them."""
    parts = [name.split(".") for name in names]
    kept: list[str] = []
    for place in range(min(map(len, parts)) - 1):
        if len({tuple(each[: place + 1]) for each in parts}) > 1:
            break
        kept.append(parts[0][place])
    prefix = ".".join(kept)
    return f"{prefix}." if prefix else ""
