"""The command: what a user types, what is printed, the exit status. What a verb does stands in `commands`.

Exit status: 0 done, 1 the work failed or was interrupted, 2 the input is wrong, 3 no worker can go on (`worker`),
130 interrupted twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from mergesearch import leftovers, memory, signals
from mergesearch.commands import completing, usage
from mergesearch.errors import (
    CandidateError,
    CutError,
    RunError,
    StorageError,
    UserError,
    of_system,
    unknown,
    without_passwords,
)


class Verbs(TyperGroup):
    """The verbs, as the first page shows them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page of bare `mergesearch` and of `mergesearch -h`."""
        options = [row for option in self.get_params(ctx) if (row := option.get_help_record(ctx))]
        verbs = {name: command.help or "" for name, command in self.commands.items()}
        usage.write_page(formatter, verbs, options, lambda text: typer.style(text, bold=True))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that is meant; `UserError` with the nearest for one that there is not."""
        if not args[0].startswith("-") and args[0] not in self.commands and not ctx.resilient_parsing:
            raise unknown("verb", args[0], self.commands, usage.COMMAND)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; an interruption has the exit status of this command and not the library's own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort() from None


app: typer.Typer = typer.Typer(
    name=usage.COMMAND,
    cls=Verbs,
    help=usage.SUMMARY,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
if TYPE_CHECKING:
    from mergesearch.commands.crew import Shares
    from mergesearch.config import Config
    from mergesearch.search.worker import Search

# a file or a pipe has no width to fit into
out: Console = Console(width=None if sys.stdout.isatty() else 240)
err: Console = Console(stderr=True)

_NO_ROOM = (
    b"error: what this command needs does not fit into memory: end other programs or raise the limit, use fewer or "
    b"smaller models, or a machine with more\n"
)

# bytes, of which a thread's stack takes eight million
_LEAST = 16 * 2**20

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="the new checkpoint folder")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a key: search.trials=10")]
ShardSize = Annotated[str, typer.Option(help="the largest safetensors file")]
TextOrJson = Annotated[str, typer.Option(help="text or json", autocompletion=lambda: ["text", "json"])]
AllowChanged = Annotated[
    bool, typer.Option("--allow-changed", help="also with other weights or documents than the run was scored with")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
MethodName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="one method, with its mathematics", autocompletion=completing.methods),
]
StrategyName = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="one strategy, with all it says", autocompletion=completing.strategies),
]


def main() -> None:
    """The entry point of the command."""
    # else tokenizers warns at length whenever lm-eval forks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signals.install()
    try:
        _need_room()
        ended = status()
        leftovers.discard_again()
    except MemoryError:
        # there is no room even to say so: what stands ready is written, and nothing else is tried
        os.write(2, _NO_ROOM)
        os._exit(1)
    signals.over(ended)
    if signals.is_interrupted():  # libraries that were being loaded may not survive to be left in order
        signals.flush()
        os._exit(ended)
    sys.exit(ended)


def _need_room() -> None:
    """Raises MemoryError where there is not even memory to start in.

    A thread whose memory runs out as it begins is waited for in vain by whoever starts it, and libraries start threads.
    """
    try:
        mmap.mmap(-1, _LEAST).close()
    except OSError:
        raise MemoryError from None


def status() -> int:
    """Runs the verb in `sys.argv` and returns its exit status."""
    signals.how_to_go_on(f"interrupted. To go on: {_same_again()}")
    try:
        ended = app(prog_name=usage.COMMAND, standalone_mode=False) or 0
        # the library's own status of an interruption outside of the verbs
        return _say_interrupted() if ended == signals.AT_ONCE else ended
    except (Exception, KeyboardInterrupt, CutError, StorageError) as error:
        return _say_why(error)


def _same_again() -> str:
    return without_passwords(shlex.join([usage.COMMAND, *sys.argv[1:]]))


def _say_interrupted() -> int:
    if not signals.is_said():
        _say_error(signals.line(), 1)
        signals.said()
    return 1


