"""Run the placement study's cells and keep every record the moment it is there.

Here: run_cells, Watcher (what a display may follow).
May import: torch, study.{data, grid, processes, records, train}.
Read next: processes.py, where cells run; progress.py, which shows what a Watcher is told.
"""

from __future__ import annotations

import time

import torch

from normkit.study import train
from normkit.study.data import Corpus, guess_loss, spaced_batches
from normkit.study.grid import Cell
from normkit.study.processes import Executor, Failed, Tell
from normkit.study.records import Record, RecordStore, new_record
from normkit.study.train import VALIDATION_BATCHES

_SECONDS_BETWEEN_STEPS = 0.1  # a progress display needs no more, and the pipe stays out of the measurements


class Watcher:
    """Is told what happens; a display overrides what it shows."""

    def timing(self, done: int, total: int) -> None:
        """The serial timing pass has done this many of its rounds; at first 0 of an unknown number."""

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        """These cells will run, in this order; their time per step by configuration."""

    def started(self, cell: Cell) -> None:
        """A worker has taken the cell."""

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        """The cell has done this many steps; not every step is told, and none on Ray."""

    def finished(self, cell: Cell, record: Record) -> None:
        """The cell's record is on the disk."""


def run_cells(
    executor: Executor,
    cells: list[Cell],
    corpus: Corpus,
    store: RecordStore,
    *,
    jobs: int,
    threads: int,
    watcher: Watcher,
) -> None:
    """Run the cells that the store does not hold, `jobs` at a time in processes of `threads` threads each.

    First one worker, alone on the machine, measures the seconds per step of every configuration; then the deepest
    cells start first, so that no long one is left for the end. A worker that dies makes its cell "failed"; a cell
    that failed in an earlier run is run again. Whatever ends this function, an interrupt too, ends the workers, and
    the store keeps what was done.
    """
    pending = sorted((cell for cell in cells if store.done(cell.key) is None), key=lambda cell: -cell.depth)
    if not pending:
        return
    text = executor.put(corpus)
    configurations = list(dict.fromkeys(cell.configuration for cell in pending))
    watcher.timing(0, 1)
    ((_, times),) = executor.results(
        _time, [(text, configurations, threads)], jobs=1, threads=threads, told=lambda _, round: watcher.timing(*round)
    )
    seconds_per_step = dict.fromkeys(configurations)
    if not isinstance(times, Failed):
        seconds_per_step = dict(zip(configurations, times, strict=True))
    watcher.planned(pending, seconds_per_step)
    done = executor.results(
        _train,
        [(text, cell, seconds_per_step[cell.configuration], threads) for cell in pending],
        jobs=jobs,
        threads=threads,
        started=lambda index: watcher.started(pending[index]),
        told=lambda index, step: watcher.stepped(pending[index], *step),
    )
    for index, found in done:
        cell = pending[index]
        record = _failed(threads, cell, corpus, found.reason) if isinstance(found, Failed) else found
        watcher.finished(cell, store.add(record))


def _nobody(message: object) -> None:
    pass


def _time(corpus: Corpus, cells: list[Cell], threads: int, tell: Tell = _nobody) -> list[float]:
    """Seconds per step of each cell; tells (rounds done, rounds)."""
    torch.set_num_threads(threads)
    return train.time_steps(cells, corpus, lambda done, total: tell((done, total)))


def _train(corpus: Corpus, cell: Cell, seconds_per_step: float | None, threads: int, tell: Tell = _nobody) -> Record:
    """The cell's record; tells (step, loss) now and then."""
    torch.set_num_threads(threads)
    told = 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _SECONDS_BETWEEN_STEPS:
            tell((step, loss))
            told = now

    return train.run_cell(cell, corpus, seconds_per_step, on_step)


def _failed(threads: int, cell: Cell, corpus: Corpus, reason: str) -> Record:
    scored = spaced_batches(corpus.held_out, cell.batch, cell.seq, VALIDATION_BATCHES)
    record = new_record(cell, guess_loss(corpus.train, scored), None)
    return record | {"status": "failed", "reason": reason, "threads": threads}
