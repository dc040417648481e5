"""The verbs of the command. Exit status: 0 done, 1 the work failed or was interrupted, 2 the input is wrong."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mergesearch.errors import CandidateError, UserError

if TYPE_CHECKING:
    from mergesearch.results.record import Record

app = typer.Typer(
    name="mergesearch",
    help="Search for the best way to merge fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# a file or a pipe has no width to fit into
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="the new checkpoint folder")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key: search.trials=10")]


def main() -> None:
    """The entry point of the command."""
    # else tokenizers warns at length whenever lm-eval forks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(status())


def status() -> int:
    """Runs the verb in `sys.argv` and returns its exit status."""
    try:
        return app(standalone_mode=False) or 0
    except UserError as error:
        return _say_error(str(error), 2)
    except typer.TyperException as error:
        return _say_error(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say_error("interrupted", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CandidateError as error:
        return _say_error(str(error), 1)
    except Exception as error:
        if os.environ.get("MERGESEARCH_DEBUG"):
            raise
        reason = " ".join(str(error).split())
        return _say_error(f"{type(error).__name__}: {reason} (MERGESEARCH_DEBUG=1 shows where)", 1)


def _say_error(message: str, status: int) -> int:
    err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status


@app.command()
def run(config: ConfigPath, override: Sets = []) -> None:  # noqa: B006 - typer reads the default
    """Search; the same command again goes on where it stopped."""
    from mergesearch import config as configuration

    settings = configuration.read(config, override)
    with _progress(settings) as watch, _sigterm_interrupts():
        from mergesearch.commands.run import prepare
        from mergesearch.search.worker import SearchFailed

        session = prepare(settings, say=watch.say, started=watch.started, finished=watch.finished)
        watch.begin(session)
        try:
            session.search.run()
        except KeyboardInterrupt:
            watch.stop()
            _print_table(settings.folder)
            again = " ".join(["mergesearch run", str(config), *(f"--set {item}" for item in override)])
            out.print(f"interrupted; what was scored is kept. To go on: {again}", soft_wrap=True, markup=False)
            raise typer.Exit(1) from None
        except SearchFailed as error:
            raise CandidateError(str(error)) from error
        watch.stop()
        _print_table(settings.folder)
        _export_best(session)


@app.command()
def table(
    run: RunPath,
    format: Annotated[str, typer.Option(help="text, csv, md or json")] = "text",
    top: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="a column's name")] = "rank",
) -> None:
    """The result table of a run."""
    _print_table(run, format, top, sort)


@app.command()
def report(
    run: RunPath,
    format: Annotated[str, typer.Option(help="text, md or json")] = "text",
    finalists: Annotated[int, typer.Option(min=1, help="how many of the best proposals beside the baselines")] = 3,
) -> None:
    """What the winner is worth on the holdout, documents that the search never saw."""
    from mergesearch.commands.report import report_run
    from mergesearch.results.report import FORMATS, render

    _one_of("--format", format, FORMATS)
    made = report_run(run, finalists, say=lambda text: err.print(text, style="dim", markup=False, soft_wrap=True))
    rendered = render(made, format)
    if format == "text":
        for piece in rendered:
            out.print(piece)
    else:
        print(rendered)


@app.command()
def export(
    run: RunPath,
    out_folder: OutPath,
    trial: Annotated[str, typer.Option(metavar="best|N", help="which candidate")] = "best",
    max_shard_size: Annotated[str, typer.Option(help="the largest safetensors file")] = "5GB",
    format: Annotated[str, typer.Option(help="checkpoint (a folder) or mergekit (its YAML file)")] = "checkpoint",
) -> None:
    """A candidate of a run as a complete checkpoint, or as a file that mergekit runs."""
    from mergesearch.commands.run import export_mergekit, export_trial

    _one_of("--format", format, ("checkpoint", "mergekit"))
    if format == "mergekit":
        record, notes = export_mergekit(run, out_folder, trial)
    else:
        record, notes = export_trial(run, out_folder, trial, max_shard_size), []
    out.print(f"trial {record.number} ({record.method}) is in {out_folder}", soft_wrap=True, markup=False)
    for note in notes:
        out.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe's YAML file, native or mergekit's")],
    out_folder: OutPath,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="the largest safetensors file")] = "5GB",
    allow_unrelated: Annotated[bool, typer.Option(help="merge models that share no base")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="run code from the models' folders")] = False,
) -> None:
    """Build a checkpoint from a recipe file."""
    from mergesearch import mergekit
    from mergesearch.commands.merge import merge_recipe

    stated = mergekit.read_any(recipe)
    merge_recipe(stated, out_folder, device, max_shard_size, allow_unrelated, trust_remote_code)
    out.print(f"recipe {stated.id} is in {out_folder}", soft_wrap=True, markup=False)


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="a checkpoint, or a recipe's YAML file")],
    config: Annotated[Path, typer.Option(help="the run's YAML file: tasks, documents, batch size")],
    on: Annotated[str, typer.Option(help="search, holdout or all documents")] = "search",
    format: Annotated[str, typer.Option(help="text or json")] = "text",
    override: Sets = [],  # noqa: B006 - typer reads the default
) -> None:
    """Score a checkpoint or a recipe on a run's documents."""
    from mergesearch import config as configuration
    from mergesearch.commands.score import score_model

    settings = configuration.read(config, override)
    _one_of("--format", format, ("text", "json"))
    scores = score_model(model, settings, on)
    if format == "json":
        data = {task: found.to_data() for task, found in scores.tasks.items()}
        out.print_json(json.dumps({"model": model, "on": on, "seconds": scores.seconds, "tasks": data}))
        return
    for task, found in scores.tasks.items():
        error = f" ± {found.stderr:.4f}" if found.stderr is not None else ""
        out.print(f"{task} {found.metric}: {found.value:.4f}{error} on {found.documents} documents", highlight=False)


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a recipe, or a run's configuration")],
    override: Sets = [],  # noqa: B006 - typer reads the default
    allow_unrelated: Annotated[bool, typer.Option(help="for a recipe: merge models that share no base")] = False,
) -> None:
    """Run every check on a recipe or a configuration and say what it would do, merging nothing."""
    from mergesearch.commands.check import preview

    for label, text in preview(file, override, allow_unrelated):
        out.print(f"[bold]{label}[/bold]: ", end="", highlight=False)
        out.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, with its mathematics")] = None,
    format: Annotated[str, typer.Option(help="text or json")] = "text",
) -> None:
    """Every merge method with its parameters, their ranges, and the paper."""
    from mergesearch import methods as registry

    _one_of("--format", format, ("text", "json"))
    if name:
        registry.get(name, "the command line")
    rows = [row for row in registry.describe() if name in (None, row["name"])]
    if format == "json":
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        out.print(f"[bold]{row['name']}[/bold]  {row['summary']}", highlight=False, soft_wrap=True)
        base = {"required": "the base and ", "optional": "with or without the base, ", "unused": ""}[row["base"]]
        out.print(f"    merges {base}{row['models']}; {row['paper']}", highlight=False, markup=False, soft_wrap=True)
        for parameter in row["parameters"]:
            out.print(f"    {_parameter_line(parameter)}", highlight=False, markup=False, soft_wrap=True)
    if name:
        out.print("\n" + inspect.getdoc(registry.get(name).function), highlight=False, markup=False, soft_wrap=True)


