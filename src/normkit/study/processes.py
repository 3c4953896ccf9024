"""Cells in processes of this machine; and what every executor of cells gives, cluster.py's Ray too.

Here: Executor, Failed, Processes, cores, sentence.
May import: the standard library.
Read next: run.py and studies/run.py, which hand over their cells; cluster.py, the other executor.

A worker gets (task, arguments, whether it may tell) over its pipe and answers ("told", anything) any number of times,
then ("done", result) or, when the task raised, ("failed", sentence). It ends when its pipe closes: a parent that was
killed leaves no orphans behind.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Protocol

Tell = Callable[[Any], None]


@dataclass(frozen=True)
class Failed:
    """Stands for the result of a call that raised, or whose process died."""

    reason: str


class Executor(Protocol):
    """Calls functions in other processes, for the length of a `with`."""

    @property
    def cores(self) -> int:
        """How many calls of one thread it can run at a time."""

    @property
    def machine(self) -> dict[str, str | int]:
        """Where they run, in words: cpu, cores, platform; no host names and no paths."""

    def put(self, value: Any) -> Any:
        """What stands for the value among a call's arguments, so that it travels once and not with every call."""

    def results(
        self,
        task: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        *,
        jobs: int,
        threads: int,
        started: Callable[[int], None] = ...,
        told: Callable[[int, Any], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """The calls' indices and results, or `Failed`, as they come; at most `jobs` at a time.

        With `told` the task is called with `tell=`, a function whose argument reaches `told` while the call runs; an
        executor may leave that out. A call whose process dies is not tried again. Whatever ends the loop, an interrupt
        too, ends the calls that run.
        """

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sentence(error: BaseException) -> str:
    """What a record gives as the reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class _Put:
    """Stands for a value that every worker got when it started."""

    index: int


class Processes:
    """Worker processes of this machine, started as they are needed; an `Executor`."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._pool: list[_Worker] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(self._pool)

    @property
    def cores(self) -> int:
        return cores()

    @property
    def machine(self) -> dict[str, str | int]:
        cpu = platform.processor() or platform.machine()
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
        except OSError:
            pass
        return {"cpu": cpu, "cores": cores(), "platform": f"{platform.system()} {platform.machine()}"}

    def put(self, value: Any) -> Any:
        self._end(self._pool)  # workers get the values as they start
        self._values.append(value)
        return _Put(len(self._values) - 1)

    def results(
        self,
        task: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        *,
        jobs: int,
        threads: int,
        started: Callable[[int], None] = lambda index: None,
        told: Callable[[int, Any], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """See `Executor`; the task sets its threads itself."""
        waiting = list(range(len(calls)))
        try:
            while waiting or self._busy():
                self._end([one for one in self._pool if one.call is None and not one.process.is_alive()])
                while len(self._pool) < min(jobs, len(self._busy()) + len(waiting)):
                    self._pool.append(_Worker(self._values))
                for idle in [one for one in self._pool if one.call is None][: jobs - len(self._busy())]:
                    if waiting:
                        idle.call = waiting.pop(0)
                        idle.send((task, calls[idle.call], told is not None))
                        started(idle.call)
                for one in connection.wait([one.connection for one in self._busy()]):
                    worker = next(each for each in self._pool if each.connection is one)
                    kind, answer = worker.receive()
                    index = worker.call
                    assert index is not None
                    if kind == "told":
                        assert told is not None
                        told(index, answer)
                        continue
                    worker.call = None
                    yield index, answer if kind == "done" else Failed(answer)
        finally:
            self._end(self._busy())

    def _busy(self) -> list[_Worker]:
        return [one for one in self._pool if one.call is not None]

    def _end(self, workers: Sequence[_Worker]) -> None:
        """Kill these workers of the pool and take them out of it."""
        for one in workers:
            one.process.kill()  # idle, or its work is abandoned; it holds nothing that needs closing
        for one in workers:
            one.process.join()
            one.connection.close()
        self._pool = [one for one in self._pool if one not in workers]


class _Worker:
    """A worker process, its pipe, and the index of the call it works on."""

    def __init__(self, values: Sequence[Any]) -> None:
        # spawn, never fork: torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.call: int | None = None
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, list(values)), daemon=True)
        with _interrupts_held():
            self.process.start()
        theirs.close()  # ours must be the only other end: the pipe breaks when either process goes

    def send(self, message: tuple[Any, ...]) -> None:
        with suppress(OSError):  # it died; the wait for its answer finds that out
            self.connection.send(message)

    def receive(self) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = self.connection.recv()
            return answer
        except (EOFError, OSError):
            self.process.join()
            return "failed", _death(self.process.exitcode)


def _serve(pipe: Connection, values: Sequence[Any]) -> None:
    """A worker's life. SIGINT stays blocked, as inherited: Ctrl-C is for the parent to handle."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task, arguments, may_tell = pipe.recv()
            resolved = [values[each.index] if isinstance(each, _Put) else each for each in arguments]
            more = {"tell": lambda message: pipe.send(("told", message))} if may_tell else {}
            try:
                answer = "done", task(*resolved, **more)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # whatever a cell raises is its own failure, not the study's
                answer = "failed", sentence(error)
            pipe.send(answer)


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


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        hint = "; too little memory is the usual cause" if name == "SIGKILL" else ""
        return f"The worker process was killed by {name}{hint}."
    return f"The worker process ended by itself with exit code {exitcode}."
