"""Scoring on the holdout: what it costs, what is loaded for it, and how it is told while it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mergesearch import leftovers
from mergesearch.checkpoints import Survey
from mergesearch.commands.holding import engine_of, holding_of, length_of, load_pool, settled_with, survey_of
from mergesearch.commands.inputs import load_tasks, samples_of, scorer_of, splits
from mergesearch.commands.originals import Originals
from mergesearch.commands.probe import asked_again
from mergesearch.config.served import file_type, is_filed
from mergesearch.engine.gguf.candidates import FileCandidates
from mergesearch.engine.live import Engine
from mergesearch.engine.residency import Holding
from mergesearch.errors import UserError
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import Task
from mergesearch.results.loading import Run, batch_size_of
from mergesearch.results.record import Record
from mergesearch.results.report.finalists import Finalists, choose
from mergesearch.results.report.holdout import HoldoutScores, drawn, score_finalists
from mergesearch.search.costs import duration
from mergesearch.search.speed import Probe

log: logging.Logger = logging.getLogger(__name__)

AGAIN = "-again"
# of the winner as it was merged, where candidates are scored in the form that they are served in
MERGED = "-merged"
# requests at once of what llama.cpp answers: it takes texts that are scored one by one
_FILED_AT_ONCE = 8


def filed(form: str | None) -> str:
    """Of finalists as files for llama.cpp; empty where they are served as they are scored."""
    return f"-{file_type(form)}" if is_filed(form) else ""


# --- on what, and what that costs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportCost:
    """What a report still has to score.

    Attributes:
        candidates: that are missing documents; the winner's second scoring is not counted.
        again: whether the winner is still to be scored a second time.
        documents: document evaluations, that of the second scoring among them.
        seconds: how long they take, by what a document took in the search; loading the models is not in it.
        each: documents of each candidate, where all of them are missing as many.
    """

    candidates: int
    again: bool
    documents: int
    seconds: float
    each: int | None = None

    def __str__(self) -> str:
        """`about 1 min 20 s: 17 candidates on 400 documents each, the winner twice`."""
        who = f"{self.candidates} candidate{'s' * (self.candidates != 1)}"
        if not self.candidates:
            what = f"the winner a second time, on {self.documents:,} documents"
        elif self.each is None:
            what = f"{who}, {self.documents:,} document evaluations"
        else:
            several = " each" if self.candidates > 1 else ""
            what = f"{who} on {self.each:,} documents{several}{', the winner twice' * self.again}"
        return f"about {duration(self.seconds)}: {what}"


def most_documents(run: Run, asked: int | None = None) -> int | None:
    """How many holdout documents of each task a report goes by at most; None for all of them.

    Args:
        run: the run.
        asked: on the command line; None for what the configuration says. A report never goes by fewer than an earlier
            one did.
    """
    most = run.config.report.documents if asked is None else asked
    largest = max(_sizes(run).values(), default=0)
    most = None if most is not None and most >= largest else most
    return HoldoutScores(run.folder.holdout).at_least(most)


def cost(
    run: Run, finalists: int | None = None, documents: int | None = None, probe: Probe | None = None
) -> ReportCost | None:
    """What `mergesearch report` would cost now; None where there is nothing to report on.

    Args:
        run: as it stands.
        finalists: how many of the best proposals; None for what the configuration says.
        documents: the most of each task; None for what the configuration says.
        probe: what was measured before the first trial: how long lm-eval's own model takes is known of it, as long as
            it was asked about no candidate.
    """
    if not run.config.holdout or run.objective is None:
        return None
    try:
        chosen = choose(run.records, run.config, finalists or run.config.report.finalists)
    except UserError:
        return None
    return cost_of(run, chosen, most_documents(run, documents), probe)


def cost_of(run: Run, chosen: Finalists, most: int | None, probe: Probe | None = None) -> ReportCost:
    """What is still to be scored of chosen finalists, on at most so many documents of each task."""
    scored, sizes = HoldoutScores(run.folder.holdout), _sizes(run)

    def missing(record: Record, suffix: str = "") -> int:
        return max(0, _total(sizes, most) - _total(sizes, scored.most(record, suffix)))

    each = [count for record in chosen.records if (count := missing(record))]
    again = missing(chosen.winner, AGAIN)
    documents, builds = sum(each) + again, len(each) + bool(again)
    of_a_document, of_a_merge = _measured(run.records)
    if probe is not None and probe.again and not any(record.by_lm_eval_seconds for record in run.records):
        whole = probe.again / asked_again(run.config) - probe.merge
        of_a_document = max(of_a_document, whole / max(1, sum(probe.documents.values())))
    uniform = each[0] if each and set(each) == {each[0]} and again in (0, each[0]) else None
    return ReportCost(len(each), bool(again), documents, documents * of_a_document + builds * of_a_merge, each=uniform)


def _total(sizes: Mapping[str, int], most: int | None) -> int:
    return sum(size if most is None else min(most, size) for size in sizes.values())


def _sizes(run: Run) -> dict[str, int]:
    """How many holdout documents each task has, before anything is loaded.

    The run folder counts them by lm-eval's tasks: those of a group, which goes by a name of its own, are what is left
    over, and several groups are taken to share them.
    """
    left = {task: len(ids) for task, ids in run.folder.holdout_documents().items()}
    labels = [task.task for task in run.config.scored]
    sizes = {label: left.pop(label) for label in labels if label in left}
    groups = [label for label in labels if label not in sizes]
    return sizes | {label: round(sum(left.values()) / len(groups)) for label in groups}


def _measured(records: Sequence[Record]) -> tuple[float, float]:
    """Seconds of a document and of building a candidate, as most candidates of the search took them; by lm-eval's own
    model, which answers on the holdout, where it was asked."""
    asked = [record for record in records if record.by_lm_eval_seconds]
    timed = [
        (
            max(record.score_seconds, record.by_lm_eval_seconds or 0.0)
            / sum(score.documents for score in record.scores.values()),
            record.merge_seconds or 0.0,
        )
        for record in asked or records
        if record.scores and record.score_seconds
    ]
    if not timed:
        return 0.0, 0.0
    return median(each for each, _ in timed), median(merge for _, merge in timed)


# --- scoring ----------------------------------------------------------------------------------------------------------


def score_missing(
    run: Run,
    chosen: Finalists,
    most: int | None,
    asker: Asker,
    *,
    finished: Callable[[str, str | None], None] = lambda text, error: None,
) -> dict[int, str]:
    """Scores what is missing, and loads the models only where something is. Returns why trials could not be scored.

    Args:
        run: the run.
        chosen: its finalists.
        most: documents of each task; None for all.
        asker: of the run.
        finished: told of each candidate, and why where it failed.

    Raises:
        UserError: what is wrong with the input; a task's documents are not those that the run split.
    """
    scored, config = HoldoutScores(run.folder.holdout), run.pinned
    first = [record for record in chosen.records if scored.load(record, "", most) is None]
    again = [chosen.winner] if scored.load(chosen.winner, AGAIN, most) is None else []
    suffix = filed(config.score_as)
    other = config.score_as is not None and not suffix and scored.load(chosen.winner, MERGED, most) is None
    files = [record for record in chosen.records if suffix and scored.load(record, suffix, most) is None]
    if not first and not again and not other and not files:
        return {}
    asker.say(f"report on the holdout, {cost_of(run, chosen, most)}")
    documents = drawn(asker.holdout, most, config.search.seed)
    engine = asker.engine
    failed = score_finalists(first, scored, engine, asker.first, documents, most=most, finished=finished)
    if chosen.winner.number not in failed:
        score_finalists(again, scored, engine, asker.again, documents, most=most, suffix=AGAIN, finished=finished)
    if other and chosen.winner.number not in failed:
        with engine.as_merged():
            score_finalists(
                [chosen.winner], scored, engine, asker.first, documents, most=most, suffix=MERGED, finished=finished
            )
    files = [record for record in files if record.number not in failed]
    return {**failed, **_score_files(files, scored, asker, documents, most, suffix, finished)}


def _score_files(
    records: Sequence[Record],
    scored: HoldoutScores,
    asker: Asker,
    documents: Mapping[str, Sequence[int]],
    most: int | None,
    suffix: str,
    finished: Callable[[str, str | None], None],
) -> dict[int, str]:
    """Scores candidates as files for llama.cpp; returns why for those who could not be, by trial."""
    form = asker.engine.filed
    if not records or form is None:
        return {}
    asker.say(f"scoring {len(records)} of them in {form.form} too, by llama.cpp")
    scored.path.mkdir(parents=True, exist_ok=True)
    leftovers.clear(scored.path)
    candidates = FileCandidates(asker.engine, form, scored.path)
    try:
        scorer = asker.of(candidates.model)
        failed = score_finalists(
            records, scored, candidates, scorer, documents, most=most, suffix=suffix, finished=finished
        )
    finally:
        candidates.close()
    return failed


@dataclass
class Asker:
    """What asks a run's candidates about its holdout: loaded when it is first needed, and once.

    Attributes:
        run: the run.
        originals: asked whether the documents are those that the run was scored with.
        given: an engine of this run, if one is loaded already.
        say: told in a few words what is being done.
        changes: which documents were changed, where that is allowed; known once something was loaded.
    """

    run: Run
    originals: Originals
    given: Engine | None = None
    say: Callable[[str], None] = log.info
    changes: tuple[str, ...] = ()

    @cached_property
    def engine(self) -> Engine:
        """The run's engine.

        Raises:
            UserError: the models cannot be loaded.
        """
        if self.given is not None:
            return self.given
        config = self.run.pinned
        holding, survey = self._holding
        self.say(f"loading the base and {len(config.models)} models: {holding}")
        return engine_of(load_pool(config, survey, holding), config.dtype, holding, config.score_as)

    @property
    def first(self) -> Scorer:
        """A scorer of the live model on all of the holdout, also where only some documents are asked: the few-shot
        examples of a document depend on the others."""
        return self._scorers[0]

    @property
    def again(self) -> Scorer:
        """One that asks in another order and batch size."""
        return self._scorers[1]

    def of(self, model: Any) -> Scorer:
        """A scorer of another model on all of the holdout."""
        tasks, holdout = self._tasks
        plain = self.run.pinned.by_lm_eval.model_copy(update={"attn_implementation": None})
        return scorer_of(plain, model, self.engine.pool.tokenizer, tasks, holdout, batch_size=_FILED_AT_ONCE)

    @property
    def holdout(self) -> dict[str, list[int]]:
        """All documents of the holdout, by task."""
        return self._tasks[1]

    @cached_property
    def _tasks(self) -> tuple[list[Task], dict[str, list[int]]]:
        """The tasks, and the documents of the holdout by task."""
        config, folder = self.run.pinned, self.run.folder
        self.say(f"loading {len(config.scored)} tasks")
        tasks = load_tasks(config)
        parts = splits(config, tasks)
        if samples_of(tasks, parts)["holdout"] != folder.holdout_documents():
            raise UserError(
                f"the tasks' documents are no longer those that {folder.path} was searched with: restore the tasks' "
                "data"
            )
        self.changes = self.originals.check(tasks, parents=())
        return tasks, {label: part.holdout for label, part in parts.items()}

    @cached_property
    def _holding(self) -> tuple[Holding, Survey]:
        config, (tasks, holdout) = self.run.pinned, self._tasks
        survey = survey_of(config)
        return holding_of(config, survey, length_of(config, survey, tasks, holdout), self.run.settled), survey

    @cached_property
    def _scorers(self) -> tuple[Scorer, Scorer]:
        tasks, holdout = self._tasks
        engine, rows = self.engine, batch_size_of(self.run.config, self.run.settled)
        self.say("building requests")
        live, tokenizer = engine.model, engine.pool.tokenizer
        # what a report says the lm_eval command gives too
        plain = self.run.pinned.by_lm_eval
        first = scorer_of(plain, live, tokenizer, tasks, holdout, batch_size=rows)
        if rows is None and self.given is None:  # a run that was searched before batch sizes were found
            settled_with(plain, first, self._holding[0], self.run.settled)
        other = plain.model_copy(update={"batch_size": other_batch_size(first.batch_size)})
        return first, scorer_of(other, live, tokenizer, tasks, holdout, shuffle=plain.search.seed)


def other_batch_size(batch_size: int) -> int:
    """For the second scoring of the winner."""
    return batch_size * 2 // 3 if batch_size > 1 else 2


# --- told while it goes -----------------------------------------------------------------------------------------------


class ReportProgress:
    """A context in which a report tells how far it is: a bar on a terminal, a line for each candidate elsewhere.

    Args:
        console: where to, mostly the one for errors, so that the report alone goes to a pipe.
    """

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._console = console
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=None, visible=False)

    def __enter__(self) -> ReportProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def expect(self, scorings: int) -> None:
        """How many candidates there will be."""
        self._bar.update(self._task, total=scorings, visible=scorings > 0, description="scoring")

    def say(self, text: str) -> None:
        """What is being done."""
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def finished(self, text: str, error: str | None) -> None:
        """A candidate was scored, or could not be."""
        self._bar.update(self._task, advance=1, description=text if error is None else "scoring")
        if error is not None or not self._console.is_terminal:
            self.say(text)
