"""The compiled core, primitive by primitive and instruction set by instruction set, against reference.py in float64.

An error may be a few units of the accumulation dtype (FLOOR, SUM_FLOOR in tolerance.py) or twice that of reference.py
itself in that dtype. Where a claim is about bits, bits are compared.
Read next: tolerance.py; csrc/rows.h, csrc/channels.h for what is tested.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normkit import reference
from normkit.kernels import cpu
from normkit.reference import accumulation_dtype
from tolerance import SUM_FLOOR, assert_exact_enough, assert_same_bits, threads

if (why := cpu.unavailable()) is not None:
    pytest.skip(why, allow_module_level=True)

core = cpu._core
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 1000, 4096, 4097, 131072 + 3)
ROWS = (1, 3, 64)
TWO_BLOCKS = 2 * 4096 + 5  # a row that threads share
Tensors = tuple[Tensor | None, ...]


def dtype_text(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_text)
wide_range = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_text)


@pytest.fixture(params=core.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test on every instruction set that this machine has."""
    before = core.isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


def double(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def close(found: Tensors, exact: Tensors, theirs: Tensors, what: str, floor: float = SUM_FLOOR) -> None:
    for index, (ours, true, other) in enumerate(zip(found, exact, theirs, strict=True)):
        assert (ours is None) == (true is None), f"{what}: result {index}"
        if ours is not None:
            assert_exact_enough(ours, true, other, f"{what}: result {index}", floor)


def same(found: Tensors, expected: Tensors, what: str) -> None:
    for index, (ours, other) in enumerate(zip(found, expected, strict=True)):
        assert (ours is None) == (other is None), f"{what}: result {index}"
        if ours is not None:
            assert_same_bits(ours, other, f"{what}: result {index}")


# ------------------------------------------------------------------------------------------------ rows: values

# centered, residual, weight: none / x's dtype / accumulation dtype, bias, weight_offset
ROW_VARIANTS = (
    (True, False, "own", True, 0.0),
    (False, False, "own", False, 0.0),
    (True, True, "wide", True, 0.0),
    (False, True, "wide", False, 1.0),
    (True, False, None, False, 0.0),
    (False, False, None, True, 0.0),
    (True, True, "own", False, 1.0),
)


def row_inputs(rows: int, size: int, dtype: torch.dtype, residual: bool, weight: str | None, bias: bool) -> Tensors:
    own = torch.randn(4 * rows + 2, size).to(dtype)
    x, added, dout, dtotal = own[: 4 * rows].view(4, rows, size)
    wide = accumulation_dtype(dtype)
    gamma = None if weight is None else own[-1] if weight == "own" else torch.randn(size, dtype=wide)
    return x, added if residual else None, gamma, own[-2] if bias else None, dout, dtotal if residual else None


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_rows_forward_and_backward_are_those_of_the_reference(size: int, dtype: torch.dtype) -> None:
    for rows, (centered, with_residual, gamma, with_bias, offset) in itertools.product(ROWS, ROW_VARIANTS):
        if rows * size > 500_000 or (rows * size > 100_000 and not (centered and gamma == "wide")):
            continue
        what = f"rows {rows}, centered {centered}, residual {with_residual}, weight {gamma}, offset {offset}"
        x, residual, weight, bias, dout, dtotal = row_inputs(rows, size, dtype, with_residual, gamma, with_bias)
        assert x is not None
        assert dout is not None
        wide = accumulation_dtype(dtype)
        out, total, mean, rstd = cpu.rows_forward(x, residual, weight, bias, 1e-5, centered, offset)
        assert_same_bits(total, x if residual is None else x + residual, f"{what}: total")
        arguments = (None, weight, bias)
        exact = reference.rows_forward(total.double(), *double(*arguments), 1e-5, centered, offset)
        theirs = reference.rows_forward(total.to(wide), *arguments, 1e-5, centered, offset)
        close((out, mean, rstd), (exact[0], *exact[2:]), (theirs[0], *theirs[2:]), what)

        needs = (True, True, True)
        found = cpu.rows_backward(dout, dtotal, total, mean, rstd, weight, offset, needs)
        assert [tensor.dtype for tensor in found if tensor is not None] == [dtype, wide, wide]
        statistics = double(*exact[2:])
        exact_back = reference.rows_backward(
            dout.double(), *double(dtotal, total), *statistics, *double(weight), offset, needs
        )
        theirs_back = reference.rows_backward(dout.to(wide), dtotal, total.to(wide), *theirs[2:], weight, offset, needs)
        close(found, exact_back, theirs_back, f"{what}: backward", floor=2 * SUM_FLOOR)


@every_dtype
def test_what_is_not_needed_in_rows_backward_is_none_and_the_rest_has_the_same_bits(dtype: torch.dtype) -> None:
    x, _, weight, bias, dout, _ = row_inputs(64, 65, dtype, False, "own", True)
    assert x is not None
    assert dout is not None
    _, total, mean, rstd = cpu.rows_forward(x, None, weight, bias, 1e-5, True, 0.0)
    every = cpu.rows_backward(dout, None, total, mean, rstd, weight, 0.0, (True, True, True))
    for needs in itertools.product((False, True), repeat=3):
        found = cpu.rows_backward(dout, None, total, mean, rstd, weight, 0.0, needs)
        same(found, tuple(e if n else None for e, n in zip(every, needs, strict=True)), str(needs))


def test_weights_of_any_other_dtype_and_stride_are_taken() -> None:
    x = torch.randn(5, 33)
    wide = torch.randn(66, dtype=torch.float64)[::2]
    expected = cpu.rows_forward(x, None, wide.float(), wide.float(), 1e-5, True, 0.0)
    same(cpu.rows_forward(x, None, wide, wide, 1e-5, True, 0.0), expected, "float64 weights")


@every_dtype
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 7), (0,), (5,), (1, 1)], ids=str)
def test_empty_and_smallest_rows_have_the_references_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    for centered in (False, True):
        found = cpu.rows_forward(x, None, weight, weight, 1e-5, centered, 0.0)
        expected = reference.rows_forward(x, None, weight, weight, 1e-5, centered, 0.0)
        back = cpu.rows_backward(x, x, *found[1:], weight, 0.0, (True, True, True))
        expected_back = reference.rows_backward(x, x, *expected[1:], weight, 0.0, (True, True, True))
        for ours, theirs in zip((*found, *back), (*expected, *expected_back), strict=True):
            if theirs is not None:
                assert ours is not None
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-2, atol=1e-2, check_stride=True)


