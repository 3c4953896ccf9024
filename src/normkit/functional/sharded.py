"""Row norms whose normalized axis is split over the ranks of a process group, as tensor parallelism splits it.

Here: what each rank counts of its shard, the merge, and how both are differentiated.
May import: torch, ranks, reference.
Read next: ranks.py, the collectives; reference.py, the formulas.

Forward sends R + 1 numbers for RMSNorm (sums of squares and D, summed) and 2 R + 1 for LayerNorm (mean, m2 and D,
gathered and merged by Chan's formula); backward sums R or 2 R numbers. From reading x to the one rounding at the end
all is float64, so that squares of finite float32 values do not overflow. The loss is the sum of what the ranks' outputs
contribute; all ranks of the group make the same calls, forward and backward.

Ranks are compared at a group's and at a layer's first call, not at later ones, which would cost a second message each.
Where the number of rows differs later, gloo ends a process, runs into its timeout or gives wrong numbers;
TORCH_DISTRIBUTED_DEBUG=DETAIL lets torch compare every message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from normkit import ranks, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Elements of x that are float64 at a time on the CPU: 1 MB. Forward of (4096, 1024) float32 on one thread took 12 ms
# so, 138 in one piece and 25 by 2^14.
_BLOCK = 1 << 17

_compared: WeakSet[Any] = WeakSet()  # groups whose ranks were found to agree


def compare_again(group: ranks.ProcessGroup) -> None:
    """Let the group's next call compare what its ranks are asked for, as its first call does."""
    _compared.discard(group)


