"""Runs a function on several gloo ranks, each a process of its own, within bounded time.

Here: on_ranks, and RankFailed, which carries what a rank raised.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds for all ranks together, on a busy machine
TIMEOUT = datetime.timedelta(seconds=20)  # of one collective


class RankFailed(Exception):
    """What a rank raised, as text."""


def _rank(function: Callable[..., Any], rank: int, world: int, meeting: str, arguments: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world, timeout=TIMEOUT
        )
        result = function(rank, *arguments)
        pipe.send((True, result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:  # whatever it is: the parent tells
        pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


def outcomes(function: Callable[..., Any], world: int, *arguments: Any) -> list[tuple[bool, Any]]:
    """For each rank (True, what it returned) or (False, (type, message, traceback)). Tensors travel as numpy arrays."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            given = (function, rank, world, str(Path(folder) / "meeting"), arguments, sender)
            process = context.Process(target=_rank, args=given, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _answer(pipe: Any, rank: int) -> tuple[bool, Any]:
    if not pipe.poll(PATIENCE):
        raise RankFailed(f"rank {rank} did not answer within {PATIENCE} s")
    try:
        answer: tuple[bool, Any] = pipe.recv()
    except EOFError:
        return False, ("EOFError", "the process ended without an answer", "")
    return answer


def on_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank; RankFailed with the traceback if one raised."""
    found = outcomes(function, world, *arguments)
    for rank, (fine, value) in enumerate(found):
        if not fine:
            raise RankFailed(f"rank {rank}: {value[2]}")
    return [value for _, value in found]


def arrays(values: Sequence[torch.Tensor | None]) -> list[Any]:
    """Tensors as numpy arrays, to be sent; None stays."""
    return [None if value is None else value.detach().numpy() for value in values]
