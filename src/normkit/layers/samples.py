"""Layers with statistics of their own for each sample: GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d.

Here: torch.nn's classes, constructors, buffers and state dicts, with normkit's forward.
May import: torch, functional, _checks.
Read next: functional/channels.py, where the call is checked and computed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from normkit import _checks, functional
from normkit.functional.masks import Lengths
from normkit.layers.running import recomputed


class GroupNorm(torch.nn.GroupNorm):
    """Normalizes each group of channels of each sample over its channels and space; a drop-in for torch.nn.GroupNorm.

        out = (x - mean) / sqrt(var + eps) * weight + bias,     mean and var over C / G channels and space, per sample

    Args:
        num_groups: G; divides num_channels.
        num_channels: C.
        eps: added to the variance under the root; default 1e-5.
        affine: whether gamma (`weight`, ones) and beta (`bias`, zeros), one number per channel, are learned; default
            True.
        device, dtype: of the parameters.

    Shape: `forward(input, mask=None, lengths=None)`; x (B, C, ...) -> the same shape, dtype and memory format. `mask`
        (B, *space) bool or, for (B, C, L), `lengths` (B,) say which positions are valid.

    Raises:
        ValueError, TypeError: as `normkit.functional.group_norm`; x has another number of channels.

    Numerics: as `normkit.functional.group_norm`; train and eval are the same.

    Example:
        >>> import torch, normkit
        >>> normkit.GroupNorm(1, 2)(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])).detach()
        tensor([[[-1.3416, -0.4472],
                 [ 0.4472,  1.3416]]])

    Source: Wu and He, "Group Normalization", 2018, eq. 1 and 7.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None) -> Tensor:
        if not self.affine and input.dim() > 1 and input.shape[1] != self.num_channels:
            raise ValueError(  # with weight and bias, functional.group_norm says so
                f"GroupNorm: x must have num_channels={self.num_channels} channels in dimension 1, got x of shape "
                f"{_checks.shape_text(input.shape)}; pass num_channels={input.shape[1]} or transpose x"
            )
        return functional.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, mask=mask, lengths=lengths
        )


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    """What InstanceNorm1d, 2d and 3d share; their docstrings describe it."""

    dimension: int  # of a batch; one less is a single sample
    dimension_names: str

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None) -> Tensor:
        if input.dim() not in (self.dimension - 1, self.dimension):
            raise ValueError(
                f"{type(self).__name__}: x must have {self.dimension - 1} or {self.dimension} dimensions "
                f"{self.dimension_names}, got x of shape {_checks.shape_text(input.shape)}; reshape x or use the "
                f"InstanceNorm of its dimension"
            )
        alone = input.dim() == self.dimension - 1
        x = input.unsqueeze(0) if alone else input
        if x.shape[1] != self.num_features:
            message = (
                f"{type(self).__name__}: x must have num_features={self.num_features} channels, got x of shape "
                f"{_checks.shape_text(input.shape)}; pass num_features={x.shape[1]} or transpose x"
            )
            if self.affine or self.track_running_stats:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)  # torch warns too: without parameters the number is not used
        own = self.training or not self.track_running_stats
        moves = not (own and recomputed())  # a checkpointed forward is computed twice and counts once
        out = functional.instance_norm(
            x,
            self.running_mean if moves else None,
            self.running_var if moves else None,
            self.weight,
            self.bias,
            own,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            mask=mask.unsqueeze(0) if alone and isinstance(mask, Tensor) else mask,
            lengths=lengths,
        )
        return out.squeeze(0) if alone else out


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """Normalizes each channel of each sample of (B, C, L) or (C, L) over length; a drop-in for torch.nn.InstanceNorm1d.

        own statistics: mean and var over space, per sample and channel (training; eval too unless they are tracked)
        out = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        num_features: C.
        eps: added to the variance under the root; default 1e-5.
        momentum: the weight of the *new* batch in the running averages; default 0.1. None leaves them as they are, as
            in torch.
        affine: whether gamma (`weight`, ones) and beta (`bias`, zeros) are learned; default False, as in torch.
        track_running_stats: whether running averages are kept, and used in eval; default False, as in torch.
        device, dtype: of parameters and buffers.

    Shape: `forward(input, mask=None, lengths=None)`; the input's shape, dtype and memory format are kept. `mask` (B, L)
        bool or `lengths` (B,) say which positions are valid.

    Raises:
        ValueError: x has another number of dimensions or channels, or one value per channel in training. Running
            statistics are then untouched.

    Numerics: as `normkit.functional.instance_norm`.

    Example:
        >>> import torch, normkit
        >>> normkit.InstanceNorm1d(2)(torch.tensor([[[1.0, 3.0], [5.0, 9.0]]]))
        tensor([[[-1.0000,  1.0000],
                 [-1.0000,  1.0000]]])

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
        2016, eq. 3.
    """

    dimension = 3
    dimension_names = "(C, L) or (B, C, L)"


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Normalizes each channel of each sample of (B, C, H, W) or (C, H, W) over space; a drop-in for
    torch.nn.InstanceNorm2d.

    Arguments, formula, errors and numerics are those of `InstanceNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.InstanceNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    dimension = 4
    dimension_names = "(C, H, W) or (B, C, H, W)"


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Normalizes each channel of each sample of (B, C, D, H, W) or (C, D, H, W) over space; a drop-in for
    torch.nn.InstanceNorm3d.

    Arguments, formula, errors and numerics are those of `InstanceNorm1d`.

    Example:
        >>> import torch, normkit
        >>> normkit.InstanceNorm3d(3)(torch.ones(2, 3, 2, 4, 4)).shape
        torch.Size([2, 3, 2, 4, 4])
    """

    dimension = 5
    dimension_names = "(C, D, H, W) or (B, C, D, H, W)"
