"""Where a command writes: tables or JSON to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import typer

from torch_otprune import errors

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["CODES", "Bars", "Screen", "screen"]

CODES: dict[type[errors.OTPruneError], int] = {
    errors.OTPruneError: 1,  # 2 is wrong usage, by custom
    errors.PolicyError: 3,
    errors.BudgetError: 4,
    errors.StructureError: 5,
    errors.CalibrationError: 6,
    errors.PlanError: 7,
    errors.RepairError: 8,
    errors.VerificationError: 9,
    errors.LoadError: 10,
    errors.TransportError: 11,
}
_WIDTH = 120  # characters where no terminal says otherwise


@contextmanager
def screen(*, json: bool) -> Iterator[Screen]:
    """Open standard output for one command, and turn our errors into three lines and a code.

    Whatever else prints meanwhile, such as the user's model, goes to standard error.

    Args:
        json: whether standard output is for JSON alone.

    Yields:
        where to write.

    Raises:
        Exit: with the code of the error.
    """
    try:
        out = sys.stdout
        with redirect_stdout(sys.stderr):
            yield Screen(out, json)
    except errors.OTPruneError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code_of(error)) from None


def code_of(error: errors.OTPruneError) -> int:
    """Look up the exit code of an error: that of its nearest class."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


@dataclass(frozen=True)
class Screen:
    """One command's output.

    Args:
        out: the real standard output.
        json: whether it is for JSON alone.
    """

    out: TextIO
    json: bool

    def data(self, text: str) -> None:
        """Print JSON, if it was asked for."""
        if self.json:
            typer.echo(text, file=self.out)

    def text(self, *lines: str) -> None:
        """Print plain lines, unless JSON was asked for."""
        if not self.json:
            typer.echo("\n".join(lines), file=self.out)

    def table(
        self, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
    ) -> None:
        """Print a table, unless JSON was asked for.

        Args:
            head: column names.
            rows: cells.
            numbers: columns that are aligned to the right.
        """
        if self.json:
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        _console(self.out).print(table)
        self.text("")

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Show progress on standard error while the block runs, if that is a terminal.

        Yields:
            what to tell.
        """
        from rich.progress import Progress

        console = _console(sys.stderr)
        quiet = not console.is_terminal  # a log needs no bars, and no line breaks in their place
        with Progress(console=console, transient=True, redirect_stdout=False, disable=quiet) as on:
            yield Bars(on)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else _WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


class Bars:
    """Progress bars, one per stage.

    Args:
        shown: where they are drawn.
    """

    def __init__(self, shown: Progress) -> None:
        self.shown = shown
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take notice of a stage's progress, as the pipeline tells it.

        Args:
            stage: what is being done.
            done: steps done.
            total: steps in all.
        """
        if stage not in self.tasks:
            self.tasks[stage] = self.shown.add_task(stage, total=total)
        self.shown.update(self.tasks[stage], completed=done, total=total)

    def each(self, stage: str, items: Sequence[Any], do: Callable[[Any], object]) -> None:
        """Do something with every item, and show how far that is.

        Args:
            stage: what is being done.
            items: what to do it with.
            do: the deed.
        """
        self(stage, 0, len(items))
        for i, item in enumerate(items):
            do(item)
            self(stage, i + 1, len(items))
