"""Writes what the pages say of keys, strategies, methods, commands and memory, from the code.

`python -m scripts.docs`. A page is prose, and blocks between `<!-- NAME: python -m scripts.docs -->` and
`<!-- end of NAME -->`, which are written here alone. tests/test_docs.py refuses a page whose blocks are not what the
code says.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import statistics
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic.fields import FieldInfo

from mergesearch import methods, registry
from mergesearch.config import Config
from mergesearch.engine.residency import OVERHEAD, SHARE
from mergesearch.mergekit.known import EXPORTED
from mergesearch.recipe import Recipe
from mergesearch.results import frames
from mergesearch.schema import Strict, fields_of, inner_model, words_of_type
from mergesearch.search import strategies
from mergesearch.search.strategies.baselines import DEFAULTS
from scripts import real_result
from scripts.bench import search_rows
from scripts.bench.search_report import Mean

ROOT = Path(__file__).parent.parent
SEARCHES = ROOT / "results" / "search.csv"
_BLOCK = re.compile(r"(<!-- ([\w-]+): python -m scripts\.docs -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page's text with every block as the code has it now."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]().strip()}\n\n{found[3]}", text)


# --- the shape of things --------------------------------------------------------------------------------------------


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    """A value as a file states it."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return f"`{text}`"


# --- frames ---------------------------------------------------------------------------------------------------------


def trials_frame() -> str:
    """The columns of the table."""
    return _columns(frames.TRIAL_COLUMNS)


def documents_frame() -> str:
    """The columns of a run's documents."""
    return _columns(frames.DOCUMENT_COLUMNS)


def report_frame() -> str:
    """The columns of a report."""
    return _columns(frames.REPORT_COLUMNS)


def _columns(columns: Mapping[str, tuple[str, str]]) -> str:
    kinds = {"Int64": "integer", "float64": "number", "string": "text", "boolean": "boolean", "bool": "boolean"}
    return _table(("column", "type", "meaning"), [(f"`{n}`", kinds[k], meaning) for n, (k, meaning) in columns.items()])


# --- configuration --------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of a configuration, a table for each part of it."""
    return "\n\n".join(_parts(Config, ""))


def _parts(model: type[Strict], path: str) -> Iterator[str]:
    keys = fields_of(model)
    if path:
        yield f"### `{path}`\n\n{_sentences(model)}"
    rows = [(f"`{path}{'.' * bool(path)}{key}`", *_key(field)) for key, field in keys.items()]
    yield _table(("key", "meaning", "allowed", "default"), rows)
    for key, field in keys.items():
        inner = inner_model(field.annotation)
        if inner is not None:
            below = f"{path}{'.' * bool(path)}{key}"
            yield from _parts(inner, f"{below}.N" if _is_list(field) else below)


def _key(field: FieldInfo) -> tuple[str, str, str]:
    """Meaning, what is allowed, default."""
    inner = inner_model(field.annotation)
    allowed = words_of_type(field) if inner is None else "a list, see below" if _is_list(field) else "see below"
    return field.description or "", allowed, _default(field, inner)


def _default(field: FieldInfo, inner: type[Strict] | None) -> str:
    if field.is_required():
        return "to be given"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "its own" if inner is not None and isinstance(default, Strict) else _plain(default)


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) in (list, tuple)


def _sentences(thing: Any) -> str:
    """Its docstring, without examples for Python."""
    return re.sub(r"\n*^>>> .*?(?=\n\n|\Z)", "", inspect.getdoc(thing) or "", flags=re.DOTALL | re.MULTILINE)


def recipe() -> str:
    """Every key of a recipe."""
    return "\n\n".join(_parts(Recipe, ""))


# --- strategies and methods -----------------------------------------------------------------------------------------


def strategy_pages() -> str:
    """Every strategy with all that it says of itself and its keys."""
    known = registry.strategies()
    return "\n\n".join(_strategy(row, known[row["name"]]) for row in strategies.describe())


def _strategy(row: dict[str, Any], strategy: type[Any]) -> str:
    stands = [
        "named in `search.strategy`" if row["named"] else "joins by itself where its key asks for it",
        *["part of `auto`"] * row["auto"],
        *["goes on until the budget ends"] * row["open_ended"],
    ]
    keys = [(f"`{k['key']}`", k["meaning"], k["allowed"], _plain(k["default"])) for k in row["keys"]]
    parts = [f"### `{row['name']}`", _sentences(strategy), f"*{'; '.join(stands)}.*"]
    return "\n\n".join([*parts, *([_table(("key", "meaning", "allowed", "default"), keys)] if keys else [])])


