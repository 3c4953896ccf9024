"""Which tiles the long rows of a CUDA device should have: times those that could be, for `kernels/launch.py` to choose.

    python benchmarks/gpu_tiles.py                      # every size: minutes; results/gpu_tiles.json and a table
    python benchmarks/gpu_tiles.py --sizes 65536        # one size; the rows of the others stay in the file
    python benchmarks/gpu_tiles.py --out FILE           # elsewhere

Of each choice the whole call is timed, backward with its sums of parameters' gradients, in turn with a copy of x, on
inputs that rotate past the cache. Processes beside each other compile first. Rows that are in the file for the same
size, dtype, norm and task are replaced; others, of sizes and of channels, stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gpu
import results
import torch
from gpu_variants import reason

from normkit.kernels import launch
from normkit.kernels.launch import RowTile

SIZES = (16384, 32768, 65536)
ELEMENTS = 1 << 26  # of x
TASKS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """Rows of one kind, all of whose tiles are compared."""

    size: int
    dtype: str
    centered: bool
    task: str

    @property
    def label(self) -> str:
        return f"{'layer' if self.centered else 'rms'}_norm {self.size} {self.dtype} {self.task}"


@dataclass(frozen=True)
class Choice:
    """A tile of the case's kernel; `columns` is the second one's, where backward goes by rows and then by columns."""

    tile: RowTile
    columns: RowTile | None = None

    @property
    def label(self) -> str:
        said = f"{self.tile.block} x {self.tile.warps} warps, {self.tile.stages} stages"
        if self.columns is not None:
            said += f"; columns {self.columns.block} x {self.columns.warps}, {self.columns.programs} programs"
        return said


def cases(sizes: tuple[int, ...]) -> list[Case]:
    dtypes = ("bfloat16", "float32")
    return [Case(*each) for each in ((s, d, c, t) for s in sizes for d in dtypes for c in (True, False) for t in TASKS)]


def choices(case: Case, multiprocessors: int) -> list[Choice]:
    """What is tried of a case, the choice of `launch` first."""
    itemsize = getattr(torch, case.dtype).itemsize
    found = [Choice(RowTile(1, bytes_ // itemsize, 16, n, 1)) for bytes_ in (8192, 16384) for n in (1, 3, 4, 6)]
    now = (launch.rows_forward if case.task == "forward" else launch.rows_backward)(case.size, itemsize, case.centered)
    if case.task == "backward":
        columns = launch.long_columns(case.size, multiprocessors)
        if case.size * (2 if case.centered else 1) > 32768:
            found = []  # the sums would spill
        for means in (RowTile(1, 4096, 16, 1), RowTile(1, 8192, 32, 1), RowTile(1, 4096, 8, 1)):
            for warps, block, share in ((4, 1024, 1), (4, 1024, 2), (8, 2048, 1)):
                programs = max(1, share * columns.programs * 1024 // block)
                found.append(Choice(means, RowTile(1, block, warps, 3, programs)))
        chosen = Choice(now, None if now.programs else columns)
    else:
        chosen = Choice(now)
    return [chosen, *(choice for choice in found if choice != chosen)]


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """Launches are planned with the choice, whatever their size."""
    from normkit.kernels import triton_rows

    replaced = {"rows_forward": choice.tile, "rows_backward": choice.tile, "long_columns": choice.columns}
    with mock.patch.multiple(launch, **{name: (lambda *_, tile=tile: tile) for name, tile in replaced.items()}):
        triton_rows.forget_plans()
        yield
    triton_rows.forget_plans()


def launches(case: Case, choice: Choice, x: torch.Tensor, dout: torch.Tensor) -> Callable[[], None]:
    """The launches that the choice makes of a call, again and again, without the host's work before them."""
    from normkit.kernels import triton_rows
    from normkit.kernels.triton_run import Launcher

    weight = torch.ones(case.size, dtype=x.dtype, device=x.device)
    statistics = torch.ones(x.shape[0], device=x.device)
    mean, bias = (statistics, weight) if case.centered else (None, None)
    launched: list[tuple[Any, ...]] = []
    launch_one = Launcher.launch

    def kept(launcher: Launcher, *arguments: Any) -> None:
        launched.append((launcher, *arguments))
        launch_one(launcher, *arguments)

    with chosen(choice), mock.patch.object(Launcher, "launch", kept):
        if case.task == "forward":
            triton_rows.rows_forward(x, None, weight, bias, 1e-5, case.centered, 0.0)
        else:
            needs = (True, True, case.centered)
            triton_rows.rows_backward(dout, None, x, mean, statistics, weight, 0.0, needs)

    def again() -> None:
        for each in launched:
            launch_one(*each)

    return again


