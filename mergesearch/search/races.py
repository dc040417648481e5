"""The races of one worker: whom a candidate has to beat, on which blocks of documents. The rule stands in `racing`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence

from mergesearch.config import Config, RacingConfig
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import load_documents
from mergesearch.recipe import Recipe
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.racing import OTHERS, Best, Blocks, Documents, Outcome, answers_of, race, spreads
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State, Trial

log: logging.Logger = logging.getLogger(__name__)

# where the study notes how far the parents differ on each task, by which the blocks are drawn
_SPREAD = "spread"


class Races:
    """Scores candidates block by block.

    Args:
        config: the run's configuration.
        settings: its `racing`.
        folder: the run folder, which keeps the documents' scores and the answers to blocks.
        scorer: of the live model, in blocks.
        again: scores a finished trial again and keeps its documents.
        say: told which trial's documents are damaged.
    """

    def __init__(
        self,
        config: Config,
        settings: RacingConfig,
        folder: RunFolder,
        scorer: Blocks,
        again: Callable[[Trial], None],
        say: Callable[[str], None],
    ):
        self.config = config
        self.settings = settings
        self.folder = folder
        self.scorer = scorer
        self._again, self._say = again, say
        self._arranged = False
        self._left_out: set[int] = set()

    def run(self, recipe: Recipe, history: History, load: Callable[[], None]) -> Outcome:
        """Scores a candidate until it is finished or cannot win.

        Args:
            history: with the objective, and with a complete trial at least.
            load: builds the candidate; called before the first block that was not scored before.
        """
        self._arrange(history)
        blocks = self.folder.blocks(recipe.id)
        for number in range(self.scorer.count):  # another host may have begun it
            file = answers_of(blocks, number)
            if not file.is_file() and not self.folder.fetch(file):
                break
        error = self.settings.error
        return race(self.scorer, self._best(history), _factors(history), error, blocks, load, self.folder.keep)

    def forget(self, recipe: Recipe) -> None:
        """Removes the answers to a candidate's blocks, once its scores are recorded."""
        blocks = self.folder.blocks(recipe.id)
        for file in blocks.iterdir() if blocks.is_dir() else ():
            self.folder.forget(file)
        shutil.rmtree(blocks, ignore_errors=True)

    def tidy(self, history: History) -> None:
        """Removes the answers to blocks whose candidate is scored to the end: a worker was killed as it forgot them."""
        done = {trial.recipe_id for trial in history.trials if trial.state in (State.SCORED, State.COMPLETE)}
        folder = self.folder.blocks("all").parent
        for kept in folder.iterdir() if folder.is_dir() else ():
            if kept.name in done:
                shutil.rmtree(kept, ignore_errors=True)

    def _best(self, history: History) -> Best | None:
        """The best finished trial whose documents are here and that breaks no guard."""
        there = [t for t in history.complete() if t.feasible and self.folder.documents(t.number).is_file()]
        for place, best in enumerate(there):
            documents = self._documents(best, needed=True)
            if documents is not None:
                return Best(best.number, documents, self._others(there[place + 1 :]))
        return None

    def _others(self, rest: Sequence[Trial]) -> list[Documents]:
        """What the baselines and the latest of the others did on the documents."""
        rest = sorted(rest, key=lambda trial: trial.number)
        late = [trial for trial in rest if not trial.name][-OTHERS:]
        found = (self._documents(trial) for trial in [*(trial for trial in rest if trial.name), *late])
        return [documents for documents in found if documents is not None]

    def _documents(self, trial: Trial, needed: bool = False) -> Documents | None:
        """What a finished trial did on the documents; None where that is not known any more.

        Args:
            needed: whether it is scored again where its file is damaged.
        """
        file = self.folder.documents(trial.number)
        try:
            documents = load_documents(file)
            if trial.scores.keys() <= documents.keys():
                return documents
        except (OSError, ValueError) as error:
            log.debug("%s", error)
        if not needed:
            self._leave_out(trial, f"{file} is damaged: no race predicts from trial {trial.number}")
            return None
        self._say(f"note: {file} is damaged: trial {trial.number} is scored again, since races need it")
        try:
            self._again(trial)
            return load_documents(file)
        except (CandidateError, ValueError) as error:
            self._leave_out(trial, f"trial {trial.number} is left out of races: {error}")
            return None

    def _leave_out(self, trial: Trial, why: str) -> None:
        if trial.number not in self._left_out:
            self._say(f"note: {why}")
            self._left_out.add(trial.number)

    def _arrange(self, history: History) -> None:
        """Draws the blocks once, from the parents' scores: the same for every trial, worker and start."""
        if self._arranged:
            return
        if not store.has_note(history.study, _SPREAD):
            wanted = set(self.config.parents)
            scored = [trial for trial in history.trials if trial.name in wanted and trial.scores]
            here = [trial for trial in scored if self.folder.documents(trial.number).is_file()]
            read = [self._documents(trial, needed=True) for trial in here]
            documents = [each for each in read if each is not None]
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
