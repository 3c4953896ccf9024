"""Layers whose statistics run along the channels: BatchNorm1d, BatchNorm2d, BatchNorm3d.

Here: torch.nn's classes, constructors, buffers and state dicts, with normkit's forward and `decay`.
May import: torch, functional, _checks.
Read next: functional/channels.py, where the call is checked and computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import _checks, functional

# An object of its own, not the literal: identity tells an omitted momentum from a given 0.1.
_MOMENTUM_DEFAULT = float("0.1")


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What BatchNorm1d, 2d and 3d share; their docstrings describe it."""

    stated_as_decay: bool = False
    dimensions: tuple[int, ...]  # how many x may have, and their names for the error
    dimension_names: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM_DEFAULT,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        decay: float | None = None,
    ) -> None:
        _checks.momentum_or_decay(type(self).__name__, momentum is not _MOMENTUM_DEFAULT, momentum, decay)
        if decay is not None:
            momentum = 1.0 - decay
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.stated_as_decay = decay is not None
        if affine and not bias:  # torch.nn's own argument only since 2.13
            self.register_parameter("bias", None)

    @property
    def decay(self) -> float | None:
        """The weight of the old average, 1 - momentum; None for the cumulative average."""
        return None if self.momentum is None else 1.0 - self.momentum

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: x must have num_features={self.num_features} channels in dimension 1, "
                f"got x of shape {_checks.shape_text(input.shape)}; pass num_features={input.shape[1]} or transpose x"
            )
        tracking = self.training and self.track_running_stats
        momentum = 0.0
        if self.momentum is not None:
            momentum = self.momentum
        elif tracking and self.num_batches_tracked is not None:
            momentum = 1.0 / (float(self.num_batches_tracked) + 1.0)  # cumulative: every batch weighs the same
        training = self.training or self.running_mean is None
        # eval of a layer that tracked uses the buffers; training of one that no longer tracks leaves them alone
        use_buffers = not self.training or self.track_running_stats
        out = functional.batch_norm(
            input,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
        )
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # after the call: a refused batch is not counted
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.dimensions:
            counts = " or ".join(str(dimension) for dimension in self.dimensions)
            raise ValueError(
                f"{type(self).__name__}: x must have {counts} dimensions {self.dimension_names}, "
                f"got x of shape {_checks.shape_text(input.shape)}; reshape x or use the BatchNorm of its dimension"
            )

    def extra_repr(self) -> str:
        printed: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's words in every version
        if self.stated_as_decay and self.decay is not None:
            printed = printed.replace(f"momentum={self.momentum}", f"decay={self.decay:.12g}")
        return printed


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Normalizes each channel of (B, C) or (B, C, L) over batch and length; a drop-in for torch.nn.BatchNorm1d.

        training: mean and var of the batch;  eval: running_mean and running_var
        out = (x - mean) / sqrt(var + eps) * weight + bias
        running = decay * running + (1 - decay) * batch,     decay = 1 - momentum

    Args:
        num_features: C.
        eps: added to the variance under the root; default 1e-5.
        momentum: the weight of the *new* batch in the running averages, torch's convention; default 0.1. None
            averages all batches with equal weight.
        affine: whether gamma (`weight`, ones) and beta (`bias`, zeros) are learned; default True.
        track_running_stats: whether running averages are kept; without them eval uses the batch's statistics too.
        device, dtype: of parameters and buffers.
        bias: whether beta is learned; default True.
        decay: the weight of the *old* average, the textbook's and Keras's convention (0.9, 0.99, 0.999), instead
            of momentum.

    Shape: the input's shape, dtype and memory format are kept.

    Raises:
        ValueError: momentum and decay are both given, or lie outside [0, 1]; x has another number of dimensions or
            channels; one value per channel in training. Running statistics and the batch counter are then untouched.

    Numerics: as `normkit.functional.batch_norm`; the running variance averages the unbiased batch variance and so is
        larger than what normalizes in training by n / (n - 1).

    Example:
        >>> import torch, normkit
        >>> norm = normkit.BatchNorm1d(3, decay=0.9)
        >>> _ = norm(torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]]))
        >>> norm.running_mean
        tensor([7.5000, 6.5000, 5.5000])

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2; the running average is the usual
        replacement of the paper's averages over training batches.
    """

    dimensions = (2, 3)
    dimension_names = "(B, C) or (B, C, L)"


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Normalizes each channel of (B, C, H, W) over batch and space; a drop-in for torch.nn.BatchNorm2d.

    Arguments, formula, errors and numerics are those of `BatchNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    dimensions = (4,)
    dimension_names = "(B, C, H, W)"


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Normalizes each channel of (B, C, D, H, W) over batch and space; a drop-in for torch.nn.BatchNorm3d.

    Arguments, formula, errors and numerics are those of `BatchNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.BatchNorm3d(3)(torch.ones(2, 3, 2, 4, 4)).shape
        torch.Size([2, 3, 2, 4, 4])
    """

    dimensions = (5,)
    dimension_names = "(B, C, D, H, W)"
