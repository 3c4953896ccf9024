"""One table, all tests: the norms, their inputs, memory layouts and sizes, and the float64 oracle.

Here: NORMS (a new norm is a new row, which then runs through every check), LAYOUTS, DTYPES, the oracle written from
the formulas, torch's counterparts. Nothing here calls normkit: a row's `call` takes the implementation as an argument,
so that normkit, torch, the oracle and a deliberately wrong norm go through the same line.
Read next: checks.py, what is required of an implementation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Inputs = dict[str, Tensor | None]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
NOT_DIFFERENTIATED = ("running_mean", "running_var")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


# --------------------------------------------------------------------------------------------- implementations


class Oracle:
    """The formulas in float64, straight from the definitions. `dtype` is what a stored total is rounded to."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):
        dims = tuple(range(-len(normalized_shape), 0))
        deviation = x - x.mean(dims, keepdim=True)
        out = deviation / torch.sqrt((deviation**2).mean(dims, keepdim=True) + eps)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def rms_norm(self, x, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
        dims = tuple(range(-len(normalized_shape), 0))
        eps = (2.0**-52 if self.dtype == torch.float64 else 2.0**-23) if eps is None else eps
        out = x / torch.sqrt((x**2).mean(dims, keepdim=True) + eps)
        return out if weight is None else out * (weight + weight_offset)

    def stored(self, total: Tensor) -> Tensor:
        """The total as memory holds it; its gradient passes, as through any rounding."""
        return total + (total.detach().to(self.dtype).double() - total.detach())

    def add_layer_norm(self, x, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
        total = self.stored(x + residual)
        return self.layer_norm(total, normalized_shape, weight, bias, eps), total

    def add_rms_norm(self, x, residual, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
        total = self.stored(x + residual)
        return self.rms_norm(total, normalized_shape, weight, eps, weight_offset=weight_offset), total

    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        across = (1, -1) + (1,) * (x.dim() - 2)
        if training:
            dims = (0, *range(2, x.dim()))
            mean = x.mean(dims, keepdim=True)
            var = ((x - mean) ** 2).mean(dims, keepdim=True)
        else:
            mean, var = running_mean.view(across), running_var.view(across)
        out = (x - mean) / torch.sqrt(var + eps)
        out = out if weight is None else out * weight.view(across)
        return out if bias is None else out + bias.view(across)

    def group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5):
        across = (1, -1) + (1,) * (x.dim() - 2)
        grouped = x.reshape(x.shape[0], num_groups, -1)
        deviation = grouped - grouped.mean(2, keepdim=True)
        out = (deviation / torch.sqrt((deviation**2).mean(2, keepdim=True) + eps)).reshape(x.shape)
        out = out if weight is None else out * weight.view(across)
        return out if bias is None else out + bias.view(across)

    def instance_norm(self, x, running_mean=None, running_var=None, weight=None, bias=None, eps=1e-5):
        return self.group_norm(x, x.shape[1], weight, bias, eps)


class Torch:
    """torch's own norms; its fused add does not exist, so it adds first."""

    layer_norm = staticmethod(torch.nn.functional.layer_norm)
    batch_norm = staticmethod(torch.nn.functional.batch_norm)
    group_norm = staticmethod(torch.nn.functional.group_norm)
    instance_norm = staticmethod(torch.nn.functional.instance_norm)

    @staticmethod
    def rms_norm(x, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
        if weight is not None and weight_offset:
            weight = weight.to(accumulation_dtype(weight.dtype)) + weight_offset
        with warnings.catch_warnings():  # a mixed dtype is slow in torch, and it says so
            warnings.filterwarnings("ignore", message="Mismatch dtype")
            return torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)

    @classmethod
    def add_layer_norm(cls, x, residual, *arguments, **keywords):
        return cls.layer_norm(x + residual, *arguments, **keywords), x + residual

    @classmethod
    def add_rms_norm(cls, x, residual, *arguments, **keywords):
        return cls.rms_norm(x + residual, *arguments, **keywords), x + residual


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Norm:
    """One row: how it is called, which inputs it has for a shape of x, and which axes share statistics."""

    name: str
    call: Callable[..., Any]  # call(implementation, x, ...) -> out, or (out, total)
    shapes: tuple[Shape, ...]  # of x
    inputs: Callable[[Shape], dict[str, Shape]]
    axes: Callable[[Shape], Shape] = lambda shape: (-1,)
    rows: bool = True  # the rows family; False for channels
    takes: Callable[[Shape], bool] = lambda shape: True  # of the shapes that a check makes up

    def __str__(self) -> str:
        return self.name


def _rows(*parameters: str, dims: int = 1) -> Callable[[Shape], dict[str, Shape]]:
    """x, perhaps a residual, and parameters of the trailing shape (dims = 0: the whole of x)."""
    return lambda shape: {
        "x": shape,
        **{name: shape if name == "residual" else shape[-dims:] for name in parameters},
    }


def _channels(*parameters: str) -> Callable[[Shape], dict[str, Shape]]:
    return lambda shape: {"x": shape, **dict.fromkeys(parameters, shape[1:2])}


_ROW_SHAPES = ((5, 37), (2, 3, 16))
_CHANNEL_SHAPES = ((17, 5), (4, 5, 11), (3, 5, 4, 6), (2, 3, 2, 3, 4))


def _over_batch_and_space(shape: Shape) -> Shape:
    return (0, *range(2, len(shape)))


def _within_a_sample(shape: Shape) -> Shape:
    return tuple(range(1, len(shape)))


def _within_a_channel(shape: Shape) -> Shape:
    return tuple(range(2, len(shape)))


NORMS = (
    Norm(
        "layer_norm",
        lambda norms, x, weight, bias: norms.layer_norm(x, x.shape[-1:], weight, bias),
        (*_ROW_SHAPES, (2, 3, 4, 8)),
        _rows("weight", "bias"),
    ),
    Norm(
        "layer_norm without bias, eps 0.1",
        lambda norms, x, weight: norms.layer_norm(x, x.shape[-1:], weight, eps=0.1),
        _ROW_SHAPES,
        _rows("weight"),
    ),
    Norm(
        "layer_norm without parameters",
        lambda norms, x: norms.layer_norm(x, x.shape[-1:]),
        _ROW_SHAPES,
        _rows(),
    ),
    Norm(
        "layer_norm over two axes",
        lambda norms, x, weight, bias: norms.layer_norm(x, x.shape[-2:], weight, bias),
        ((3, 4, 7), (2, 3, 5, 6)),
        _rows("weight", "bias", dims=2),
        lambda shape: (-2, -1),
    ),
    Norm(
        "rms_norm",
        lambda norms, x, weight: norms.rms_norm(x, x.shape[-1:], weight, 1e-5),
        (*_ROW_SHAPES, (2, 3, 4, 8), (2, 1, 2, 3, 9)),
        _rows("weight"),
    ),
    Norm(
        "rms_norm with torch's default eps",
        lambda norms, x: norms.rms_norm(x, x.shape[-1:]),
        _ROW_SHAPES,
        _rows(),
    ),
    Norm(
        "rms_norm with gain 1 + weight",
        lambda norms, x, weight: norms.rms_norm(x, x.shape[-1:], weight, 1e-6, weight_offset=1.0),
        _ROW_SHAPES,
        _rows("weight"),
    ),
    Norm(
        "rms_norm of the whole matrix",
        lambda norms, x, weight: norms.rms_norm(x, x.shape, weight, 1e-5),
        ((5, 37), (2, 3, 5)),
        _rows("weight", dims=0),
        lambda shape: tuple(range(len(shape))),
    ),
    Norm(
        "add_layer_norm",
        lambda norms, x, residual, weight, bias: norms.add_layer_norm(x, residual, x.shape[-1:], weight, bias),
        _ROW_SHAPES,
        _rows("residual", "weight", "bias"),
    ),
    Norm(
        "add_layer_norm over two axes",
        lambda norms, x, residual: norms.add_layer_norm(x, residual, x.shape[-2:]),
        ((3, 4, 7),),
        _rows("residual"),
        lambda shape: (-2, -1),
    ),
    Norm(
        "add_rms_norm",
        lambda norms, x, residual, weight: norms.add_rms_norm(x, residual, x.shape[-1:], weight, 1e-5),
        (*_ROW_SHAPES, (2, 3, 4, 8)),
        _rows("residual", "weight"),
    ),
    Norm(
        "add_rms_norm with gain 1 + weight",
        lambda norms, x, residual, weight: norms.add_rms_norm(x, residual, x.shape[-1:], weight, weight_offset=1.0),
        _ROW_SHAPES,
        _rows("residual", "weight"),
    ),
    Norm(
        "batch_norm in training",
        lambda norms, x, weight, bias: norms.batch_norm(x, None, None, weight, bias, True),
        _CHANNEL_SHAPES,
        _channels("weight", "bias"),
        _over_batch_and_space,
        rows=False,
    ),
    Norm(
        "batch_norm in training without parameters",
        lambda norms, x: norms.batch_norm(x, None, None, training=True, eps=1e-3),
        _CHANNEL_SHAPES,
        _channels(),
        _over_batch_and_space,
        rows=False,
    ),
    Norm(
        "batch_norm in eval",
        lambda norms, x, running_mean, running_var, weight, bias: norms.batch_norm(
            x, running_mean, running_var, weight, bias
        ),
        _CHANNEL_SHAPES,
        _channels("running_mean", "running_var", "weight", "bias"),
        lambda shape: (),
        rows=False,
    ),
    Norm(
        "batch_norm in eval without parameters",
        lambda norms, x, running_mean, running_var: norms.batch_norm(x, running_mean, running_var),
        ((3, 5, 4, 6),),
        _channels("running_mean", "running_var"),
        lambda shape: (),
        rows=False,
    ),
    Norm(
        "group_norm",
        lambda norms, x, weight, bias: norms.group_norm(x, 2, weight, bias),
        ((17, 6), (4, 6, 11), (3, 8, 4, 6), (2, 4, 2, 3, 4)),
        _channels("weight", "bias"),
        _within_a_sample,
        rows=False,
        takes=lambda shape: shape[1] % 2 == 0,
    ),
    Norm(
        "group_norm of one group without parameters, eps 0.1",
        lambda norms, x: norms.group_norm(x, 1, eps=0.1),
        ((5, 7), (4, 5, 11)),
        _channels(),
        _within_a_sample,
        rows=False,
    ),
    Norm(
        "instance_norm",
        lambda norms, x, weight, bias: norms.instance_norm(x, weight=weight, bias=bias),
        ((4, 5, 11), (3, 5, 4, 6), (2, 3, 2, 3, 4)),
        _channels("weight", "bias"),
        _within_a_channel,
        rows=False,
        takes=lambda shape: math.prod(shape[2:]) > 1,
    ),
)
ROWS = tuple(norm for norm in NORMS if norm.rows)
CHANNELS = tuple(norm for norm in NORMS if not norm.rows)
BY_NAME = {norm.name: norm for norm in NORMS}

# Normalized sizes around every vector width in use (4 to 32 elements, unrolled by up to 4), primes, and 1.
ROW_SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1031, 4095, 4097, 12289)
ROW_COUNTS = (0, 1, 2, 31)
HUGE = 2**18 + 3  # one row that threads share: 64 blocks of the core and a tail


# ------------------------------------------------------------------------------------------------------ layouts


def _row_strided(values: Tensor) -> Tensor:
    wider = values.new_full((*values.shape[:-1], values.shape[-1] + 3), float("nan"))
    wider[..., :-3] = values
    return wider[..., :-3]


def _qkv_slice(values: Tensor) -> Tensor:
    """The k of a fused (..., 3, heads, D) projection: two outer strides that no single one replaces."""
    dim = max(values.dim() - 2, 1)
    junk = torch.full_like(values, float("nan"))
    return torch.stack([junk, values, junk], dim).select(dim, 1)


def _transposed(values: Tensor) -> Tensor:
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(values: Tensor) -> Tensor:
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _overlapping(values: Tensor) -> Tensor:
    """Sliding windows: neighbours share memory, strides of 1 in every axis."""
    size = sum(extent - 1 for extent in values.shape) + 1
    return values.flatten()[:size].clone().as_strided(values.shape, (1,) * values.dim())


def _expanded(values: Tensor) -> Tensor:
    """Every sample is the first one, in the memory of one: stride 0."""
    if values.dim() == 2:  # would be constant channels to a BatchNorm, a subject of test_hard_values.py
        return _overlapping(values)
    return values[:1].expand(values.shape)


def _misaligned(values: Tensor) -> Tensor:
    """One element past the start of an allocation: aligned to the element, to no vector."""
    memory = values.new_empty(values.numel() + 1)
    return memory[1:].view(values.shape).copy_(values)


def _every_other(values: Tensor) -> Tensor:
    return torch.stack([values, torch.full_like(values, float("nan"))], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "row-strided": _row_strided,
    "qkv slice": _qkv_slice,
    "transposed": _transposed,
    "channels-last": _channels_last,
    "expanded": _expanded,
    "overlapping": _overlapping,
    "misaligned": _misaligned,
    "every other element": _every_other,
}


# ------------------------------------------------------------------------------------------------ inputs and runs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def make_inputs(
    norm: Norm,
    shape: Shape,
    dtype: torch.dtype,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
) -> Inputs:
    """x about 0.5 with standard deviation 2, residual alike, gains about 1, variances about 1.5; seeded by name."""
    made: Inputs = {}
    for name, size in norm.inputs(shape).items():
        values = normal(size, seed=len(name) * 7919 + sum(size))
        if name in ("x", "residual"):
            made[name] = LAYOUTS[layout]((values * 2.0 + 0.5).to(dtype))
            continue
        if name == "weight":
            values = values * 0.3 + (0.0 if "gain 1 +" in norm.name else 1.0)
        elif name == "running_var":
            values = values.abs() + 0.5
        made[name] = values.to(parameter_dtype or dtype)
    return made


