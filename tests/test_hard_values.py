"""Values at the edge: large means, constants, overflow, denormals, NaN, infinity, nothing. Read next: checks.py."""

from __future__ import annotations

import math

import pytest
import torch

from cases import BY_NAME, NORMS, Norm, Oracle, Torch, gradients, make_douts, make_inputs, normal
from checks import check_large_mean, check_large_mean_costs_nothing, check_large_values, check_not_finite_as_torch
from normkit import functional
from tolerance import FLOOR, TORCH_MULTIPLE, assert_exact_enough, assert_same_bits

ROW_NAMES = ("layer_norm", "rms_norm")
every_row_norm = pytest.mark.parametrize("name", ROW_NAMES)
FLOATS = (torch.float32, torch.float64)


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error relative to the largest exact value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


# ----------------------------------------------------------------------------------------- large means, constants


def test_a_large_mean_keeps_the_digits_of_the_variance(backend: str) -> None:
    check_large_mean(functional)


def test_a_large_mean_costs_nothing_on_the_core(core: None) -> None:
    check_large_mean_costs_nothing(functional)


def test_gradients_at_a_large_mean_are_as_exact_as_torchs(backend: str) -> None:
    for name in ("layer_norm", "batch_norm in training"):
        norm = BY_NAME[name]
        inputs = make_inputs(norm, (64, 128), torch.float32)
        inputs["x"] = (normal((64, 128), 5) + 1e4).float()
        douts = make_douts(norm, inputs)
        exact = gradients(
            norm, Oracle(torch.float32), {k: v.double() for k, v in inputs.items()}, tuple(d.double() for d in douts)
        )
        found, theirs = gradients(norm, functional, inputs, douts), gradients(norm, Torch, inputs, douts)
        for key, value in exact.items():
            # xhat is off by the rounding of the mean, 4.9e-4 of a standard deviation; a sum of 64 adds them up
            allowed = max(TORCH_MULTIPLE * worst(theirs[key], value), 1e-3)
            assert worst(found[key], value) <= allowed, f"{name}: d{key} off by {worst(found[key], value):.2g}"


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 0.1, 1e4, 12345.678])
def test_a_constant_row_becomes_the_bias(value: float, backend: str) -> None:
    bias = normal((37,), 3, torch.float32)
    x = torch.full((3, 37), value)
    out = functional.layer_norm(x, 37, None, bias)
    # the mean of a constant may be off by its last digit, and 1 / sqrt(eps) = 316 scales that up; torch's is too
    theirs = Torch.layer_norm(x, (37,), None, bias)
    allowed = max(TORCH_MULTIPLE * float((theirs - bias).abs().max()), FLOOR * abs(value) * 2.0**-24 * 1e-5**-0.5)
    assert float((out - bias).abs().max()) <= allowed + 2.0**-23 * float(bias.abs().max())


def test_a_constant_channel_becomes_the_bias(backend: str) -> None:
    bias = normal((3,), 3, torch.float32)
    for shape in ((8, 3), (2, 3, 4, 4)):
        out = functional.batch_norm(torch.full(shape, 3.0), None, None, None, bias, True)
        expected = bias.view(1, 3, *[1] * (len(shape) - 2)).expand(shape)
        assert_same_bits(out, expected.contiguous(), f"batch_norm of a constant {shape}")


def test_one_element_per_row_is_its_own_mean(backend: str) -> None:
    x = torch.tensor([[5.0], [-2.0], [0.0]])
    bias = torch.tensor([0.25])
    assert functional.layer_norm(x, 1, None, bias).tolist() == [[0.25]] * 3
    torch.testing.assert_close(functional.rms_norm(x, 1, eps=0.0)[:2], torch.tensor([[1.0], [-1.0]]))
    leaf = x.clone().requires_grad_()
    functional.layer_norm(leaf, 1).sum().backward()
    assert leaf.grad.tolist() == [[0.0]] * 3


def test_a_huge_row_leaves_its_neighbours_alone(backend: str) -> None:
    x = normal((5, 37), 1, torch.float32)
    wild = x.clone()
    wild[2] = 1e25
    wild[3, 0] = float("nan")
    keep = [0, 1, 4]
    for name in ROW_NAMES:
        call = getattr(functional, name)
        assert_same_bits(call(wild, (37,))[keep], call(x, (37,))[keep], name)