def _say_why(ended: BaseException) -> int:
    """Says what ended the verb, and returns the exit status."""
    # a library may have made anything of an interruption
    if signals.is_interrupted():
        return _say_interrupted()
    try:
        raise ended
    except UserError as error:
        return _say_error(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say_interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CandidateError, CutError, StorageError) as error:
        return _say_error(str(error), 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # of the library that reads the command line
            return _say_error(usage.sentence(error), 2)
        if os.environ.get("MERGESEARCH_DEBUG"):
            raise
        if memory.ran_out(error):
            return _say_error(memory.too_little("what this command needs"), 1)
        if isinstance(error, OSError) and error.errno and error.strerror:
            # no disk makes a name too long
            return _say_error(of_system(error), 2 if error.errno == errno.ENAMETOOLONG else 1)
        reason = " ".join(str(error).split())
        return _say_error(f"{type(error).__name__}: {reason} (MERGESEARCH_DEBUG=1 shows where)", 1)


def _say_error(message: str, status: int) -> int:
    # a library's words may hold a URL
    message = without_passwords(message)
    err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=not err.is_terminal)
    return status


def _say(lines: Iterable[Any]) -> None:
    """Prints lines as they are, and whatever else rich lays out."""
    for line in lines:
        # a terminal would break words; whoever reads a pipe wants a line to stay one
        out.print(line, soft_wrap=isinstance(line, str | Text) and not out.is_terminal, markup=False, highlight=False)


def _show(pieces: Iterable[Any]) -> None:
    """Prints what fits itself to a terminal's width, and is as wide as it needs to be in a file or a pipe."""
    if out.is_terminal:
        _say(pieces)
    else:
        print(*pieces, sep="\n")


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _labelled(lines: Iterable[tuple[str, str]]) -> None:
    _say(Text.assemble((label, "bold"), f": {text}") for label, text in lines)


def _note(text: str) -> None:
    """What is being done, beside the result."""
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=not err.is_terminal)


def _one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown("value", value, known, option)


def _as_text_only(form: str) -> str:
    raise UserError(f"--format {form} is no text: name the file to write with --out")


def _described(
    described: Callable[[str | None], list[dict[str, Any]]],
    lines_of: Callable[[str | None], Iterable[Any]],
    name: str | None,
    form: str,
) -> None:
    """Prints what a registry says of its entries, or of the one that is named."""
    _one_of("--format", form, ("text", "json"))
    if form == "json":
        print(json.dumps(described(name), indent=1))
        return
    for line in lines_of(name):
        out.print(line, soft_wrap=True)


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the versions and end.")] = False,
) -> None:
    """Prints the first page where no verb is given."""
    if version:
        from mergesearch.commands.version import lines

        print(*lines(), sep="\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def init(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="what to write; else mergesearch.yaml")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="what they were fine-tuned from", autocompletion=completing.models),
    ] = None,
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]MODEL",
            help="a folder, a hub id or zoo:NAME; again for each",
            autocompletion=completing.models,
        ),
    ] = [],  # noqa: B006 - typer reads the default
    task: Annotated[
        list[str], typer.Option(metavar="TASK[:METRIC]", help="one that lm-eval knows, or yours; again for each")
    ] = [],  # noqa: B006
    include_path: Annotated[list[str], typer.Option(metavar="FOLDER", help="with tasks of your own")] = [],  # noqa: B006
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="of the run, and of the file where FILE is left out")
    ] = None,
    limit: Annotated[str | None, typer.Option(metavar="N|all", help="documents of each task to score on")] = None,
    trials: Annotated[int | None, typer.Option(metavar="N", min=0, help="how many candidates to try")] = None,
    hours: Annotated[float | None, typer.Option(metavar="H", help="when to end")] = None,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code from the models' folders")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing, take what is proposed")] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite FILE")] = False,
    check: Annotated[bool, typer.Option(help="say what the run may cost")] = True,
) -> None:
    """Write a configuration for your models, from questions or options."""
    from mergesearch.commands.given import Given, missing, target

    path, asks = target(file, name, force), _on_terminal() and not yes
    given = Given(base, model, task, include_path, name, limit, trials, hours, device, trust_remote_code)
    if asks:
        _say([f"A few questions, then {path} is written. Enter takes what stands in brackets, Ctrl-C ends."])
    else:
        missing(given, yes)
    try:
        with out.status("loading torch and lm-eval"):
            from mergesearch.commands.init import write_configuration
            from mergesearch.commands.questions import Questions

        write_configuration(given, path, Questions(out) if asks else None, _note)
    except (KeyboardInterrupt, EOFError):
        err.print()
        signals.how_to_go_on(f"interrupted; {path} was not written")
        _say_interrupted()
        raise typer.Exit(1) from None
    _say([f"{path} is written."])
    if check:
        from mergesearch.commands.check import preview

        _note("checking it as `mergesearch check` does")
        try:
            _labelled(preview(path))
        except UserError as error:
            raise UserError(f"{path} is written and cannot be run yet: {error}") from None
    _say([f"Next: {shlex.join([usage.COMMAND, 'run', str(path)])}"])


