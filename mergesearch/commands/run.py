"""`mergesearch run`: a search made ready, with all that it works on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mergesearch.checkpoints import Pool
from mergesearch.commands import backend as backends
from mergesearch.commands.again import score_again
from mergesearch.commands.best import refresh_best
from mergesearch.commands.holding import (
    check_written,
    engine_of,
    holding_of,
    length_of,
    load_pool,
    settled_with,
    survey_of,
    winners_room,
)
from mergesearch.commands.hooks import BestHook
from mergesearch.commands.inputs import (
    check_racing,
    load_tasks,
    samples_of,
    scorer_of,
    spaces,
    splits,
)
from mergesearch.commands.originals import Originals
from mergesearch.commands.probe import measure
from mergesearch.commands.room import ReportRoom
from mergesearch.commands.track import Tracking, check_trackers
from mergesearch.commands.winner import sentence
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.engine.served import check_served
from mergesearch.errors import CandidateError, RunError, UserError
from mergesearch.evaluate.asking import Asked
from mergesearch.evaluate.blocks import BlockScorer
from mergesearch.evaluate.scores import load_documents
from mergesearch.evaluate.scoring import Scorer
from mergesearch.results.loading import BATCH_SIZE, CHANGES, NOTES, SETTLED, Run, batch_size_of, run_of
from mergesearch.results.page.anatomy import ANATOMY, anatomy_of
from mergesearch.results.record import Record, record_of
from mergesearch.search import by_lm_eval, revisions, store, strategies
from mergesearch.search.presence import check_disk
from mergesearch.search.soup.learner import Learner
from mergesearch.search.soup.learning import LearningStep
from mergesearch.search.speed import PROBE, Probe
from mergesearch.search.store import DIGESTS, RunFolder, write_documents
from mergesearch.search.worker import Search, SearchFailed
from mergesearch.space import check_space

log: logging.Logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A search with all that it works on. The study is opened once, by the search."""

    config: Config
    folder: RunFolder
    pool: Pool
    engine: Engine
    search: Search
    probe: Probe
    scorer: Scorer
    hook: BestHook
    tracking: Tracking
    plain: Scorer | None = None

    def read(self) -> Run:
        """The run as it is by now."""
        return run_of(self.search.history(), self.folder)

    def run(self, say: Callable[[str], None] = log.info) -> None:
        """Searches until nothing is left to do, and everything is told.

        Raises:
            RunError: nothing could be scored, or nothing can any more.
            CandidateError: what was scored could not be recorded on this host.
        """
        self.mend(say)
        try:
            self.search.run()
        except SearchFailed as error:
            # another start, or another host, may be able to write
            kind = CandidateError if isinstance(error.__cause__, OSError) else RunError
            raise kind(str(error)) from error
        finally:
            self.scorer.close()
        self.hook.wait()
        self.tracking.wait()

    def mend(self, say: Callable[[str], None] = log.info) -> None:
        """Scores complete trials again whose documents are damaged: what they are expected to score elsewhere goes by
        them, and so does who wins."""
        with self.folder.lock("mend"):
            for trial in self.search.history().complete():
                file = self.folder.documents(trial.number)
                try:
                    if file.is_file():  # hosts that share no folder have each their own
                        load_documents(file)
                except ValueError:
                    say(f"note: {file} is damaged: trial {trial.number} is scored again")
                    try:
                        self.search.score_again(trial)
                    except CandidateError as error:
                        say(f"note: trial {trial.number}: {error}")

    def score_again(self, say: Callable[[str], None] = log.info) -> None:
        """Has lm-eval's own model score what a person goes by, where the search was scored by something else."""
        if self.plain is None:
            return
        study = self.search.study
        with self.folder.lock("best"):
            score_again(self.read(), self.engine, self.plain, partial(by_lm_eval.note, study), say)

    def export_best(self) -> list[str]:
        """Exports the best candidate to `best/` in the run folder, and says where it is; see `refresh_best`."""
        begun = time.perf_counter()
        self._note_batch_size()
        winner, best = refresh_best(self.folder, self.engine, self.read), self.folder.best
        if winner is None:
            return ["no candidate was scored, so none is exported"]
        store.note(
            self.search.study, PROBE, replace(self.probe, export=time.perf_counter() - begun).to_data()
        )  # for who goes on with the run
        pace = self.scorer.pace
        return [
            *([f"answers were generated at {pace}"] if pace else []),
            sentence(self.read(), winner),
            f"winner: trial {winner.number}, exported to {best} (its README.md says how to score it by hand)",
        ]

    def _note_batch_size(self) -> None:
        """Notes what running out of memory left of a batch size that was found: the card's command goes by it."""
        noted = store.noted(self.search.study, SETTLED) or {}
        left = min(scorer.batch_size for scorer in (self.scorer, self.plain) if scorer is not None)
        if self.config.batch_size == "auto" and left < noted.get(BATCH_SIZE, 0):
            store.note(self.search.study, SETTLED, {**noted, BATCH_SIZE: left})


