"""Ray: cells in the processes of a cluster, or of one that is started on this machine.

Here: Cluster, LOCAL.
May import: ray (the extra normkit[ray]), only inside; study.processes.
Read next: processes.py, which says what an executor does.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType
from typing import Any

from normkit.study.processes import Failed, sentence

LOCAL = "local"
_SECONDS_TO_ANSWER = 5.0  # ray itself asks for two minutes, and then ends the process


class Cluster:
    """A Ray cluster for the length of a `with`; an `Executor` whose calls tell nothing before they are done.

    Its nodes need the same normkit and the same torch; a text goes to them with the cells.

    Args:
        address: "local" starts Ray on this machine and ends it with the `with`; "host:port" is a cluster
            that runs, "auto" the one that runs on this machine.

    Raises:
        ValueError: "ray: expected ..., ...": ray is not installed, or nothing answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("ray: expected Ray to be installed, it is not; pip install 'normkit[ray]'") from None
        self.address = address
        self._ray: Any = ray
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a study leaves the machine
        else:
            _expect_an_answer(address)
        options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **options,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "" if address == LOCAL else "; one that asks for a token needs RAY_AUTH_MODE=token here"
            raise ValueError(f"ray: expected a Ray cluster at {address!r}: {first}{hint}") from None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ray.shutdown()

    @property
    def cores(self) -> int:
        """Of all nodes together."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    @property
    def machine(self) -> dict[str, str | int]:
        """The cluster in words, for study.json; no host names."""
        nodes = sum(bool(node["Alive"]) for node in self._ray.nodes())
        return {"cpu": "", "cores": self.cores, "platform": f"Ray cluster of {nodes} node{'s' if nodes > 1 else ''}"}

    def put(self, value: Any) -> Any:
        """A reference that stands for the value among a task's arguments, sent to each node once."""
        return self._ray.put(value)

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
        """See `Executor`; each call has `threads` cores."""
        remote = self._ray.remote(num_cpus=threads, max_retries=0)(task)
        running: dict[Future[Any], tuple[int, Any]] = {}
        waiting = list(range(len(calls)))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index = waiting.pop(0)
                    reference = remote.remote(*calls[index])
                    running[reference.future()] = index, reference
                    started(index)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    yield running.pop(future)[0], future.result() if error is None else Failed(_why(error))
        finally:
            for _, reference in running.values():
                self._ray.cancel(reference, force=True)


def _why(error: BaseException) -> str:
    """What the task raised, of the error that its future raises."""
    return sentence(getattr(error, "cause", None) or error)


def _expect_an_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise ValueError(f"ray: expected {LOCAL!r}, 'auto' or 'host:port', got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"ray: expected a Ray cluster at {address!r}, nothing answers there: {error}") from None
