"""A few documents scored, and a step of learning taken, before the first trial: how fast a run will be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.evaluate.scoring import Scorer
from mergesearch.recipe import BASE
from mergesearch.search import strategies
from mergesearch.search.outlook import Outlook
from mergesearch.search.soup.foreseen import Foreseen
from mergesearch.search.soup.learner import Learner
from mergesearch.search.speed import Probe
from mergesearch.search.strategies.baselines import parents

log: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

# of each task so many documents are scored, in these seconds at most
FEW, SECONDS = 8, 4.0


def measure(
    config: Config,
    engine: Engine,
    scorer: Scorer,
    learner: Learner,
    documents: Mapping[str, Sequence[int]],
    loading: float = 0.0,
    export: float = 0.0,
    plain: Scorer | None = None,
) -> Probe:
    """What the base takes on a few documents; the live model is the base afterwards.

    What cannot be measured, or not in a few seconds, is left out: the trials will tell.

    Args:
        config: the run's configuration.
        engine: its live model is scored.
        scorer: of that model on the search documents.
        learner: of the run, which takes a step where any of its strategies learns.
        documents: the search documents by task.
        loading: the seconds until now.
        export: what writing the winner may take.
        plain: by lm-eval's own model, of the tasks that are to be scored once more at the end; None where none are.
    """
    begun, merge, scoring = time.perf_counter(), 0.0, {}
    by_lm_eval: dict[str, float] = {}
    try:
        merge = engine.load(config.recipe(parents(config)[BASE]))
        _ask(scorer, documents, next(iter(documents)), 1)  # the first forward pass is no measure
        for label in documents:
            if time.perf_counter() - begun > SECONDS:
                break
            scoring[label] = _ask(scorer, documents, label, FEW)
        if plain is not None:
            for label in plain.labels:
                if time.perf_counter() - begun < 2 * SECONDS:
                    by_lm_eval[label] = _ask(plain, documents, label, FEW)
    except Exception:  # whatever it is, the first trial meets it again and says so
        log.debug("the speed of scoring was not measured", exc_info=True)
    learning = _guarded(learner.seconds_a_document, "learning") if learns(config, documents) else None
    counts = {label: len(ids) for label, ids in documents.items()}
    again = 0.0
    if plain is not None:
        each = sum((by_lm_eval.get(label) or scoring.get(label) or 0.0) * counts[label] for label in plain.labels)
        again = asked_again(config) * (merge + each)
    return Probe(counts, scoring, merge, learning, loading, export, again)


def asked_again(config: Config) -> int:
    """How many candidates lm-eval's own model scores once more at the end: the parents, the average, the winner."""
    return len(config.parents) + 2


def _ask(scorer: Scorer, documents: Mapping[str, Sequence[int]], label: str, few: int) -> float:
    """Seconds a document, on a few from all over the task's."""
    ids = documents[label]
    chosen = ids[:: max(1, len(ids) // few)][:few]
    part = scorer.only({**dict.fromkeys(documents, ()), label: chosen})
    part.asked = None
    start = time.perf_counter()
    part.answer()
    return (time.perf_counter() - start) / len(chosen)


def learns(config: Config, documents: Mapping[str, Sequence[int]]) -> bool:
    """Whether a strategy of the run learns recipes on the search documents."""
    counts = [len(documents[task.task]) for task in config.tasks]
    known, outlook = strategies.registered(), Outlook(config, counts)
    return any(ahead.learning for name in config.search.strategies for ahead in known[name].expects(outlook))


def foreseen(learner: Learner, measure: Any) -> Foreseen | None:
    """What a full form's statistics will take; None where that could not be measured. The live model is anything
    afterwards.

    Args:
        measure: of `soup.full`.
    """
    return _guarded(lambda: learner.foreseen(measure), "measuring statistics")


def _guarded(measured: Callable[[], T | None], what: str) -> T | None:
    try:
        return measured()
    except Exception:  # as above
        log.debug("the speed of %s was not measured", what, exc_info=True)
        return None