# ------------------------------------------------------------------------------------------- rows: places in memory


def row_views(dtype: torch.dtype) -> dict[str, Tensor]:
    fused = torch.randn(2, 5, 3, 4, 36).to(dtype)
    padded = torch.randn(7, 40).to(dtype)
    flat = torch.randn(6 * 33 + 3).to(dtype)
    return {
        "q of a fused qkv": fused[:, :, 0],
        "k of a fused qkv": fused[:, :, 1],
        "padded rows": padded[:, 1:38],
        "every other row": padded[::2],
        "an expanded row": padded[0].expand(6, 40),
        "expanded over the batch": padded.expand(3, 7, 40),
        "storage shifted by an element": flat[1 : 1 + 6 * 33].view(6, 33),
        "storage shifted by three": flat[3:].view(6, 33),
        "three outer strides": fused[:, ::2, 0],
        "a transposed matrix": torch.randn(40, 7).to(dtype).t(),
        "one column": padded[:, :1],
        "expanded along the row": padded[:, :1].expand(7, 9),
    }


@every_dtype
def test_rows_have_the_same_bits_wherever_they_lie(dtype: torch.dtype) -> None:
    for what, x in row_views(dtype).items():
        weight = torch.randn(x.shape[-1]).to(dtype)
        packed = x.clone(memory_format=torch.contiguous_format)
        found = cpu.rows_forward(x, x, weight, weight, 1e-5, True, 0.0)
        same(found, cpu.rows_forward(packed, packed, weight, weight, 1e-5, True, 0.0), what)
        assert all(tensor is not None and tensor.is_contiguous() for tensor in found), what
        _, _, mean, rstd = cpu.rows_forward(x, None, weight, weight, 1e-5, True, 0.0)
        back = cpu.rows_backward(x, x, x, mean, rstd, weight, 0.0, (True, True, True))
        same(back, cpu.rows_backward(packed, packed, packed, mean, rstd, weight, 0.0, (True, True, True)), what)


