"""Every Triton kernel compiled for three architectures without a GPU: it compiles, loads 128 bits at once where memory
allows, spills no register, and fits in shared memory.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("needs triton, and not its interpreter", allow_module_level=True)

from normkit.kernels import triton_batch_norm, triton_channels, triton_rows
from triton_offline import compiled, launches

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a block, CUDA C++ programming guide, table 29
SIZES = (64, 768, 1024, 4096, 8192, 16384)
LONG = (16384, 32768, 65536)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
everywhere = pytest.mark.parametrize("capability", SHARED_BYTES)


def rows(
    size: int, dtype: torch.dtype, centered: bool, residual: bool = False, wider: bool = False
) -> Callable[[], None]:
    """Forward and backward of 64 rows."""

    def call() -> None:
        x = torch.empty((64, size), dtype=dtype)
        weight = torch.empty(size, dtype=F32 if wider else dtype)
        addend = torch.empty_like(x) if residual else None
        statistics = torch.empty(64, dtype=F64 if dtype == F64 else F32)
        mean = statistics if centered else None
        triton_rows.rows_forward(x, addend, weight, weight if centered else None, 1e-5, centered, 0.0)
        needs = (True, True, centered)
        triton_rows.rows_backward(x, addend, x, mean, statistics, weight, 0.0, needs)

    return call


def batch_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, masked: bool, apart: int = 0
) -> Callable[[], None]:
    """Training, evaluation and backward; `apart` channels lie between samples."""

    def call() -> None:
        batch, channels, space = shape
        x = (
            torch.empty((batch, space, channels), dtype=dtype).transpose(1, 2)
            if channels_last
            else torch.empty((batch, channels + apart, space), dtype=dtype)[:, :channels]
        )
        mask = torch.ones((batch, space), dtype=torch.bool) if masked else None
        vector = torch.empty(channels)
        wide = torch.empty(channels, dtype=F64)
        one = torch.zeros((), dtype=torch.int64)
        triton_batch_norm.batch_norm_forward(x, vector, vector, vector, vector, 0.1, 1e-5, mask, True, one, one)
        triton_batch_norm.batch_norm_with_running(x, vector, vector, vector, vector, 1e-5, mask)
        count = one if masked else batch * space
        triton_batch_norm.batch_norm_backward(x, x, wide, wide, vector, count, mask, (True, True), F32)

    return call


def per_sample(dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        x = torch.empty((4, 32, 1024), dtype=dtype)
        vector = torch.empty((4, 32))
        triton_channels.channels_moments(x, None, True)
        triton_channels.channels_affine(x, vector, vector, vector, None)
        triton_channels.channels_backward_moments(x, x, vector, None, True)
        triton_channels.channels_backward_affine(x, x, vector, vector, vector, vector, None)

    return call


ON_CHIP = {
    f"{'layer' if centered else 'rms'}_norm {size} {str(dtype)[6:]}": rows(size, dtype, centered)
    for size in SIZES
    for dtype in (BF16, F32)
    for centered in (True, False)
}
MORE = {
    "add_layer_norm": rows(4096, BF16, True, residual=True),
    "add_rms_norm": rows(4096, F32, False, residual=True),
    "bfloat16 with float32 gamma": rows(4096, BF16, True, wider=True),
    "float16": rows(1024, F16, True),
    "float64": rows(1024, F64, True),
    **{f"{size} {str(dtype)[6:]}": rows(size, dtype, True) for size in LONG[1:] for dtype in (BF16, F32)},
    "layer_norm 16384 bfloat16 with float32 gamma": rows(16384, BF16, True, wider=True),
    "layer_norm 40000 float16": rows(40000, F16, True),
    "rms_norm 32768 float32": rows(32768, F32, False),
    "add_layer_norm 65536 bfloat16": rows(65536, BF16, True, residual=True),
    "add_rms_norm 65536 float32": rows(65536, F32, False, residual=True),
}
LONG_ROWS = {
    f"{'add ' * residual}{'layer' if centered else 'rms'}_norm {size} {str(dtype)[6:]}": rows(
        size, dtype, centered, residual
    )
    for size in LONG
    for dtype in (BF16, F32)
    for centered in (True, False)
    for residual in (False, True)
    if centered or size > 16384
}
BATCH_NORMS = {
    f"{shape} {str(dtype)[6:]}{' channels-last' * last}{' masked' * masked}": batch_norm(shape, dtype, last, masked)
    for shape, dtypes in (((8, 64, 3136), (BF16, F32)), ((8, 512, 64), (BF16,)))
    for dtype in dtypes
    for last in (False, True)
    for masked in (False, True)
}
BATCH_NORMS["small maps in samples apart"] = batch_norm((256, 512, 49), F32, False, False, apart=1)
BATCH_NORMS["small maps masked"] = batch_norm((256, 512, 49), F32, False, True)
for dtype in (BF16, F32):
    BATCH_NORMS[f"small maps by planes {str(dtype)[6:]}"] = batch_norm((256, 512, 49), dtype, False, False)
for last in (False, True):
    BATCH_NORMS[f"float64{' channels-last' * last}"] = batch_norm((8, 64, 3136), F64, last, False)
SCALARS = {"moments_kernel": 20}  # bytes: what its outer loop keeps while a pass runs, nothing of a tile
VECTORS = (
    "merge_kernel",
    "sums_kernel",
    "sum_kernel",
    "finish_forward_kernel",
    "stored_kernel",
    "finish_backward_kernel",
)


def check(call: Callable[[], None], capability: int, monkeypatch: pytest.MonkeyPatch, wide: bool = True) -> None:
    monkeypatch.setattr(triton_rows, "shared_bytes", lambda _: SHARED_BYTES[capability])  # what stages depend on
    triton_rows.forget_plans()
    for launch in launches(monkeypatch, call):
        name = launch.kernel.__name__
        found = compiled(launch, capability)
        what = f"{name} {launch.options} on sm_{capability}: {found.registers} registers"
        allowed = SCALARS.get(name, 0)
        assert found.spill_bytes <= allowed, f"{what}, {found.spill_bytes} bytes spilled"
        assert found.shared_bytes <= SHARED_BYTES[capability], f"{what}, {found.shared_bytes} bytes shared"
        if name not in VECTORS and wide:
            assert found.widest_load_bits == 128, f"{what}, loads of {found.widest_load_bits} bits"


@pytest.mark.parametrize("call", ON_CHIP.values(), ids=ON_CHIP)
def test_the_common_row_sizes_load_wide_and_spill_nothing(
    call: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(call, 90, monkeypatch)


@everywhere
@pytest.mark.parametrize("call", MORE.values(), ids=MORE)
def test_row_kernels_compile_for(call: Callable[[], None], capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(call, capability, monkeypatch)


@pytest.mark.parametrize("call", LONG_ROWS.values(), ids=LONG_ROWS)
def test_long_rows_stay_on_chip_without_spills(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    check(call, 90, monkeypatch)
    for launch in launches(monkeypatch, call):
        if launch.kernel.__name__ in ("long_forward_kernel", "long_backward_kernel"):
            found = compiled(launch, 90)
            loop = found.ttgir.split("scf.for", 1)[1].split("} {tt.num_stages", 1)[0]
            assert "convert_layout" not in loop, "a step's blocks would go through shared memory once more"
            assert "async_copy_global_to_local" in found.ttgir, "loads would not be started steps ahead"


@everywhere
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_channel_kernels_compile_for(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(BATCH_NORMS[name], capability, monkeypatch, wide="masked" not in name and "apart" not in name)


@everywhere
def test_statistics_of_samples_compile_for(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(per_sample(BF16), capability, monkeypatch)
    check(per_sample(F32), capability, monkeypatch)
