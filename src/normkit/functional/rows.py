"""Norms along rows: layer_norm, rms_norm, and both after a residual add.

Here: check the arguments, differentiate, call the backend; the docstrings that quote the formulas.
May import: torch, _checks, reference, ranks, autograd, backends, calls, handover, nested, sharded.
Read next: autograd.py, what is saved and what backward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from normkit import _checks, backends, reference
from normkit.autograd import record_row_norm
from normkit.functional import handover, nested, sharded
from normkit.functional.calls import autocast_widens, overridden, profiled, requires_grad
from normkit.ranks import ProcessGroup
from normkit.reference import accumulation_dtype

_OMITTED = object()  # not None, which torch.utils._pytree may put in a tensor's place


class _Pair(NamedTuple):
    out: Tensor
    total: Tensor


class AddNorm(_Pair):
    """What `add_layer_norm` and `add_rms_norm` return.

    Made of one iterable too, as torch.return_types are: so does torch rebuild a result for a tensor subclass.
    """

    __slots__ = ()

    def __new__(cls, out: Any, total: Any = _OMITTED) -> Self:
        return cls._make(out) if total is _OMITTED else super().__new__(cls, out, total)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shard_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalizes each sample over its trailing `normalized_shape` axes to mean 0 and variance 1.

        mean = mean(x over D);  var = mean((x - mean)^2 over D)
        out = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        input: x (..., *normalized_shape); float32, float64, bfloat16 or float16; dense, or nested of layout jagged.
        normalized_shape: the trailing shape that shares statistics, D elements in all; an int means one axis.
        weight: gamma, shape `normalized_shape`, of any floating dtype; None multiplies by 1.
        bias: beta, the same; None adds 0.
        eps: added to the variance under the root; 1e-5 as in torch (Keras and Flax use 1e-3 and 1e-6).
        shard_group: the process group over whose ranks the normalized axes are split, as tensor parallelism splits
            them: x, normalized_shape, weight and bias are then this rank's shard, whose sizes may differ, and the
            statistics are those of the whole rows. The loss is taken to be the sum of what the ranks' outputs
            contribute; every rank of the group makes the same calls, backward too, on the same rows. None, which
            torch.distributed.group.WORLD is before init_process_group: not split.

    Returns:
        x's shape and dtype, contiguous, new memory.

    Raises:
        ValueError: "layer_norm: x must end with normalized_shape (4096,), got x of shape (2, 768); ..." and the
            like for weight, bias and eps; a ragged axis among the normalized ones. At a shard_group's first call, and
            at each layer's first, ranks whose rows, dtype, eps or norm differ (at later ones torch compares them, with
            TORCH_DISTRIBUTED_DEBUG=DETAIL).
        TypeError: x is no tensor, or has no floating-point dtype; shard_group is no process group.

    Numerics: statistics in float32 (float64 for float64), deviations from the mean squared, one rounding at the
        end. A finite row never overflows on a compiled backend, where torch's gives NaN beyond 1e19 in float32. A
        row that holds inf or NaN becomes NaN, as in torch; a constant row becomes `bias`. Rows are bit-identical
        whatever the batch size and the number of threads. Under CUDA autocast x is normalized in float32. With a
        shard_group everything before the rounding is float64; ranks send mean, m2 and D, merged by Chan's formula.
        A CUDA x of up to 8 MiB is computed by torch, with torch's numerics (docs/gpu.md; `use_backend("triton")`
        never hands a call over).

    Example:
        >>> import torch, normkit.functional as F
        >>> F.layer_norm(torch.tensor([[90.0, 80.0, 70.0]]), 3)
        tensor([[ 1.2247,  0.0000, -1.2247]])

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, eq. 3 and 4 (which have no eps).
    """
    if shard_group is None and not is_compiling():
        call = (input, None, normalized_shape, weight, bias, eps, True, 0.0)
        plain: Tensor | None = backends.norm_now(*call)
        if plain is None:
            plain = handover.row_norm_now(*call)
        if plain is not None:
            return plain
    if has_torch_function_variadic(input, weight, bias) and not nested.alone((input,), weight, bias):
        added = {} if shard_group is None else {"shard_group": shard_group}
        return overridden(layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps, **added)
    return _row_norm("layer_norm", input, None, normalized_shape, weight, bias, eps, True, 0.0, shard_group)[0]


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    shard_group: ProcessGroup | None = None,
) -> Tensor:
    """Divides each sample by its root mean square over the trailing `normalized_shape` axes; no mean is subtracted.

        rstd = 1 / sqrt(mean(x^2 over D) + eps);  out = x * rstd * (weight + weight_offset)

    Args:
        input: x (..., *normalized_shape); float32, float64, bfloat16 or float16; complex as in torch (x^2, not |x|^2);
            dense, or nested of layout jagged.
        normalized_shape: the trailing shape that shares the mean square, D elements; an int means one axis.
            `rms_norm(x, x.shape)` divides by the RMS of the whole matrix.
        weight: gamma, shape `normalized_shape`, of any floating dtype; None multiplies by 1.
        eps: added to the mean square under the root. None means the machine epsilon of the accumulation dtype
            (1.19e-7 for float32 and half inputs, 2.2e-16 for float64), as in torch 2.13; name it for a model
            that must not change with the library (Llama uses 1e-5 or 1e-6).
        weight_offset: 1.0 for gains that are stored as (1 + weight), as in Gemma.
        shard_group: as in `layer_norm`: x, normalized_shape and weight are then this rank's shard of rows that are
            split over the group's ranks.

    Returns:
        x's shape and dtype, contiguous, new memory.

    Raises:
        ValueError: "rms_norm: x must end with normalized_shape (4096,), got x of shape (2, 768); ..." and the like
            for weight and eps; as `layer_norm` for ragged axes and ranks that differ.
        TypeError: x is no tensor, or has an integer or boolean dtype; shard_group is no process group.

    Numerics: as `layer_norm`; the gain multiplies before the one rounding to x's dtype (Llama's own code rounds
        x * rstd first: up to one unit in the last place apart). An element inf gives NaN there and 0 elsewhere.
        With a shard_group ranks sum squares and D.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.rms_norm(torch.tensor([[3.0, 4.0]]), 2)
        tensor([[0.8485, 1.1314]])

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4 (which has no eps).
    """
    if shard_group is None and not is_compiling():
        call = (input, None, normalized_shape, weight, None, eps, False, weight_offset)
        plain: Tensor | None = backends.norm_now(*call)
        if plain is None:
            plain = handover.row_norm_now(*call)
        if plain is not None:
            return plain
    if has_torch_function_variadic(input, weight) and not nested.alone((input,), weight):
        # without what we add it is torch's call in torch's words: there are subclasses that take it by its name
        added: dict[str, Any] = {"weight_offset": weight_offset} if weight_offset else {}
        if shard_group is not None:
            added["shard_group"] = shard_group
        return overridden(rms_norm, (input, weight), input, normalized_shape, weight, eps, **added)
    return _row_norm("rms_norm", input, None, normalized_shape, weight, None, eps, False, weight_offset, shard_group)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> AddNorm:
    """Adds a residual and normalizes the sum over its trailing axes, reading and writing memory once.

        total = x + residual;  out = layer_norm(total, normalized_shape, weight, bias, eps)

    Args:
        x: (..., *normalized_shape); dense, or nested of layout jagged.
        residual: x's shape, or offsets. With another dtype than x's the sum is torch's, in the promoted dtype.
        normalized_shape, weight, bias, eps: as in `layer_norm`.

    Returns:
        AddNorm(out, total), both of x's shape, new memory.

    Raises:
        ValueError, TypeError: as `layer_norm`, and when the shapes of x and residual differ.

    Numerics: the total is normalized *as stored*, rounded to its dtype: values and gradients are those of
        `layer_norm(x + residual)`.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.add_layer_norm(torch.ones(1, 3), torch.tensor([[89.0, 79.0, 69.0]]), 3).total
        tensor([[90., 80., 70.]])

    Source: the PostNorm block of Vaswani et al., "Attention Is All You Need", 2017, section 3.1.
    """
    if residual is not None and not is_compiling():
        call = (x, residual, normalized_shape, weight, bias, eps, True, 0.0)
        plain = backends.norm_now(*call)
        if plain is None:
            plain = handover.row_norm_now(*call)
        if plain is not None:
            return AddNorm(*plain)
    if has_torch_function_variadic(x, residual, weight, bias) and not nested.alone((x, residual), weight, bias):
        return overridden(add_layer_norm, (x, residual, weight, bias), x, residual, normalized_shape, weight, bias, eps)
    _checks.addend("add_layer_norm", x, residual)
    pair = _row_norm("add_layer_norm", x, residual, normalized_shape, weight, bias, eps, True, 0.0)
    return AddNorm(*pair)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> AddNorm:
    """Adds a residual and divides the sum by its root mean square over the trailing axes, in one pass over memory.

        total = x + residual;  out = rms_norm(total, normalized_shape, weight, eps, weight_offset=weight_offset)

    Args:
        x: (..., *normalized_shape); dense, or nested of layout jagged.
        residual: x's shape, or offsets. With another dtype than x's the sum is torch's, in the promoted dtype.
        normalized_shape, weight, eps, weight_offset: as in `rms_norm`.

    Returns:
        AddNorm(out, total), both of x's shape, new memory.

    Raises:
        ValueError, TypeError: as `rms_norm`, and when the shapes of x and residual differ.

    Numerics: the total is normalized *as stored*, rounded to its dtype: values and gradients are those of
        `rms_norm(x + residual)`.

    Example:
        >>> import torch, normkit.functional as F
        >>> F.add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), 2)
        AddNorm(out=tensor([[0.8485, 1.1314]]), total=tensor([[3., 4.]]))

    Source: the residual stream of Touvron et al., "LLaMA", 2023, section 2.2, with the add fused.
    """
    if residual is not None and not is_compiling():
        call = (x, residual, normalized_shape, weight, None, eps, False, weight_offset)
        plain = backends.norm_now(*call)
        if plain is None:
            plain = handover.row_norm_now(*call)
        if plain is not None:
            return AddNorm(*plain)
    if has_torch_function_variadic(x, residual, weight) and not nested.alone((x, residual), weight):
        return overridden(
            add_rms_norm,
            (x, residual, weight),
            x,
            residual,
            normalized_shape,
            weight,
            eps,
            weight_offset=weight_offset,
        )
    _checks.addend("add_rms_norm", x, residual)
    pair = _row_norm("add_rms_norm", x, residual, normalized_shape, weight, None, eps, False, weight_offset)
    return AddNorm(*pair)