def test_rows_with_two_outer_strides_are_read_in_place() -> None:
    for what, x in row_views(torch.float32).items():
        in_place, _ = cpu._in_rows(x)
        copied = what in ("three outer strides", "a transposed matrix", "expanded along the row")
        assert (in_place is x) != copied, what


@every_dtype
@pytest.mark.parametrize("size", [7, 64, 256, 257, 1000, 4097, TWO_BLOCKS])
def test_a_row_has_the_same_bits_in_any_batch_and_for_any_number_of_threads(size: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias, dout, dtotal = row_inputs(40, size, dtype, True, "own", True)
    assert x is not None
    assert residual is not None
    assert dout is not None
    assert dtotal is not None

    def one(rows: slice, count: int) -> Tensors:
        with threads(count):
            out, total, mean, rstd = cpu.rows_forward(x[rows], residual[rows], weight, bias, 1e-5, True, 0.0)
            dx, *_ = cpu.rows_backward(dout[rows], dtotal[rows], total, mean, rstd, weight, 0.0, (True, False, False))
            dx_too, *_ = cpu.rows_backward(dout[rows], dtotal[rows], total, mean, rstd, weight, 0.0, (True, True, True))
            same((dx,), (dx_too,), "dx with and without dweight")
            return out, total, mean, rstd, dx

    every = one(slice(None), 1)
    for rows, count in itertools.product([slice(0, 1), slice(3, 5), slice(17, 40), slice(None)], [1, 2, 3]):
        same(one(rows, count), tuple(t[rows] for t in every if t is not None), f"rows {rows}, {count} threads")


@every_dtype
@pytest.mark.parametrize("shape", [(1000, 33), (130, 1000), (1, 300_000), (3, TWO_BLOCKS), (67, 4097)], ids=str)
def test_dweight_and_dbias_have_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, _, weight, _, dout, _ = row_inputs(*shape, dtype, False, "own", False)
    assert x is not None
    assert dout is not None
    _, _, mean, rstd = cpu.rows_forward(x, None, weight, None, 1e-5, True, 0.0)
    results = []
    for count in (1, 2, 3, 2, 5):
        with threads(count):
            results.append(cpu.rows_backward(dout, None, x, mean, rstd, weight, 0.0, (True, True, True)))
    for result in results[1:]:
        same(result, results[0], f"{shape}")


def test_sums_over_many_rows_are_as_exact_as_those_over_few() -> None:
    """A single float32 sum over 200,000 rows of ones stops being exact at 2^24 / 3, one over blocks does not."""
    rows = 200_000
    x, dout = torch.randn(rows, 3), torch.full((rows, 3), 101.0)
    _, _, mean, rstd = cpu.rows_forward(x, None, None, None, 1e-5, True, 0.0)
    _, _, dbias = cpu.rows_backward(dout, None, x, mean, rstd, None, 0.0, (False, False, True))
    assert dbias is not None
    assert dbias.tolist() == [101.0 * rows] * 3


# ------------------------------------------------------------------------------------------- rows: hard values


@pytest.mark.parametrize("size", [33, 4096, 20_000])
def test_layer_norm_keeps_full_precision_at_mean_1e4(size: int) -> None:
    x = torch.randn(3, size) + 1e4
    out, _, mean, rstd = cpu.rows_forward(x, None, None, None, 1e-5, True, 0.0)
    exact = reference.rows_forward(x.double(), None, None, None, 1e-5, True, 0.0)
    assert mean is not None
    assert float((out - exact[0]).abs().max()) < 2e-6  # torch.nn.functional.layer_norm: 1e-3
    assert float((rstd / exact[3] - 1).abs().max()) < 5e-7
    assert float((mean - exact[2]).abs().max()) <= 2.0**-11  # half a float32 step at 1e4


@every_dtype
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1234.0, 1e-30])
@pytest.mark.parametrize("size", [1, 17, 1000, 9000])
def test_a_constant_row_is_normalized_to_exactly_the_bias(size: int, value: float, dtype: torch.dtype) -> None:
    x, bias = torch.full((2, size), value).to(dtype), torch.randn(size).to(dtype)
    out, _, mean, _ = cpu.rows_forward(x, None, bias, bias, 1e-5, True, 0.0)
    assert_same_bits(out, bias.expand(2, size), "out")
    assert mean is not None
    torch.testing.assert_close(mean, x[:, 0].to(mean.dtype), rtol=1e-15, atol=0.0)


