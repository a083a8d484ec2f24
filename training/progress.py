"""What a run shows while it works: a progress bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Epoch lines and a progress bar; silent unless `show` (true on the main process only)."""

    def __init__(self, title: str, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and sys.stderr.isatty()),
        )
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, total: int) -> None:
        """`step` of `total` optimizer steps are done."""
        self.bar.update(self.task, completed=step, total=total)

    def message(self, text: str) -> None:
        """A line of text above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def metrics(self, line: dict[str, Any], epochs: int) -> None:
        """The figures of an epoch."""
        head = f"epoch {line['epoch']}/{epochs}" if line["kind"] == "epoch" else "final"
        names = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy")
        self.message("  ".join([head] + [f"{name} {line[name]:.4f}" for name in names if name in line]))
