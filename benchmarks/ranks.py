"""What synchronised BatchNorm statistics cost on this machine's gloo ranks: benchmarks/results/ranks.json.

    python benchmarks/ranks.py [--ranks 2 4] [--seconds 3] [--patience 60] [--out benchmarks/results/ranks.json]

Here: the calls that are timed, the ranks (spawned processes, one thread each) that time them, and when. For every
number of channels C, float64 numbers as normkit.statistics sends them:

- gather:     one all-gather of 2 C + 1 numbers (count, mean, m2); nothing is done with them
- reduces:    two all-reduces, of C + 1 numbers and of C
- backward:   one all-reduce of 2 C numbers
- by gather, by reduces: the merged moments, with all arithmetic, as `statistics.over_ranks` takes them either way

and whole layers, forward and backward, SyncBatchNorm beside BatchNorm on the same local batch. In a round every variant
is called: a barrier, then calls back to back for 10 ms; its time is the slowest rank's. Rounds come in slices, of all
cells in turn. A slice counts where other processes took less than 0.15 cores meanwhile; the script goes on until every
cell has so many seconds of them, or for so many minutes, after which the quietest slices stand.
Read next: rank_model.py, which prints the file, fits a cost model to it and says what it would be on more ranks.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Any

import rank_model
import results
import timing
import torch
import torch.distributed as dist
from torch import Tensor

import normkit
from normkit import ranks, statistics
from normkit.statistics import Moments

CHANNELS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)  # the last is no layer's: it shows the crossing
SHAPES = ((32, 64), (16, 256, 14, 14), (8, 64, 56, 56))  # a rank's batch
CELLS: list[dict[str, Any]] = [{"kind": "collectives", "channels": channels} for channels in CHANNELS]
CELLS += [{"kind": "layer", "shape": shape} for shape in SHAPES]
BATCH_S = 10e-3  # calls back to back after a barrier
SLICE_S = 0.15  # and at least two rounds
QUIET_CPUS = 0.15  # cores taken by others; the system counts in hundredths of a second
ANSWER_S = 300.0
Calls = dict[str, Callable[[], object]]


# ------------------------------------------------------------------------------------------------ what is timed


def by_gather(own: Moments, group: ranks.ProcessGroup) -> Moments:
    """One all-gather of (count, mean, m2), merged by Chan's formula."""
    channels = own.mean.numel()
    count = torch.as_tensor(own.count, dtype=torch.float64).reshape(1)
    parts = ranks.gathered(torch.cat([count, own.mean, own.m2]), group)
    return statistics.pooled(parts[:, :1], parts[:, 1 : channels + 1], parts[:, channels + 1 :])


def by_reduces(own: Moments, group: ranks.ProcessGroup) -> Moments:
    """Two all-reduces: of count and sum, then of the squared deviations from the common mean."""
    count = torch.as_tensor(own.count, dtype=torch.float64).reshape(1)
    sums = ranks.summed(torch.cat([count, count * own.mean]), group)
    mean = sums[1:] / sums[0].clamp(min=1)
    return Moments(sums[0], mean, ranks.summed(own.m2 + count * (own.mean - mean) ** 2, group))


def collectives(channels: int) -> Calls:
    group = ranks.world()
    gathered, first, second, back = (
        torch.randn(size, dtype=torch.float64) for size in (2 * channels + 1, channels + 1, channels, 2 * channels)
    )
    mean, m2 = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64)
    own = Moments(100 + dist.get_rank(), mean, m2)
    for merge in (by_gather, by_reduces):  # what is timed is what the layers do
        torch.testing.assert_close(vars(merge(own, group)), vars(statistics.over_ranks(own, group)))

    def reduces() -> None:
        ranks.summed(first, group)
        ranks.summed(second, group)

    return {
        "gather": lambda: ranks.gathered(gathered, group),
        "reduces": reduces,
        "backward": lambda: ranks.summed(back, group),
        "by gather": lambda: by_gather(own, group),
        "by reduces": lambda: by_reduces(own, group),
    }


def layers(shape: Sequence[int]) -> Calls:
    """Forward and backward of both layers on the same batch."""
    x = torch.randn(shape, requires_grad=True)
    dout = torch.randn(shape)

    def task(layer: torch.nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        inputs = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), inputs, dout)

    plain = normkit.BatchNorm1d if len(shape) == 2 else normkit.BatchNorm2d
    return {"BatchNorm": task(plain(shape[1])), "SyncBatchNorm": task(normkit.SyncBatchNorm(shape[1]))}


# ---------------------------------------------------------------------------------------------------- on a rank


def batch_s(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call on this rank, of `repeats` back to back after a barrier."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def busy_s() -> float:
    """Processor seconds that all processes of the machine have taken, and that a hypervisor took from it."""
    user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


class Cell:
    """A cell's calls, ready on this rank."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.calls = layers(asked["shape"]) if asked["kind"] == "layer" else collectives(asked["channels"])
        probes = [[batch_s(call, 3) for call in self.calls.values()] for _ in range(5)]
        once = torch.tensor(probes, dtype=torch.float64).amin(0)
        dist.all_reduce(once, op=dist.ReduceOp.MAX)  # every rank must make as many calls
        self.repeats = {
            name: max(1, round(BATCH_S / each)) for name, each in zip(self.calls, once.tolist(), strict=True)
        }
        round_s = sum(each * repeats for each, repeats in zip(once.tolist(), self.repeats.values(), strict=True))
        self.rounds = max(2, round(SLICE_S / round_s))

    def slice(self) -> dict[str, Any]:
        """Seconds of a call in every round; wall and processor seconds, this rank's and everyone's."""
        samples: dict[str, list[float]] = {name: [] for name in self.calls}
        wall, own, busy = time.perf_counter(), time.process_time(), busy_s()
        for _ in range(self.rounds):
            for name, call in self.calls.items():
                samples[name].append(batch_s(call, self.repeats[name]))
        spent = {"wall": time.perf_counter() - wall, "own": time.process_time() - own, "busy": busy_s() - busy}
        return {"samples": samples, **spent}


def serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    """Take new cells, and numbers of cells of which a slice is wanted, from the pipe until None comes."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    gc.disable()
    cells: list[Cell] = []
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, dict):
            cells.append(Cell(asked))
            gc.collect()
            pipe.send(cells[-1].repeats)
        else:
            pipe.send(cells[asked].slice())
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ around the ranks