def _parameter_line(parameter: dict[str, Any]) -> str:
    each = ", one for each model" if parameter["per_model"] else ""
    low_high = parameter["search"]
    searched = f", searched in [{low_high[0]:g}, {low_high[1]:g}]" if low_high else ""
    default = str(parameter["default"]).lower() if isinstance(parameter["default"], bool) else parameter["default"]
    return f"{parameter['key']} = {default} ({parameter['allowed']}{each}{searched}): {parameter['meaning']}"


@app.command()
def zoo() -> None:
    """Where the demo models and their tasks are."""
    from mergesearch import zoo as demo

    print(demo.folder())


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        from mergesearch.errors import unknown

        raise unknown("value", value, known, option)


def _print_table(run: Path, form: str = "text", top: int | None = None, sort: str = "rank") -> None:
    from mergesearch.commands.run import words_of
    from mergesearch.results.record import read_records
    from mergesearch.results.table import render

    _, records, _ = read_records(run)
    rendered = render(records, form, top, sort)
    if form != "text":
        print(rendered)
        return
    out.print(rendered)
    for line in words_of(run):
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _export_best(session: Any) -> None:
    from mergesearch.commands.run import refresh_best

    record = refresh_best(session)
    if record is None:
        out.print("no candidate was scored, so none is exported")
        return
    folder = session.folder.best
    out.print(f"winner: trial {record.number} ({record.method}), exported to {folder}", soft_wrap=True, markup=False)
    out.print(f"its recipe: {folder / 'recipe.yaml'}; by hand: {folder / 'README.md'}", soft_wrap=True, markup=False)


class _Watch:
    """Tells how a run goes: a bar on a terminal, and a line for each trial everywhere."""

    def __init__(self, settings: Any):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)

        from mergesearch.search.strategies import registered

        known = registered()
        self._total = settings.search.trials + sum(
            known[n].cost(settings, []).trials for n in settings.search.strategies
        )
        self._task = self._bar.add_task("starting", total=self._total)
        self._done = 0
        self._best: Record | None = None

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if not out.is_terminal:
            out.print(text, markup=False, soft_wrap=True)

    def begin(self, session: Any) -> None:
        from mergesearch.results.record import records

        for record in records(session.search.history()):
            self._count(record)
        if self._done:
            self.say(f"going on after {self._done} trials")

    def started(self, record: Record) -> None:
        text = f"trial {record.number} {record.method}"
        if record.name:  # the first ones have no objective, and so no line, until all parents are scored
            self.say(text)
        else:
            self._bar.update(self._task, description=text)

    def finished(self, record: Record) -> None:
        self._count(record)
        self._bar.console.print(self._line(record), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()

    def _count(self, record: Record) -> None:
        if record.state not in ("complete", "pruned", "failed"):
            return
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if record.objective is None or record.infeasible:
            return
        if self._best is None or record.objective > (self._best.objective or 0.0):
            self._best = record

    def _line(self, record: Record) -> str:
        head = f"[{self._done}/{self._total}] trial {record.number} {record.method}"
        if record.stopped:
            return f"{head}: stopped {record.stopped} ({record.seconds or 0.0:.1f} s)"
        if record.objective is None:
            return f"{head}: failed: {record.error}"
        best = f"best {self._best.objective:.4f}, trial {self._best.number}" if self._best else ""
        broken = f" but {record.infeasible}" if record.infeasible else ""
        return f"{head}: {record.objective:.4f}{broken} ({best}; {record.seconds or 0.0:.1f} s)"


@contextlib.contextmanager
def _progress(settings: Any) -> Iterator[_Watch]:
    watch = _Watch(settings)
    watch._bar.start()
    try:
        yield watch
    finally:
        watch.stop()


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A cluster's SIGTERM ends a run as cleanly as Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