@app.command()
def run(
    config: ConfigPath,
    override: Sets = [],  # noqa: B006 - typer reads the default
    workers: Annotated[
        str, typer.Option(metavar="N|auto", help="processes at work; auto: one for each GPU, one without")
    ] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|auto", help="place the workers on a Ray cluster, one for each of its GPUs"),
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="NEW", help="begin a run with other models or tasks, which takes over the trials that hold"
        ),
    ] = None,
    allow_changed: AllowChanged = False,
) -> None:
    """Search, on all GPUs that are to be seen; the same command again goes on where it stopped."""
    if fork is not None:
        from mergesearch.commands.forking import forked

        override = forked(config, override, fork)
    options = ([] if workers == "auto" else ["--workers", workers]) + (["--ray", ray] if ray is not None else [])
    settings = _settings(config, override, "run", options)
    from mergesearch.commands.crew import shares
    from mergesearch.commands.hooks import told_at_end
    from mergesearch.commands.watching import watch as watch_worker
    from mergesearch.commands.winner import verdict_of

    share = shares(workers, settings) if ray is None else None
    with told_at_end(settings, lambda: verdict_of(settings.folder), _note):
        if share is None:
            from mergesearch.commands import on_ray

            assert ray is not None
            _with_workers(
                settings, lambda: on_ray.run(ray, workers, settings, lambda line: _say([line]), allow_changed)
            )
        elif share.workers == 1:
            watch_worker(_note)  # what follows is done by the process that it starts
            _search(settings, allow_changed)
        else:
            _search_with(share, settings, config, override, allow_changed)


@app.command()
def worker(
    config: ConfigPath,
    override: Sets = [],  # noqa: B006 - typer reads the default
    allow_changed: AllowChanged = False,
) -> None:
    """Join a run as one worker more, from any host that reaches its storage, or begin it."""
    from mergesearch.commands.crew import LEASH, RUN_OVER, hold_leash
    from mergesearch.commands.hooks import tell_end
    from mergesearch.commands.winner import verdict_of

    hold_leash(os.environ)
    settings = _settings(config, override, "worker")
    try:
        search = _search(settings, allow_changed, alone=False)
    except RunError as error:
        raise typer.Exit(_say_error(str(error), RUN_OVER)) from error
    if LEASH not in os.environ and search.is_last():  # else whoever started it tells
        tell_end(settings, lambda: verdict_of(settings.folder), _note)


def _settings(config: Path, override: Sequence[str], verb: str, options: Sequence[str] = ()) -> Config:
    """The configuration of a search, and from here on how one goes on with it."""
    from mergesearch.commands.foreign import read_config

    settings = read_config(config, list(override), _note)
    sets = [part for item in override for part in ("--set", item)]
    again = shlex.join([usage.COMMAND, verb, str(config), *options, *sets])
    signals.how_to_go_on(f"interrupted; what was scored is kept. To go on: {without_passwords(again)}")
    return settings


def _search(settings: Config, allow_changed: bool, alone: bool = True) -> Search:
    """One worker, from the first model that it loads to the winner's export; returns its search.

    Args:
        alone: whether the reader sees this worker's output as the run's; else it is told in lines.
    """
    from mergesearch.commands.progress import RunProgress

    progress = RunProgress(settings, out if alone else Console(width=240, force_terminal=False))
    with signals.at_work(), progress:
        from mergesearch.commands.report import ReportProgress, report_at_end
        from mergesearch.commands.run import prepare
        from mergesearch.commands.table import show
        from mergesearch.results.report import render

        session = prepare(
            settings,
            say=progress.say,
            started=progress.started,
            scored=progress.scored,
            finished=progress.finished,
            asked=progress.asked,
            stepped=progress.learning,
            hung=_end_hung,
            doing=progress.doing,
            allow_changed=allow_changed,
        )
        progress.begin(session.search.history, session.read().records, lambda: session.search.at_work)
        try:
            session.run(progress.say)
        except KeyboardInterrupt:
            progress.stop()
            if alone:
                _show(show(session.read()))
            _show([signals.line()])
            signals.said()
            raise typer.Exit(1) from None
        progress.stop()
        session.score_again(_note)
        if alone:
            _show(show(session.read()))
        _say(session.export_best())
        with ReportProgress(err) as scoring:
            held = report_at_end(session.read(), session.engine, scoring, allow_changed=allow_changed)
        if held is not None:
            _show([render(held)])
    return session.search


