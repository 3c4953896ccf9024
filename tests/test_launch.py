"""How Triton kernels are launched, without a GPU: the choices of launch.py, and what a Launcher compiles and reuses."""

from __future__ import annotations

import importlib.util
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normkit.kernels import launch
from normkit.kernels.launch import RowTile

SIZES = (1, 37, 64, 128, 256, 768, 1000, 1024, 4096, 8192, 16384, 16385, 32768, 65536, 1 << 20)
ITEMSIZES = (2, 4, 8)
every_size = pytest.mark.parametrize("size", SIZES)


@every_size
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("choose", [launch.rows_forward, launch.rows_backward])
def test_a_row_tile_is_whole_rows_or_blocks_of_one(choose: Any, itemsize: int, centered: bool, size: int) -> None:
    tile = choose(size, itemsize, centered)
    for number in (tile.rows, tile.block, tile.warps):
        assert number == launch.power_of_two(number)
    assert tile.warps <= 32
    if tile.block < size:
        assert tile.rows == 1
        assert tile.stages >= 1  # loops over blocks take it
    else:
        assert tile.block < 2 * size
        assert tile.rows * tile.block <= 16384  # beyond, registers spill (test_triton_offline.py)


@every_size
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024, 227 * 1024])
def test_stages_fit_the_shared_memory_of_every_device(shared_bytes: int, itemsize: int, size: int) -> None:
    for tensors in (2, 3):
        tile = launch.fitting(launch.rows_backward(size, itemsize, True), tensors, itemsize, shared_bytes)
        if tile.block >= size and tile.stages > 1:
            assert (tile.stages - 1) * tensors * tile.rows * tile.block * itemsize <= shared_bytes
        assert tile.stages >= 1


def test_programs_are_no_more_than_tiles_and_than_the_device_holds() -> None:
    assert launch.programs(7, 132, RowTile(1, 64, 4)) == 7
    assert launch.programs(7, 132, RowTile(1, 64, 4, stages=2, programs=2)) == 7
    assert launch.programs(10_000, 132, RowTile(1, 64, 4, stages=2, programs=2)) == 264


