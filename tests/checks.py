"""What is required of an implementation of the norms, as functions that raise AssertionError.

Here: the checks that test_numerics.py, test_gradients.py, test_hard_values.py and test_batch_norm.py run on normkit,
and that test_wrong_norms.py runs on deliberately wrong norms, which each must fail one of them.
Read next: tolerance.py, wrong_norms.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cases import (
    BY_NAME,
    CHANNELS,
    LAYOUTS,
    NORMS,
    ROW_COUNTS,
    ROW_SIZES,
    ROWS,
    Norm,
    Oracle,
    Shape,
    Torch,
    exactly,
    gradients,
    leaves,
    make_douts,
    make_inputs,
    normal,
    outputs,
)
from tolerance import FLOOR, SUM_FLOOR, assert_exact_enough, assert_same_bits, threads

# ------------------------------------------------------------------------------------------------- against float64

Case = tuple[Norm, Shape, torch.dtype, str, torch.dtype | None]


@functools.lru_cache(maxsize=4096)
def _expected_outputs(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """float64's and torch's outputs: computed once for all implementations and backends."""
    norm, _, dtype, _, parameter_dtype = case
    inputs = make_inputs(*case)
    exact = outputs(norm, Oracle(dtype), exactly(inputs))
    return exact, outputs(norm, Torch, inputs) if parameter_dtype is None else (None,) * len(exact)


@functools.lru_cache(maxsize=8192)
def _expected_gradients(case: Case, through: tuple[bool, bool]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    norm, _, dtype, layout, parameter_dtype = case
    inputs = make_inputs(*case)
    douts = _chosen(make_douts(norm, inputs, layout), through)
    wide = tuple(None if dout is None else dout.double() for dout in douts)
    theirs = gradients(norm, Torch, inputs, douts) if parameter_dtype is None else {}
    return gradients(norm, Oracle(dtype), exactly(inputs), wide), theirs


def _chosen(douts: tuple[Tensor, ...], through: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    return tuple(dout if use else None for dout, use in zip(douts, through, strict=False))


def check_values(
    norms: Any,
    norm: Norm,
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
) -> None:
    """Outputs against float64 and torch; x's dtype and shape; new memory; inputs left alone."""
    case = (norm, tuple(shape), dtype, layout, parameter_dtype)
    inputs = make_inputs(*case)
    kept = {name: value.clone() for name, value in inputs.items()}
    exact, theirs = _expected_outputs(case)
    found = outputs(norm, norms, inputs)
    for name, ours, right, torchs in zip(("out", "total"), found, exact, theirs, strict=False):
        what = f"{norm} {tuple(shape)} {dtype} {layout}: {name}"
        assert ours.dtype == dtype, f"{what} is {ours.dtype}"
        assert_exact_enough(ours, right, torchs, what)
    for name, value in inputs.items():
        assert_same_bits(value, kept[name], f"{norm} {layout}: input {name} was written to")


def check_gradients(
    norms: Any,
    norm: Norm,
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
    through: tuple[bool, bool] = (True, True),
    floor: float = FLOOR,
) -> None:
    """Every gradient against float64 and torch; `through` chooses out and total. The incoming one is left alone."""
    case = (norm, tuple(shape), dtype, layout, parameter_dtype)
    inputs = make_inputs(*case)
    douts = make_douts(norm, inputs, layout)
    kept = [dout.clone() for dout in douts]
    exact, theirs = _expected_gradients(case, through)
    found = gradients(norm, norms, inputs, _chosen(douts, through))
    for name, right in exact.items():
        what = f"{norm} {tuple(shape)} {dtype} {layout}: d{name}"
        assert found[name].dtype == inputs[name].dtype, f"{what} is {found[name].dtype}"
        allowed = floor if name in ("x", "residual") else max(floor, SUM_FLOOR)
        assert_exact_enough(found[name], right, theirs.get(name), what, allowed)
    for dout, before in zip(douts, kept, strict=True):
        assert_same_bits(dout, before, f"{norm} {layout}: the incoming gradient was written to")


def check_second_derivatives(norms: Any, norm: Norm, shape: Shape, batched: bool = True) -> None:
    """gradcheck and gradgradcheck in float64: numerical against analytical, first and second order."""
    inputs = make_inputs(norm, shape, torch.float64)
    made = leaves(inputs)
    arguments = [value for value in made.values() if value.requires_grad]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        return outputs(norm, norms, {k: next(given) if v.requires_grad else v for k, v in made.items()})

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        right = check(call, arguments, raise_exception=False, check_batched_grad=batched)
        assert right, f"{norm}: {check.__name__} in float64 fails"


