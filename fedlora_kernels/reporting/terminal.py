"""What a terminal shows: one console per stream, names made harmless, a progress bar where somebody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from fedlora_kernels.text import harmless

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

__all__ = ["ProgressBar", "console", "one_line", "show", "text"]

PIPE_WIDTH = 1000
"""Columns of a console that is no terminal: tables are never cut there."""


def one_line(message: str) -> str:
    """Return a message of several lines as one, harmless."""
    return harmless("; ".join(line.strip() for line in message.splitlines() if line.strip()))


def text(value: object, style: str = "") -> Text:
    """Return ``value`` as harmless text in which nothing is read as markup."""
    return Text(harmless(value), style=style)


def console(*, error: bool = False) -> Console:
    """Return a console on stdout, or on stderr; wide and uncoloured where the stream is no terminal."""
    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def show(renderable: RenderableType) -> None:
    """Print to stdout now. BrokenPipeError where nobody reads any more (rich itself would end the process)."""
    out = console()
    with out.capture() as captured:
        out.print(renderable)
    lines = captured.get().splitlines()
    sys.stdout.writelines(f"{line if sys.stdout.isatty() else line.rstrip()}\n" for line in lines)
    sys.stdout.flush()


class ProgressBar:
    """A bar on stderr if that is a terminal, else nothing. Call it with (stage, done, total), in bytes or in ``steps``.

    It shows how much is done of what, the rate of bytes, and the time left.
    """

    def __init__(self, *, quiet: bool, steps: bool = False) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if not quiet and sys.stderr.isatty():
            from rich import progress

            stage, left = (
                progress.TextColumn("{task.description:>8}"),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            amounts: list[ProgressColumn] = [progress.MofNCompleteColumn()]
            if not steps:
                amounts = [progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn()]
            columns = (stage, progress.BarColumn(), *amounts, left)
            self._bar = progress.Progress(*columns, console=console(error=True), transient=True)

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes or steps of ``stage`` are through."""
        if self._bar is None:
            return
        if stage not in self._tasks:
            # what an earlier run has done says nothing of the rate of this one
            self._tasks[stage] = self._bar.add_task(harmless(stage), total=total, completed=done)
        self._bar.update(self._tasks[stage], completed=done, total=total)