def _end_hung(reason: str) -> None:
    """Ends a process whose work may never return."""
    signals.how_to_go_on(f"{reason}; {signals.line().partition('; ')[2]}")
    signals.leave_word(reason)
    signals.end_now(1)


def _search_with(share: Shares, settings: Config, config: Path, override: Sequence[str], allow_changed: bool) -> None:
    """Several workers on this host, and the run's table once they are done."""
    from mergesearch.commands.crew import Crew, command_of, seats
    from mergesearch.search.presence import signs_of

    where = seats(share, settings.device, os.environ)
    _say([f"{share.workers} workers: {', '.join(seat.name for seat in where)}"])
    crew = Crew(
        where,
        lambda seat: command_of(seat, str(config), override, allow_changed),
        lambda line: _say([line]),
        lambda: signs_of(settings.folder),
    )
    _with_workers(settings, crew.run)


def _with_workers(settings: Config, work: Callable[[], None]) -> None:
    """Waits for workers in processes of their own, and shows what the run came to."""
    from mergesearch.commands.table import show
    from mergesearch.commands.winner import verdict_of
    from mergesearch.results.loading import load_run

    try:
        work()
    except KeyboardInterrupt:
        with contextlib.suppress(UserError):
            _show(show(load_run(settings.folder)))
        _show([signals.line()])
        signals.said()
        raise typer.Exit(1) from None
    _show(show(load_run(settings.folder)))
    _say([verdict_of(settings.folder)[1]])


@app.command()
def table(
    run: RunPath,
    format: Annotated[
        str | None, typer.Option(help="text, csv, md, json, jsonl or parquet; else by FILE's ending")
    ] = None,
    of: Annotated[
        str, typer.Option(help="trials, documents or report: the last two as csv, jsonl or parquet")
    ] = "trials",
    top: Annotated[int | None, typer.Option(min=1, help="only the first N rows")] = None,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="a column's name")] = "rank",
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="write it there")] = None,
) -> None:
    """The result table of a run, as wide as the terminal; into a pipe or a file as wide as need be.

    Where there is no room, columns go in this order: bars, seconds, interval, rank, ±, vs, expected, tasks
    from the last.
    """
    from mergesearch.commands.table import data_of, form_of, show, write_data, write_table
    from mergesearch.results.loading import load_run

    form = format or (form_of(file) if file is not None else "text" if of == "trials" else "csv")
    if of != "trials":
        if file is not None:
            write_data(run, file, of, form)
        else:
            print(data_of(run, of, form).decode() if form != "parquet" else _as_text_only(form), end="")
        return
    if file is not None:
        write_table(run, file, form, top, sort)
        return
    pieces = show(load_run(run), form, top, sort)
    _show(pieces)


@app.command()
def report(
    run: RunPath,
    format: Annotated[str, typer.Option(help="text, md or json")] = "text",
    finalists: Annotated[
        int | None,
        typer.Option(min=1, help="how many of the best proposals beside the baselines; else report.finalists"),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=2, help="the most holdout documents of each task; else report.documents")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=0, help="documents on which winner and best model differ, for the page; else report.examples"),
    ] = None,
    task: Annotated[
        list[str], typer.Option(metavar="TASK[:METRIC]", help="one that the search never uses; beside report.tasks")
    ] = [],  # noqa: B006 - typer reads the default
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="also write the run as a page for a browser")
    ] = None,
    beside: Annotated[
        list[Path], typer.Option("--beside", metavar="RUN", help="a run to lay beside it on the page")
    ] = [],  # noqa: B006 - typer reads the default
    allow_changed: AllowChanged = False,
) -> None:
    """What the winner is worth on the holdout, documents that the search never saw."""
    from mergesearch.commands.report import ReportProgress, has_holdout, report_run
    from mergesearch.results.report import FORMATS, render

    _one_of("--format", format, FORMATS)
    if beside and html is None:
        raise UserError("--beside lays a run beside another on the page: give --html FILE too")
    if html is None or has_holdout(run):
        with ReportProgress(err) as progress:
            held = report_run(
                run, finalists, documents, progress, examples=examples, tasks=task, allow_changed=allow_changed
            )
        _show([render(held, format)])
    if html is not None:
        from mergesearch.commands.page import write_page

        write_page(run, html, beside)
        _note(f"the page is {html}: open it in a browser")


