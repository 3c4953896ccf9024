"""What choosing tiles on a CUDA device needs, whatever the kernels: cases, choices, their times, a file that grows.

Here: `Case` and `Choice`, which the two scripts subclass, `measured`, and `main`, which they end with.
Read next: gpu_tiles.py, long rows; gpu_channel_tiles.py, reductions over channels.

Of each choice all that it launches is timed, in turn with a copy of x, on inputs that rotate past the cache. Processes
beside each other compile first. Records that are in the file for the same cases are replaced, others stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import gpu
import results
import torch
from gpu_variants import reason
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What might be launched. A subclass adds tiles, and knows how they are chosen for a time."""

    @property
    def label(self) -> str:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What is kept of it, beside what is kept of the case."""
        raise NotImplementedError

    def chosen(self) -> AbstractContextManager[None]:
        """Launches are planned with the choice, whatever their size."""
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    """Calls of one kind, all of whose choices are compared. A subclass adds what tells it from others."""

    dtype: str

    @property
    def label(self) -> str:
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """How many times the least that a call does goes through memory of x's size; the copy makes two."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        raise NotImplementedError

    def laid(self, x: Tensor) -> Tensor:
        """x in the case's memory format."""
        return x

    def choices(self, multiprocessors: int) -> Sequence[Choice]:
        """What is tried, that of `kernels/launch.py` first."""
        raise NotImplementedError

    def call(self, x: Tensor, dout: Tensor) -> object:
        raise NotImplementedError


def launches(case: Case, choice: Choice, x: Tensor, dout: Tensor) -> Callable[[], None]:
    """The launches that the choice makes of a call, again and again, without the host's work before them."""
    from normkit.kernels.triton_run import Launcher

    launched: list[tuple[Any, ...]] = []
    launch_one = Launcher.launch

    def kept(launcher: Launcher, *arguments: Any) -> None:
        launched.append((launcher, *arguments))
        launch_one(launcher, *arguments)

    with choice.chosen(), mock.patch.object(Launcher, "launch", kept):
        case.call(x, dout)

    def again() -> None:
        for each in launched:
            launch_one(*each)

    return again


def measured(
    case: Case, multiprocessors: int, cache_bytes: int, device: str = "cuda", clock: Any = torch.cuda
) -> list[dict[str, Any]]:
    """Records of all choices of a case, fastest first; `us` is missing where a choice fails, and `failed` says why."""
    dtype = getattr(torch, case.dtype)
    times = max(2, 1 + -(-2 * cache_bytes // (prod(case.shape) * dtype.itemsize)))  # in turn, past the cache
    inputs = [[case.laid(torch.randn(case.shape, device=device).to(dtype)) for _ in range(2)] for _ in range(times)]
    calls: dict[str, Callable[[int], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for choice in case.choices(multiprocessors):
        records[choice.label] = {**asdict(case), "elements": inputs[0][0].numel(), **choice.record()}
        try:
            each = [launches(case, choice, x, dout) for x, dout in inputs]
        except Exception as error:  # the others are worth having
            records[choice.label]["failed"] = reason(error)
            continue
        calls[choice.label] = lambda i, each=each: each[i % len(each)]()
    target = torch.empty_like(inputs[0][0])
    calls["copy"] = lambda i: target.copy_(inputs[i % len(inputs)][0])
    found, late = gpu.device_times(calls, clock)
    copy = found.pop("copy")["median"]
    for label, timing in found.items():
        records[label].update(us=round(timing["median"], 1), copy_us=round(copy, 1))
        if label in late:
            records[label]["late"] = late[label]
    for label, record in records.items():
        print(f"  {line(label, record, case.passes)}", flush=True)
    return sorted(records.values(), key=lambda record: record.get("us", float("inf")))


def line(label: str, record: dict[str, Any], passes: int) -> str:
    if "us" not in record:
        return f"{label}: {record['failed']}"
    return f"{label}: {record['us']} us, {passes / 2 * record['copy_us'] / record['us']:.2f} of the copy's rate"


def replaced(result: dict[str, Any], under: str, records: list[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """The result with these records, listed `under` a name, in the place of those of the same cases."""

    def of(record: dict[str, Any]) -> str:
        return json.dumps([record.get(key) for key in keys])

    new = {of(record) for record in records}
    old = [record for record in result.get(under, []) if of(record) not in new]
    return {**result, under: old + records}


def main(script: str, said: str, under: str, cases: Sequence[Case]) -> None:
    """The command line of a script: its cases into the list `under` that name in the result file."""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "gpu_tiles.json")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile before the run; 0: none")
    parser.add_argument("--part", default="", help="i/n: call the choices of every n-th case from the i-th on, once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks/{script}: needs a CUDA device, torch finds none; run it on a machine with a GPU")
    device = torch.cuda.get_device_properties(0)
    cases = [case for case in cases if arguments.only in case.label]
    if arguments.part:
        compile_part(cases, arguments.part, device.multi_processor_count)
        return
    command = [sys.executable, str(Path(__file__).with_name(script)), "--only", arguments.only, "--part"]
    parts = [
        subprocess.Popen([*command, f"{i}/{arguments.jobs}"], stdout=subprocess.DEVNULL) for i in range(arguments.jobs)
    ]
    for part in parts:
        if part.wait():
            print(f"a process that compiles ended with {part.returncode}; its kernels are compiled later", flush=True)
    records: list[dict[str, Any]] = []
    for case in cases:
        print(case.label)
        records += measured(case, device.multi_processor_count, device.L2_cache_size)
        torch.cuda.empty_cache()
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        result = replaced(result, under, records, list(asdict(case)))
        result[f"{under}_environment"] = {k: v for k, v in gpu.environment().items() if k not in ("rounds", "calls")}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_name(arguments.out.name + ".partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.replace(arguments.out)


def compile_part(cases: Sequence[Case], part: str, multiprocessors: int) -> None:
    """Compiles for every n-th case from the i-th on, `part` being "i/n", by one call of each choice."""
    first, step = map(int, part.split("/"))
    for case in cases[first::step]:
        dtype = getattr(torch, case.dtype)
        x = case.laid(torch.zeros(case.shape, device="cuda", dtype=dtype))
        for choice in case.choices(multiprocessors):
            try:
                launches(case, choice, x, x)
            except Exception as error:  # the run itself will say it
                print(reason(error))
