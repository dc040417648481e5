"""What the model card of a run's candidate tells beside its recipe."""

from __future__ import annotations

from pathlib import Path

from mergesearch import zoo
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.recipe import AVERAGE
from mergesearch.results.card import Asking, Story
from mergesearch.results.loading import Run
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
        asking=_asking(config, run.batch_size),
        holdout=_holdout(run.folder, record),
        changes=run.changes,
        gen_kwargs={task.task: task.gen_kwargs for task in config.scored if task.gen_kwargs},
        served=config.score_as,
    )


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


def _asking(config: Config, batch_size: int) -> Asking:
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
    )
