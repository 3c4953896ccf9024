"""The GPU benchmark without a GPU: what its cells must move, what its tables say, and that it refuses in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cells

    return gpu_cells


@pytest.fixture
def table(cells: ModuleType) -> ModuleType:
    import gpu_table

    return gpu_table


def test_bytes_are_what_must_move_once(cells: ModuleType) -> None:
    def moved(*arguments: Any, **more: Any) -> int:
        return cells.Cell(*arguments, **more).bytes

    assert moved("layer_norm", (4, 8), "float32", "forward") == 2 * 128  # x, out
    assert moved("rms_norm", (4, 8), "bfloat16", "backward") == 3 * 64  # dout, x, dx
    assert moved("add_rms_norm", (4, 8), "bfloat16", "forward") == 4 * 64  # x, residual, total, out
    assert moved("add_layer_norm", (4, 8), "float32", "forward+backward") == 8 * 128
    assert moved("batch_norm", (2, 3, 4, 4), "float32", "forward") == 3 * 384  # x twice, out
    assert moved("batch_norm", (2, 3, 4, 4), "float32", "backward") == 5 * 384  # x and dout twice, dx


def test_large_cells_have_every_size_and_at_least_2_to_the_25_elements(cells: ModuleType) -> None:
    large = list(cells.large())
    rows = [cell for cell in large if cell.norm in ("layer_norm", "rms_norm")]
    assert {cell.shape[-1] for cell in rows} == {64, 128, 256, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
    assert all(cell.shape[0] * cell.shape[1] >= 2**25 for cell in rows)
    assert len({cell.label for cell in large}) == len(large)


def record(cells: ModuleType, cell: Any, **time_us: float) -> dict[str, Any]:
    times = {name: {"median": time, "p10": time, "p90": time} for name, time in time_us.items()}
    return {**cell.record(), "wrong": {}, "absent": {}, "time_us": times}


def test_a_cell_at_the_copys_rate_has_fraction_1(cells: ModuleType, table: ModuleType) -> None:
    cell = cells.Cell("layer_norm", (65536, 1024), "bfloat16", "forward")
    assert table.fraction(record(cells, cell, normkit=100.0, copy=100.0)) == 1.0
    backward = cells.Cell("layer_norm", (65536, 1024), "bfloat16", "backward")
    assert table.fraction(record(cells, backward, normkit=300.0, copy=100.0)) == 0.5  # 150 would be the floor
    assert table.fraction(record(cells, cell, normkit=100.0)) is None


def test_goals_count_the_cells_that_pass_and_name_those_that_do_not(cells: ModuleType, table: ModuleType) -> None:
    fast = cells.Cell("layer_norm", (65536, 1024), "bfloat16", "forward")
    slow = cells.Cell("rms_norm", (65536, 1024), "bfloat16", "forward")
    added = cells.Cell("add_rms_norm", (65536, 1024), "bfloat16", "forward+backward")
    result = {
        "environment": dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "some"),
        "cells": [
            record(cells, fast, normkit=100.0, copy=95.0),
            record(cells, slow, normkit=100.0, copy=80.0),
            record(cells, added, normkit=100.0, torch=300.0, liger=140.0, copy=20.0),
            {**cells.Cell("rms_norm", (1024, 65536), "bfloat16", "forward").record(), "skipped": "no time"},
        ],
    }
    text = table.markdown(result)
    assert "| forward >= 0.90 of the copy rate, D from 1024 to 16384 | 1 of 2 | 0.95 | 0.80 |" in text
    assert "rms_norm 65536x1024 bfloat16 forward: 0.80" in text
    assert "| fused add forward+backward >= 1.3 x the fastest peer | 1 of 1 | 1.40 | 1.40 |" in text
    assert "| rows backward >= 0.85 of the copy rate | not measured |  |  |" in text
    assert "- 1 cells, rms_norm 1024x65536 bfloat16 forward to rms_norm 1024x65536 bfloat16 forward: no time" in text


def test_a_wrong_variant_is_told_and_has_no_time(cells: ModuleType, table: ModuleType) -> None:
    cell = cells.Cell("rms_norm", (65536, 1024), "bfloat16", "forward")
    wrong = {**record(cells, cell, normkit=100.0, copy=95.0), "wrong": {"liger": 3.0}}
    assert "| wrong |" in "\n".join(table.large_lines({"cells": [wrong]}, ("rms_norm",)))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "batch_norm"])
@pytest.mark.parametrize("task", ["forward", "backward", "forward+backward"])
def test_ours_and_torchs_pass_the_check_and_a_wrong_result_does_not(cells: ModuleType, norm: str, task: str) -> None:
    import gpu_variants

    shape = (4, 8, 3, 3) if norm == "batch_norm" else (4, 64)
    cell = cells.Cell(norm, shape, "float32", task)
    inputs = gpu_variants.Inputs(cell, "cpu", 0)
    exact = gpu_variants.reference(cell, inputs)
    for make in (gpu_variants.ours, gpu_variants.torchs):
        found = gpu_variants.task(cell, make(cell, inputs), inputs)(0)
        assert gpu_variants.error(cell, found, exact) < 1e-5
    first = gpu_variants.flat(found)[0].detach().clone()
    first[0] *= 1.01
    assert gpu_variants.error(cell, first, exact) > 1e-4
    first[0] = torch.nan
    assert gpu_variants.error(cell, first, exact) == float("inf")


def test_the_committed_table_is_what_the_committed_record_says(table: ModuleType) -> None:
    results = BENCHMARKS / "results"
    assert table.markdown(json.loads((results / "gpu.json").read_text())) == (results / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_with_a_sentence() -> None:
    ran = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.strip().endswith(
        "benchmarks/gpu.py: needs a CUDA device, torch finds none; run it on a machine with a GPU"
    )