def _ignore(_: Any) -> None:
    """Stands in for a listener nobody gave."""


def prepare(
    config: Config,
    *,
    say: Callable[[str], None] = log.info,
    started: Callable[[Record], None] = _ignore,
    scored: Callable[[Record], None] = _ignore,
    finished: Callable[[Record], None] = _ignore,
    asked: Callable[[Asked], None] | None = None,
    stepped: Callable[[LearningStep], None] = _ignore,
    hung: Callable[[str], None] = log.error,
    doing: Callable[[], str] = str,
    allow_changed: bool = False,
) -> Session:
    """Everything that `Search.run` needs. All of the input is checked before anything is written.

    Args:
        config: the run's configuration.
        say: told in a few words what is being done.
        started, scored, finished: as for `Search`.
        asked: told while a candidate is scored how far that is.
        hung, doing: as for `Search`.
        stepped: told while a recipe is learned how far that is.
        allow_changed: go on with other weights or documents than the run was scored with.

    Raises:
        UserError: what is wrong with the input.
    """
    begun = time.perf_counter()
    backend = _checked(config)
    there = store.begun(config, say)
    check_disk(config, RunFolder(config.folder), there, say)
    say(f"loading {len(config.scored)} tasks")
    commits = dict((store.noted(there, revisions.REVISIONS) if there else None) or {})
    tasks = load_tasks(revisions.at(config, commits), say)
    commits = {**revisions.revisions(revisions.at(config, commits)), **commits}
    loading = revisions.at(config, commits)
    backends.check_generates(config, tasks)
    documents = splits(config, tasks)
    check_racing(config, tasks)
    originals = Originals(loading, (store.noted(there, DIGESTS) if there else None) or {}, allow_changed, say)
    if there is not None and not originals.noted:
        say("note: this run is older than digests of models and documents: those of now are noted")
    changes = originals.check(tasks)
    originals.watch()
    survey = survey_of(loading)
    check_written(config.score_as, survey)
    if (lacking := winners_room(config, survey)) is not None:
        say(f"note: {lacking}")
    searched = {label: part.search for label, part in documents.items()}
    settled = (store.noted(there, SETTLED) if there else None) or {}
    holding = holding_of(config, survey, length_of(config, survey, tasks, searched), settled, searched)
    say(f"loading the base and {len(config.models)} models: {holding}")
    reading = time.perf_counter()
    pool = load_pool(loading, survey, holding)
    reading = time.perf_counter() - reading
    originals.watched()
    for note in pool.notes:
        say(f"note: {note}")
    say(f"tokenizer: {pool.tokens}")
    space, coarse = spaces(config, pool)
    engine = engine_of(pool, config.dtype, holding, config.score_as)
    say("building requests")
    rows = batch_size_of(config, settled)
    vllm = backends.vllm_of(backend, pool)
    scorer = scorer_of(config, engine.model, pool.tokenizer, tasks, searched, batch_size=rows, vllm=vllm)
    settled = settled_with(config, scorer, holding, settled)
    backends.start(config, engine, scorer, say)
    blocks = BlockScorer(scorer, searched, config.racing.blocks, config.search.seed) if config.racing else None
    folder = RunFolder.prepare(config)
    write_documents(folder, samples_of(tasks, documents))
    try:
        folder.keep(folder.path / store.CONFIG)
    except OSError as error:
        raise UserError(
            f"artifacts {config.artifacts} cannot be written ({error.strerror}): check your access to it, or name "
            "another"
        ) from None
    each = sum(map(len, searched.values()))
    learner = Learner(config, engine, scorer, pool.infos, pool.layers, searched, say, stepped)
    tracking = Tracking(config, folder, say)
    hook = BestHook(config, lambda: run_of(search.history(), folder).best(), say)
    rooms: list[ReportRoom] = []  # once it is measured how long things take

    def ended(record: Record) -> None:
        finished(record)
        hook.finished(record)
        for room in rooms:
            room.look()
        tracking.finished(record)

    search = Search(
        config,
        folder,
        space,
        engine,
        blocks or scorer,
        coarse=coarse,
        infos=pool.infos,
        layers=pool.layers,
        learner=learner,
        started=lambda trial: started(record_of(trial, store.objective_of(search.study))),
        scored=lambda trial: scored(record_of(trial, None)),
        finished=lambda trial: ended(record_of(trial, store.objective_of(search.study))),
        say=say,
        hung=hung,
        device=str(pool.device),
        doing=doing,
    )
    with folder.lock("start"):
        scorer.settle(by_lm_eval.agree(search.study, scorer.kinds))
        settled = {**settled, **(store.noted(search.study, SETTLED) or {})}  # another worker may have been first
        store.note(search.study, SETTLED, settled)
    scorer.language_model.batch_size_per_gpu = batch_size_of(config, settled) or scorer.batch_size
    plain = scorer.by_lm_eval()
    _note(search, pool, commits, changes)
    store.note(search.study, DIGESTS, originals.note(tasks))
    store.note(search.study, "tokens_per_document", scorer.prompt_tokens / max(1, each))
    say("trying a few documents")
    # to write a checkpoint takes about as long as to read one
    writing = reading / (1 + len(config.models))
    probe = measure(config, engine, scorer, learner, searched, time.perf_counter() - begun, writing, plain)
    store.note(search.study, PROBE, probe.to_data())
    rooms.append(
        ReportRoom(config, probe, lambda: run_of(search.history(), folder), partial(store.note, search.study), say)
    )
    scorer.asked = asked
    return Session(config, folder, pool, engine, search, probe, scorer, hook, tracking, plain)


def _checked(config: Config) -> backends.Backend | None:
    """The backend, once all is checked that can be refused before a storage, a task or a model is looked at."""
    check_space(config)
    check_trackers(config)
    check_served(config.score_as)
    backend = backends.find_backend(config)
    RunFolder(config.folder).check(config)
    if config.artifacts is not None:
        from mergesearch.search import artifacts  # loads the clouds' libraries

        artifacts.check(config.artifacts, config.name)
    strategies.refuse(config)
    return backend


def _note(search: Search, pool: Pool, commits: Mapping[str, str], changes: Sequence[str]) -> None:
    """What a reader of the run should know of its models, for who opens it without them."""
    study = search.study
    store.note(study, NOTES, [*pool.notes, *revisions.words(commits)])
    store.note(study, revisions.REVISIONS, commits)
    store.note(study, ANATOMY, anatomy_of(pool.infos))
    if changes:
        before = store.noted(study, CHANGES) or []
        store.note(study, CHANGES, list(dict.fromkeys([*before, *changes])))


__all__ = ["Session", "prepare"]