@wide_range
@pytest.mark.parametrize("size", [3, 37, 5000, TWO_BLOCKS])
@pytest.mark.parametrize("centered", [False, True])
def test_a_finite_row_never_overflows(centered: bool, size: int, dtype: torch.dtype) -> None:
    """At the dtype's maximum and at the square root of it, forward and backward; dx of c x is dx / c."""
    pattern = torch.where(torch.arange(size) % 3 == 2, -1.0, 1.0).double().expand(2, size)
    pattern = pattern + torch.rand(2, size).double().sub(1.0).mul(pattern) / 4
    top = torch.finfo(dtype).max
    dout = torch.randn(2, size).to(dtype)
    for scale in (top, top**0.5 * 16, top / 1024):
        x = (pattern.to(dtype) * scale).to(dtype)
        small = x.double() * (2.0**-1000 if dtype == torch.float64 else 2.0**-100)  # eps is nothing beside either
        exact = reference.rows_forward(small, None, None, None, 0.0, centered, 0.0)
        for count in (1, 2):
            with threads(count):
                out, _, mean, rstd = cpu.rows_forward(x, None, None, None, 1e-5, centered, 0.0)
                found = cpu.rows_backward(dout, None, x, mean, rstd, None, 0.0, (True, True, True))
            assert bool(torch.isfinite(rstd).all())
            assert mean is None or bool(torch.isfinite(mean).all())
            assert_exact_enough(out, exact[0], None, f"out at {scale:g}", SUM_FLOOR)
            assert all(tensor is not None and bool(torch.isfinite(tensor).all()) for tensor in found)
            if rstd.min() < 8 * torch.finfo(rstd.dtype).smallest_normal:
                continue  # rstd itself has lost bits
            exact_back = reference.rows_backward(dout.double(), None, small, *exact[2:], None, 0.0, (False, True, True))
            close(found[1:], exact_back[1:], (None, None), f"at {scale:g}", floor=4 * SUM_FLOOR)


@wide_range
def test_a_constant_row_at_the_maximum_is_normalized_to_zero(dtype: torch.dtype) -> None:
    x = torch.full((2, 100), torch.finfo(dtype).max, dtype=dtype)
    out, _, mean, rstd = cpu.rows_forward(x, None, None, None, 1e-5, True, 0.0)
    assert mean is not None
    assert out.abs().max() == 0
    torch.testing.assert_close(mean, x[:, 0].to(mean.dtype))
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))


