"""The GPU benchmark without a GPU: what its cells must move, its protocol on a stand-in clock, what its tables say.

Read next: benchmarks/gpu.py and its README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "batch_norm")
TASKS = ("forward", "backward", "forward+backward")


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cells

    return gpu_cells


@pytest.fixture
def table(cells: ModuleType) -> ModuleType:
    import gpu_table

    return gpu_table


@pytest.fixture
def variants(cells: ModuleType) -> ModuleType:
    import gpu_variants

    return gpu_variants


@pytest.fixture
def gpu(cells: ModuleType) -> ModuleType:
    import gpu as script

    return script


class Clock:
    """A stand-in for torch.cuda: a device whose time passes when it is told to, in order of the queue."""

    def __init__(self, begins_early: bool = False) -> None:
        self.now_ms, self.begins_early = 0.0, begins_early

    def Event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                self.at_ms = clock.now_ms

            def query(self) -> bool:
                return clock.begins_early

            def elapsed_time(self, end: Any) -> float:
                return float(end.at_ms - self.at_ms)

        assert enable_timing
        return Event()

    def _sleep(self, cycles: int) -> None:
        self.now_ms += 1000.0

    def synchronize(self) -> None:
        pass

    def taking(self, us: float) -> Callable[[int], None]:
        def call(i: int) -> None:
            self.now_ms += us / 1e3

        return call


# --- cells


def test_bytes_are_what_must_move_once(cells: ModuleType) -> None:
    def moved(*arguments: Any, **more: Any) -> int:
        return int(cells.Cell(*arguments, **more).bytes)

    assert moved("layer_norm", (4, 8), "float32", "forward") == 2 * 128  # x, out
    assert moved("rms_norm", (4, 8), "bfloat16", "backward") == 3 * 64  # dout, x, dx
    assert moved("add_rms_norm", (4, 8), "bfloat16", "forward") == 4 * 64  # x, residual, total, out
    assert moved("add_rms_norm", (4, 8), "bfloat16", "backward") == 4 * 64  # dout, dtotal, total, dx
    assert moved("add_layer_norm", (4, 8), "float32", "forward+backward") == 8 * 128
    assert moved("batch_norm", (2, 3, 4, 4), "float32", "forward") == 3 * 384  # x twice, out
    assert moved("batch_norm", (2, 3, 4, 4), "float32", "backward") == 5 * 384  # x and dout twice, dx


def test_large_cells_have_every_size_and_at_least_2_to_the_25_elements(cells: ModuleType) -> None:
    for dtype in ("bfloat16", "float32"):
        large = list(cells.large(dtype))
        rows = [cell for cell in large if cell.norm in ("layer_norm", "rms_norm")]
        assert {cell.shape[-1] for cell in rows} == {64, 128, 256, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
        assert all(cell.shape[0] * cell.shape[1] >= 2**25 for cell in rows)


def test_no_cell_is_measured_twice_and_each_belongs_to_one_goal_at_most(cells: ModuleType, table: ModuleType) -> None:
    grid = cells.grid()
    assert len({(cell.kind, cell.label) for cell in grid}) == len(grid)
    of_goals = [[goal.name for goal in table.GOALS if goal.applies(cell)] for cell in grid]
    assert max(map(len, of_goals)) == 1
    assert {name for names in of_goals for name in names} == {goal.name for goal in table.GOALS}


def test_the_quick_run_has_cells_of_every_goal(cells: ModuleType, table: ModuleType) -> None:
    quick = cells.grid(quick=True)
    assert len(quick) < 60
    assert all(any(goal.applies(cell) for cell in quick) for goal in table.GOALS)


def test_kinds_and_text_choose_cells(cells: ModuleType) -> None:
    assert {cell.kind for cell in cells.grid(("small", "ladder"))} == {"small", "ladder"}
    assert [cell.shape for cell in cells.grid(text="add_rms_norm 65536x1024 float32 backward")] == [(65536, 1024)]


# --- protocol


def test_device_times_are_those_between_the_events_without_the_wait(gpu: ModuleType) -> None:
    clock = Clock()
    times, late = gpu.device_times({"slow": clock.taking(300.0), "fast": clock.taking(100.0)}, clock)
    assert times["slow"] == pytest.approx({"median": 300.0, "p10": 300.0, "p90": 300.0})
    assert times["fast"]["median"] == pytest.approx(100.0)
    assert late == {}


def test_a_device_that_began_before_the_calls_were_queued_is_told(gpu: ModuleType) -> None:
    clock = Clock(begins_early=True)
    assert gpu.device_times({"late": clock.taking(1.0)}, clock)[1] == {"late": gpu.ROUNDS}


def test_variants_are_called_in_turn_on_inputs_that_rotate(gpu: ModuleType) -> None:
    called: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: called.append((name, i)) for name in ("a", "b")}
    gpu.device_times(calls, Clock())
    assert [name for name, _ in called[: 2 * gpu.CALLS]] == ["a"] * gpu.CALLS + ["b"] * gpu.CALLS
    assert [i for _, i in called] == list(range(1, 2 * gpu.CALLS * gpu.ROUNDS + 1))


def test_timing_is_the_median_with_deciles(gpu: ModuleType) -> None:
    assert gpu.timing([float(i) for i in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


def test_inputs_exceed_twice_the_cache(cells: ModuleType, variants: ModuleType) -> None:
    cell = cells.Cell("rms_norm", (16, 64), "float32", "forward")  # 4096 bytes
    inputs = variants.Inputs(cell, "cpu", 10_000)
    assert len(inputs.x) * cell.x_bytes > 2 * 10_000
    assert inputs.of(0)[0] is not inputs.of(1)[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("task", TASKS)
def test_ours_and_torchs_pass_the_check_and_a_wrong_result_does_not(
    cells: ModuleType, variants: ModuleType, norm: str, task: str
) -> None:
    cell = cells.Cell(norm, (4, 8, 3, 3) if norm == "batch_norm" else (4, 64), "float32", task)
    inputs = variants.Inputs(cell, "cpu", 0)
    exact = variants.reference(cell, inputs)
    for make in (variants.ours, variants.torchs):
        found = variants.flat(variants.task(cell, make(cell, inputs), inputs)(0))
        assert max(variants.errors(found, exact)) < 1e-5
    for i, part in enumerate(found):
        wrong = part.detach().clone()
        wrong.view(-1)[wrong.abs().argmax()] *= 1.01
        off = variants.errors([*found[:i], wrong, *found[i + 1 :]], exact)
        assert off[part.dim() == 1] > 1e-4
        assert off[part.dim() > 1] < 1e-5
        wrong.view(-1)[-1] = torch.nan
        assert variants.errors([*found[:i], wrong, *found[i + 1 :]], exact)[part.dim() == 1] == float("inf")


def test_a_large_cell_is_measured_whole_with_the_peers_absence_explained(
    cells: ModuleType, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    cell = cells.Cell("rms_norm", (16, 256), "bfloat16", "backward")
    found = gpu.measure(cell, 0, compiled=False, device="cpu", clock=Clock())
    assert set(found["time_us"]) == {"normkit", "torch", "copy"}
    assert set(found["first_call_s"]) == {"normkit", "torch"}
    assert found["absent"]["liger"].startswith("ModuleNotFoundError: ")
    assert found["absent"]["compile"] == "60 s of compiling were over"
    assert found["wrong"] == {}
    assert found["bytes"] == 3 * 16 * 256 * 2
    json.dumps(found, allow_nan=False)


def test_a_wrong_variant_is_not_timed_and_one_that_raises_leaves_the_others(
    cells: ModuleType, gpu: ModuleType, variants: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(x: Any, weight: Any) -> Any:
        raise RuntimeError("no such device\nand more")

    monkeypatch.setattr(variants, "torchs", lambda cell, inputs: lambda x, weight: x * torch.nan)
    monkeypatch.setattr(variants, "ours", lambda cell, inputs: raises)
    cell = cells.Cell("rms_norm", (4, 64), "float32", "forward")
    found = gpu.measure(cell, 0, device="cpu", clock=Clock())
    assert found["wrong"] == {"torch": "inf"}
    assert set(found["time_us"]) == {"copy"}
    assert found["absent"]["normkit"] == "RuntimeError: no such device"
    assert gpu.unfit(found) == "RuntimeError: no such device"


def test_torch_compile_compiles_for_every_size(
    cells: ModuleType, variants: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda norm, dynamic: compile_(norm, dynamic=dynamic, backend=counting))
    monkeypatch.setattr(cells, "COMPILED_SIZES", tuple(range(1, 12)))
    for size in cells.COMPILED_SIZES:  # more than dynamo compiles of one function before it gives up on it
        cell = cells.Cell("layer_norm", (4, size), "bfloat16", "forward")
        calls, _, _ = variants.variants(cell, variants.Inputs(cell, "cpu", 0))
        assert "compile" in calls
    assert len(graphs) == len(cells.COMPILED_SIZES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton backend takes CUDA tensors")
def test_a_forced_backend_that_refuses_leaves_the_other_calls(
    cells: ModuleType, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SMALL_CALLS", 2)
    cell = cells.Cell("layer_norm", (2, 64), "float32", "forward", kind="ladder")
    found = gpu.measure(cell, 0, device="cpu", clock=Clock())
    assert set(found["time_us"]) == {"torch"}
    assert "triton" in found["absent"]


def test_a_dry_cell_calls_everything_and_times_nothing(cells: ModuleType, gpu: ModuleType) -> None:
    cell = gpu.tiny(cells.Cell("batch_norm", (64, 8, 7, 7), "float32", "forward+backward", layout="channels-last"))
    found = gpu.measure(cell, 0, dry=True, device="cpu", clock=Clock())
    assert found["shape"] == [4, 8, 7, 7]
    assert set(found["error"]) == {"normkit", "torch"}
    assert "time_us" not in found


# --- tables


def record(cell: Any, **time_us: float) -> dict[str, Any]:
    times = {name: {"median": time, "p10": time, "p90": time} for name, time in time_us.items()}
    return {**cell.record(), "wrong": {}, "absent": {}, "first_call_s": {"normkit": 0.34}, "time_us": times}


def test_a_cell_at_the_copys_rate_has_fraction_1(cells: ModuleType, table: ModuleType) -> None:
    cell = cells.Cell("layer_norm", (65536, 1024), "bfloat16", "forward")
    assert table.fraction(record(cell, normkit=100.0, copy=100.0)) == 1.0
    backward = cells.Cell("layer_norm", (65536, 1024), "bfloat16", "backward")
    assert table.fraction(record(backward, normkit=300.0, copy=100.0)) == 0.5  # 150 would be the floor
    assert table.fraction(record(cell, normkit=100.0)) is None


def test_goals_count_the_cells_that_pass_and_name_those_that_do_not(cells: ModuleType, table: ModuleType) -> None:
    def rows(norm: str, task: str, size: int = 1024) -> Any:
        return cells.Cell(norm, (2**26 // size, size), "bfloat16", task)

    wrong = {**record(rows("rms_norm", "backward"), copy=95.0), "wrong": {"normkit": "inf"}}
    raising = {**record(rows("layer_norm", "backward"), copy=95.0), "absent": {"normkit": "RuntimeError: no"}}
    result = {
        "environment": dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "some"),
        "cells": [
            record(rows("layer_norm", "forward"), normkit=100.0, copy=95.0),
            record(rows("rms_norm", "forward"), normkit=100.0, copy=80.0),
            record(rows("add_rms_norm", "forward+backward"), normkit=100.0, torch=300.0, liger=140.0, copy=20.0),
            wrong,
            raising,
            {**record(rows("rms_norm", "forward", 64), normkit=1.0, copy=1.0), "late": {"torch": 3}},
            {**rows("rms_norm", "forward", 65536).record(), "skipped": "no time"},
            {**rows("rms_norm", "backward", 65536).record(), "failed": "OutOfMemoryError: "},
        ],
    }
    text = table.markdown(result)
    assert "| forward >= 0.90 of the copy rate, D from 1024 to 16384 | 1 of 2 |  | 0.88 | 0.80 |" in text
    assert "rms_norm 65536x1024 bfloat16 forward: 0.80" in text
    assert "| forward >= 0.80 of the copy rate at D = 256 and 65536 | not measured | 1 |  |  |" in text
    assert "| rows backward >= 0.85 of the copy rate | 0 of 2 | 1 |  |  |" in text
    assert "rms_norm 65536x1024 bfloat16 backward: wrong by inf" in text
    assert "layer_norm 65536x1024 bfloat16 backward: raises RuntimeError: no" in text
    assert "| fused add forward+backward >= 1.3 x the fastest peer | 1 of 1 |  | 1.40 | 1.40 |" in text
    assert "- 1 cells, rms_norm 1024x65536 bfloat16 forward to rms_norm 1024x65536 bfloat16 forward: no time" in text
    assert "- rms_norm 1048576x64 bfloat16 forward: torch 3 rounds" in text
    assert "| layer_norm | 65536x1024 | bfloat16 | forward | 95.0 | 100 | 0.95 |  |  |  |  | passed | 0.3 |" in text
    assert "| rms_norm | 65536x1024 | bfloat16 | forward | 80.0 | 100 | 0.80 |  |  |  |  | missed | 0.3 |" in text
    assert "| rms_norm | 65536x1024 | bfloat16 | backward |  | wrong |  |  |  |  |  | missed | 0.3 |" in text


def test_the_fastest_peer_counts_and_a_wrong_one_does_not(cells: ModuleType, table: ModuleType) -> None:
    cell = cells.Cell("rms_norm", (65536, 1024), "bfloat16", "forward")
    found = record(cell, normkit=100.0, torch=300.0, compile=120.0, liger=150.0, copy=95.0)
    assert table.speedup(found) == 1.2
    assert table.speedup(found, ("torch",)) == 3.0
    del found["time_us"]["compile"]
    found["wrong"] = {"compile": "3.0"}
    assert table.speedup(found) == 1.5
    assert "| wrong |" in "\n".join(table.large_lines({"cells": [found]}, ("rms_norm",)))


def test_the_committed_table_is_what_the_committed_record_says(table: ModuleType) -> None:
    result = BENCHMARKS / "results" / "gpu.json"
    if not result.exists():
        pytest.skip("no GPU result is committed")
    assert table.markdown(json.loads(result.read_text())) == result.with_suffix(".md").read_text()


# --- tiles


@pytest.fixture
def rows(cells: ModuleType) -> ModuleType:
    pytest.importorskip("triton")
    import gpu_tiles

    return gpu_tiles


@pytest.fixture
def tiles(rows: ModuleType) -> ModuleType:
    import tiles

    return tiles


def test_what_launch_chooses_is_compared_with_others(rows: ModuleType) -> None:
    from normkit.kernels import launch

    for case in rows.cases():
        found = case.choices(132)
        itemsize = getattr(torch, case.dtype).itemsize
        choose = launch.rows_forward if case.task == "forward" else launch.rows_backward
        assert found[0].tile == choose(case.size, itemsize, case.centered), case.label
        assert len(found) >= 8
        assert len({choice.label for choice in found}) == len(found), case.label
        for choice in found:
            by_columns = case.task == "backward" and not choice.tile.programs
            assert (choice.columns is not None) == by_columns, case.label


def test_reductions_are_compared_with_others_and_by_channels_where_they_go_by_planes(
    rows: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_channel_tiles

    from normkit.kernels import triton_channels
    from normkit.kernels.triton_run import Launcher

    launched: list[Launcher] = []
    monkeypatch.setattr(Launcher, "launch", lambda launcher, *_: launched.append(launcher))
    for case in gpu_channel_tiles.cases():
        found = case.choices(132)
        assert len({choice.label for choice in found}) == len(found), case.label
        small = case.space == 49 and not case.channels_last
        assert {choice.planes for choice in found} == ({True, False} if small else {False}), case.label
        x = case.laid(torch.empty(case.shape, device="meta", dtype=getattr(torch, case.dtype)))
        triton_channels.forget_plans()
        case.call(x, x)
        planned = launched[-2]
        with found[0].chosen():
            case.call(x, x)
        assert (launched[-2].constants, launched[-2].options) == (planned.constants, planned.options), case.label


def test_choices_are_timed_in_turn_and_those_that_fail_are_told(
    rows: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from normkit.kernels.triton_run import Launcher

    clock = Clock()

    def launched(launcher: Launcher, *_: Any) -> None:
        stages = launcher.constants[-1]
        if stages == 6:
            raise RuntimeError("out of resource: shared memory")
        clock.now_ms += stages * 1e-3

    monkeypatch.setattr(Launcher, "launch", launched)
    monkeypatch.setattr("normkit.kernels.triton_rows.shared_bytes", lambda _: 227 * 1024)
    case = rows.Case("float32", 32768, False, "forward")
    monkeypatch.setattr(rows, "ELEMENTS", 4 * 32768)
    records = tiles.measured(case, 132, 0, device="cpu", clock=clock)
    times = [record["us"] for record in records if "us" in record]
    assert times == sorted(times)
    assert times[0] == 1.0  # one stage
    failed = [record for record in records if "us" not in record]
    assert failed
    assert all(record["stages"] == 6 and "out of resource" in record["failed"] for record in failed)
    said = capsys.readouterr().out
    assert "of the copy's rate" in said
    assert "out of resource" in said


def test_rows_of_other_cases_stay_in_the_file(tiles: ModuleType) -> None:
    keys = {"size": 32768, "dtype": "float32", "centered": True, "task": "forward"}
    old = {"what": "kept", "rows": [{**keys, "us": 1.0}, {**keys, "size": 256, "us": 2.0}]}
    new = tiles.replaced(old, "rows", [{**keys, "us": 3.0}], list(keys))
    assert new["what"] == "kept"
    assert sorted(row["us"] for row in new["rows"]) == [2.0, 3.0]


@pytest.mark.parametrize("script", ["gpu.py", "gpu_tiles.py", "gpu_channel_tiles.py"])
def test_without_a_gpu_it_ends_with_a_sentence(script: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 1
    assert ran.stderr.strip().endswith(
        f"benchmarks/{script}: needs a CUDA device, torch finds none; run it on a machine with a GPU"
    )
