"""Row norms of jagged nested tensors: on their packed values, so that every backend takes them.

Here: `alone`, whether a call is ours to take apart, and `over_values`, which takes it apart and puts it together.
May import: torch, _checks.
Read next: rows.py, which computes on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from normkit import _checks


def is_jagged(x: object) -> bool:
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter):
        return False
    with torch._C.DisableTorchFunctionSubclass():  # a subclass that overrides functions is not asked for attributes
        return x.layout is torch.jagged


def alone(data: tuple[Tensor | None, ...], *parameters: Tensor | None) -> bool:
    """Whether all `data` are jagged and nothing else overrides the call: no function mode, no other subclass."""
    return not has_torch_function_variadic(*parameters) and all(value is None or is_jagged(value) for value in data)


def over_values(
    op: str,
    compute: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],  # (out, total) of plain tensors
    x: Any,  # (B, ragged, ..., *normalized_shape), or with the ragged axis further back
    residual: Any,  # as x, or None
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, total) with x's offsets and ragged size, so that `out + x` is allowed; total is x without a residual.

    Positions of the packed values that belong to no sample (`torch.nested.narrow` leaves some) are computed as zeros:
    whatever stands there would otherwise reach the gradients of weight and bias.
    """
    values, lengths = x.values(), x.lengths()
    # the ragged axis: its size in x equals no number
    axis = next(i + 1 for i, size in enumerate(values.shape) if size != x.shape[i + 1])
    _check(op, x, values, axis, normalized_shape, weight, bias)
    gaps = None
    if lengths is not None:
        if residual is not None and not torch.equal(x.offsets(), residual.offsets()):  # equal shapes do not tell it
            raise ValueError(f"{op}: residual must have x's offsets, got other ones; make both of the same offsets")
        gaps = _gaps(values, axis, x.offsets()[:-1], lengths)

    def filled(values: Tensor) -> Tensor:
        return values if gaps is None else values.masked_fill(gaps, 0.0)

    def as_x(values: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(filled(values), x.offsets(), lengths, axis)

    out, total = compute(filled(values), None if residual is None else filled(residual.values()))
    return as_x(out), x if residual is None else as_x(total)


def _check(
    op: str,
    x: Tensor,
    values: Tensor,
    axis: int,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """What the check of the values cannot say in terms of x."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if axis >= x.dim() - len(shape):
        raise ValueError(
            f"{op}: x must not be ragged along a normalized axis, got x of shape {_checks.shape_text(x.shape)}, ragged "
            f"along axis {axis}, and {len(shape)} normalized axes; normalize over axes behind it, or each of x.unbind()"
        )
    if tuple(values.shape[values.dim() - len(shape) :]) != shape:
        _checks.normalized_shape(op, x, normalized_shape, weight, bias)


def _gaps(values: Tensor, axis: int, starts: Tensor, lengths: Tensor) -> Tensor:
    """For each position of the packed axis whether no sample holds it; shaped to stand beside `values`."""
    steps = torch.zeros(values.shape[axis - 1] + 1, dtype=torch.int64, device=values.device)
    ones = torch.ones_like(starts, dtype=torch.int64)
    steps.index_add_(0, starts, ones).index_add_(0, starts + lengths, -ones)
    outside: Tensor = steps.cumsum(0)[:-1] == 0
    return outside.view(-1, *[1] * (values.dim() - axis))
