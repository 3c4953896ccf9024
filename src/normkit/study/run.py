"""Run cells in local worker processes and keep every record the moment it is there.

Here: run_cells, run_cells_on (a Ray cluster), Watcher (what a display may follow), default_jobs, machine.
May import: study.{cluster, data, grid, records, train, worker}.
Read next: worker.py, the other end of the pipes; cli.py, which shows what a Watcher is told.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

from normkit.study import worker
from normkit.study.cluster import Cluster, why
from normkit.study.data import Corpus, guess_loss, spaced_batches
from normkit.study.grid import Cell
from normkit.study.records import Record, RecordStore, new_record
from normkit.study.train import VALIDATION_BATCHES


class Watcher:
    """Is told what happens; a display overrides what it shows."""

    def timing(self, done: int, total: int) -> None:
        """The serial timing pass has done this many of its rounds."""

    def planned(self, cells: list[Cell], seconds_per_step: dict[Cell, float | None]) -> None:
        """These cells will run, in this order; their time per step by configuration."""

    def started(self, cell: Cell) -> None:
        """A worker has taken the cell."""

    def stepped(self, cell: Cell, step: int, loss: float) -> None:
        """The cell has done this many steps; not every step is told."""

    def finished(self, cell: Cell, record: Record) -> None:
        """The cell's record is on the disk."""


def run_cells(
    cells: list[Cell], corpus: Corpus, store: RecordStore, *, jobs: int, threads: int, watcher: Watcher
) -> None:
    """Run the cells that the store does not hold, `jobs` at a time in processes of `threads` threads each.

    First one worker, alone on the machine, measures the seconds per step of every configuration; then the deepest
    cells start first, so that no long one is left for the end. A worker that dies makes its cell "failed"; a cell
    that failed in an earlier run is run again. Whatever ends this function, an interrupt too, ends the workers, and
    the store keeps what was done.
    """
    pending = sorted((cell for cell in cells if store.done(cell.key) is None), key=lambda cell: -cell.depth)
    pool: list[_Worker] = []
    try:
        if not pending:
            return
        pool.append(_Worker(corpus, threads))
        seconds_per_step = _time(pool[0], pending, watcher)
        watcher.planned(pending, seconds_per_step)
        while pending or any(one.cell is not None for one in pool):
            pool[:] = [one for one in pool if one.cell is not None or one.process.is_alive()]
            while pending and len(pool) < jobs:
                pool.append(_Worker(corpus, threads))
            for idle in pool:
                if idle.cell is None and pending:
                    idle.cell = pending.pop(0)
                    idle.send(("run", idle.cell, seconds_per_step[idle.cell.configuration]))
                    watcher.started(idle.cell)
            for one, message in _wait([one for one in pool if one.cell is not None]):
                _handle(one, message, corpus, store, watcher)
    finally:
        for one in pool:
            one.process.kill()  # idle, or its work is abandoned; it holds nothing that needs closing
        for one in pool:
            one.process.join()
            one.connection.close()


def run_cells_on(
    cluster: Cluster,
    cells: list[Cell],
    corpus: Corpus,
    store: RecordStore,
    *,
    jobs: int,
    threads: int,
    watcher: Watcher,
) -> None:
    """`run_cells` on a Ray cluster; a running cell tells nothing before it is done.

    The seconds per step are measured by one task before all others; on another kind of node they would be others.
    """
    pending = sorted((cell for cell in cells if store.done(cell.key) is None), key=lambda cell: -cell.depth)
    if not pending:
        return
    text = cluster.put(corpus)
    configurations = list(dict.fromkeys(cell.configuration for cell in pending))
    watcher.timing(1, 1)
    _, timed = next(cluster.results(worker.time_here, [(text, configurations, threads)], jobs=1, threads=threads))
    times = [None] * len(configurations) if timed.exception() is not None else timed.result()
    seconds_per_step = dict(zip(configurations, times, strict=True))
    watcher.planned(pending, seconds_per_step)
    calls = [(text, cell, seconds_per_step[cell.configuration], threads) for cell in pending]
    done = cluster.results(
        worker.run_here, calls, jobs=jobs, threads=threads, started=lambda index: watcher.started(pending[index])
    )
    for index, future in done:
        cell, error = pending[index], future.exception()
        record = future.result() if error is None else _failed(threads, cell, corpus, worker.sentence(why(error)))
        watcher.finished(cell, store.add(record))


