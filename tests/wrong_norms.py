"""Deliberately wrong norms: each is right but for one step, and names the check that must reject it.

Here: subclasses of PlainNorms; the suite's checks pass that one and must reject each of these.
Read next: plain_norms.py, test_wrong_norms.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases import HALF, accumulation_dtype
from plain_norms import PlainNorms

# ------------------------------------------------------------------------------------------------- wrong forward


class EpsOutsideTheRoot(PlainNorms):
    rejected_by = "values"

    def rstd(self, var, eps):
        return 1.0 / (torch.sqrt(var) + eps)


class OneLessInTheVariance(PlainNorms):
    rejected_by = "values"

    def variance(self, x, mean, dims):
        count = x.numel() // max(super().variance(x, mean, dims).numel(), 1)
        return super().variance(x, mean, dims) * count / max(count - 1, 1)


class StatisticsIgnoreTheTail(PlainNorms):
    """A vector loop of 8 without its remainder: right at 8, 16, 128; wrong between."""

    rejected_by = "row sizes"

    def variance(self, x, mean, dims):
        if x.shape[-1] > 8 and dims == (-1,):
            x = x[..., : x.shape[-1] // 8 * 8]
        return super().variance(x, mean, dims)


class TailIsNotScaled(PlainNorms):
    rejected_by = "row sizes"

    def affine(self, x, mean, rstd, gain, bias):
        full = x.shape[-1] // 8 * 8
        right = super().affine(x, mean, rstd, gain, bias)
        if gain is None or full == 0 or gain.shape[-1] != x.shape[-1]:
            return right
        return torch.cat([right[..., :full], super().affine(x, mean, rstd, None, bias)[..., full:]], -1)


class TrustsItsSample(PlainNorms):
    """Squares about the mean of the first 128 elements, and never again about the mean itself."""

    rejected_by = "a start unlike the rest"

    def variance(self, x, mean, dims):
        narrow = x.float()
        deviation = narrow - narrow[..., :128].mean(dims, keepdim=True)
        return ((deviation**2).mean(dims, keepdim=True) - deviation.mean(dims, keepdim=True) ** 2).to(x.dtype)


class GainBeforeTheStatistics(PlainNorms):
    rejected_by = "values"

    def rows(self, x, normalized_shape, weight, bias, eps, centered, offset, dtype):
        x = x if weight is None else self.wide(x) * self.gain(weight, offset)
        return super().rows(x, normalized_shape, None, bias, eps, centered, 0.0, dtype)


class MeanOfSquaresMinusSquareOfMean(PlainNorms):
    rejected_by = "large mean"

    def wide(self, x):
        return x.to(accumulation_dtype(x.dtype))

    def variance(self, x, mean, dims):
        return (x * x).mean(dims, keepdim=True) - mean * mean


class MeanFoldedIntoTheShift(PlainNorms):
    """x * scale - mean * scale, torch's BatchNorm: cancels where |mean| is far above the standard deviation."""

    rejected_by = "large mean costs nothing"

    def affine(self, x, mean, rstd, gain, bias):
        scale = (rstd if gain is None else rstd * gain).float()
        out = x.float() * scale - (mean * scale).float()
        return out if bias is None else out + bias.float()


class SquaresOverflow(PlainNorms):
    rejected_by = "large values"

    def wide(self, x):
        return x.to(accumulation_dtype(x.dtype))


class SumsInHalf(PlainNorms):
    rejected_by = "values in bfloat16"

    def wide(self, x):
        return x if x.dtype in HALF else super().wide(x)


class RoundedBeforeTheGain(PlainNorms):
    """Llama's order: x * rstd is rounded to the input's dtype, then multiplied by gamma, then rounded again."""

    rejected_by = "values in bfloat16"

    def affine(self, x, mean, rstd, gain, bias):
        return super().affine(x, mean, rstd, None, None).bfloat16().double() * (1.0 if gain is None else gain) + (
            0.0 if bias is None else bias
        )


class DefaultEpsOfTheInput(PlainNorms):
    """finfo(bfloat16).eps is 0.0078: visible wherever the mean square is not large."""

    rejected_by = "values in bfloat16"

    def default_eps(self, dtype):
        return torch.finfo(dtype).eps


class OffsetForgotten(PlainNorms):
    rejected_by = "values"

    def gain(self, weight, offset):
        return self.wide(weight)


class StridesIgnored(PlainNorms):
    """Reads memory as if x were contiguous."""

    rejected_by = "layouts"

    def wide(self, x):
        if x.dim() > 1 and not x.is_contiguous() and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
            size, start = torch.empty(x.shape).stride(), x.storage_offset()
            if (start + x.numel()) * x.element_size() <= x.untyped_storage().nbytes():
                x = x.as_strided(x.shape, size, start)
        return super().wide(x)


class BatchMatesMatter(PlainNorms):
    """Sums in an order that depends on the number of rows, as grids chosen by batch size do."""

    rejected_by = "rows alone"

    def wide(self, x):
        return x.to(accumulation_dtype(x.dtype))

    def mean(self, x, dims):
        return super().mean(x if x.shape[0] > 8 else x.cumsum(-1).diff(dim=-1, prepend=x[..., :1] * 0), dims)

    def variance(self, x, mean, dims):
        d = (x - mean) ** 2
        return d.mean(dims, keepdim=True) if x.shape[0] > 8 else d.cumsum(-1)[..., -1:] / x.shape[-1]


class NotANumberSwallowed(PlainNorms):
    rejected_by = "not finite"

    def rounded(self, out, dtype):
        return torch.nan_to_num(out).to(dtype)


class InputOverwritten(PlainNorms):
    """The total written into the residual's memory."""

    rejected_by = "values"

    def add(self, x, residual):
        total = residual.add_(x)
        return total, total


