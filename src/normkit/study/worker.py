"""The child's side of the study: a process that runs one cell after another as its parent asks.

Here: main, the entry point of a worker process, and the messages that go over its pipe; time_here and run_here, the
    same work as single tasks.
May import: torch, study.{data, grid, records, train}.
Read next: run.py, the parent's side.

Messages to a worker are ("time", cells) and ("run", cell, seconds_per_step); what comes back is ("round", done, total)
and ("times", seconds) for the first, ("step", step, loss) and ("done", record) for the second, and ("failed",
sentence) instead of the last one for either when it raised. A worker ends when its pipe closes: a parent that was
killed leaves no orphans behind.
"""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from normkit.study import train
from normkit.study.data import Corpus
from normkit.study.grid import Cell
from normkit.study.records import Record

_SECONDS_BETWEEN_STEPS = 0.1  # a progress display needs no more, and the pipe stays out of the measurements


def main(connection: Connection, corpus: Corpus, threads: int) -> None:
    """Serve until the pipe closes. SIGINT stays blocked, as inherited: Ctrl-C is for the parent to handle."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    torch.set_num_threads(threads)
    try:
        while True:
            message = connection.recv()
            try:
                connection.send(_answer(connection, corpus, message))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # whatever a cell raises is its own failure, not the study's
                connection.send(("failed", sentence(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(connection: Connection, corpus: Corpus, message: tuple[Any, ...]) -> tuple[Any, ...]:
    if message[0] == "time":
        return "times", train.time_steps(
            message[1], corpus, lambda done, total: connection.send(("round", done, total))
        )
    _, cell, seconds_per_step = message
    last_sent = 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal last_sent
        now = time.monotonic()
        if now - last_sent >= _SECONDS_BETWEEN_STEPS:
            connection.send(("step", step, loss))
            last_sent = now

    return "done", train.run_cell(cell, corpus, seconds_per_step, on_step)


def time_here(corpus: Corpus, cells: list[Cell], threads: int) -> list[float]:
    """Seconds per step of each cell."""
    torch.set_num_threads(threads)
    return train.time_steps(cells, corpus, lambda done, total: None)


def run_here(corpus: Corpus, cell: Cell, seconds_per_step: float | None, threads: int) -> Record:
    """The cell's record."""
    torch.set_num_threads(threads)
    return train.run_cell(cell, corpus, seconds_per_step)


def sentence(error: BaseException) -> str:
    """What a record gives as the reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