@app.command()
def watch(
    run: RunPath,
    html: Annotated[bool, typer.Option("--html", help="write the run as a page for a browser each time")] = False,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="that page; else page.html in the run folder")
    ] = None,
    every: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="from one look to the next")] = 60.0,
) -> None:
    """Look at a run while it goes on, from any host: workers, the best so far, failures; ends with it."""
    from mergesearch.commands.page import PAGE, watch
    from mergesearch.commands.table import brief, show

    page = (file or run / PAGE) if html or file is not None else None
    signals.how_to_go_on(f"no longer watching; the run goes on. To go on: {_same_again()}")
    if page is not None:
        _note(f"the page is {page}: open it in a browser, it reads itself anew")
    looks = 0

    def look(seen: Any) -> None:
        nonlocal looks
        if out.is_terminal:
            out.clear()
        if out.is_terminal or not looks:
            _show(show(seen, top=20))
        else:
            _say(brief(seen))
        looks += 1

    watch(run, page, every, look)


@app.command()
def export(
    run: RunPath,
    out_folder: OutPath,
    trial: Annotated[str, typer.Option(metavar="best|N", help="which candidate")] = "best",
    max_shard_size: ShardSize = "5GB",
    format: Annotated[
        str, typer.Option(help="checkpoint (a folder), adapter (a PEFT folder) or mergekit (its YAML file)")
    ] = "checkpoint",
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="R", help="of an adapter, at most; by default the sum of the models' own, or 64"),
    ] = None,
    allow_changed: AllowChanged = False,
) -> None:
    """A candidate of a run as a checkpoint, as an adapter over the base, or as a file for mergekit."""
    from mergesearch.commands.export import (
        ADAPTER,
        FORMATS,
        MERGEKIT,
        export_adapter,
        export_mergekit,
        export_trial,
    )

    _one_of("--format", format, FORMATS)
    if rank is not None and format != ADAPTER:
        raise UserError(f"--rank {rank} goes with --format adapter, not with {format}: leave it out")
    if format == ADAPTER:
        record, notes = export_adapter(run, out_folder, trial, rank, allow_changed=allow_changed, say=_note)
    elif format == MERGEKIT:
        record, notes = export_mergekit(run, out_folder, trial, allow_changed=allow_changed, say=_note)
    else:
        record = export_trial(run, out_folder, trial, max_shard_size, allow_changed=allow_changed, say=_note)
        notes = []
    _say([f"trial {record.number} ({record.method}) is in {out_folder}", *(f"note: {note}" for note in notes)])


@app.command()
def push(
    run: RunPath,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="the repository on the hub; made if need be")],
    trial: Annotated[str, typer.Option(metavar="best|N", help="which candidate")] = "best",
    private: Annotated[bool, typer.Option("--private", help="a new repository is for its owner alone")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="else the main one")] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    allow_changed: AllowChanged = False,
) -> None:
    """Upload a candidate of a run, with its model card, to the Hugging Face hub."""
    from mergesearch.commands.push import push_trial

    options = {"private": private, "revision": revision, "message": message, "allow_changed": allow_changed}
    record, address = push_trial(run, name, trial, **options, say=_note)
    _say([f"trial {record.number} ({record.method}) is at {address}"])


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe's YAML file, native or mergekit's")],
    out_folder: OutPath,
    device: Device = "auto",
    max_shard_size: ShardSize = "5GB",
    allow_unrelated: Annotated[bool, typer.Option(help="merge models that share no base")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="run code from the models' folders")] = False,
) -> None:
    """Build a checkpoint from a recipe file."""
    from mergesearch.commands.inputs import read_recipe
    from mergesearch.commands.merge import merge_recipe

    stated = read_recipe(recipe)
    notes = merge_recipe(stated, out_folder, device, max_shard_size, allow_unrelated, trust_remote_code)
    _say([f"recipe {stated.id} is in {out_folder}", *notes])


