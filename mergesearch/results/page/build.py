"""From runs to one self-contained page: HTML with its style, its script, plotly and all data inside."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from mergesearch import leftovers
from mergesearch.errors import UserError
from mergesearch.results.loading import recipe_of
from mergesearch.results.page import contenders, curves, depth, tradeoffs
from mergesearch.results.page.marks import Picture
from mergesearch.results.page.subject import WINNER, Subject, label_of
from mergesearch.results.record import Record
from mergesearch.results.report.data import AsServed, Figure
from mergesearch.results.report.words import METHOD, cell, remarks, served_cells, served_title
from mergesearch.results.states import FAILED, PRUNED
from mergesearch.results.table import has_front, table_rows
from mergesearch.search.history import settled_at

# tables and lists of a page end after so many rows, and say how many there are
MOST_ROWS = 1_000


def write(out: Path, subjects: Sequence[Subject], refresh: int | None = None) -> None:
    """Writes the page of one run, or of several beside each other; a reader sees the old file or the new one.

    Args:
        out: the file; one that is there is replaced.
        subjects: the runs, the one that it is about first.
        refresh: after how many seconds a browser reads the page anew; None for never.

    Raises:
        UserError: the file cannot be written.
    """
    text = page(subjects, datetime.now(), refresh)
    try:
        leftovers.clear(out.parent, out.name)
        with leftovers.writing(out) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file") from None


def page(subjects: Sequence[Subject], now: datetime, refresh: int | None = None) -> str:
    """The page as a text.

    Args:
        subjects: as for `write`.
        now: when it was made, local time.
        refresh: as for `write`.
    """
    pictures: list[Picture] = []

    def keep(picture: Picture | None) -> Picture | None:
        if picture is not None:
            pictures.append(picture)
        return picture

    shared = keep(curves.best_so_far(subjects, "shared-progress")) if _comparable(subjects) else None
    runs = [_run(subject, place, keep, shared if place == 0 else None, len(subjects) > 1 and shared is not None)
            for place, subject in enumerate(subjects)]  # fmt: skip
    return _template().render(
        title=subjects[0].name if len(subjects) == 1 else " and ".join(s.name for s in subjects),
        runs=runs,
        shared=shared,
        several=len(subjects) > 1,
        made=now.strftime("%Y-%m-%d %H:%M"),
        refresh=refresh,
        method=METHOD,
        style=_file("page.css"),
        script=_file("page.js"),
        library=_library(),
        pictures=_json([picture.to_data() for picture in pictures]),
        json=_json,
    )


def _comparable(subjects: Sequence[Subject]) -> bool:
    """Whether all runs maximise the same: tasks, weights and scales."""
    return all(subject.objective == subjects[0].objective for subject in subjects)


def _run(subject: Subject, place: int, keep: Callable[[Picture | None], Picture | None], shared: Picture | None,
         told: bool) -> dict[str, Any]:  # fmt: skip
    """All that the template says of one run."""
    key = f"run{place}"
    report = subject.report
    return {
        "key": key,
        "name": subject.name,
        "subject": subject,
        "verdict": report.sentence if report else subject.verdict,
        "good": report.improvement if report else None,
        "tiles": _tiles(subject),
        "contenders": keep(contenders.contenders(subject, f"{key}-contenders")),
        "differences": contenders.differences(subject),
        "progress": shared or (None if told else keep(curves.best_so_far([subject], f"{key}-progress"))),
        "forest": [
            {"task": task, "documents": _documents(subject, task),
             "picture": keep(contenders.forest(subject, task, f"{key}-task{n}"))}
            for n, task in enumerate(subject.tasks) if subject.finalists
        ],
        "benchmarks": _benchmarks(subject),
        "examples": subject.examples,
        "recipes": depth.recipes(subject),
        "recipes_of": len({record.recipe_id for record in subject.scored if record.recipe}),
        "importances": [
            {"method": one["method"], "trials": one["trials"], "picture": keep(picture)}
            for one, picture in zip(
                subject.importances, tradeoffs.importances(subject, f"{key}-importance"), strict=True
            )
        ],
        "tradeoffs": tradeoffs.tradeoffs(subject),
        "luck": keep(curves.search_against_holdout(subject, f"{key}-luck")),
        "remarks": remarks(report) if report else [],
        "served": _served(report.served) if report and report.served else None,
        "spent": keep(curves.spent(subject, f"{key}-spent")),
        "words": subject.run.words,
        "guards": _guards(subject),
        "failures": _failures(subject),
        "stopped": sum(record.state == PRUNED for record in subject.run.records),
        "recipe": _recipe(subject),
        "rows": _rows(subject),
        "machine": _machine(subject),
    }  # fmt: skip


def _served(served: AsServed) -> dict[str, Any]:
    """The finalists in the form that will be served, as a table."""
    return {"title": served_title(served), "names": served.names, "rows": served_cells(served)}


# --- the parts that are no pictures -----------------------------------------------------------------------------------


def _tiles(subject: Subject) -> list[dict[str, str]]:
    """The figures to be seen first."""
    if not subject.contenders:
        return []
    winner = subject.contenders[WINNER]
    held, searched = subject.holdout.figure(winner.number), subject.search.figure(winner.number)
    shown = held or searched
    where = "on the holdout" if held else "on the search documents"
    tiles = [{"what": f"objective of the winner {where}", "value": f"{shown.value:.4f}" if shown else "-",
              "more": _interval(shown)}]  # fmt: skip
    for line in contenders.differences(subject):
        found = line["holdout"] or line["search"]
        if found:
            label = f" ({line['label']})" if line["label"] else ""
            more = ", ".join(filter(None, (found["interval"], line["p"])))
            tiles.append({"what": f"over the {line['what']}{label}", "value": found["value"], "more": more})
    return tiles


def _interval(figure: Figure | None, form: str = ".4f") -> str:
    return f"{figure.low:{form}} to {figure.high:{form}}" if figure is not None and figure.low is not None else ""


def _documents(subject: Subject, task: str) -> str:
    score = subject.tasks[task]
    held = next((s.documents for s in (subject.report.sections if subject.report else ()) if s.name == task), None)
    direction = "" if score.higher_is_better else "lower is better; "
    return f"{direction}{score.documents:,} search documents" + (f", {held:,} of the holdout" if held else "")


def _benchmarks(subject: Subject) -> dict[str, Any] | None:
    """Finalists on tasks that the search never used."""
    sections = subject.benchmarks
    if not sections:
        return None
    titles = [
        f"{s.name} ({s.metric}, {s.documents:,} documents{'' if s.higher_is_better else ', lower is better'})"
        for s in sections
    ]
    cells: dict[int, list[str]] = {}
    labels: dict[int, str] = {}
    for place, section in enumerate(sections):
        for row in section.rows:
            labels.setdefault(row.trial, row.candidate if row.baseline else f"{row.candidate} {row.method}")
            mine = cells.setdefault(row.trial, ["-"] * len(sections))
            mine[place] = "failed" if row.error else cell(row.holdout, " ")
    return {"tasks": titles, "rows": [{"label": labels[n], "scores": scores} for n, scores in cells.items()]}


def _guards(subject: Subject) -> list[dict[str, str]]:
    objective, contenders = subject.objective, subject.contenders
    if objective is None:
        return []
    outcomes = {outcome.task: outcome for outcome in (subject.report.guards if subject.report else ())}
    winner = contenders.get(WINNER)
    lines = []
    for guard in objective.guards:
        outcome = outcomes.get(guard.name)
        score = winner.scores.get(guard.task) if winner else None
        scores = [record.scores[guard.task] for record in subject.scored if guard.task in record.scores]
        broken = sum(guard.excess(each) > 0 for each in scores)
        lines.append(
            {
                "guard": guard.words(score.metric if score else ""),
                "winner": f"{guard.figure(score).value:.4f}" if score else "-",
                "holdout": difference_text(outcome.difference) if outcome else "",
                "verdict": outcome.verdict if outcome else "",
                "broken": f"{broken} of {len(scores)}",
            }
        )
    return lines


def difference_text(figure: Figure | None) -> str:
    """`+0.0100, -0.0200 to +0.0400`."""
    if figure is None:
        return "-"
    interval = f", {figure.low:+.4f} to {figure.high:+.4f}" if figure.low is not None else ""
    return f"{figure.value:+.4f}{interval}"


def _failures(subject: Subject) -> list[dict[str, Any]]:
    """Why trials failed: one line a reason, with the trials that have it."""
    reasons: dict[str, list[Record]] = {}
    for record in subject.run.records:
        if record.state == FAILED:
            reasons.setdefault(record.error or "no reason is known", []).append(record)
    return [
        {"reason": reason, "count": len(mine), "trials": ", ".join(label_of(record) for record in mine[:12]),
         "more": max(0, len(mine) - 12)}
        for reason, mine in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]  # fmt: skip


def _recipe(subject: Subject) -> dict[str, str] | None:
    winner = subject.contenders.get(WINNER)
    if winner is None or winner.recipe is None:
        return None
    try:
        recipe = recipe_of(winner)
    except UserError:
        return None
    return {"label": label_of(winner), "id": recipe.id, "yaml": recipe.to_yaml(), "words": depth.words(recipe)}


def _rows(subject: Subject) -> dict[str, Any]:
    """The table of all trials."""
    tasks = list(subject.tasks)
    rows, fronts = table_rows(subject.run.records, MOST_ROWS), has_front(subject.run.records)
    expected = any(row["expected"] is not None for row in rows)
    told = ["trial", "objective", *["expected"] * expected]
    columns = ["rank", *["front"] * fronts, *told, *tasks, "method", "strategy", "seconds", "state"]
    return {
        "columns": columns,
        "rows": [[_cell(row.get(column), column) for column in columns] for row in rows],
        "more": max(0, len(subject.run.records) - len(rows)),
    }


def _cell(value: Any, column: str) -> dict[str, Any]:
    """A cell's text, and what the column is sorted by."""
    if value is None:
        return {"text": "-", "by": "", "number": False}
    if isinstance(value, bool):
        return {"text": "*" if value else "", "by": str(int(value)), "number": False}
    if isinstance(value, float):
        return {"text": f"{value:.1f}" if column == "seconds" else f"{value:.4f}", "by": repr(value), "number": True}
    return {"text": str(value), "by": str(value), "number": isinstance(value, int)}