def defaults() -> str:
    """The published defaults that are baselines."""
    rows = [
        (name, f"`{method}`", ", ".join(f"{key} {value:g}" for key, value in parameters.items()) or "none")
        for name, (method, parameters) in DEFAULTS.items()
    ]
    return _table(("baseline", "method", "parameters"), rows)


_BASE = {"required": "yes", "optional": "if there is one", "unused": "no"}


def method_list() -> str:
    """One line for each method."""
    rows = [
        (
            f"[`{row['name']}`](#{row['name']})", row["summary"], row["models"], _BASE[row["base"]],
            "yes" if row["name"] in EXPORTED else "no",
        )
        for row in methods.describe()
    ]  # fmt: skip
    wrapped = [
        (f"[`...+{row['name']}`](#{row['name']})", row["summary"], "any method's result", "yes", "no")
        for row in methods.describe_wrappers()
    ]
    return _table(("method", "what it does", "merges", "uses the base", "mergekit export"), [*rows, *wrapped])


def method_pages() -> str:
    """Every method: parameters and mathematics."""
    told = [_method(row, methods.get(row["name"]).function) for row in methods.describe()]
    told += [_method(row, methods.get_wrapper(row["name"]).function) for row in methods.describe_wrappers()]
    return "\n\n".join(told)


def _method(row: dict[str, Any], function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    mathematics = text.partition("\n")[2].strip()
    parameters = [
        (f"`{p['key']}`", p["meaning"], p["allowed"], _each(p), _plain(_number(p["default"])), _range(p["search"]))
        for p in row["parameters"]
    ]
    titles = ("parameter", "meaning", "allowed", "one for each model", "default", "searched in")
    parts = [f"### {row['name']}", f"{row['summary']} {row['paper']}."]
    return "\n\n".join([*parts, *([_table(titles, parameters)] if parameters else []), f"```text\n{mathematics}\n```"])


def _each(parameter: dict[str, Any]) -> str:
    return "yes" if parameter["per_model"] else "no"


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _range(searched: Any) -> str:
    """Numbers have a range; what has choices is searched over all of them, or not at all."""
    if searched is None:
        return "not searched"
    low_high = [f"{end:g}" for end in searched] if isinstance(searched, tuple) else []
    return f"[{', '.join(low_high)}]" if low_high else "every choice"


# --- commands -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every verb: how it is called, what it takes."""
    from mergesearch.cli import app

    group: Any = typer.main.get_command(app)
    parts = [_options([p for p in group.params if _is_option(p)])]
    return "\n\n".join(part for part in [*parts, *(_command(n, c) for n, c in group.commands.items())] if part)


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if not _is_option(p)]
    options = [p for p in command.params if _is_option(p)]
    usage = " ".join(["mergesearch", name, *map(_called, arguments), *["[OPTIONS]"] * bool(options)])
    rows = [(f"`{_called(p)}`", p.help or "", "") for p in arguments]
    parts = [f"### {name}", f"```\n{usage}\n```", command.help or "", _options(options, rows)]
    return "\n\n".join(part for part in parts if part)


def _options(options: Sequence[Any], before: Sequence[tuple[str, str, str]] = ()) -> str:
    rows = [*before, *((f"`{_flag(p)}`", p.help or "", _given(p)) for p in options if not p.hidden)]
    return _table(("argument or option", "meaning", "default"), rows) if rows else ""


def _is_option(parameter: Any) -> bool:
    return parameter.opts[0].startswith("-")