@every_dtype
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_go_where_torch_lets_them_and_to_no_other_row(
    special: float, centered: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(5, 37).to(dtype)
    clean = cpu.rows_forward(x, None, None, None, 1e-5, centered, 0.0)[0]
    x[2, 5] = special
    out = cpu.rows_forward(x, None, None, None, 1e-5, centered, 0.0)[0]
    norm = torch.nn.functional.layer_norm if centered else torch.nn.functional.rms_norm
    torch.testing.assert_close(out[2], norm(x, (37,), eps=1e-5)[2], equal_nan=True)
    others = [0, 1, 3, 4]
    assert_same_bits(out[others], clean[others], "other rows")


@every_dtype
def test_denormal_rows_are_as_exact_as_others(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = (torch.randn(4, 65) * 0.25 * tiny).to(dtype) if dtype != torch.float64 else torch.randn(4, 65).double() * tiny
    out = cpu.rows_forward(x, None, None, None, tiny * 1.0 if dtype == torch.float16 else 1e-30, False, 0.0)[0]
    eps = tiny * 1.0 if dtype == torch.float16 else 1e-30
    exact = reference.rows_forward(x.double(), None, None, None, eps, False, 0.0)[0]
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert float((out.double() - exact).abs().max()) <= max(step, float(exact.abs().max()) * torch.finfo(dtype).eps)


# --------------------------------------------------------------------------------------------- storage conversion


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_text)
@pytest.mark.parametrize("factor", [1.0, 0.3, 1.001, 2.0**-12, 2.0**-20, 3.7, 40000.0])
@pytest.mark.parametrize("length", [65536, 7])
def test_every_half_value_is_read_and_rounded_as_torch_does(length: int, factor: float, dtype: torch.dtype) -> None:
    """All 65536 bit patterns, times a factor that brings denormals, ties, overflow: nearest even, NaN stays NaN."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    expected = (x.float() * factor + 0.0).to(dtype)
    zero, scale = torch.zeros(1), torch.full((1,), factor)
    lines = x[: 65536 // length * length].view(-1, 1, length)
    found = cpu.channels_affine(lines, zero, scale, zero, None).flatten()
    expected = expected[: found.numel()]
    assert bool((found.isnan() == expected.isnan()).all())
    # + 0.0: a fused multiply-add gives the underflow of a negative product its sign, a separate addition takes it
    found, expected = (t.nan_to_num(0.0, float("inf"), float("-inf")) + 0.0 for t in (found, expected))
    assert_same_bits(found, expected, f"times {factor}")


# ------------------------------------------------------------------------------------------------ channels: values

CHANNEL_SHAPES = (
    (1, 1, 1),
    (3, 1, 5),
    (1, 7, 1),
    (5, 17, 1),
    (64, 300, 1),
    (3, 16, 15),
    (2, 3, 16),
    (2, 15, 17),
    (4, 33, 31),
    (37, 5, 64),
    (2, 65, 65),
    (600, 3, 49),
    (2, 3, 8192),
    (3, 2, 20_001),
    (1, 600, 70),
)


def channels_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channel_layouts(x: Tensor) -> dict[str, Tensor]:
    batch, channels, space = x.shape
    wide = x.new_full((batch, channels + 2, space + 3), float("nan"))
    wide[:, 1:-1, 2:-1] = x
    last = channels_last(wide)
    return {
        "channels-first": x.contiguous(),
        "channels-last": channels_last(x),
        "part of channels-first": wide[:, 1:-1, 2:-1],
        "part of channels-last": last[:, 1:-1, 2:-1],
        "space outermost, channels-last": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "batch innermost": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


def channel_primitives(
    x: Tensor, dout: Tensor, vectors: list[Tensor], mask: Tensor | None, per_sample: bool
) -> Tensors:
    """Every primitive of the family on the core."""
    center, scale, shift, other = vectors
    _, mean, m2 = cpu.channels_moments(x, mask, per_sample)
    return (
        mean,
        m2,
        cpu.channels_affine(x, center, scale, shift, mask),
        *cpu.channels_backward_moments(dout, x, center, mask, per_sample),
        cpu.channels_backward_affine(dout, x, center, scale, shift, other, mask),
        cpu.channels_backward_affine(dout, None, None, scale, None, None, mask),
    )


def channel_formulas(x: Tensor, dout: Tensor, vectors: list[Tensor], mask: Tensor | None, per_sample: bool) -> Tensors:
    """The same from reference.py."""
    center, scale, shift, other = vectors
    _, mean, m2 = reference.channels_moments(x, mask, per_sample)
    return (
        mean,
        m2,
        reference.channels_affine(x, center, scale, shift, mask),
        *reference.channels_backward_moments(dout, x, center, mask, per_sample),
        reference.channels_backward_affine(dout, x, center, scale, shift, other, mask),
        reference.channels_backward_affine(dout, None, None, scale, None, None, mask),
    )


def channel_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, masked: bool, per_sample: bool
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    batch, channels, space = shape
    x, dout = (torch.randn(shape) + 3.0).to(dtype), torch.randn(shape).to(dtype)
    wide = accumulation_dtype(dtype)
    vectors = [torch.randn((batch, channels) if per_sample else (channels,), dtype=wide) for _ in range(4)]
    mask = torch.rand(batch, space) > 0.4 if masked else None
    if mask is not None:
        mask[0] = False
        padding = torch.tensor([float("nan"), float("inf")]).to(dtype)[torch.randint(2, shape)]
        x = torch.where(mask.unsqueeze(1), x, padding)
        dout = torch.where(mask.unsqueeze(1), dout, padding)
    return x, dout, vectors, mask


@every_dtype
@pytest.mark.parametrize("per_sample", [False, True], ids=["over the batch", "per sample"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_channels_are_those_of_the_reference_in_every_layout(
    masked: bool, per_sample: bool, dtype: torch.dtype
) -> None:
    wide = accumulation_dtype(dtype)
    for shape in CHANNEL_SHAPES:
        x, dout, vectors, mask = channel_inputs(shape, dtype, masked, per_sample)
        exact = channel_formulas(x.double(), dout.double(), double(*vectors), mask, per_sample)
        theirs = channel_formulas(x.to(wide), dout.to(wide), vectors, mask, per_sample)
        layouts = channel_layouts(x)
        # moments are float64 and sums of float32 blocks: their error is that of float32
        units = [t if t is None or i in (2, 5, 6) else None for i, t in enumerate(theirs)]
        douts = itertools.cycle(channel_layouts(dout).values())
        next(douts)
        for (name, laid), laid_dout in zip(layouts.items(), douts, strict=False):
            found = channel_primitives(laid, laid_dout, vectors, mask, per_sample)
            for index, (ours, true) in enumerate(zip(found, exact, strict=True)):
                assert ours is not None
                assert true is not None
                what = f"{shape} {name}: result {index}"
                if index in (2, 5, 6):
                    assert_exact_enough(ours, true, units[index], what, SUM_FLOOR)
                    continue
                assert ours.dtype == torch.float64
                assert ours.shape == true.shape
                size = sum_size(x, dout, vectors[0], mask, per_sample, index)
                error = (ours - true).abs()
                allowed = SUM_FLOOR * torch.finfo(wide).eps * size
                assert bool((error <= allowed).all()), f"{what}: {float((error / size).max()):.3g} of the terms"


def sum_size(x: Tensor, dout: Tensor, center: Tensor, mask: Tensor | None, per_sample: bool, index: int) -> Tensor:
    """How large the terms are whose sum or mean is result `index`: what rounding errors are measured by."""
    terms = reference._valid(x.double(), mask), reference._valid(dout.double(), mask)
    deviation = reference._valid(terms[0] - reference._per_channel(center.double()), mask)
    dims = (2,) if per_sample else (0, 2)
    if index == 0:
        return terms[0].abs().amax(dims) + 1e-300
    if index == 1:
        return (terms[0] ** 2).sum(dims) + 1e-300
    return (terms[1] if index == 3 else terms[1] * deviation).abs().sum(dims) + 1e-300


def test_counts_are_those_of_the_reference() -> None:
    x, _, _, mask = channel_inputs((4, 3, 11), torch.float32, True, False)
    for per_sample, given in itertools.product((False, True), (None, mask)):
        found = cpu.channels_moments(x, given, per_sample)[0]
        expected = reference.channels_moments(x, given, per_sample)[0]
        assert type(found) is type(expected)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=0)


def test_outputs_keep_the_layout_of_x_and_masked_positions_are_zero() -> None:
    x, dout, vectors, mask = channel_inputs((4, 5, 6), torch.float32, True, False)
    assert mask is not None
    for name, laid in channel_layouts(x).items():
        out = cpu.channels_affine(laid, *vectors[:3], mask)
        dx = cpu.channels_backward_affine(dout, laid, *vectors, mask)
        strides = (30, 1, 5) if "channels-last" in name else (30, 6, 1)
        assert out.stride() == dx.stride() == strides, name
        for result in (out, dx):
            assert result.transpose(1, 2)[~mask].abs().max() == 0, name


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3, 1), (0, 0, 0)], ids=str)
def test_empty_channels_have_the_references_shapes_and_zeros(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for per_sample, masked, last in itertools.product((False, True), repeat=3):
        batch, channels, space = shape
        wide = accumulation_dtype(dtype)
        x = channels_last(torch.randn(shape).to(dtype)) if last else torch.randn(shape).to(dtype)
        vectors = [torch.randn((batch, channels) if per_sample else (channels,), dtype=wide) for _ in range(4)]
        mask = torch.ones(batch, space, dtype=torch.bool) if masked else None
        found = channel_primitives(x, x, vectors, mask, per_sample)
        expected = channel_formulas(x, x, vectors, mask, per_sample)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- channels: hard values


@pytest.mark.parametrize("lay", [Tensor.contiguous, channels_last], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("shape", [(8, 5, 700), (300, 40, 1), (2, 3, 9001)], ids=str)
def test_moments_keep_full_precision_at_mean_1e4(shape: tuple[int, int, int], lay: Callable[[Tensor], Tensor]) -> None:
    x = lay(torch.randn(shape) + 1e4)
    for per_sample in (False, True):
        if per_sample and shape[2] == 1:
            continue
        _, mean, m2 = cpu.channels_moments(x, None, per_sample)
        _, exact_mean, exact_m2 = reference.channels_moments(x.double(), None, per_sample)
        assert float((mean - exact_mean).abs().max()) < 1e-6
        assert float((m2 / exact_m2 - 1).abs().max()) < 1e-6


@wide_range
@pytest.mark.parametrize("lay", [Tensor.contiguous, channels_last], ids=["channels-first", "channels-last"])
def test_moments_of_squares_beyond_float32_are_finite(lay: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for scale in (1e30, 3e38):
        x = lay((torch.rand(4, 5, 70).double() - 0.5).mul(2 * scale).to(dtype))
        _, mean, m2 = cpu.channels_moments(x, None, False)
        _, exact_mean, exact_m2 = reference.channels_moments(x.double(), None, False)
        torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=1e-6 * scale)
        torch.testing.assert_close(m2, exact_m2, rtol=1e-6, atol=0.0)


@every_dtype
@pytest.mark.parametrize("lay", [Tensor.contiguous, channels_last], ids=["channels-first", "channels-last"])
def test_a_constant_channel_has_m2_zero_and_nan_stays_in_its_channel(
    lay: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(6, 20, 33).to(dtype)
    x[:, 3] = 7.5
    x[2, 7, 5] = float("nan")
    x[2, 8, 5] = float("inf")
    _, mean, m2 = cpu.channels_moments(lay(x), None, False)
    assert mean[3] == 7.5
    assert m2[3] == 0.0
    assert bool(mean[7].isnan())
    assert mean[8] == float("inf")
    assert bool(m2[7:9].isnan().all())
    clean = torch.tensor([i not in (7, 8) for i in range(20)])
    assert bool(torch.isfinite(mean[clean]).all())
    assert bool(torch.isfinite(m2[clean]).all())


@every_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_channels_have_the_same_bits_for_any_number_of_threads(masked: bool, dtype: torch.dtype) -> None:
    for shape in [(9, 31, 257), (300, 257, 1), (2, 3, 30_011), (70, 70, 49)]:
        for per_sample in (False, True):
            x, dout, vectors, mask = channel_inputs(shape, dtype, masked, per_sample)
            for name, laid in channel_layouts(x).items():
                results = []
                for count in (1, 2, 3):
                    with threads(count):
                        results.append(channel_primitives(laid, dout, vectors, mask, per_sample))
                for result in results[1:]:
                    same(result, results[0], f"{shape} {name}")


# ---------------------------------------------------------------------------------- threads, processes, other builds


def a_bit_of_everything() -> list[Tensor | None]:
    """Each primitive on inputs that are large enough for threads, from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    results: list[Tensor | None] = []
    for shape in ((700, 129), (2, 40_000), (9, 4096)):
        x, residual, dout = (torch.randn(shape, generator=generator) for _ in range(3))
        weight = torch.randn(shape[1], generator=generator)
        for dtype, centered in itertools.product(DTYPES, (False, True)):
            forward = cpu.rows_forward(x.to(dtype), residual.to(dtype), weight, weight, 1e-5, centered, 0.0)
            backward = cpu.rows_backward(
                dout.to(dtype), residual.to(dtype), *forward[1:], weight, 0.0, (True, True, True)
            )
            results += [*forward, *backward]
    for shape in ((6, 70, 300), (200, 300, 1)):
        x, dout = (torch.randn(shape, generator=generator) for _ in range(2))
        vectors = [torch.randn(shape[1], generator=generator) for _ in range(4)]
        mask = torch.rand(shape[0], shape[2], generator=generator) > 0.3
        for dtype, lay in itertools.product(DTYPES, (Tensor.contiguous, channels_last)):
            wide = [vector.to(accumulation_dtype(dtype)) for vector in vectors]
            results += channel_primitives(lay(x.to(dtype)), dout.to(dtype), wide, mask, False)
    return results


def test_two_python_threads_at_once_give_the_bits_of_one() -> None:
    expected = a_bit_of_everything()
    met = threading.Barrier(2, timeout=60)
    found: list[list[Tensor | None]] = []

    def work() -> None:
        met.wait()
        found.extend(a_bit_of_everything() for _ in range(2))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert len(found) == 4
    for result in found:
        same(tuple(result), tuple(expected), "two threads")


def run(script: str) -> str:
    """What a fresh interpreter prints, within two minutes."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


only_once = pytest.mark.parametrize("isa", core.isas()[:1], indirect=True)


@only_once
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_with_one_thread_finishes() -> None:
    found = run(
        "import os, torch, normkit\n"
        "from normkit.kernels import cpu\n"
        "x = torch.randn(600, 600)\n"
        "torch.set_num_threads(2)\n"
        "cpu.rows_forward(x, None, None, None, 1e-5, True, 0.0)\n"  # the parent's pool exists
        "child = os.fork()\n"
        "torch.set_num_threads(1)\n"
        "out = cpu.rows_forward(x, None, None, None, 1e-5, True, 0.0)\n"
        "back = cpu.rows_backward(x, None, *out[1:], None, 0.0, (True, True, True))\n"
        "moments = cpu.channels_moments(x.view(6, 100, 600), None, False)\n"
        "if child == 0: os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert found.strip() == "0"


@only_once
def test_an_import_that_fails_is_told_in_a_sentence() -> None:
    found = run(
        "import sys, torch\n"
        "sys.modules['normkit._core'] = None\n"
        "from normkit.kernels import cpu\n"
        "print(cpu.unavailable())\n"
    )
    assert found.startswith("the compiled core could not be imported: import of normkit._core halted")


@only_once
def test_an_unknown_instruction_set_is_refused() -> None:
    names = core.isas()
    assert names[-1] == "baseline"
    with pytest.raises(ValueError, match=rf"^set_isa: name must be one of {', '.join(names)}, got sse9$"):
        core.set_isa("sse9")
    assert core.isa() == names[0]


def serial_core() -> Any:
    place = Path(os.environ["NORMKIT_SERIAL_CORE"])
    found = [place] if place.is_file() else sorted(place.rglob("_core*.so"))
    assert len(found) == 1, f"NORMKIT_SERIAL_CORE={place} must name a _core*.so or a folder with one, got {found}"
    loader = importlib.machinery.ExtensionFileLoader("_core", str(found[0]))
    spec = importlib.util.spec_from_file_location("_core", found[0], loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.skipif("NORMKIT_SERIAL_CORE" not in os.environ, reason="NORMKIT_SERIAL_CORE names no serial build")
def test_a_serial_build_gives_the_same_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = a_bit_of_everything()
    serial = serial_core()
    assert not serial.openmp()
    assert serial.isas() == core.isas()
    serial.set_isa(isa)
    monkeypatch.setattr(cpu, "_core", serial)
    same(tuple(a_bit_of_everything()), tuple(expected), "serial")
