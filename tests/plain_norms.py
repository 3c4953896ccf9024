"""A right implementation of the norms in plain torch, in steps that wrong_norms.py replaces one at a time.

Read next: wrong_norms.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases import accumulation_dtype


class PlainNorms:
    """Right: every step in float64 with torch's own differentiation, one rounding at the end."""

    rejected_by = ""

    # ---- the steps, each of which a wrong norm replaces

    def wide(self, x: Tensor) -> Tensor:
        return x.double()

    def mean(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        return x.mean(dims, keepdim=True)

    def variance(self, x: Tensor, mean: Tensor | float, dims: tuple[int, ...]) -> Tensor:
        return ((x - mean) ** 2).mean(dims, keepdim=True)

    def rstd(self, var: Tensor, eps: float) -> Tensor:
        return 1.0 / torch.sqrt(var + eps)

    def default_eps(self, dtype: torch.dtype) -> float:
        return torch.finfo(accumulation_dtype(dtype)).eps

    def gain(self, weight: Tensor, offset: float) -> Tensor:
        return self.wide(weight) + offset

    def affine(self, x: Tensor, mean: Any, rstd: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        out = (x - mean) * rstd
        out = out if gain is None else out * gain
        return out if bias is None else out + bias

    def rounded(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        return out.to(dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What is normalized, and what is returned as the total."""
        total = x + residual
        return total, total

    def update(self, running_mean: Tensor, running_var: Tensor, momentum: float, mean: Tensor, var: Tensor, n: int):
        if n == 0:
            return
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var * n / max(n - 1, 1))):
                running.copy_((1.0 - momentum) * running.double() + momentum * batch)

    # ---- the norms

    def rows(self, x, normalized_shape, weight, bias, eps, centered, offset, dtype):
        dims = tuple(range(-len(normalized_shape), 0))
        wide = self.wide(x)
        mean = self.mean(wide, dims) if centered else 0.0
        rstd = self.rstd(self.variance(wide, mean, dims), self.default_eps(dtype) if eps is None else eps)
        gain = None if weight is None else self.gain(weight, offset)
        return self.rounded(self.affine(wide, mean, rstd, gain, None if bias is None else self.wide(bias)), dtype)

    def layer_norm(self, x, normalized_shape, weight=None, bias=None, eps=1e-5):
        return self.rows(x, normalized_shape, weight, bias, eps, True, 0.0, x.dtype)

    def rms_norm(self, x, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
        return self.rows(x, normalized_shape, weight, None, eps, False, weight_offset, x.dtype)

    def add_layer_norm(self, x, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
        normalized, total = self.add(x, residual)
        return self.rows(normalized, normalized_shape, weight, bias, eps, True, 0.0, x.dtype), total

    def add_rms_norm(self, x, residual, normalized_shape, weight=None, eps=None, *, weight_offset=0.0):
        normalized, total = self.add(x, residual)
        return self.rows(normalized, normalized_shape, weight, None, eps, False, weight_offset, x.dtype), total

    def batch_norm(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        wide = self.wide(x)
        across = (1, -1) + (1,) * (x.dim() - 2)
        if training:
            dims = (0, *range(2, x.dim()))
            mean = self.mean(wide, dims)
            var = self.variance(wide, mean, dims)
            if running_mean is not None:
                self.update(running_mean, running_var, momentum, mean.flatten(), var.flatten(), x[:, :1].numel())
        else:
            mean, var = self.stored(wide, running_mean, running_var, across)
        gain, bias = (None if v is None else self.wide(v).view(across) for v in (weight, bias))
        return self.rounded(self.affine(wide, mean, self.rstd(var, eps), gain, bias), x.dtype)

    def group_norm(self, x, num_groups, weight=None, bias=None, eps=1e-5):
        across = (1, -1) + (1,) * (x.dim() - 2)
        wide = self.wide(x).reshape(x.shape[0], num_groups, -1)
        mean = self.mean(wide, (2,))
        normalized = self.affine(wide, mean, self.rstd(self.variance(wide, mean, (2,)), eps), None, None)
        gain, bias = (None if v is None else self.wide(v).view(across) for v in (weight, bias))
        out = normalized.reshape(x.shape) if gain is None else normalized.reshape(x.shape) * gain
        return self.rounded(out if bias is None else out + bias, x.dtype)

    def instance_norm(self, x, running_mean=None, running_var=None, weight=None, bias=None, eps=1e-5):
        return self.group_norm(x, x.shape[1], weight, bias, eps)

    def stored(self, wide: Tensor, running_mean: Tensor, running_var: Tensor, across: tuple[int, ...]):
        # a copy, as the buffers may change before backward
        return running_mean.double().view(across), running_var.to(torch.float64, copy=True).view(across)