def _called(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _flag(option: Any) -> str:
    if getattr(option, "is_flag", False):
        # of what is on by itself, the word that turns it off is the one to know
        return ", ".join([*option.opts, *(option.secondary_opts if option.default else ())])
    return f"{', '.join(option.opts)} {option.metavar or option.name.upper()}"


def _given(option: Any) -> str:
    if getattr(option, "is_flag", False):
        return "off" if not option.default else "on"
    if option.required:
        return "to be given"
    return "none" if option.default in (None, [], ()) else _plain(option.default)


# --- memory ---------------------------------------------------------------------------------------------------------

# parameters, in billions, and bytes for each in bfloat16
_SIZES, _BYTES, _MODELS = (1, 7, 8), 2, 4


def memory() -> str:
    """What a base, four models and a candidate take in bfloat16, by the rule of engine/residency.py."""
    titles = (
        "parameters", "base and 4 models", "candidate", "all on the device", "free memory for it",
        "candidate alone on the device", "free host memory for the rest",
    )  # fmt: skip
    return _table(titles, [[f"{billions} B", *map(_gib, _taken(billions))] for billions in _SIZES])


def memory_short() -> str:
    """The same for whoever has not begun yet."""
    sizes = {billions: _taken(billions) for billions in _SIZES}
    rows = [
        ("all on the device", *(_gib(sizes[billions][2]) for billions in _SIZES)),
        ("the same with a fifth left free for scoring", *(_gib(sizes[billions][3]) for billions in _SIZES)),
    ]
    return _table(("four models and their base, bfloat16", *(f"{billions} B each" for billions in _SIZES)), rows)


def _taken(billions: int) -> tuple[float, ...]:
    """Bytes: the pool, a candidate, both together, the memory in which they leave room for scoring, a candidate whose
    parents lie elsewhere, the host memory that these want free."""
    one = billions * 1e9 * _BYTES
    pool = (1 + _MODELS) * one
    whole = (pool + one) * (1 + OVERHEAD)
    return pool, one, whole, whole / SHARE, one + OVERHEAD * (pool + one), pool / SHARE


def _gib(size: float) -> str:
    return f"{size / 2**30:.0f} GiB" if size >= 10 * 2**30 else f"{size / 2**30:.1f} GiB"


# --- the real result ------------------------------------------------------------------------------------------------


def real() -> str:
    """The rows of results/search-real.md that a newcomer asks about."""
    result = real_result.read()
    default, single = result.defaults[0], result.models[0]
    named = {
        "**found by the search**": result.winner,
        f"best published default ({default.name})": default,
        "plain average of the four": result.average,
        f"best single model ({single.name})": single,
        "the base": result.base,
    }
    rounded = real_result.rounded
    rows = [
        (name, f"{rounded(c.holdout)} [{rounded(c.low)}, {rounded(c.high)}]", *map(rounded, c.tasks.values()))
        for name, c in named.items()
    ]
    own = [model.tasks[task] for task in result.winner.tasks for model in result.models if model.name == task]
    rows.insert(1, ("all four kept, each asked its own task", rounded(statistics.mean(own)), *map(rounded, own)))
    return _table(("on 400 documents that no search saw", "mean, 95 % interval", *result.winner.tasks), rows)


# --- the judging pools ----------------------------------------------------------------------------------------------

# each in a newcomer's words
JUDGED = {
    "judge_zoo_a": "five small fine-tunes",
    "judge_zoo_b": "four small LoRA adapters",
    "judge_real_adapters": "four LoRA adapters on SmolLM2-135M",
    "judge_real_seven": "seven fine-tunes of it, two of them useless",
}
# "published defaults" gives the best of all baselines, which need not be one of these
OURS, THEIRS = "auto", ("published defaults", "cmaes")


def judged() -> str:
    """What auto has on the pools that nothing was chosen by, from the rows of results/search.csv."""
    curves = {key: curve for key, curve in search_rows.read(SEARCHES).items() if key.pool in JUDGED}
    ends = {key: curve.at(math.inf)[1] for key, curve in curves.items()}
    rows = []
    for pool, words in JUDGED.items():
        ours = {key.seed: end for key, end in ends.items() if (key.pool, key.search) == (pool, OURS)}
        others = [{seed: ends.get(search_rows.Key(pool, name, seed)) for seed in ours} for name in THEIRS]
        means = [_mean_of(each.values()) for each in (ours, *others)]
        baselines = others[0]
        ahead = [end - other for seed, end in ours.items() if (other := baselines[seed]) is not None]
        keys = [key for seed in ours if (key := search_rows.Key(pool, THEIRS[0], seed)) in curves]
        kinds = Counter(curves[key].best.partition(", ")[0] or "not recorded" for key in keys)
        means.insert(2, ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()))
        lead = Mean.of(ahead)
        interval = "" if math.isnan(lead.half) else f" ± {lead.half:.3f}"
        rows.append((words, str(len(ours)), *means, f"{lead.value:+.3f}{interval}"))
    titles = ("pool", "seeds", "`auto`", "best baseline", "which is (seeds)", "CMA-ES", "`auto` less that baseline")
    return _table(titles, rows)


def _mean_of(scores: Iterable[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{statistics.mean(known):.3f}" if known else "not run"


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "trials-frame": trials_frame,
    "documents-frame": documents_frame,
    "report-frame": report_frame,
    "defaults": defaults,
    "judged": judged,
    "memory": memory,
    "memory-short": memory_short,
    "method-list": method_list,
    "methods": method_pages,
    "real": real,
    "recipe": recipe,
    "strategies": strategy_pages,
}


def main() -> None:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} written anew")


if __name__ == "__main__":
    main()