@app.command()
def score(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE", help="a checkpoint, or a recipe's YAML file", autocompletion=completing.models
        ),
    ],
    config: Annotated[Path, typer.Option(help="the run's YAML file: tasks, documents, batch size")],
    on: Annotated[str, typer.Option(help="search, holdout or all documents")] = "search",
    format: TextOrJson = "text",
    override: Sets = [],  # noqa: B006 - typer reads the default
    allow_changed: AllowChanged = False,
) -> None:
    """Score a checkpoint or a recipe on a run's documents."""
    from mergesearch.commands.foreign import read_config
    from mergesearch.commands.score import json_of, lines_of, score_model

    settings = read_config(config, override, _note)
    _one_of("--format", format, ("text", "json"))
    scores = score_model(model, settings, on, allow_changed=allow_changed, say=_note)
    if format == "json":
        out.print_json(json_of(scores, model, on))
        return
    _say(lines_of(scores))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a configuration of mergekit-evolve or mergenetic")],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="the new file; else it is printed, and nothing is written")
    ] = None,
) -> None:
    """Another program's search as a configuration, with what differs."""
    from mergesearch.commands.foreign import convert, write

    converted = convert(file)
    if target is None:
        print(converted.to_yaml(), end="")
        return
    write(converted, target)
    _say([f"{target} is written, from a configuration of {converted.program}."])
    _say(f"note: {note}" for note in converted.notes)


@app.command()
def dashboard(
    run: RunPath,
    host: Annotated[str, typer.Option(help="who may look: 127.0.0.1 is this machine alone")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8080,
) -> None:
    """A run in optuna-dashboard, while it goes on or afterwards; the run itself is only read."""
    from mergesearch.commands.dashboard import serving

    signals.how_to_go_on("the dashboard is closed")
    with serving(run, host, port) as server:
        _say([f"http://{host}:{server.server_port}/ (Ctrl-C ends)"])
        server.serve_forever()


@app.command()
def proxy(
    config: ConfigPath,
    override: Sets = [],  # noqa: B006 - typer reads the default
    host: Annotated[
        str, typer.Option(help="who may connect: 127.0.0.1 is this machine alone, 0.0.0.0 all that reach it")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 13000,
) -> None:
    """Stand before a run's storage, for more workers than a database takes connections; see `storage_proxy`."""
    from mergesearch.search.proxy import serving, wait

    settings = _settings(config, override, "proxy")
    signals.how_to_go_on("the proxy is closed; workers wait for it for ten minutes")
    with serving(settings, host, port) as bound:
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        _say([f"storage_proxy: {shown}:{bound} (Ctrl-C ends)"])
        wait()


@app.command()
def doctor() -> None:
    """Versions, devices, memory, storage, compiler, and what is missing for which feature."""
    from mergesearch.commands.doctor import report

    _labelled(report())


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a recipe, or a run's configuration")],
    override: Sets = [],  # noqa: B006 - typer reads the default
) -> None:
    """What a configuration or a recipe would do and cost; reads no weights and merges nothing."""
    from mergesearch.commands.check import preview

    _labelled(preview(file, override, _note))


@app.command()
def methods(
    name: MethodName = None,
    format: TextOrJson = "text",
) -> None:
    """Every merge method: its parameters, their ranges, the paper."""
    from mergesearch.commands.methods import described, lines_of

    _described(described, lines_of, name, format)


@app.command()
def strategies(
    name: StrategyName = None,
    format: TextOrJson = "text",
) -> None:
    """Every way to search: its settings, their ranges and defaults."""
    from mergesearch.commands.strategies import described, lines_of

    _described(described, lines_of, name, format)


@app.command()
def zoo(
    format: Annotated[str, typer.Option(help="text: the folder alone; json: what is in it")] = "text",
) -> None:
    """Where the demo models and their tasks are."""
    from mergesearch.commands.zoo import described, folder

    _one_of("--format", format, ("text", "json"))
    print(json.dumps(described(), indent=1) if format == "json" else folder())