class TotalNotRounded(PlainNorms):
    rejected_by = "total as stored"

    def add(self, x, residual):
        total = x.double() + residual.double()
        return total, total.to(x.dtype)


class EvalWithBatchStatistics(PlainNorms):
    rejected_by = "eval alone"

    def stored(self, wide, running_mean, running_var, across):
        dims = (0, *range(2, wide.dim()))
        return self.mean(wide, dims), self.variance(wide, self.mean(wide, dims), dims)


# ------------------------------------------------------------------------------------------------ wrong backward


class GradientWithoutTheMeanTerm(PlainNorms):
    rejected_by = "gradients"

    def mean(self, x, dims):
        return super().mean(x, dims).detach()


class GradientWithoutTheVarianceTerm(PlainNorms):
    rejected_by = "gradients"

    def rstd(self, var, eps):
        return super().rstd(var, eps).detach()


class WeightGradientMissesABlock(PlainNorms):
    """The last partial block of 128 rows does not reach dweight and dbias."""

    rejected_by = "gradients of many rows"

    def affine(self, x, mean, rstd, gain, bias):
        full = x.shape[0] // 128 * 128
        if full == 0 or x.dim() != 2 or gain is None or gain.dim() > 1:
            return super().affine(x, mean, rstd, gain, bias)
        counted = torch.arange(x.shape[0]).unsqueeze(1) < full
        gain, bias = (None if v is None else torch.where(counted, v, v.detach()) for v in (gain, bias))
        return super().affine(x, mean, rstd, gain, bias)


class GradientThroughTotalDropped(PlainNorms):
    rejected_by = "gradients"

    def add(self, x, residual):
        total = x + residual
        return total, total.detach() + 0.0 * total


class ResidualWithoutGradientThroughOut(PlainNorms):
    rejected_by = "gradients"

    def add(self, x, residual):
        return x + residual.detach(), x + residual


class _Halved(torch.autograd.Function):
    """Passes x on; its backward writes into the gradient that came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        copy = dout.clone()
        dout.zero_()
        return copy


class IncomingGradientOverwritten(PlainNorms):
    rejected_by = "gradients"

    def rounded(self, out, dtype):
        return _Halved.apply(super().rounded(out, dtype))


class _FirstOrder(torch.autograd.Function):
    """1 / sqrt(var + eps), whose derivative is right and is itself taken for a constant."""

    @staticmethod
    def forward(ctx: Any, var: Tensor, eps: float) -> Tensor:
        rstd = 1.0 / torch.sqrt(var + eps)
        ctx.rstd = rstd
        return rstd.clone()

    @staticmethod
    def backward(ctx: Any, drstd: Tensor) -> tuple[Tensor, None]:
        return -0.5 * drstd * ctx.rstd**3, None


class StatisticsConstantInDoubleBackward(PlainNorms):
    rejected_by = "second derivatives"

    def rstd(self, var, eps):
        return _FirstOrder.apply(var, eps)


# --------------------------------------------------------------------------------------- wrong running statistics


class RunningMeanStale(PlainNorms):
    """Updated with the statistics of the batch before."""

    rejected_by = "running statistics"
    before: tuple[Tensor, Tensor] | None = None

    def update(self, running_mean, running_var, momentum, mean, var, n):
        stale, self.before = self.before or (mean, var), (mean.detach(), var.detach())
        super().update(running_mean, running_var, momentum, stale[0], var, n)


class GroupsInterleave(PlainNorms):
    """Channel c in group c % G instead of c // (C / G)."""

    rejected_by = "values"

    def group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5):
        order = torch.arange(x.shape[1]).view(-1, num_groups).T.flatten()
        weight, bias = (None if v is None else v[order] for v in (weight, bias))
        return super().group_norm(x[:, order], num_groups, weight, bias, eps)[:, order.argsort()]


class InstancesShareStatistics(PlainNorms):
    """As batch_norm: over the batch too."""

    rejected_by = "values"

    def instance_norm(self, x, running_mean=None, running_var=None, weight=None, bias=None, eps=1e-5):
        return self.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


class RunningMeanNeverUpdated(PlainNorms):
    rejected_by = "running statistics"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        super().update(running_mean.clone(), running_var, momentum, mean, var, n)


class RunningVarianceBiased(PlainNorms):
    rejected_by = "running statistics"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        super().update(running_mean, running_var, momentum, mean, var * (n - 1) / n, n)


class MomentumTakenForDecay(PlainNorms):
    rejected_by = "running statistics"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        super().update(running_mean, running_var, 1.0 - momentum, mean, var, n)


class UpdatedTwice(PlainNorms):
    """As activation checkpointing does: two updates of one batch act as momentum 1 - (1 - m)^2."""

    rejected_by = "running statistics"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        for _ in range(2):
            super().update(running_mean, running_var, momentum, mean, var, n)


class RunningStatisticsInTheGraph(PlainNorms):
    rejected_by = "running statistics outside backpropagation"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        running_mean.mul_(1.0 - momentum).add_(momentum * mean)
        running_var.mul_(1.0 - momentum).add_(momentum * var * n / max(n - 1, 1))


class EmptyBatchPoisons(PlainNorms):
    rejected_by = "empty batch"

    def update(self, running_mean, running_var, momentum, mean, var, n):
        super().update(running_mean, running_var, momentum, mean, var, max(n, 2))


class EvalUpdates(PlainNorms):
    """The running statistics move in eval too."""

    rejected_by = "eval alone"

    def stored(self, wide, running_mean, running_var, across):
        found = super().stored(wide, running_mean, running_var, across)
        running_mean.mul_(0.9)
        return found


WRONG = tuple(
    value for value in list(globals().values()) if isinstance(value, type) and getattr(value, "rejected_by", "")
)