@pytest.mark.parametrize("space", [1, 2, 7, 49, 64, 196, 784, 3136, 12544, 50176])
def test_blocks_of_positions_waste_little(space: int) -> None:
    block = launch.position_block(space)
    covered = -(-space // block) * block
    assert block <= 64 or 1 - space / covered <= 0.15


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("itemsize", ITEMSIZES)
@pytest.mark.parametrize(("channels", "space"), [(1, 1), (3, 50176), (64, 3136), (512, 49), (2048, 1)])
def test_channel_tiles_are_powers_of_two(channels: int, space: int, itemsize: int, channels_last: bool) -> None:
    for choose in (launch.affine, launch.reduction):
        tile = choose(channels, space, channels_last, itemsize)
        for number in (tile.block_c, tile.block_s, tile.warps):
            assert number == launch.power_of_two(number)
        assert tile.block_c * tile.block_s <= 4096


def test_short_lines_of_many_channels_and_samples_go_by_planes() -> None:
    assert launch.planes(256, 512, 49, 4)
    assert launch.planes(256, 512, 49, 2)
    assert launch.planes(64, 512, 49, 4)
    assert not launch.planes(64, 512, 49, 2)  # the planes' sums would be much beside what is summed
    assert not launch.planes(256, 512, 64, 4)  # lines begin at 16 bytes
    assert not launch.planes(256, 511, 49, 4)  # rows would not
    assert not launch.planes(256, 64, 49, 4)
    assert not launch.planes(256, 64, 3135, 4)
    assert not launch.planes(256, 8192, 1, 4)  # already are


def test_what_is_written_of_planes_is_little_beside_them() -> None:
    for batch, itemsize in ((64, 4), (128, 2), (256, 4), (1000, 2)):
        assert 48 * launch.plane_blocks(batch, itemsize) <= 0.2 * batch * itemsize


def test_all_programs_of_a_reduction_are_there_at_once() -> None:
    for itemsize in ITEMSIZES:
        for tile in (launch.reduction(256, 3136, False, itemsize), launch.reduction(512, 12544, True, itemsize)):
            assert tile.registers * tile.warps * 32 * tile.programs <= 65536
            assert tile.stages == 4
    for itemsize in (2, 4):
        short = launch.reduction(512, 49, False, itemsize)
        assert short.block_c * short.block_s == 1024
        assert short.stages == (4 if itemsize == 2 else 1)  # nothing is copied ahead 4 bytes at a time


def test_parts_that_one_program_would_read_too_long_are_merged_first() -> None:
    assert not launch.merged_first(33, 1, 64)  # (256, 64, 56, 56) on 132 multiprocessors
    assert not launch.merged_first(9, 1, 256)
    assert launch.merged_first(66, 1, 512)  # (256, 512, 7, 7) in channels-last
    assert launch.merged_first(1, 49, 512)


@pytest.mark.parametrize(
    ("grid", "blocks", "programs"), [(1, 1, 528), (16, 1024, 528), (64, 448, 528), (1000, 7, 528), (3, 100, 12)]
)
def test_splits_share_blocks_that_exist(grid: int, blocks: int, programs: int) -> None:
    splits = launch.splits(grid, blocks, programs)
    assert 1 <= splits <= blocks
    assert splits == 1 or grid * splits <= programs
    block_p, block_c = launch.merging(splits)
    assert block_p * block_c >= 512


# ---------------------------------------------------------------------------------------------- the launcher


class _Compiled:
    function, packed_metadata = 0, 0

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class _Kernel:
    """Counts what triton would have to look up or compile."""

    fn = SimpleNamespace(__name__="some_kernel")

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.compiled: list[_Compiled] = []
        self.seconds = seconds

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **options: int) -> _Compiled:
            time.sleep(self.seconds)
            self.calls.append(arguments)
            self.compiled.append(_Compiled())
            return self.compiled[-1]

        return call


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from normkit.kernels import triton_run

    silent = SimpleNamespace(calls=[])
    for name, value in {"_REUSES": True, "_enter": silent, "_leave": silent, "INTERPRETED": False}.items():
        monkeypatch.setattr(triton_run, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return triton_run


def test_other_numbers_of_rows_reuse_what_was_compiled(run: Any) -> None:
    kernel = _Kernel()
    launcher = run.Launcher(kernel, (1e-5, 64), 4)
    x = torch.zeros(64)
    for rows in (37, 41, 1000003):
        launcher.launch(0, (rows,), (x, None), (rows, 64))
    assert len(kernel.calls) == 1
    assert [run_[0] for run_ in kernel.compiled[0].runs] == [41, 1000003]
    # x, y, z, stream, function, metadata, three for hooks; pointers, numbers, constants
    assert kernel.compiled[0].runs[0][9:] == (x.data_ptr(), None, 41, 64, 1e-5, 64)


def test_what_triton_specializes_on_is_compiled_apart(run: Any) -> None:
    kernel = _Kernel()
    launcher = run.Launcher(kernel, (), 4)
    x = torch.zeros(64)
    apart = [
        ((x,), (37,)),
        ((x,), (1,)),
        ((x,), (48,)),
        ((x,), (2**31 + 1,)),
        ((x[1:],), (37,)),  # its address is no multiple of 16
        ((x.to(torch.bfloat16),), (37,)),
        ((None,), (37,)),
    ]
    for pointers, numbers in apart * 2:
        launcher.launch(0, (1,), pointers, numbers)
    assert len(kernel.calls) == len(apart)
    assert [len(compiled.runs) for compiled in kernel.compiled] == [1] * len(apart)


def test_a_profilers_hook_sees_every_launch(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    launcher = run.Launcher(kernel, (), 4)
    monkeypatch.setattr(run, "_enter", SimpleNamespace(calls=[print]))
    for _ in range(3):
        launcher.launch(0, (1,), (torch.zeros(4),), ())
    assert len(kernel.calls) == 3


def test_the_time_of_compiling_is_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="normkit"):
        launcher = run.Launcher(_Kernel(seconds=0.1), (), 4)
        launcher.launch(0, (1,), (torch.zeros(4),), ())
        launcher.launch(0, (1,), (torch.zeros(4),), ())
    assert [record.message for record in caplog.records] == ["compiled some_kernel in 0.1 s; later calls reuse it"]


def test_kinds_of_numbers_do_not_pile_up(run: Any) -> None:
    launcher = run.Launcher(_Kernel(), (), 4)
    for step in range(1, 10_000):  # a momentum of 1 / step
        launcher.launch(0, (1,), (), (1 / step,))
    assert len(launcher._kinds) <= 4097
    assert len(launcher._compiled) == 1
