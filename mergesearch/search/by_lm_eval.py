"""By what a run is scored, the same for all its workers, and the figures that lm-eval's own model gives beside.

Token tries give lm-eval's figures up to the rounding of another batch. So a search compares figures of one kind alone,
and what a person goes by is scored once more the way the `lm_eval` command scores it: the parents, the plain average
and the winner at the end of a run, finalists by the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna

from mergesearch.errors import UserError
from mergesearch.evaluate.model import LM_EVAL, VLLM
from mergesearch.evaluate.scores import Scores, TaskScore
from mergesearch.search import store

# where the study notes by what each type of request is answered, and what lm-eval's own model found
KINDS, FIGURES = "scoring", "by_lm_eval"


@dataclass(frozen=True)
class Figures:
    """What lm-eval's own model gives for one trial, on the search documents.

    Attributes:
        tasks: by label, of the tasks that token tries answered in the search.
        seconds: what asking it took.
    """

    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    seconds: float = 0.0


def agree(study: optuna.Study, mine: Mapping[str, str]) -> dict[str, str]:
    """By what the run's requests are answered: what its first worker found, or `mine` where this is the first.

    The caller holds the run's `start` lock.

    Raises:
        UserError: the run's are answered by something that this worker has tried and found that it cannot be used.
    """
    noted: dict[str, str] = kinds(study) or {}
    refused = {kind: noted[kind] for kind, by in mine.items() if by == LM_EVAL and noted.get(kind, LM_EVAL) != LM_EVAL}
    if refused:
        raise UserError(
            f"this worker cannot score {in_words(refused)} as the run's other workers do, by {means(refused)} (its log "
            "says why), and figures of two kinds are not compared: use a machine like theirs, or begin a run with "
            "`scoring: lm_eval`"
        )
    if not mine.keys() <= noted.keys():
        noted = {**mine, **noted}
        store.note(study, KINDS, noted)
    return noted


def kinds(study: optuna.Study) -> dict[str, str] | None:
    """By what each type of request is answered; None of a run that noted nothing."""
    return store.noted(study, KINDS)


def in_words(found: Mapping[str, str]) -> str:
    """What token tries or vLLM answer, in words; empty where lm-eval's own model answers everything."""
    names = {"loglikelihood": "log-likelihoods", "generate_until": "generated answers"}
    return " and ".join(names.get(kind, kind) for kind, by in found.items() if by != LM_EVAL)


def by_whom(found: Mapping[str, str]) -> str:
    """Who answered what lm-eval's own model did not, in words; empty where it answered everything."""
    vllm = {kind: by for kind, by in found.items() if by.startswith(VLLM)}
    tried = in_words({kind: by for kind, by in found.items() if kind not in vllm})
    whole = [f"{tried} were scored by token tries"] if tried else []
    return " and ".join([*whole, *(f"{in_words({kind: by})} were written by {by}" for kind, by in vllm.items())])


def means(found: Mapping[str, str]) -> str:
    """Likewise, without what was answered."""
    names = ((by if by.startswith(VLLM) else "token tries") for by in found.values() if by != LM_EVAL)
    return " and ".join(dict.fromkeys(names))


def figures(study: optuna.Study) -> dict[int, Figures]:
    """What lm-eval's own model found, by trial."""
    noted: Mapping[str, Any] = store.noted(study, FIGURES) or {}
    return {
        int(number): Figures({task: TaskScore(**score) for task, score in data["tasks"].items()}, data["seconds"])
        for number, data in noted.items()
    }


def note(study: optuna.Study, number: int, scores: Scores) -> None:
    """Notes what it found for a trial. The caller holds the run's `best` lock: others may note at the same time."""
    noted = dict(store.noted(study, FIGURES) or {})
    tasks = {task: asdict(score) for task, score in scores.tasks.items()}
    store.note(study, FIGURES, {**noted, str(number): {"tasks": tasks, "seconds": scores.seconds}})
