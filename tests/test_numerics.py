"""Forward: values, dtypes and bits of every norm of the table. Read next: test_gradients.py."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from cases import BY_NAME, CHANNELS, DTYPES, HUGE, LAYOUTS, NORMS, ROWS, Norm, Oracle, Torch, make_inputs, normal
from checks import (
    check_deterministic,
    check_gradients,
    check_row_sizes,
    check_rows_alone,
    check_total_as_stored,
    check_values,
)
from normkit import functional
from tolerance import assert_exact_enough, assert_same_bits, threads

ROW_WISE = tuple(norm for norm in ROWS if norm.axes((5, 37)) == (-1,))

every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_norm
@every_dtype
def test_outputs_are_as_exact_as_torchs_in_every_layout(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    for shape in norm.shapes:
        for layout in LAYOUTS:
            check_values(functional, norm, shape, dtype, layout)


@pytest.mark.parametrize("norm", ROWS, ids=str)
def test_no_element_is_lost_at_any_row_size(norm: Norm, backend: str) -> None:
    check_row_sizes(functional, norm, gradients_too=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_no_element_is_lost_at_any_row_size_in_other_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    check_row_sizes(functional, BY_NAME[name], dtype, gradients_too=False)


@pytest.mark.parametrize("norm", CHANNELS, ids=str)
def test_no_element_is_lost_at_any_number_of_channels_or_positions(norm: Norm, backend: str) -> None:
    for channels, space in itertools.product((1, 3, 16, 33), (1, 2, 17, 65)):
        for layout in ("contiguous", "channels-last") if norm.takes((3, channels, space)) else ():
            check_values(functional, norm, (3, channels, space), torch.float32, layout)
    large = ((1031, 7), (2, 3, 8191), (1, 2, 8193), (2, 1, 16385), (259, 255), (3, 257, 2), (3, 258, 2), (2, 513, 3, 3))
    for shape in filter(norm.takes, large):
        for layout in ("contiguous", "channels-last"):
            check_values(functional, norm, shape, torch.float32, layout)
            check_gradients(functional, norm, shape, torch.float32, layout, floor=16.0)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_huge_row_is_right(name: str, dtype: torch.dtype, backend: str) -> None:
    check_values(functional, BY_NAME[name], (1, HUGE), dtype)


def test_a_matrix_is_divided_by_the_rms_of_all_its_elements(backend: str) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(functional.rms_norm(x, x.shape, eps=0.0), x / 2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_norm
def test_half_inputs_take_float32_parameters(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    for shape in norm.shapes:
        check_values(functional, norm, shape, dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ROW_WISE, ids=str)
def test_rows_do_not_depend_on_batch_position_or_threads(norm: Norm, dtype: torch.dtype, core_by_isa: str) -> None:
    check_rows_alone(functional, norm, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_a_huge_row_shared_by_threads_equals_the_same_row_in_a_batch(
    name: str, dtype: torch.dtype, core_by_isa: str
) -> None:
    x = make_inputs(BY_NAME[name], (3, HUGE), dtype)["x"]
    call = getattr(functional, name)
    with threads(1):
        batch = call(x, (HUGE,))
    for count in (1, 2):
        with threads(count):
            assert_same_bits(call(x[1:2], (HUGE,)), batch[1:2], f"{name}: row 1 alone, {count} threads")
            assert_same_bits(call(x, (HUGE,)), batch, f"{name}: the batch, {count} threads")


@pytest.mark.parametrize("shape", [(64, 32, 14, 14), (4, 3, 200, 200), (5000, 17)])
@pytest.mark.parametrize("norm", CHANNELS[:1] + CHANNELS[2:3], ids=str)
def test_channels_do_not_depend_on_threads(norm: Norm, shape: tuple[int, ...], core_by_isa: str) -> None:
    check_deterministic(functional, norm, shape, torch.float32)


@every_dtype
def test_a_fused_add_normalizes_the_total_as_stored(dtype: torch.dtype, backend: str) -> None:
    check_total_as_stored(functional, dtype)


# ------------------------------------------------------------------------------------------- dtypes, as torch's

PARAMETERS = (None, *DTYPES)
AUTOCASTS = (None, torch.bfloat16, torch.float16)


def _result(implementation: object, norm: Norm, dtype: torch.dtype, parameters: torch.dtype | None, cast: object):
    inputs = make_inputs(norm, norm.shapes[0], dtype, parameter_dtype=parameters)
    if parameters is None and "running_mean" not in inputs:
        inputs = {name: value if name in ("x", "residual") else None for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=cast) if cast else contextlib.nullcontext():
        result = norm.call(implementation, **inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


@every_dtype
@pytest.mark.parametrize(
    "name",
    ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "batch_norm in training", "batch_norm in eval"],
)
def test_output_dtypes_are_torchs_with_mixed_parameters_and_autocast(name: str, dtype: torch.dtype) -> None:
    norm = BY_NAME[name]
    for parameters in PARAMETERS:
        for cast in AUTOCASTS:
            try:
                expected = _result(Torch, norm, dtype, parameters, cast).dtype
            except RuntimeError as error:  # torch refuses most mixtures on CPU; ours keep x's dtype
                if "mixed dtype" not in str(error):
                    raise
                expected = dtype
            found = _result(functional, norm, dtype, parameters, cast)
            assert found.dtype == expected, f"parameters {parameters}, autocast {cast}: {found.dtype}, torch {expected}"


@every_dtype
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_a_residual_of_another_dtype_is_added_as_torch_adds_it(dtype: torch.dtype, other: torch.dtype) -> None:
    x, residual = normal((4, 9), 1, dtype), normal((4, 9), 2, other)
    for fused, plain in (
        (functional.add_layer_norm, functional.layer_norm),
        (functional.add_rms_norm, functional.rms_norm),
    ):
        out, total = fused(x, residual, 9)
        assert_same_bits(total, x + residual, "total")
        assert_same_bits(out, plain(x + residual, 9), "out")


def test_complex_input_is_normalized_as_torch_does_it() -> None:
    x = torch.complex(normal((3, 8), 1), normal((3, 8), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(functional.rms_norm(x, 8, eps=1e-6), expected, rtol=1e-13, atol=1e-13)


def test_a_lazily_negated_view_is_read_with_its_sign() -> None:
    x = torch.imag(torch.complex(normal((3, 8), 1), normal((3, 8), 2)).conj())
    assert x.is_neg()
    exact = Oracle(torch.float64).layer_norm(x.clone(), (8,))
    assert_exact_enough(functional.layer_norm(x, 8), exact, None, "layer_norm of a negated view")


# ---------------------------------------------------------------------------------- the textbook's table, and any row


def test_the_textbook_table() -> None:
    table = torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]])
    mean, var = torch.zeros(3), torch.ones(3)
    out = functional.batch_norm(table, mean, var, training=True, momentum=1.0)
    assert mean.tolist() == [75.0, 65.0, 55.0]
    assert var.tolist() == [450.0, 450.0, 450.0]  # unbiased; 225 normalizes
    torch.testing.assert_close(out, torch.tensor([[1.0] * 3, [-1.0] * 3]))
    row = torch.tensor([1.224745, 0.0, -1.224745])  # (90 - 80) / sqrt(200 / 3)
    torch.testing.assert_close(functional.layer_norm(table, 3), torch.stack([row, row]))
    layer = normkit.LayerNorm(3)
    torch.testing.assert_close(layer(table).detach(), torch.stack([row, row]))


@given(
    rows=st.integers(0, 6),
    size=st.integers(1, 70),
    start=st.integers(0, 3),
    scale=st.floats(-12, 12),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["layer_norm", "rms_norm"]),
)
def test_any_row_of_any_scale_is_normalized(
    backend: str, rows: int, size: int, start: int, scale: float, shift: float, seed: int, name: str
) -> None:
    values = (normal((rows, size), seed) + shift) * 10.0**scale
    memory = torch.empty(rows * size + start)
    x = memory[start:].view(rows, size).copy_(values)
    exact = getattr(Oracle(torch.float32), name)(x.double(), (size,), eps=1e-5)
    found = getattr(functional, name)(x, (size,), eps=1e-5)
    if size > 2:  # one or two nearly equal values cancel; test_hard_values.py has them
        # |shift| / std enters through the rounding of the mean: at most 3 units, times the worst of 70 draws
        assert_exact_enough(found, exact, getattr(Torch, name)(x, (size,), eps=1e-5), f"{name} {x.shape}", floor=64.0)
