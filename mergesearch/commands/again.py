"""What a person goes by, scored once more by lm-eval's own model, so that the `lm_eval` command gives the figure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from mergesearch.commands.inputs import load_tasks, scorer_of, splits
from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.scoring import Scorer
from mergesearch.recipe import AVERAGE
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.record import Record
from mergesearch.search import by_lm_eval

log: logging.Logger = logging.getLogger(__name__)


def wanted(run: Run) -> list[Record]:
    """Whom lm-eval's own model has still to score: the parents, the plain average, and last the winner."""
    winner = run.best()
    names = {*run.config.parents, AVERAGE}
    chosen = [record for record in run.records if record.name in names and record.scores and record is not winner]
    return [record for record in (*chosen, winner) if record is not None and not record.by_lm_eval]


def score_again(
    run: Run, engine: Engine, plain: Scorer, noted: Callable[[int, Scores], None], say: Callable[[str], None]
) -> None:
    """Scores whoever `wanted` names, one after another, each noted as it comes.

    Args:
        run: as it stands.
        engine: its live model is scored.
        plain: of that model, by lm-eval's own.
        noted: called with a trial's number and its scores.
        say: told what is being done, and whom it could not score.
    """
    records = wanted(run)
    if records:
        many = f"{len(records)} candidate{'s' * (len(records) > 1)}"
        say(f"scoring {many} once more by lm-eval's own model: parents, average and winner, for the `lm_eval` command")
    for record in records:
        try:
            engine.rebuild(recipe_of(record))
            noted(record.number, plain.score())
        except CandidateError as error:
            say(f"note: trial {record.number} could not be scored by lm-eval's own model ({error})")


def with_figures(run: Run, record: Record, engine: Engine, say: Callable[[str], None]) -> Record:
    """A record with the figures of lm-eval's own model, which is asked where nobody has asked it; for a model card.

    Where it cannot be asked any more, `say` is told, and the record is as it was.
    """
    if record.by_lm_eval or not record.scores or not by_lm_eval.in_words(run.kinds):
        return record
    try:
        tasks = load_tasks(run.pinned)
        documents = {label: part.search for label, part in splits(run.config, tasks).items()}
        config = run.config.by_lm_eval
        scorer = scorer_of(config, engine.model, engine.pool.tokenizer, tasks, documents, batch_size=run.batch_size)
        engine.rebuild(recipe_of(record))
        return replace(record, by_lm_eval=scorer.score().tasks)
    except (UserError, CandidateError) as error:
        say(f"note: the figures in the model card are the search's own, by {by_lm_eval.means(run.kinds)}: {error}")
        return record