# ------------------------------------------------------------------------------------------- overflow, underflow


def test_values_whose_squares_overflow_are_normalized_by_the_core(core: None) -> None:
    check_large_values(functional)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [3, 37, 5000])
@every_row_norm
def test_a_row_of_the_largest_finite_values_is_normalized_by_the_core(
    name: str, size: int, dtype: torch.dtype, core: None
) -> None:
    """Even x - mean overflows here: two thirds of the row at the maximum, one third at its negative."""
    largest = torch.finfo(dtype).max
    small = torch.where(torch.arange(size) % 3 == 2, -1.0, 1.0).double().expand(2, size)
    x = small.to(dtype) * largest
    exact = getattr(Oracle(dtype), name)(small, (size,), eps=0.0)  # eps vanishes beside the largest squares
    assert_exact_enough(getattr(functional, name)(x, (size,), eps=1e-5), exact, None, f"{name} of {largest:g}")


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 90), (torch.float64, 700)], ids=str)
@pytest.mark.parametrize("size", [3, 37, 5000])
@every_row_norm
def test_gradients_of_values_whose_squares_overflow_are_right_on_the_core(
    name: str, size: int, dtype: torch.dtype, power: int, core: None
) -> None:
    """Scaling x by 2^k scales dx by 2^-k, eps being nothing beside either variance: exact in binary."""
    values, dout = normal((4, size), 1, dtype), normal((4, size), 2, dtype)
    found = {}
    for exponent in (0, power):
        x = (values * 2.0**exponent).requires_grad_()
        out = getattr(functional, name)(x, (size,), eps=0.0)
        (dx,) = torch.autograd.grad(out, x, dout)
        found[exponent] = (out.detach(), dx * 2.0**exponent)
    for ours, expected in zip(found[power], found[0], strict=True):
        assert worst(ours, expected.double()) <= 2 * FLOOR * torch.finfo(dtype).eps


def test_the_reference_overflows_where_torch_does() -> None:
    """The formulas in plain torch square the values: beyond 1e19 in float32 they give no number, as torch's do."""
    import normkit

    x = normal((3, 37), 6, torch.float32) * 1e30
    with normkit.use_backend("reference"):
        for name in ROW_NAMES:
            ours, theirs = getattr(functional, name)(x, (37,)), getattr(Torch, name)(x, (37,))
            assert not (ours.isfinite() & (ours != 0)).any(), name
            assert not (theirs.isfinite() & (theirs != 0)).any(), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_row_norm
def test_denormal_values_keep_their_digits(name: str, dtype: torch.dtype, backend: str) -> None:
    """Beside eps their variance is nothing: out = x / sqrt(eps), a normal number again."""
    smallest = torch.finfo(dtype).smallest_normal
    x = (normal((3, 37), 1) * smallest / 8).to(dtype)
    assert bool((x[0].abs() < smallest).all())
    exact = getattr(Oracle(dtype), name)(x.double(), (37,), eps=1e-5)
    if dtype == torch.float64:  # the oracle squares to 0 as it should, and rounds the mean to a denormal as we do
        assert worst(getattr(functional, name)(x, (37,), eps=1e-5), exact) <= 1e-12
        return
    # the mean is itself denormal: rounded by up to half of the smallest step
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    off = (getattr(functional, name)(x, (37,), eps=1e-5).double() - exact).abs().max()
    assert off <= 1e-5**-0.5 * step * FLOOR + FLOOR * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_batch_norm_takes_halves_at_large_values(dtype: torch.dtype, backend: str) -> None:
    scale = 65504.0 if dtype == torch.float16 else 1e15
    x = (torch.sign(normal((64, 3, 5), 3)) * scale).to(dtype)
    exact = Oracle(dtype).batch_norm(x.double(), None, None, training=True)
    assert_exact_enough(functional.batch_norm(x, None, None, training=True), exact, None, f"batch_norm at {scale:g}")