def _row_norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centered: bool,
    weight_offset: float,
    shard_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Check, fold the normalized axes into one, compute, unfold; (out, total)."""
    if nested.is_jagged(x):
        rest = (normalized_shape, weight, bias, eps, centered, weight_offset, shard_group)
        return nested.over_values(op, lambda x, residual: _row_norm(op, x, residual, *rest), x, residual, *rest[:3])
    shape = _checks.normalized_shape(op, x, normalized_shape, weight, bias)
    widens = x.is_cuda and autocast_widens(x.dtype)
    given = None
    if residual is None:
        given = x
    elif widens or residual.dtype != x.dtype:  # not one rounding to one dtype: torch adds, then we normalize
        given = x = x + residual
        residual = None
    _checks.floating(op, x, complex_too=not centered and shard_group is None)
    if shard_group is not None:
        _checks.process_group(op, "shard_group", shard_group)
    if widens:
        x = x.float()
    if eps is None:
        eps = torch.finfo(accumulation_dtype(x.dtype)).eps
    _checks.epsilon(op, eps)
    folded = len(shape) > 1
    unfolded = x.shape
    if folded:
        x, residual, weight, bias = _fold(x, shape), _fold(residual, shape), _fold(weight, shape), _fold(bias, shape)
    arguments = (x, residual, weight, bias, eps, centered, weight_offset)
    compute = _row_compute if shard_group is None else partial(sharded.row_norm, op, shard_group)
    if profiled():
        with profiler.record_function(f"normkit::{op}"):
            out, total = compute(*arguments)
    else:
        out, total = compute(*arguments)
    if folded:
        out, total = out.view(unfolded), total.view(unfolded)
    return out, total if given is None else given


def _fold(x: Any, shape: tuple[int, ...]) -> Any:
    """The trailing axes `shape` as one; a view where memory allows it."""
    return None if x is None else x.flatten(-len(shape))


def _row_compute(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    backend = backends.select(x, residual, weight, bias)
    if backend is None:
        return reference.rows_forward(x, residual, weight, bias, eps, centered, weight_offset)[:2]
    if backend is backends.TRITON:
        small = handover.row_norm(x, residual, x.shape[-1:], weight, bias, eps, centered, weight_offset)
        if small is not None:
            return small
    if torch.is_grad_enabled() and requires_grad(x, residual, weight, bias):
        return record_row_norm(backend, x, residual, weight, bias, eps, centered, weight_offset)
    return backend.rows_forward(x, residual, weight, bias, eps, centered, weight_offset)[:2]
