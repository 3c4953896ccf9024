"""One table of calls for the tests of PyTorch's machinery: ours and torch's, with the inputs for both.

Here: CALLS (rows with and without a residual, batch_norm in training and in eval, norms within a sample), `inputs`,
`scalar`, `gradients`, `watch_core`, `record_primitives`.
Read next: test_transforms.py, which runs the table through every transform; test_compile.py, through the compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit.functional as NF
from normkit import backends
from normkit.kernels import cpu

PRIMITIVES = (
    "rows_forward",
    "rows_backward",
    "channels_moments",
    "channels_affine",
    "channels_backward_moments",
    "channels_backward_affine",
)
# What else the compiled core is asked for, and the primitives that this stands for where it takes the call.
WHOLE_CALLS = (
    (backends, "norm_now", ("rows_forward",)),
    (backends, "norm_backward_now", ("rows_backward",)),
    (backends, "batch_norm_now", ("channels_moments", "channels_affine")),  # in eval only the second
    (backends, "sample_norm_now", ("channels_moments", "channels_affine")),
    (backends, "batch_norm_backward_now", ("channels_backward_moments", "channels_backward_affine")),
)
D = 16  # normalized size of the row calls
C = 3  # channels of the batch_norm calls


@dataclass(frozen=True)
class Call:
    """One function call; both functions return a tuple of tensors. The first `differentiable` inputs get gradients."""

    name: str
    ours: Callable[..., tuple[Tensor, ...]]
    torchs: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    differentiable: int
    forward: tuple[str, ...]  # the primitives that eager forward and backward ask of a kernel
    backward: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (NF.layer_norm(x, D, weight, bias),)


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.layer_norm(x, (D,), weight, bias),)


def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (NF.rms_norm(x, D, weight, 1e-6),)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.rms_norm(x, (D,), weight, 1e-6),)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return NF.add_layer_norm(x, residual, D, weight, bias)


def _torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return F.layer_norm(x + residual, (D,), weight, bias), x + residual


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return NF.add_rms_norm(x, residual, D, weight, 1e-6)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return F.rms_norm(x + residual, (D,), weight, 1e-6), x + residual


def _batch_norm_train(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (NF.batch_norm(x, None, None, weight, bias, training=True),)


def _torch_batch_norm_train(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.batch_norm(x, None, None, weight, bias, training=True),)


def _batch_norm_eval(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    return (NF.batch_norm(x, mean, var, weight, bias),)


def _torch_batch_norm_eval(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    return (F.batch_norm(x, mean, var, weight, bias),)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (NF.group_norm(x, 2, weight, bias),)


def _torch_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.group_norm(x, 2, weight, bias),)


def _instance_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (NF.instance_norm(x, weight=weight, bias=bias),)


def _torch_instance_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.instance_norm(x, weight=weight, bias=bias),)


_ROW = ((6, D), (D,))
_ADD = ((6, D), (6, D), (D,))
_CHANNEL = ((4, C, 5), (C,), (C,))
_ROWS = (("rows_forward",), ("rows_backward",))
_TRAIN = (("channels_moments", "channels_affine"), ("channels_backward_moments", "channels_backward_affine"))
_EVAL = (("channels_affine",), ("channels_backward_moments", "channels_backward_affine"))

CALLS = (
    Call("layer_norm", _layer_norm, _torch_layer_norm, (*_ROW, (D,)), 3, *_ROWS),
    Call("rms_norm", _rms_norm, _torch_rms_norm, _ROW, 2, *_ROWS),
    Call("add_layer_norm", _add_layer_norm, _torch_add_layer_norm, (*_ADD, (D,)), 4, *_ROWS),
    Call("add_rms_norm", _add_rms_norm, _torch_add_rms_norm, _ADD, 3, *_ROWS),
    Call("batch_norm-train", _batch_norm_train, _torch_batch_norm_train, _CHANNEL, 3, *_TRAIN),
    Call("batch_norm-eval", _batch_norm_eval, _torch_batch_norm_eval, (*_CHANNEL, (C,), (C,)), 3, *_EVAL),
    Call("group_norm", _group_norm, _torch_group_norm, ((4, 10, 5), (10,), (10,)), 3, *_TRAIN),
    Call("instance_norm", _instance_norm, _torch_instance_norm, _CHANNEL, 3, *_TRAIN),
)


def inputs(
    call: Call, *, dtype: torch.dtype = torch.float64, rows: int | None = None, grad: bool = True
) -> list[Tensor]:
    """Fresh leaves for one call, the same on every call; running variances are positive."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index, shape in enumerate(call.shapes):
        batched = rows is not None and len(shape) > 1
        size = (rows, *shape[1:]) if batched else shape
        value = torch.randn(size, generator=generator, dtype=torch.float64) * 1.5 + 0.5
        if index >= call.differentiable:
            value = value.abs() + 0.5
        made.append(value.to(dtype).requires_grad_(grad and index < call.differentiable))
    return made


def scalar(outputs: Sequence[Tensor]) -> Tensor:
    """One number that depends on every element nonlinearly, so that second derivatives do not vanish."""
    first, *others = [out.sin().sum() for out in outputs]
    return sum(others, first)  # not stacked: DTensor of torch 2.8 does not differentiate that


def gradients(function: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `scalar` of the function's outputs by the arguments that require them."""
    return torch.autograd.grad(scalar(function(*arguments)), [a for a in arguments if a.requires_grad])


def watch_core(patch: Callable[[object, str, object], None], on_call: Callable[[str], None]) -> None:
    """Calls on_call(primitive) for every primitive that the compiled core computes; `patch` is setattr."""

    def watched(name: str, function: Callable[..., Any], primitives: tuple[str, ...]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            fixed = name == "batch_norm_now" and not args[5]  # training
            if result is not None:
                for primitive in primitives[1:] if fixed else primitives:
                    on_call(primitive)
            return result

        return watching

    for owner, name, primitives in (*((cpu, name, (name,)) for name in PRIMITIVES), *WHOLE_CALLS):
        patch(owner, name, watched(name, getattr(owner, name), primitives))


def record_primitives(patch: Callable[[object, str, object], None]) -> list[str]:
    """A list that grows by the name of each primitive that the compiled core is asked for; `patch` is setattr."""
    called: list[str] = []
    watch_core(patch, called.append)
    return called
