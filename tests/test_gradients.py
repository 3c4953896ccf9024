"""Backward: values, second derivatives, graphs and saved tensors of every norm of the table. Read next: checks.py."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch

import normkit
from cases import (
    BY_NAME,
    DTYPES,
    HUGE,
    LAYOUTS,
    NORMS,
    ROWS,
    Norm,
    Oracle,
    exactly,
    gradients,
    leaves,
    make_douts,
    make_inputs,
    normal,
    outputs,
)
from checks import check_deterministic, check_gradients, check_row_sizes, check_second_derivatives
from normkit import functional
from tolerance import assert_exact_enough, assert_same_bits

every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
FUSED = tuple(norm for norm in NORMS if norm.name.startswith("add_"))
# Small, for numerical differentiation: two calls per element of every input, squared for the second order.
SMALL = {2: (3, 4), 3: (2, 4, 3), 4: (2, 2, 3, 2), 5: (2, 2, 1, 2, 2)}


@every_norm
@every_dtype
def test_gradients_are_as_exact_as_torchs_in_every_layout(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    for shape in norm.shapes:
        for layout in LAYOUTS:
            check_gradients(functional, norm, shape, dtype, layout)


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_inputs_with_float32_parameters(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    for shape in norm.shapes:
        check_gradients(functional, norm, shape, dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("norm", ROWS, ids=str)
def test_no_gradient_is_lost_at_any_row_size(norm: Norm, backend: str) -> None:
    check_row_sizes(functional, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2048, 33), (513, 256), (1, HUGE)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_gradients_over_many_rows_and_one_huge_row(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    # sums of n terms of random sign: pairwise or blocked summation keeps them within a few units
    check_gradients(functional, BY_NAME[name], shape, dtype, floor=16.0)


@every_norm
def test_first_and_second_derivatives_are_numerical_ones(norm: Norm, backend: str) -> None:
    for dims in {len(shape) for shape in norm.shapes}:
        check_second_derivatives(functional, norm, SMALL[dims])


# ---------------------------------------------------------------------------------------- which gradients are asked


@every_norm
def test_any_subset_of_inputs_may_require_gradients(norm: Norm, backend: str) -> None:
    inputs = make_inputs(norm, norm.shapes[0], torch.float32)
    douts = make_douts(norm, inputs)
    every = gradients(norm, functional, inputs, douts)
    names = tuple(every)
    for subset in chain.from_iterable(combinations(names, count) for count in range(len(names) + 1)):
        made = leaves(inputs, only=subset)
        outs = outputs(norm, functional, made)
        assert outs[0].requires_grad == bool(subset), f"{norm}: {subset}"
        graph = [(out, dout) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
        torch.autograd.backward([out for out, _ in graph], [dout for _, dout in graph]) if graph else None
        for name, value in made.items():
            if name in subset:
                assert_same_bits(value.grad, every[name], f"{norm}: d{name} of {subset}")
            else:
                assert value.grad is None, f"{norm}: d{name} came unasked with {subset}"


@pytest.mark.parametrize("through", [(True, False), (False, True), (True, True)], ids=["out", "total", "both"])
@every_dtype
@pytest.mark.parametrize("norm", FUSED, ids=str)
def test_gradients_through_out_and_total(
    norm: Norm, dtype: torch.dtype, through: tuple[bool, bool], backend: str
) -> None:
    for layout in LAYOUTS:
        check_gradients(functional, norm, norm.shapes[0], dtype, layout, through=through)


def test_without_gradients_nothing_is_recorded(backend: str) -> None:
    for norm in NORMS:
        made = leaves(make_inputs(norm, norm.shapes[0], torch.float32))
        with torch.no_grad():
            assert not any(out.requires_grad for out in outputs(norm, functional, made)), norm.name
        with torch.inference_mode():
            outputs(norm, functional, made)


@every_norm
def test_an_expanded_incoming_gradient_is_read_in_place(norm: Norm, backend: str) -> None:
    """`out.sum().backward()` sends one number with strides of 0."""
    inputs = make_inputs(norm, norm.shapes[0], torch.float64)
    shape = inputs["x"].shape
    douts = tuple(torch.full((), 0.75, dtype=torch.float64).expand(shape) for _ in make_douts(norm, inputs))
    found = gradients(norm, functional, inputs, douts)
    exact = gradients(norm, Oracle(torch.float64), exactly(inputs), douts)
    for name, value in exact.items():
        assert_exact_enough(found[name], value, None, f"{norm}: d{name}", floor=64.0)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1031, 257), (3, 70001), (1, HUGE)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_row_gradients_are_bit_identical_over_runs_and_threads(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, core_by_isa: str
) -> None:
    check_deterministic(functional, BY_NAME[name], shape, dtype)


@pytest.mark.parametrize("shape", [(64, 32, 14, 14), (5000, 17)], ids=str)
@pytest.mark.parametrize("name", ["batch_norm in training", "batch_norm in eval"])
def test_channel_gradients_are_bit_identical_over_runs_and_threads(
    name: str, shape: tuple[int, ...], core_by_isa: str
) -> None:
    check_deterministic(functional, BY_NAME[name], shape, torch.float32)


# ------------------------------------------------------------------------------------- the graph and what is saved


@every_norm
def test_double_backward_is_the_exact_second_derivative(norm: Norm, backend: str) -> None:
    """A gradient penalty: d/dx of |d(out)/d(inputs)|^2, against autograd through the float64 formula."""

    def penalty(implementation: object) -> dict[str, torch.Tensor]:
        made = leaves(make_inputs(norm, norm.shapes[0], torch.float64))
        wanted = [value for value in made.values() if value.requires_grad]
        outs = outputs(norm, implementation, made)
        first = torch.autograd.grad(outs, wanted, make_douts(norm, made), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first) + 0 * sum(w.sum() for w in wanted), wanted)
        return dict(zip((k for k, v in made.items() if v.requires_grad), second, strict=True))

    exact = penalty(Oracle(torch.float64))
    for name, found in penalty(functional).items():
        torch.testing.assert_close(found, exact[name], rtol=1e-9, atol=1e-9)


@every_norm
def test_batched_gradients_are_those_of_one_by_one(norm: Norm, backend: str) -> None:
    made = leaves(make_inputs(norm, norm.shapes[0], torch.float64))
    wanted = [value for value in made.values() if value.requires_grad]
    outs = outputs(norm, functional, made)
    stacks = [torch.stack([normal(tuple(out.shape), 40 + i) for i in range(3)]) for out in outs]
    batched = torch.autograd.grad(outs, wanted, stacks, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(outs, wanted, [stack[i] for stack in stacks], retain_graph=True)
        for found, expected in zip(batched, single, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-11, atol=1e-11)


@every_norm
def test_a_retained_graph_gives_the_same_gradients_twice(norm: Norm, backend: str) -> None:
    made = leaves(make_inputs(norm, norm.shapes[0], torch.float32))
    wanted = [value for value in made.values() if value.requires_grad]
    outs, douts = outputs(norm, functional, made), make_douts(norm, made)
    first = torch.autograd.grad(outs, wanted, douts, retain_graph=True)
    for again, before in zip(torch.autograd.grad(outs, wanted, douts), first, strict=True):
        assert_same_bits(again, before, f"{norm}: second backward")


SAVED_INPUTS = [(norm, name) for norm in NORMS for name in norm.inputs(norm.shapes[0])]


@pytest.mark.parametrize(("norm", "name"), SAVED_INPUTS, ids=[f"{norm}-{name}" for norm, name in SAVED_INPUTS])
def test_a_changed_input_raises_or_leaves_the_gradient_right(norm: Norm, name: str, backend: str) -> None:
    """In-place change between forward and backward: torch's version error, or the true gradient; never a wrong one."""
    inputs = make_inputs(norm, norm.shapes[0], torch.float64)
    douts = make_douts(norm, inputs)
    exact = gradients(norm, functional, inputs, douts)
    made = leaves(inputs)
    given = {key: value * 1 for key, value in made.items()}  # not leaves: those may not be written to in place
    outs = outputs(norm, functional, given)
    given[name].data_ptr()
    with torch.no_grad():
        given[name].mul_(3.0)
    wanted = {key: value for key, value in made.items() if value.requires_grad}
    try:
        found = torch.autograd.grad(outs, list(wanted.values()), douts)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    for key, value in zip(wanted, found, strict=True):
        assert_same_bits(value, exact[key], f"{norm}: d{key} after {name} was changed in place")


