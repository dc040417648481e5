"""What the command says of itself: the page that bare `mergesearch` prints, and what is wrong with a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergesearch.errors import unknown

COMMAND = "mergesearch"
SUMMARY = "Search for the best way to merge fine-tuned language models."
USAGE = f"Usage: {COMMAND} VERB ...      {COMMAND} VERB -h says all that a verb takes"
EXAMPLES: Sequence[tuple[str, Sequence[str]]] = (
    (
        "The demo, whose models and tasks come with the package:",
        (f"{COMMAND} init demo.yaml --base zoo:base --trials 8 --yes", f"{COMMAND} run demo.yaml"),
    ),
    (
        "Your own models; init asks for them and for the tasks:",
        (f"{COMMAND} init mine.yaml", f"{COMMAND} run mine.yaml"),
    ),
    (
        "What the winner is worth on documents that no search saw, and its files:",
        (f"{COMMAND} report results/mine", f"{COMMAND} export results/mine merged"),
    ),
)
# every verb once, in the order in which a person meets them
GROUPS: Mapping[str, Sequence[str]] = {
    "Search": ("init", "convert", "check", "run", "worker", "proxy"),
    "Look": ("table", "watch", "dashboard", "report", "score"),
    "Merge": ("export", "push", "merge"),
    "Learn": ("methods", "strategies", "zoo", "doctor"),
}
STATUSES = "Exit status: 0 done, 1 failed or stopped, 2 wrong input, 130 stopped twice."


def write_page(
    formatter: Any, verbs: Mapping[str, str], options: Sequence[tuple[str, str]], bold: Callable[[str], str]
) -> None:
    """Writes the first page: what it is, examples, the verbs in their groups, options, exit statuses.

    Args:
        formatter: the library's, which knows how wide the terminal is.
        verbs: what each verb does.
        options: what each option does.
    """
    formatter.write(f"{SUMMARY}\n\n{USAGE}\n")
    with formatter.section(bold("Examples")):
        for words, lines in EXAMPLES:
            formatter.write("".join([f"  {words}\n", *(f"    {line}\n" for line in lines)]))
    width = max(map(len, verbs))
    for title, names in GROUPS.items():
        with formatter.section(bold(title)):
            formatter.write_dl([(name.ljust(width), verbs[name]) for name in names])
    with formatter.section(bold("Options")):
        formatter.write_dl(options)
    formatter.write(f"\n{STATUSES}\n")


def sentence(error: Any) -> str:
    """What is wrong with a command line, in one sentence with the remedy.

    Args:
        error: what the library that reads command lines raised. It is known by its attributes: the class is another
            one in each of that library's versions.
    """
    context, kind = getattr(error, "ctx", None), type(error).__name__
    where = context.command_path if context is not None else COMMAND
    see = f"see `{where} -h`"
    if kind == "NoSuchOption" and context is not None:
        options = [name for parameter in context.command.get_params(context) for name in _written(parameter)]
        return str(unknown("option", error.option_name, options, where))
    if kind == "MissingParameter":
        parameter = error.param
        written = parameter.metavar or "/".join(parameter.opts)
        meaning = f" ({parameter.help})" if getattr(parameter, "help", None) else ""
        return f"{where} needs {written}{meaning}: {see}"
    parts = " ".join(str(error.format_message()).split()).rstrip(".").split(": ")
    return f"{where}: {': '.join(part[:1].lower() + part[1:] for part in parts)} ({see})"


def _written(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
