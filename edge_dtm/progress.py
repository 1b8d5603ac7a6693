"""Progress of long work: a bar with time left, one line when a stage is done, its seconds kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]


class Stages:
    """Runs named stages one after another on stderr; `seconds` holds what each took."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, title: str, total: int) -> Iterator[Advance]:
        start = time.perf_counter()
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
        )
        with progress:
            task = progress.add_task(title, total=max(total, 1))
            yield lambda amount: progress.advance(task, amount)
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
        self.note(f"{title}: {time.perf_counter() - start:.1f} s")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