def test_a_changed_x_or_weight_raises_torchs_version_error(backend: str) -> None:
    """Where the saved tensor itself was written to, the error must come: the true gradient is gone."""
    for norm, name in (
        (BY_NAME["layer_norm"], "x"),
        (BY_NAME["layer_norm"], "weight"),
        (BY_NAME["rms_norm"], "x"),
        (BY_NAME["rms_norm"], "weight"),
        (BY_NAME["batch_norm in training"], "x"),
        (BY_NAME["batch_norm in training"], "weight"),
        (BY_NAME["batch_norm in eval"], "weight"),
    ):
        made = leaves(make_inputs(norm, norm.shapes[0], torch.float32))
        outs = outputs(norm, functional, made)
        with torch.no_grad():
            made[name].mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outs[0].sum().backward()


def test_a_changed_total_raises_and_a_changed_out_does_not(backend: str) -> None:
    for fused in (functional.add_layer_norm, functional.add_rms_norm):
        x, residual = normal((4, 9), 1).requires_grad_(), normal((4, 9), 2)
        out, total = fused(x, residual, 9)
        with torch.no_grad():
            total.mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    for norm in NORMS:
        inputs = make_inputs(norm, norm.shapes[0], torch.float64)
        made = leaves(inputs)
        out = outputs(norm, functional, made)[0]
        dout = make_douts(norm, inputs)[0]
        exact = gradients(norm, functional, inputs, (dout * 2, *([None] * ("residual" in inputs))))
        found = torch.autograd.grad(out.mul_(2.0), [made[name] for name in exact], dout)
        for name, value in zip(exact, found, strict=True):
            assert_same_bits(value, exact[name], f"{norm}: d{name} after out.mul_(2)")


