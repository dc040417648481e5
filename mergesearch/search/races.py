"""The races of one worker: whom a candidate has to beat, on which blocks of documents. The rule stands in `racing`."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from mergesearch.config import Config, RacingConfig
from mergesearch.evaluate.scores import load_documents
from mergesearch.recipe import Recipe
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.racing import OTHERS, Best, Blocks, Outcome, race, spreads
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State

# where the study notes how far the parents differ on each task, by which the blocks are drawn
_SPREAD = "spread"


class Races:
    """Scores candidates block by block.

    Args:
        config: the run's configuration.
        settings: its `racing`.
        folder: the run folder, which keeps the documents' scores and the answers to blocks.
        scorer: of the live model, in blocks.
    """

    def __init__(self, config: Config, settings: RacingConfig, folder: RunFolder, scorer: Blocks):
        self.config = config
        self.settings = settings
        self.folder = folder
        self.scorer = scorer
        self._arranged = False

    def run(self, recipe: Recipe, history: History, load: Callable[[], None]) -> Outcome:
        """Scores a candidate until it is finished or cannot win.

        Args:
            history: with the objective, and with a complete trial at least.
            load: builds the candidate; called before the first block that was not scored before.
        """
        self._arrange(history)
        blocks = self.folder.blocks(recipe.id)
        return race(self.scorer, self._best(history), _factors(history), self.settings.error, blocks, load)

    def forget(self, recipe: Recipe) -> None:
        """Removes the answers to a candidate's blocks, once its scores are recorded."""
        shutil.rmtree(self.folder.blocks(recipe.id), ignore_errors=True)

    def _best(self, history: History) -> Best | None:
        """The best finished trial whose documents are here and that breaks no guard."""
        there = [t for t in history.complete() if t.feasible and self.folder.documents(t.number).is_file()]
        if not there:
            return None
        best, rest = there[0], sorted(there[1:], key=lambda trial: trial.number)
        # the baselines, and the latest of the others
        named = [trial.number for trial in rest if trial.name]
        late = [trial.number for trial in rest if not trial.name][-OTHERS:]
        documents = [load_documents(self.folder.documents(number)) for number in (best.number, *named, *late)]
        return Best(best.number, documents[0], documents[1:])

    def _arrange(self, history: History) -> None:
        """Draws the blocks once, from the parents' scores: the same for every trial, worker and start."""
        if self._arranged:
            return
        if not store.has_note(history.study, _SPREAD):
            wanted = set(self.config.parents)
            scored = [trial for trial in history.trials if trial.name in wanted and trial.scores]
            files = [self.folder.documents(trial.number) for trial in scored]
            documents = [load_documents(file) for file in files if file.is_file()]
            spread = spreads(documents, _factors(history)) if len(documents) > 1 else None
            store.note(history.study, _SPREAD, spread)
        self.scorer.arrange(store.noted(history.study, _SPREAD))
        self._arranged = True


def _factors(history: History) -> dict[str, float]:
    """Of each task's figure in the objective."""
    scores = next(trial.scores for trial in history.trials if trial.state is State.COMPLETE)
    if history.objective is None:
        raise LookupError("a race needs the objective, which the parents' scores fix")
    return history.objective.factors(scores)