def default_jobs(threads: int) -> int:
    """As many workers of `threads` threads as this process has cores."""
    return max(1, cores() // threads)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """The machine in words, for study.json; no host name and no paths."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {"cpu": cpu, "cores": cores(), "platform": f"{platform.system()} {platform.machine()}"}


@dataclass(frozen=True)
class _Died:
    """Stands for the message of a worker that is gone."""

    sentence: str


class _Worker:
    """A worker process, its pipe, and the cell it works on."""

    def __init__(self, corpus: Corpus, threads: int) -> None:
        # spawn, never fork: torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.threads = threads
        self.cell: Cell | None = None
        self.process: SpawnProcess = context.Process(target=worker.main, args=(theirs, corpus, threads), daemon=True)
        with _interrupts_held():
            self.process.start()
        theirs.close()  # ours must be the only other end: the pipe breaks when either process goes

    def send(self, message: tuple[Any, ...]) -> None:
        with suppress(OSError):  # it died; the wait for its answer finds that out
            self.connection.send(message)

    def receive(self) -> tuple[Any, ...] | _Died:
        try:
            message: tuple[Any, ...] = self.connection.recv()
            return message
        except (EOFError, OSError):
            self.process.join()
            return _Died(_death(self.process.exitcode))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while a worker starts; it inherits that, and a Ctrl-C reaches the parent alone."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would start with the worker, and let go of the held signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _time(alone: _Worker, cells: list[Cell], watcher: Watcher) -> dict[Cell, float | None]:
    """Seconds per step by configuration; None for all if that cannot be measured."""
    configurations = list(dict.fromkeys(cell.configuration for cell in cells))
    alone.send(("time", configurations))
    while True:
        message = alone.receive()
        if isinstance(message, _Died) or message[0] == "failed":
            return dict.fromkeys(configurations)
        if message[0] == "times":
            return dict(zip(configurations, message[1], strict=True))
        watcher.timing(message[1], message[2])


def _wait(busy: list[_Worker]) -> Iterator[tuple[_Worker, tuple[Any, ...] | _Died]]:
    """One message of each worker that has any; a dead worker's pipe is ready, too."""
    by_connection = {one.connection: one for one in busy}
    for ready in connection.wait(list(by_connection)):
        one = by_connection[ready]  # type: ignore[index]
        yield one, one.receive()


def _handle(
    one: _Worker, message: tuple[Any, ...] | _Died, corpus: Corpus, store: RecordStore, watcher: Watcher
) -> None:
    cell = one.cell
    assert cell is not None
    if not isinstance(message, _Died) and message[0] == "step":
        watcher.stepped(cell, message[1], message[2])
        return
    if isinstance(message, _Died):
        record = _failed(one.threads, cell, corpus, message.sentence)
    else:
        record = message[1] if message[0] == "done" else _failed(one.threads, cell, corpus, message[1])
    one.cell = None
    watcher.finished(cell, store.add(record))


def _failed(threads: int, cell: Cell, corpus: Corpus, sentence: str) -> Record:
    scored = spaced_batches(corpus.held_out, cell.batch, cell.seq, VALIDATION_BATCHES)
    record = new_record(cell, guess_loss(corpus.train, scored), None)
    return record | {"status": "failed", "reason": sentence, "threads": threads}


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        hint = "; too little memory is the usual cause" if name == "SIGKILL" else ""
        return f"The worker process was killed by {name}{hint}."
    return f"The worker process ended by itself with exit code {exitcode}."