def check_row_sizes(norms: Any, norm: Norm, dtype: torch.dtype = torch.float32, gradients_too: bool = True) -> None:
    """Every normalized size around the vector widths, and every count of rows: nothing of a tail is lost."""
    for size in ROW_SIZES:
        check_values(norms, norm, (3, size), dtype)
        if gradients_too:
            # The gradient of one or two elements is what cancellation of much larger terms leaves: torch's own
            # error measures it, and below that the terms are at most rstd = 1 / sqrt(eps) = 1e3 times larger.
            check_gradients(norms, norm, (3, size), dtype, floor=FLOOR if size > 2 else 4096.0)
    for count in ROW_COUNTS:
        check_values(norms, norm, (count, 17), dtype)
        if gradients_too:
            check_gradients(norms, norm, (count, 17), dtype)


# ------------------------------------------------------------------------------------------------------ promises


def check_rows_alone(norms: Any, norm: Norm, dtype: torch.dtype, sizes: tuple[int, ...] = (8, 37, 1031)) -> None:
    """A row's result is bit-identical in whatever batch, at whatever position, with 1 or 2 threads."""
    for size in sizes:
        inputs = make_inputs(norm, (65, size), dtype)
        with threads(1):
            whole = outputs(norm, norms, inputs)
        for chosen in ([0], [64], [7, 3, 64, 0, 1], list(range(64, -1, -1))):
            for count in (1, 2):
                part = {k: v[chosen] if k in ("x", "residual") else v for k, v in inputs.items()}
                with threads(count):
                    found = outputs(norm, norms, part)
                for ours, expected in zip(found, whole, strict=True):
                    what = f"{norm} {dtype}, size {size}: {len(chosen)} of the 65 rows, {count} threads"
                    assert_same_bits(ours, expected[chosen], what)


def check_deterministic(norms: Any, norm: Norm, shape: Shape, dtype: torch.dtype) -> None:
    """Outputs and gradients are bit-identical from run to run and with 1 and 2 threads."""
    inputs = make_inputs(norm, shape, dtype)
    douts = make_douts(norm, inputs)
    seen = None
    for count in (1, 2, 2, 1):
        with threads(count):
            found = {"out": outputs(norm, norms, inputs)[0], **gradients(norm, norms, inputs, douts)}
        seen = seen or found
        for name, value in found.items():
            assert_same_bits(value, seen[name], f"{norm} {tuple(shape)} {dtype}: {name} with {count} threads")


def check_total_as_stored(norms: Any, dtype: torch.dtype) -> None:
    """add_*_norm is norm(x + residual): the total rounded, outputs and gradients that function's, to its rounding."""
    for kind in ("layer_norm", "rms_norm"):
        x, residual, dout, dtotal = (normal((9, 33), seed, dtype) for seed in (1, 2, 3, 4))
        residual *= 7.0
        fused_in = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        plain_in = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        fused = getattr(norms, f"add_{kind}")(*fused_in, (33,), eps=1e-5)
        total = plain_in[0] + plain_in[1]
        plain = (getattr(norms, kind)(total, (33,), eps=1e-5), total)
        assert_same_bits(fused[1], plain[1], f"add_{kind} {dtype}: total")
        assert_exact_enough(fused[0], plain[0].double(), None, f"add_{kind} {dtype}: out", floor=1.0)
        for through in ((dout, None), (None, dtotal), (dout, dtotal)):
            found, expected = (
                torch.autograd.grad(
                    [out for out, d in zip(pair, through, strict=True) if d is not None],
                    leaf,
                    [d for d in through if d is not None],
                    retain_graph=True,
                )
                for pair, leaf in ((fused, fused_in), (plain, plain_in))
            )
            for ours, theirs in zip(found, expected, strict=True):
                step = torch.finfo(dtype).eps * float(theirs.double().abs().max())
                off = float((ours.double() - theirs.double()).abs().max())
                assert off <= 2 * step, (
                    f"add_{kind} {dtype}: gradient off by {off:.3g}, two roundings are {2 * step:.3g}"
                )


