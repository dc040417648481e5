"""What the model card of a run's candidate tells beside its recipe."""

from __future__ import annotations

from pathlib import Path

from mergesearch import zoo
from mergesearch.checkpoints import is_causal, locate
from mergesearch.checkpoints.hub import licence_of
from mergesearch.commands.originals import PARENTS
from mergesearch.config import Config
from mergesearch.config.served import is_filed
from mergesearch.errors import UserError
from mergesearch.recipe import AVERAGE, BASE
from mergesearch.results.card import Asking, Story
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.origin import Metric, Origin
from mergesearch.results.record import Record
from mergesearch.results.report import Report, card
from mergesearch.schema import read_json
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import machine

_DAMAGED = "remove it, and `mergesearch report` makes it again"


def story_of(run: Run, record: Record) -> Story:
    """What a run has to tell of one of its candidates."""
    config = run.config
    compared = (*config.parents, AVERAGE)
    parents = [other for other in run.records if other.name in compared and other.objective is not None]
    shown = [record, *(other for other in parents if other.number != record.number)] if record.scores else []
    return Story(
        title=f"{config.name}, trial {record.number}",
        versions=dict(record.machine) or machine(config.device),
        records=shown,
        tasks={task.task: task.num_fewshot for task in config.scored},
        samples=run.folder.search_documents() if record.scores else {},
        asking=_asking(config, run.batch_size, _is_loaded(run)),
        holdout=_holdout(run.folder, record),
        changes=run.changes,
        gen_kwargs={task.task: task.gen_kwargs for task in config.scored if task.gen_kwargs},
        origin=origin_of(run, record),
        served=None if is_filed(config.score_as) else config.score_as,
    )


def origin_of(run: Run, record: Record) -> Origin | None:
    """Whose weights a candidate is made of, with hashes, licences and figures; None where it has no recipe."""
    if record.recipe is None:
        return None
    noted, where = run.digests.get(PARENTS, {}), {BASE: "base_model", **{n: f"models.{n}" for n in run.config.models}}
    hashes = {}
    for name, place in where.items():
        digest = noted.get(place, {})
        if known := digest.get("whole") or digest.get("blocks"):
            hashes[name] = known
    references = {BASE: run.pinned.base_model, **run.pinned.models}
    licences = {name: _licence(reference, where[name]) for name, reference in references.items()}
    return Origin.of(recipe_of(record), hashes=hashes, licences=licences, metrics=_metrics(run, record))


def _licence(reference: str, where: str) -> str | None:
    """What the model's own card states; a model that is no longer there states nothing."""
    try:
        return licence_of(locate(reference, where).path)
    except UserError:
        return None


def _metrics(run: Run, record: Record) -> list[Metric]:
    """Figures on the holdout where a report has them, else those on the search documents, which are biased upwards."""
    report = kept_report(run.folder)
    found = [
        Metric(section.name, section.metric, row.holdout.value, "holdout")
        for section in (report.sections[1:] if report is not None else ())
        for row in section.rows
        if row.trial == record.number and row.holdout is not None
    ]
    if found:
        return found
    return [Metric(task, score.metric, score.value, "search documents") for task, score in record.shown.items()]


def report_file(folder: RunFolder) -> Path:
    """Where the last report on the holdout is."""
    return folder.holdout / "report.json"


def kept_report(folder: RunFolder) -> Report | None:
    """The last report on the holdout; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = report_file(folder)
    if not file.is_file():
        return None
    data = read_json(file, _DAMAGED)
    try:
        return Report.from_data(data)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{file} holds no report ({type(error).__name__}: {error}): {_DAMAGED}") from None


def _holdout(folder: RunFolder, record: Record) -> str | None:
    """The candidate's figures on the holdout, where a report has them."""
    report = kept_report(folder)
    return None if report is None else card(report, record.number)


def _is_loaded(run: Run) -> bool:
    """Whether lm_eval's own model loads what the run merges; taken for granted where the base is no longer there."""
    try:
        return is_causal(locate(run.pinned.base_model, "base_model").path, "base_model")
    except UserError:
        return True


def _asking(config: Config, batch_size: int, loaded: bool) -> Asking:
    return Asking(
        task_folders=tuple(config.include_path),
        zoo=any((zoo.folder() / "tasks" / f"{task.task}.yaml").is_file() for task in config.scored),
        batch_size=batch_size,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        trust_remote_code=config.trust_remote_code,
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        model_args={name: value for name, value in config.model_args.items() if value is not None},
        loaded=loaded,
    )