def measured(
    case: Case, rows: int, multiprocessors: int, times: int = 2, device: str = "cuda", clock: Any = torch.cuda
) -> list[dict[str, Any]]:
    """Records of all choices of a case, fastest first; `us` is missing where a choice fails, and `failed` says why."""
    dtype = getattr(torch, case.dtype)
    inputs = [tuple(torch.randn(rows, case.size, device=device).to(dtype) for _ in range(2)) for _ in range(times)]
    calls: dict[str, Callable[[int], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for choice in choices(case, multiprocessors):
        record = {**asdict(case), "elements": rows * case.size, **asdict(choice.tile)}
        if choice.columns is not None:
            record["columns"] = asdict(choice.columns)
        records[choice.label] = record
        try:
            each = [launches(case, choice, x, dout) for x, dout in inputs]
        except Exception as error:  # the others are worth having
            record["failed"] = reason(error)
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
    return sorted(records.values(), key=lambda record: record.get("us", float("inf")))


def replaced(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result with these rows in the place of those of the same cases."""
    keys = ("size", "dtype", "centered", "task")
    new = {tuple(row[key] for key in keys) for row in rows}
    old = [row for row in result.get("rows", []) if tuple(row[key] for key in keys) not in new]
    return {**result, "rows": old + rows}


def line(record: dict[str, Any]) -> str:
    tile = RowTile(**{key: record[key] for key in asdict(RowTile(1, 1, 1))})
    choice = Choice(tile, RowTile(**record["columns"]) if "columns" in record else None)
    if "us" not in record:
        return f"  {choice.label}: {record['failed']}"
    least = 2 if record["task"] == "forward" else 3  # passes through memory, of which the copy makes two
    return f"  {choice.label}: {record['us']} us, {least / 2 * record['copy_us'] / record['us']:.2f} of the copy's rate"


def compile_first(arguments: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "--sizes", *map(str, arguments.sizes)]
    parts = [
        subprocess.Popen([*command, "--part", f"{i}/{arguments.jobs}"], stdout=subprocess.DEVNULL)
        for i in range(arguments.jobs)
    ]
    for part in parts:
        part.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=results.RESULTS / "gpu_tiles.json")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile before the run; 0: none")
    parser.add_argument("--part", default="", help="i/n: call the choices of every n-th case from the i-th on, once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_tiles.py: needs a CUDA device, torch finds none; run it on a machine with a GPU")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen_cases = cases(tuple(arguments.sizes))
    if arguments.part:
        first, step = map(int, arguments.part.split("/"))
        for case in chosen_cases[first::step]:
            x = torch.zeros(4, case.size, device="cuda", dtype=getattr(torch, case.dtype))
            for choice in choices(case, multiprocessors):
                try:
                    launches(case, choice, x, x)
                except Exception as error:  # the run itself will say it
                    print(reason(error))
        return
    if arguments.jobs:
        compile_first(arguments)
    rows: list[dict[str, Any]] = []
    for case in chosen_cases:
        found = measured(case, ELEMENTS // case.size, multiprocessors)
        rows += found
        print("\n".join([case.label, *map(line, found)]), flush=True)
        torch.cuda.empty_cache()
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        environment = {key: value for key, value in gpu.environment().items() if key not in ("rounds", "calls")}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_name(arguments.out.name + ".partial")
        partial.write_text(json.dumps({**replaced(result, rows), "long_rows": environment}) + "\n")
        partial.replace(arguments.out)


if __name__ == "__main__":
    main()