def check_large_mean(norms: Any) -> None:
    """Mean 1e4 and standard deviation 1: the variance keeps its digits, since deviations are squared, not values.

    x itself is exact in float64; a float32 mean at 1e4 comes in steps of 9.8e-4 standard deviations, and a sum of
    1024 values may be two of them off. E[x^2] - E[x]^2 would lose all digits: at 1e8 a step of float32 is 8.
    """
    x = (normal((64, 1024), 5) + 1e4).float()
    exactly_x = x.double()
    for name, found, exact in (
        ("layer_norm", norms.layer_norm(x, (1024,)), Oracle(x.dtype).layer_norm(exactly_x, (1024,))),
        (
            "batch_norm",
            norms.batch_norm(x, None, None, training=True),
            Oracle(x.dtype).batch_norm(exactly_x, None, None, training=True),
        ),
    ):
        off = float((found.double() - exact).abs().max())
        assert off <= 2e-3, f"{name} at mean 1e4, standard deviation 1: off by {off:.3g}"


def check_large_mean_costs_nothing(norms: Any) -> None:
    """The stricter promise of the compiled core: what rounding takes from a mean of 1e4 is put back."""
    x = (normal((64, 3, 257), 5) + 1e4).float()
    exactly_x, oracle = x.double(), Oracle(x.dtype)
    exact = oracle.batch_norm(exactly_x, None, None, training=True)
    assert_exact_enough(norms.batch_norm(x, None, None, training=True), exact, None, "batch_norm at mean 1e4")
    exact = oracle.layer_norm(exactly_x, (257,))
    assert_exact_enough(norms.layer_norm(x, (257,)), exact, None, "layer_norm at mean 1e4")


def check_a_start_unlike_the_rest(norms: Any) -> None:
    """Where the first elements say nothing of the others, statistics about a centre sampled there lose nothing."""
    row = normal((3, 2**17), 15)
    row[:, :128] += 1e3
    row[1] *= 1e-3
    x = row.float()
    exact = Oracle(x.dtype).layer_norm(x.double(), (2**17,))
    assert_exact_enough(norms.layer_norm(x, (2**17,)), exact, None, "layer_norm of a row that starts elsewhere")
    planes = normal((2, 3, 8192), 16)
    planes[:, :, :128] += 1e3
    for layout in ("contiguous", "channels-last"):
        x = LAYOUTS[layout](planes.float())
        exact = Oracle(x.dtype).batch_norm(x.double(), None, None, training=True)
        found = norms.batch_norm(x, None, None, training=True)
        assert_exact_enough(found, exact, None, f"batch_norm of {layout} planes that start elsewhere")


def check_large_values(norms: Any) -> None:
    """A finite row never overflows, though the squares of its values do."""
    for dtype, scale in ((torch.float32, 1e30), (torch.float32, 3e37), (torch.bfloat16, 1e30), (torch.float16, 1e4)):
        x = (normal((5, 37), 6) * scale).clamp(-3e38, 3e38).to(dtype)
        for name in ("layer_norm", "rms_norm"):
            found = getattr(norms, name)(x, (37,), eps=1e-5)
            exact = getattr(Oracle(dtype), name)(x.double(), (37,), eps=1e-5)
            assert_exact_enough(found, exact, None, f"{name} of {dtype} values about {scale:g}")


def check_not_finite_as_torch(norms: Any, norm: Norm, bad: float) -> None:
    """One NaN or infinity in x: NaN and infinity come out exactly where torch lets them through."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(norm, norm.shapes[0], dtype)
        inputs["x"] = inputs["x"].clone()
        inputs["x"][1, 2] = bad
        for ours, theirs in zip(outputs(norm, norms, inputs), outputs(norm, Torch, inputs), strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                same = torch.equal(kind(ours), kind(theirs))
                assert same, f"{norm} {dtype} with {bad} in x: {kind.__name__} differs from torch"


# ------------------------------------------------------------------------------------------- running statistics


def run_batches(
    norms: Any, batches: list[Tensor], momentum: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Running mean and variance after these training batches, from 0 and 1."""
    channels = batches[0].shape[1]
    mean, var = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    for batch in batches:
        norms.batch_norm(batch, mean, var, training=True, momentum=momentum)
    return mean, var


def check_running_statistics(norms: Any, momentum: float, steps: int = 100, dtype: torch.dtype = torch.float64) -> None:
    """running_t = decay^t start + (1 - decay) sum_i decay^(t-i) batch_i, with the unbiased batch variance."""
    batches = [(normal((7, 3, 2), 50 + i) * (1 + i % 5) + i % 3).to(dtype) for i in range(steps)]
    found = run_batches(norms, batches, momentum, dtype)
    decay = 1.0 - momentum
    mean, var = torch.zeros(3, dtype=torch.float64), torch.full((3,), decay**steps, dtype=torch.float64)
    for i, batch in enumerate(batches):
        values = batch.double().transpose(0, 1).flatten(1)
        weight = momentum * decay ** (steps - 1 - i)
        mean += weight * values.mean(1)
        var += weight * values.var(1, correction=1)
    # every step rounds once and old errors fade by decay; the statistics themselves add a few units
    units = FLOOR + min(steps, 1.0 / momentum)
    for name, ours, exact in zip(("running_mean", "running_var"), found, (mean, var), strict=True):
        off = float((ours.double() - exact).abs().max() / (exact.abs().max() * torch.finfo(dtype).eps))
        assert off <= units, f"{name} after {steps} steps of momentum {momentum}: off by {off:.3g} units of {dtype}"