@dataclass
class Slice:
    """Some rounds: the slowest rank's seconds of a call by variant, and how many cores others took meanwhile."""

    samples: dict[str, list[float]]
    wall_s: float
    others_cpus: float


class Team:
    """Spawned ranks that measure together; one that dies or hangs ends the measurement with an error."""

    def __init__(self, world: int) -> None:
        self.world, self.folder = world, tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            own, theirs = context.Pipe()
            given = (rank, world, str(Path(self.folder.name) / "meeting"), theirs)
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(own)
            self.processes.append(process)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            for pipe in self.pipes:
                pipe.send(None)
        for process in self.processes:
            process.join(10 if error is None else 0)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()

    def all(self, asked: dict[str, Any] | int) -> list[Any]:
        """Every rank's answer."""
        for pipe in self.pipes:
            pipe.send(asked)
        return [self._answer(rank) for rank in range(self.world)]

    def slice(self, number: int) -> Slice:
        found = self.all(number)
        samples = {
            name: [max(times) for times in zip(*(one["samples"][name] for one in found), strict=True)]
            for name in found[0]["samples"]
        }
        others = (found[0]["busy"] - sum(one["own"] for one in found)) / found[0]["wall"]
        return Slice(samples, found[0]["wall"], others)

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(ANSWER_S):
            raise TimeoutError(f"rank {rank} did not answer within {ANSWER_S:.0f} s")
        try:
            return self.pipes[rank].recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} ended without an answer; its error stands above") from None


@dataclass
class Point:
    """A cell on one team, and what was measured of it so far."""

    cell: dict[str, Any]
    team: Team
    number: int  # of the cell among the team's
    repeats: dict[str, int]
    slices: list[Slice] = field(default_factory=list)

    def quiet_s(self) -> float:
        return sum(one.wall_s for one in self.slices if one.others_cpus < QUIET_CPUS)

    def record(self, seconds: float) -> dict[str, Any]:
        """The times over all quiet slices or, where they are fewer than `seconds`, over the quietest."""
        kept: list[Slice] = []
        for one in sorted(self.slices, key=lambda one: one.others_cpus):
            if one.others_cpus < QUIET_CPUS or sum(other.wall_s for other in kept) < seconds:
                kept.append(one)
        times = {
            name: asdict(summary([value for one in kept for value in one.samples[name]], repeats))
            for name, repeats in self.repeats.items()
        }
        wall = sum(one.wall_s for one in kept)
        others = sum(one.wall_s * one.others_cpus for one in kept) / wall
        said = {"seconds": round(wall, 1), "others_cpus": round(others, 2)}
        return {"ranks": self.team.world, **self.cell, "time_us": times, **said}


def summary(values: Sequence[float], repeats: int) -> timing.Timing:
    """Median and deciles of the rounds, in microseconds."""
    times_us = [value * 1e6 for value in values]
    deciles = quantiles(times_us, n=10, method="inclusive")
    found = (round(value, 1) for value in (median(times_us), deciles[0], deciles[-1]))
    return timing.Timing(*found, calls=len(values) * repeats)


def wait_until_quiet(end: float) -> None:
    """Return when others leave the processors alone, or at `end`."""
    while time.perf_counter() < end:
        start, busy = time.perf_counter(), busy_s()
        time.sleep(0.1)
        if (busy_s() - busy) / (time.perf_counter() - start) < QUIET_CPUS:
            return


def measure(points: list[Point], seconds: float, patience_s: float, save: Callable[[], None]) -> None:
    """Slices of the points in turn while the machine is quiet, until each has `seconds` of quiet ones.

    After `patience_s`, and one slice each, what there is must do. Saved every minute.
    """
    end, saved = time.perf_counter() + patience_s, time.perf_counter()
    while True:
        point = min(points, key=lambda point: (bool(point.slices), point.quiet_s()))
        if point.slices and (point.quiet_s() >= seconds or time.perf_counter() > end):
            return
        point.slices.append(point.team.slice(point.number))
        if all(point.slices for point in points) and time.perf_counter() > saved + 60:
            save()
            saved = time.perf_counter()
        if point.slices[-1].others_cpus >= QUIET_CPUS:
            wait_until_quiet(end)


def environment() -> dict[str, Any]:
    """As in the other files; threads are a rank's."""
    return {**results.environment(), "threads": 1, "backend": "gloo", "quiet_cpus": QUIET_CPUS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="of quiet measuring for each cell")
    parser.add_argument("--patience", type=float, default=60.0, help="minutes to wait for them in all")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "ranks.json")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        teams = [stack.enter_context(Team(world)) for world in arguments.ranks]
        points = [Point(cell, team, number, team.all(cell)[0]) for team in teams for number, cell in enumerate(CELLS)]

        def save() -> None:
            cells = [point.record(arguments.seconds) for point in points]
            results.write(arguments.out, {"environment": environment(), "cells": cells})

        measure(points, arguments.seconds, arguments.patience * 60, save)
        save()
    print("\n".join(rank_model.measured(results.read(arguments.out)["cells"])))
    print(f"{arguments.out} written")


if __name__ == "__main__":
    main()
