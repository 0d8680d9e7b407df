"""A bar of the bytes that a conversion has written; nothing where no terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from colm_serve.convert.tensor_file import Report


@contextmanager
def byte_bar(console: Console, text: str) -> Iterator[Report]:
    """Show a bar while the block runs; what it yields moves the bar."""
    bar = Progress(
        TextColumn(text),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(text, total=None)

    def report(num_written: int, num_total: int) -> None:
        bar.update(task, completed=num_written, total=num_total)

    with bar:
        yield report