def _machine(subject: Subject) -> list[tuple[str, str]]:
    """Machines and versions, and the run's own dates."""
    machines: dict[str, dict[str, None]] = {}
    for record in subject.run.records:
        for name, version in record.machine.items():
            machines.setdefault(name, {})[version] = None
    lines = [(name, ", ".join(versions)) for name, versions in machines.items()]
    begun = [trial.begun_at for trial in subject.trials if trial.begun_at is not None]
    ended = [moment for trial in subject.trials if (moment := settled_at(trial)) is not None]
    workers = {trial.worker for trial in subject.trials if trial.worker}
    if begun:
        lines.append(("begun", min(begun).strftime("%Y-%m-%d %H:%M")))
    if ended:
        lines.append(("last trial ended", max(ended).strftime("%Y-%m-%d %H:%M")))
    if workers:
        lines.append(("workers", str(len(workers))))
    lines += [("worker", worker.words()) for worker in subject.run.crew.workers]
    if subject.run.crew.pace is not None:
        lines.append(("trials an hour", f"{subject.run.crew.pace:.0f}, of all workers together"))
    config = subject.run.config
    lines += [("base", config.base_model), *((f"model {name}", ref) for name, ref in config.models.items())]
    lines += [("dtype", config.dtype), ("seed", str(config.search.seed))]
    return [*lines, *(("note", note) for note in subject.run.notes)]


# --- what a page is made of -------------------------------------------------------------------------------------------


def _json(data: Any) -> str:
    """Data inside a script element: nothing in it can end the element."""
    plain = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _library() -> str:
    """plotly.js, compressed: the page unpacks it, and is a third as large."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


@cache
def _file(name: str) -> str:
    return (files("mergesearch.results.page") / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    loader = PackageLoader("mergesearch.results", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    return environment.get_template("page.html.j2")
