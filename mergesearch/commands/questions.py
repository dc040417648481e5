"""Questions on a terminal, each asked again until its answer can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.prompt import Confirm, Prompt
from rich.text import Text

from mergesearch.errors import UserError

Answer = TypeVar("Answer")


class Questions:
    """Asks on a console; `KeyboardInterrupt` and `EOFError` end it wherever it is."""

    def __init__(self, console: Console):
        self.console: Console = console

    def say(self, text: str, style: str = "") -> None:
        """What the next question is about, or what is wrong with the last answer."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def text(self, question: str, check: Callable[[str], Answer], proposed: str = "") -> Answer:
        """What `check` makes of the answer; an empty one is the proposal.

        Args:
            check: raises `UserError` for an answer that will not do; that is said, and the question asked again.
        """
        while True:
            answer = Prompt.ask(
                Text(question), console=self.console, default=proposed, show_default=bool(proposed)
            ).strip()
            try:
                return check(answer)
            except UserError as error:
                self.say(str(error), "red")

    def one_of(self, question: str, choices: Sequence[str]) -> str:
        """One of several names."""
        return Prompt.ask(Text(question), console=self.console, choices=list(choices))

    def yes(self, question: str) -> bool:
        """Yes or no; an empty answer is yes."""
        return Confirm.ask(Text(question), console=self.console, default=True)
