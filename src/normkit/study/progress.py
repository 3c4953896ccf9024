"""A study's progress: bars on a terminal, lines in a log.

Here: watcher, say.
May import: rich, study.{clock, grid, plan, records, run}.
Read next: run.py, whose Watcher is told what happens.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from normkit.study.clock import TimeLeft
from normkit.study.grid import Cell
from normkit.study.plan import Study
from normkit.study.records import Record
from normkit.study.run import Watcher


def say(console: Console, line: str) -> None:
    """As it is, however wide the terminal."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _outcome(record: Record) -> str:
    """What a finished cell's line says."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    loss = "no loss" if record["val_loss"] is None else f"loss {record['val_loss']:.3f}"
    return f"{record['status']}, {loss} (guessing {record['guess_loss']:.3f}), {record['seconds']:.1f} s"


def watcher(console: Console, study: Study) -> _Lines | _Bars:
    return _Bars(console, study) if console.is_terminal and not console.is_dumb_terminal else _Lines(console, study)


class _Lines(Watcher, AbstractContextManager[Watcher]):
    """Progress as plain lines, for logs: one for each finished cell, and now and then one in between."""

    def __init__(self, console: Console, study: Study) -> None:
        self._console, self._study = console, study
        self._time_left = TimeLeft([], {}, 1)
        self._said = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        pass

    def timing(self, done: int, total: int) -> None:
        if done == 0:
            self._say("Measuring seconds per step, one configuration at a time ...")

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        self._time_left = TimeLeft(cells, seconds_per_step, self._study.settings.jobs)
        self._say(f"Training; about {self._time_left} left")

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        self._time_left.at(cell, step)
        if time.monotonic() - self._said > 30:
            self._say(f"  {cell.label}: step {step} of {cell.steps}, loss {loss:.3f}; {self._time_left} left")

    def finished(self, cell: Cell, record: Record) -> None:
        self._time_left.at(cell, cell.steps)
        count = f"[{self._study.done}/{len(self._study.cells)}]"
        self._say(f"{count} {cell.label}: {_outcome(record)}; {self._time_left} left")

    def _say(self, line: str) -> None:
        say(self._console, line)
        self._said = time.monotonic()


class _Bars(Watcher, AbstractContextManager[Watcher]):
    """Progress on a terminal: a bar for the study, one for each running cell, a line for each that is done."""

    def __init__(self, console: Console, study: Study) -> None:
        self._console, self._study = console, study
        self._time_left = TimeLeft([], {}, 1)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._all = self._progress.add_task("starting", total=1, unit="rounds", note="")
        self._bars: dict[Cell, TaskID] = {}

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def timing(self, done: int, total: int) -> None:
        self._progress.update(
            self._all, completed=done, total=total, description="seconds per step", note="one configuration at a time"
        )

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        self._time_left = TimeLeft(cells, seconds_per_step, self._study.settings.jobs)
        self._progress.reset(self._all, description="study", total=len(self._study.cells), unit="cells", note="")
        self._show_total()

    def started(self, cell: Cell) -> None:
        self._bars[cell] = self._progress.add_task(f"  {cell.label}", total=cell.steps, unit="steps", note="")

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        self._time_left.at(cell, step)
        self._progress.update(self._bars[cell], completed=step, note=f"loss {loss:.3f}")
        self._show_total()

    def finished(self, cell: Cell, record: Record) -> None:
        self._time_left.at(cell, cell.steps)
        self._progress.remove_task(self._bars.pop(cell))
        say(self._console, f"{cell.label}: {_outcome(record)}")
        self._show_total()

    def _show_total(self) -> None:
        self._progress.update(self._all, completed=self._study.done, note=f"{self._time_left} left")
