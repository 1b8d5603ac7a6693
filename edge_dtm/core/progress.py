"""Progress of long work: a bar with time left, one line when a stage is done, its seconds kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from edge_dtm.core.files import Advance, StageProgress


class Stages:
    """Runs named stages one after another on stderr; `seconds` holds what each took."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._describe: Callable[[str], None] = lambda text: None

    @contextmanager
    def __call__(self, title: str, total: int) -> Iterator[Advance]:
        start = time.perf_counter()
        with self._bars() as progress:
            task = progress.add_task(title, total=max(total, 1))
            self._describe = lambda text: progress.update(task, description=text)
            yield lambda amount: progress.advance(task, amount)
        seconds = time.perf_counter() - start
        self.seconds[title] = self.seconds.get(title, 0.0) + seconds
        self.note(f"{title}: {seconds:.1f} s")

    def describe(self, text: str) -> None:
        """Other words beside the bar of the stage that runs, such as how far a loss has come."""
        self._describe(text)

    @contextmanager
    def several(self) -> Iterator[StageProgress]:
        """For work that names its own stages."""
        with self._bars() as bars:

            def progress(stage: str, total: int) -> Advance:
                task = bars.add_task(stage, total=max(total, 1))
                return lambda amount: bars.advance(task, amount)

            yield progress

    def _bars(self) -> Progress:
        return Progress(
            "{task.description}",
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
        )

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