def test_backward_runs_on_the_backend_of_forward_outside_its_context(backend: str) -> None:
    norm = BY_NAME["layer_norm"]
    inputs = make_inputs(norm, (65, 37), torch.float32)
    douts = make_douts(norm, inputs)
    inside = gradients(norm, functional, inputs, douts)
    made = leaves(inputs)
    outs = outputs(norm, functional, made)
    with normkit.use_backend("reference"):
        found = torch.autograd.grad(outs, [made[name] for name in inside], douts)
    for name, value in zip(inside, found, strict=True):
        assert_same_bits(value, inside[name], f"d{name}")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_gradients_of_nothing_are_zeros(name: str, shape: tuple[int, ...], backend: str) -> None:
    norm = BY_NAME[name]
    inputs = make_inputs(norm, shape, torch.float32)
    for key, value in gradients(norm, functional, inputs, make_douts(norm, inputs)).items():
        assert value.shape == inputs[key].shape
        assert not value.any(), f"d{key} of an empty batch: {value}"


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_second_derivatives_reach_an_input_that_kernels_must_copy(name: str, backend: str) -> None:
    """A transposed x is saved itself, not its contiguous copy, which no derivative could pass."""
    values = normal((8, 6), 21)
    second = []
    for function in (getattr(functional, name), getattr(torch.nn.functional, name)):
        x = values.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x.t(), (8,), eps=1e-5).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(second[0], second[1], rtol=1e-9, atol=1e-9)