def row_norm(
    op: str,
    group: ranks.ProcessGroup,
    x: Tensor,  # (..., D), this rank's shard
    residual: Tensor | None,  # (..., D)
    weight: Tensor | None,  # (D,)
    bias: Tensor | None,  # (D,)
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """(out, total): this rank's shard of the norm of the whole rows. Compiled code runs it between its graphs."""
    total = x if residual is None else x + residual
    arguments = (op, group, total, weight, bias, eps, centered, weight_offset)
    if torch.compiler.is_compiling():
        uncompiled = torch.compiler.disable(_row_norm)  # type: ignore[no-untyped-call]
        return uncompiled(*arguments), total
    return _row_norm(*arguments), total


def _row_norm(
    op: str,
    group: ranks.ProcessGroup,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> Tensor:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if hasattr(value, "__tensor_flatten__"):  # DTensor, and others that wrap tensors
            raise TypeError(
                f"{op}: {name} must be this rank's own plain shard where shard_group is given, got "
                f"{type(value).__name__}; pass {name}.to_local(), or leave shard_group out"
            )
    if group not in _compared:
        _compare(op, x, eps, centered, weight_offset, group)
        _compared.add(group)
    out: Tensor = ShardedRowNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, eps, centered, weight_offset, group
    )
    return out


def _compare(op: str, x: Tensor, eps: float, centered: bool, weight_offset: float, group: ranks.ProcessGroup) -> None:
    """What would send messages of another size or at another time on one rank, or make its shard another norm's.

    Gloo ends a process whose messages have another size than its partners', without an exception.
    """
    recorded = torch.is_grad_enabled() and x.requires_grad
    facts = (
        ("the norm", centered, ("rms_norm", "layer_norm")),
        ("x's number of rows", x.shape[:-1].numel(), ()),
        ("x's dtype", _DTYPES.index(x.dtype), _DTYPES),
        ("eps", eps, ()),
        ("weight_offset", weight_offset, ()),
        ("whether x takes a gradient", recorded, ("no", "yes")),
    )
    ranks.agree_on(op, facts, group, x.device, "give all ranks of a shard_group the same rows and the same layers")


class ShardedRowNorm(torch.autograd.Function):
    """out of one shard (..., D). Saves x, weight and, in float64, mean, rstd and the size of the whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        weight_offset: float,
        group: ranks.ProcessGroup,
    ) -> Tensor:
        rows = _rows(x)
        mean, var, size = _statistics(rows, centered, group)
        rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd, size)
        ctx.arguments = eps, centered, weight_offset, group, None if bias is None else bias.dtype
        gain, shift = _wide_gain(weight, weight_offset), None if bias is None else bias.double()
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part in _blocks(rows):
            center = None if mean is None else mean[part]
            out[part] = reference.rows_affine(rows[part], center, rstd[part], gain, shift, 0.0)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, size = ctx.saved_tensors
        eps, centered, weight_offset, group, bias_dtype = ctx.arguments
        needs = ctx.needs_input_grad[:3]
        rows, douts = _rows(x), _rows(dout)
        gain = _wide_gain(weight, weight_offset)
        if torch.is_grad_enabled():  # create_graph=True: the same once more, as operations that can be differentiated
            mean, rstd = _recorded_statistics(rows, size, eps, centered, group)
            dx, dweight, dbias = _gradients(douts, rows, mean, rstd, gain, size, group, needs)
        else:
            dx, dweight, dbias = _gradients_in_blocks(douts, rows, mean, rstd, gain, size, group, needs)
        return (
            None if dx is None else dx.to(x.dtype).view(x.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias_dtype),
            *[None] * 4,
        )


# Below: rows are (R, D), statistics (R, 1) and float64, `size` is D of the whole rows, (), float64.


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows whose float64 copies stay in a core's cache; other devices take all rows at once."""
    count, size = rows.shape
    step = max(1, _BLOCK // max(size, 1)) if rows.device.type == "cpu" else max(count, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def _wide_gain(weight: Tensor | None, weight_offset: float) -> Tensor | None:
    return None if weight is None else reference.gain(weight, weight_offset, torch.float64)


def _counted(rows: Tensor, centered: bool) -> Tensor:
    """What one rank sends: mean (R; if `centered`) and sum of squares about it (R), and its D."""
    count, size = rows.shape
    columns = 2 if centered else 1
    sent = rows.new_empty(columns * count + 1, dtype=torch.float64)
    sent[-1] = size
    moments = sent[:-1].view(columns, count, 1)
    for part in _blocks(rows):
        wide = rows[part].double()
        if centered:
            moments[0, part] = mean = wide.sum(-1, keepdim=True) / max(size, 1)  # a shard may be empty
            wide = wide - mean
        moments[-1, part] = (wide * wide).sum(-1, keepdim=True)
    return sent


def _statistics(rows: Tensor, centered: bool, group: ranks.ProcessGroup) -> tuple[Tensor | None, Tensor, Tensor]:
    """mean or None, var, and size of the whole rows, by one collective."""
    counted = _counted(rows, centered)
    if not centered:
        sums = ranks.summed(counted, group)
        return None, (sums[:-1] / sums[-1]).unsqueeze(-1), sums[-1]
    found = ranks.gathered(counted, group)
    means, m2s = found[:, :-1].reshape(found.shape[0], 2, rows.shape[0], 1).unbind(1)  # (ranks, R, 1)
    sizes = found[:, -1].view(-1, 1, 1)
    size = sizes.sum()
    mean = (means * (sizes / size)).sum(0)
    return mean, (m2s + sizes * (means - mean) ** 2).sum(0) / size, size


def _recorded_statistics(
    rows: Tensor, size: Tensor, eps: float, centered: bool, group: ranks.ProcessGroup
) -> tuple[Tensor | None, Tensor]:
    """mean or None, and rstd, differentiable: the sum over ranks, then the squares about the mean of the whole rows."""
    wide, mean = rows.double(), None
    if centered:
        mean = ranks.summed(wide.sum(-1, keepdim=True), group) / size
        wide = wide - mean
    return mean, torch.rsqrt(ranks.summed((wide * wide).sum(-1, keepdim=True), group) / size + eps)


def _sums(dout: Tensor, rows: Tensor, mean: Tensor | None, rstd: Tensor, gain: Tensor | None) -> Tensor:
    """Of one rank, sum(g * xhat) and, with a mean, sum(g): (R, 1) or (R, 2); g = dout * gain."""
    wide = rows.double()
    xhat = (wide if mean is None else wide - mean) * rstd
    g = dout.double() if gain is None else dout.double() * gain
    sums = [(g * xhat).sum(-1)] if mean is None else [(g * xhat).sum(-1), g.sum(-1)]
    return torch.stack(sums, -1)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias


def _gradients(
    dout: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gain: Tensor | None,
    size: Tensor,
    group: ranks.ProcessGroup,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """dx, dweight, dbias in float64, as differentiable operations; None where `needs` says no."""
    dx = None
    if needs[0]:
        means = ranks.summed(_sums(dout, rows, mean, rstd, gain), group) / size
        dx = _dx(dout, rows, mean, rstd, gain, means)
    return (dx, *_parameter_gradients(dout, rows, mean, rstd, needs))


def _gradients_in_blocks(
    dout: Tensor,
    rows: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gain: Tensor | None,
    size: Tensor,
    group: ranks.ProcessGroup,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """`_gradients` by blocks of rows, in a fixed order; dx is rounded to x's dtype."""
    saved = [
        (part, (dout[part], rows[part], None if mean is None else mean[part], rstd[part])) for part in _blocks(rows)
    ]
    dx = None
    if needs[0]:
        sums = rstd.new_empty(rows.shape[0], 1 if mean is None else 2)
        for part, block in saved:
            sums[part] = _sums(*block, gain)
        means = ranks.summed(sums, group) / size
        dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part, block in saved:
            dx[part] = _dx(*block, gain, means[part])
    dweight, dbias = (rstd.new_zeros(rows.shape[1]) if need else None for need in needs[1:])
    for _, block in saved:
        for whole, own in zip((dweight, dbias), _parameter_gradients(*block, needs), strict=True):
            if whole is not None and own is not None:
                whole += own
    return dx, dweight, dbias


def _dx(dout: Tensor, rows: Tensor, mean: Tensor | None, rstd: Tensor, gain: Tensor | None, means: Tensor) -> Tensor:
    """`means` of g * xhat and, with a mean, of g over the whole rows."""
    mean_g = None if mean is None else means[:, 1:]
    return reference.rows_backward_affine(dout, rows, mean, rstd, gain, 0.0, mean_g, means[:, :1])


def _parameter_gradients(
    dout: Tensor, rows: Tensor, mean: Tensor | None, rstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    center = None if mean is None else mean.squeeze(-1)
    needs = (False, *needs[1:])
    return reference.rows_backward(dout, None, rows, center, rstd.squeeze(-1), None, 0.0, needs)[1:]