def check_running_outside_backprop(norms: Any) -> None:
    """No gradient reaches the buffers, and the buffers hold none of the graph."""
    x = normal((6, 3), 8).requires_grad_()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    out = norms.batch_norm(x, mean, var, training=True)
    assert out.requires_grad, "batch_norm: out must be differentiable"
    for name, buffer in (("running_mean", mean), ("running_var", var)):
        assert not buffer.requires_grad, f"batch_norm: {name} became part of the graph"


def check_eval_alone(norms: Any) -> None:
    """In eval a sample's result is bit-identical whatever its batch-mates, and the statistics stay as they were."""
    norm = BY_NAME["batch_norm in eval"]
    for shape in norm.shapes:
        inputs = make_inputs(norm, shape, torch.float32)
        kept = {name: value.clone() for name, value in inputs.items()}
        (whole,) = outputs(norm, norms, inputs)
        for i in range(shape[0]):
            (alone,) = outputs(norm, norms, {**inputs, "x": inputs["x"][i : i + 1]})
            assert_same_bits(alone, whole[i : i + 1], f"batch_norm in eval {shape}: sample {i} alone")
        for name, value in inputs.items():
            assert_same_bits(value, kept[name], f"batch_norm in eval: {name}")


def check_empty_batch(norms: Any) -> None:
    """An empty batch gives an empty output and leaves the running statistics as they are."""
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        mean, var = torch.full((3,), 0.25), torch.full((3,), 0.75)
        out = norms.batch_norm(torch.zeros(shape), mean, var, training=True)
        assert out.shape == shape, f"batch_norm of {shape}: shape {tuple(out.shape)}"
        assert mean.tolist() == [0.25] * 3, f"batch_norm of {shape}: running_mean became {mean.tolist()}"
        assert var.tolist() == [0.75] * 3, f"batch_norm of {shape}: running_var became {var.tolist()}"


# ------------------------------------------------------------------------------------------------- in one go, named


def _each(norms_to_check: tuple[Norm, ...], check: Any, *arguments: Any, **keywords: Any) -> Any:
    def run(norms: Any) -> None:
        for norm in norms_to_check:
            check(norms, norm, norm.shapes[0], *arguments, **keywords)

    return run


def _layouts(norms: Any) -> None:
    for norm in NORMS:
        for layout in LAYOUTS:
            check_values(norms, norm, norm.shapes[-1], torch.float32, layout)


def _rows_alone(norms: Any) -> None:
    for norm in ROWS:
        if norm.axes((5, 37)) == (-1,):
            check_rows_alone(norms, norm, torch.float32, sizes=(37,))


def _not_finite(norms: Any) -> None:
    for norm in NORMS:
        check_not_finite_as_torch(norms, norm, float("nan"))


CHECKS = {
    "values": _each(NORMS, check_values, torch.float32),
    "values in bfloat16": _each(NORMS, check_values, torch.bfloat16),
    "layouts": _layouts,
    "row sizes": lambda norms: check_row_sizes(norms, BY_NAME["layer_norm"], gradients_too=False),
    "gradients": _each(NORMS, check_gradients, torch.float32),
    "gradients of many rows": lambda norms: check_gradients(norms, BY_NAME["layer_norm"], (300, 17), torch.float64),
    "second derivatives": _each((BY_NAME["layer_norm"], *CHANNELS[:1]), check_second_derivatives, batched=False),
    "total as stored": lambda norms: check_total_as_stored(norms, torch.bfloat16),
    "rows alone": _rows_alone,
    "large mean": check_large_mean,
    "large mean costs nothing": check_large_mean_costs_nothing,
    "a start unlike the rest": check_a_start_unlike_the_rest,
    "large values": check_large_values,
    "not finite": _not_finite,
    "running statistics": lambda norms: check_running_statistics(norms, momentum=0.1, steps=20),
    "running statistics outside backpropagation": check_running_outside_backprop,
    "eval alone": check_eval_alone,
    "empty batch": check_empty_batch,
}
