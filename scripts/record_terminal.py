"""Records what a command shows in a terminal as an SVG: `python -m scripts.record_terminal OUT.svg -- COMMAND ...`.

The command runs in a pseudo-terminal; what stands there at its end is drawn, so that of a live view its last frame is
left, as for whoever watched. Needs pyte (`pip install 'mergesearch[docs]'`), which knows what control codes do.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import itertools
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 80
# of the terminal; what scrolls out above is kept
HEIGHT = 50
HISTORY = 10_000
# of the picture: a longer output is shown by its head and its tail
MOST, TAIL = 46, 34
# on GitHub's light and dark ground alike
THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (240, 246, 252)],
)  # fmt: skip
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# pyte's names of the eight colours that rich calls otherwise
_NAMES = {"brown": "yellow", "brightbrown": "bright_yellow"}


def run(command: Sequence[str], width: int = WIDTH) -> tuple[bytes, int]:
    """What a command writes to a terminal of that width, control codes and all, and its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
    sizes = {"COLUMNS": str(width), "LINES": str(HEIGHT)}
    environment = {**os.environ, **sizes, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the last writer has gone
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    return bytes(written), process.wait()


def screen(written: bytes, width: int = WIDTH) -> list[Text]:
    """The lines that stand in the terminal, those that scrolled out of it first; none that are empty at the end."""
    import pyte

    terminal = pyte.HistoryScreen(width, HEIGHT, history=HISTORY, ratio=0.5)
    pyte.ByteStream(terminal).feed(written)
    rows = [*terminal.history.top, *(terminal.buffer[row] for row in range(HEIGHT))]
    lines = [_line(row, width) for row in rows]
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def _line(row: Any, width: int) -> Text:
    line = Text()
    # runs of one style: else every character becomes an element of the picture
    for style, cells in itertools.groupby((row[column] for column in range(width)), _style):
        line.append("".join(cell.data for cell in cells), style)
    line.rstrip()
    return line


def _style(cell: Any) -> Style:
    return Style(
        color=_colour(cell.fg),
        bgcolor=_colour(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        strike=cell.strikethrough,
        reverse=cell.reverse,
    )


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    return _NAMES.get(name) or re.sub("^bright", "bright_", name)


def shortened(lines: Sequence[Text], most: int = MOST, tail: int = TAIL) -> list[Text]:
    """The lines, or their head and their tail with a word of how many are left out between them."""
    if len(lines) <= most:
        return list(lines)
    left_out = len(lines) - (most - 1)
    gap = Text(f"… {left_out} more lines …", style="dim italic")
    return [*lines[: most - 1 - tail], gap, *lines[len(lines) - tail :]]


def svg(lines: Sequence[Text], title: str, width: int = WIDTH) -> str:
    """The lines as a picture of a terminal."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop", highlight=False)
    drawn = console.export_svg(title=title, theme=THEME, unique_id="terminal")
    # a picture in a page loads no fonts from elsewhere, and what the reader's terminal has will do
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL).replace("Fira Code, monospace", FONTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.record_terminal", description=__doc__)
    parser.add_argument("out", type=Path, help="the SVG")
    parser.add_argument("--title", help="above the picture; else the command")
    parser.add_argument("--prompt", help="a command line to show first, as it was typed; none where it is left out")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--most", type=int, default=MOST, help="lines of the picture")
    parser.add_argument("--tail", type=int, default=TAIL, help="of a longer output, the last lines that are shown")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    written, status = run(given.command, given.width)
    lines = shortened(screen(written, given.width), given.most, given.tail)
    if given.prompt:
        typed = Text.assemble(("$ ", "green"), (given.prompt, "bold"))
        lines = [*typed.wrap(Console(width=given.width), given.width), *lines]
    title = given.title or shlex.join(given.command)
    given.out.write_text(svg(lines, title, given.width), encoding="utf-8")
    print(f"{given.out}: {len(lines)} lines, exit status {status}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