def outputs(norm: Norm, implementation: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    result = norm.call(implementation, **inputs)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def leaves(inputs: Inputs, only: tuple[str, ...] | None = None) -> Inputs:
    """The same memory, as leaves; those named in `only` (default: all but running statistics) require gradients."""
    made = {name: value.detach() for name, value in inputs.items()}
    for name, value in made.items():
        value.requires_grad_(name not in NOT_DIFFERENTIATED if only is None else name in only)
    return made


def exactly(inputs: Inputs) -> Inputs:
    return {name: value.detach().double() for name, value in inputs.items()}


def gradients(norm: Norm, implementation: Any, inputs: Inputs, douts: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The gradient of every differentiable input; a None in `douts` leaves that output out of the loss."""
    made = leaves(inputs)
    wanted = {name: value for name, value in made.items() if value.requires_grad}
    used = [
        (out, dout) for out, dout in zip(outputs(norm, implementation, made), douts, strict=True) if dout is not None
    ]
    found = torch.autograd.grad(
        [out for out, _ in used], list(wanted.values()), [dout for _, dout in used], allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def make_douts(norm: Norm, inputs: Inputs, layout: str = "contiguous") -> tuple[Tensor, ...]:
    x = inputs["x"]
    count = 2 if "residual" in inputs else 1
    return tuple(LAYOUTS[layout](normal(tuple(x.shape), 101 + i, x.dtype)) for i in range(count))