@pytest.mark.parametrize("fused", ["add_layer_norm", "add_rms_norm"])
def test_a_total_that_overflows_is_not_a_number_as_in_torch(fused: str, backend: str) -> None:
    x = torch.full((2, 9), 65504.0, dtype=torch.float16)
    x[1] = 1.0
    for ours, theirs in zip(getattr(functional, fused)(x, x, (9,)), getattr(Torch, fused)(x, x, (9,)), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@every_row_norm
def test_eps_zero_divides_by_zero_where_torch_does(name: str, backend: str) -> None:
    x = torch.zeros(2, 9)
    x[1] = normal((9,), 1, torch.float32)
    ours, theirs = getattr(functional, name)(x, (9,), eps=0.0), getattr(Torch, name)(x, (9,), eps=0.0)
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours[1], theirs[1])


def test_negative_zero_passes_through_rms_norm_as_in_torch(backend: str) -> None:
    x = torch.tensor([[-0.0, 0.0, -0.0, 1.0], [-0.0, -0.0, 0.0, 0.0]])
    assert_same_bits(functional.rms_norm(x, 4, eps=1e-5), Torch.rms_norm(x, (4,), eps=1e-5), "rms_norm of -0.0")
    assert (functional.layer_norm(x[1:], 4) == 0).all()


# ------------------------------------------------------------------------------------------- NaN and infinity

BAD = (math.nan, math.inf, -math.inf)
every_bad = pytest.mark.parametrize("bad", BAD)


@every_bad
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_not_finite_values_come_out_where_torch_lets_them(norm: Norm, bad: float, backend: str) -> None:
    check_not_finite_as_torch(functional, norm, bad)


@every_bad
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_gradients_at_not_finite_values_are_not_numbers_where_torchs_are(norm: Norm, bad: float, backend: str) -> None:
    inputs = make_inputs(norm, norm.shapes[0], torch.float32)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][1, 2] = bad
    douts = make_douts(norm, inputs)
    found, theirs = gradients(norm, functional, inputs, douts), gradients(norm, Torch, inputs, douts)
    for key, value in theirs.items():
        assert torch.equal(found[key].isfinite(), value.isfinite()), f"{norm}: d{key} with {bad} in x"


@every_bad
@pytest.mark.parametrize("where", [0, 15, 16, 36, 4100])
@every_row_norm
def test_a_not_finite_value_is_seen_at_any_place_of_a_long_row(name: str, where: int, bad: float, backend: str) -> None:
    """Also where a rescue from overflow would start: an infinite sum of squares is not always an overflow."""
    size = 5000 if where > 1000 else 37
    x = normal((2, size), 1, torch.float32)
    x[0, where] = bad
    ours, theirs = getattr(functional, name)(x, (size,)), getattr(Torch, name)(x, (size,))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[1].isfinite().all()


@every_bad
def test_a_not_finite_weight_or_bias_reaches_its_column_only(bad: float, backend: str) -> None:
    x = normal((3, 9), 1, torch.float32)
    weight, bias = torch.ones(9), torch.zeros(9)
    for parameter in (weight, bias):
        parameter[4] = bad
        finite = functional.layer_norm(x, 9, weight, bias).isfinite()
        assert not finite[:, 4].any()
        assert finite.sum() == 24
        parameter[4] = 1.0


@every_bad
def test_running_statistics_take_what_torchs_take(bad: float, backend: str) -> None:
    x = normal((4, 3), 1, torch.float32)
    x[1, 2] = bad
    ours, theirs = ((torch.zeros(3), torch.ones(3)) for _ in range(2))
    functional.batch_norm(x, *ours, training=True)
    Torch.batch_norm(x, *theirs, training=True)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ nothing


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5), (0, 3, 0)], ids=str)
def test_empty_rows_keep_shape_and_dtype(shape: tuple[int, ...], backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, size = torch.zeros(shape, dtype=dtype), shape[-1]
        weight = torch.ones(size, dtype=dtype)
        results = (
            functional.layer_norm(x, size, weight, weight),
            functional.rms_norm(x, size, weight),
            *functional.add_layer_norm(x, x, size, weight, weight),
            *functional.add_rms_norm(x, x, size, weight),
        )
        for out in results:
            assert out.shape == shape
            assert out.dtype == dtype


def test_an_empty_matrix_has_no_root_mean_square_and_no_elements(backend: str) -> None:
    x = torch.zeros(0, 5)
    assert functional.rms_norm(x, x.shape).shape == (0, 5)
    assert functional.layer_norm(torch.zeros(3, 0, 5), (0, 5)).shape == (3, 0, 5)
