"""Layers whose statistics run along the rows: LayerNorm and RMSNorm.

Here: torch.nn's classes, constructors, parameters and state dicts, with normkit's forward.
May import: torch, functional, ranks, _checks.
Read next: functional/rows.py, where the call is checked and computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import _checks, functional
from normkit.functional.sharded import compare_again
from normkit.ranks import Held, ProcessGroup


class _Shard(Held):
    """The process group of a layer, and whether its ranks were compared."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group)
        self.compared = False

    def __deepcopy__(self, memo: object) -> _Shard:
        return _Shard(self.group)

    def __str__(self) -> str:
        return f"shard_group={self.group.size()} ranks"


class _Sharded(torch.nn.Module):
    """What both layers know of `shard_group`."""

    _shard: _Shard | None = None

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The process group over whose ranks the normalized axes are split; None: not split."""
        return None if self._shard is None else self._shard.group

    @shard_group.setter
    def shard_group(self, group: ProcessGroup | None) -> None:
        if group is not None:
            _checks.process_group(type(self).__name__, "shard_group", group)
        self._shard = None if group is None else _Shard(group)

    def _group_to_call(self) -> ProcessGroup | None:
        """`shard_group`; before the layer's first call, to be compared once more."""
        if self._shard is not None and not self._shard.compared:
            self._shard.compared = True
            compare_again(self._shard.group)
        return self.shard_group


class LayerNorm(_Sharded, torch.nn.LayerNorm):
    """Normalizes each sample over its trailing `normalized_shape` axes; a drop-in for torch.nn.LayerNorm.

        out = (x - mean) / sqrt(var + eps) * weight + bias,     mean and var over normalized_shape, per sample

    Args:
        normalized_shape: the trailing shape that shares statistics; an int means one axis.
        eps: added to the variance under the root; default 1e-5.
        elementwise_affine: whether gamma (`weight`, ones) and beta (`bias`, zeros), of shape `normalized_shape`,
            are learned; default True.
        bias: whether beta is learned; default True.
        device, dtype: of the parameters.
        shard_group: the process group over whose ranks the normalized axes are split, as tensor parallelism splits
            them; `normalized_shape` is then this rank's shard's (`normkit.functional.layer_norm` says more). A copy
            keeps it; pickling is refused, since process groups cannot be pickled. Default None.

    Shape: x (..., *normalized_shape) -> the same shape and dtype.

    Raises:
        ValueError, TypeError: as `normkit.functional.layer_norm`.

    Numerics: as `normkit.functional.layer_norm`; train and eval are the same.

    Example:
        >>> import torch, normkit
        >>> normkit.LayerNorm(3)(torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]])).detach()
        tensor([[ 1.2247,  0.0000, -1.2247],
                [ 1.2247,  0.0000, -1.2247]])

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, eq. 3 and 4.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if shard_group is not None:
            self.shard_group = shard_group

    def forward(self, input: Tensor) -> Tensor:
        if self._shard is None:
            return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        group = self._group_to_call()
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, shard_group=group)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self._shard is None else f", {self._shard}")


class RMSNorm(_Sharded, torch.nn.RMSNorm):
    """Divides each sample by its root mean square over `normalized_shape`; a drop-in for torch.nn.RMSNorm.

        out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset),     mean over normalized_shape, per sample

    Args:
        normalized_shape: the trailing shape that shares the mean square; an int means one axis.
        eps: added to the mean square under the root; None (torch's default) means the machine epsilon of the
            accumulation dtype, 1.19e-7 for float32 and half inputs.
        elementwise_affine: whether gamma (`weight`), of shape `normalized_shape`, is learned; default True.
        device, dtype: of the parameters.
        weight_offset: added to `weight`; 1.0 reads and writes checkpoints whose gain is stored as (1 + weight), as
            Gemma's, and starts `weight` at 0 so that the gain starts at 1. Default 0.0.
        shard_group: as in `LayerNorm`.

    Shape: x (..., *normalized_shape) -> the same shape and dtype.

    Raises:
        ValueError, TypeError: as `normkit.functional.rms_norm`.

    Numerics: as `normkit.functional.rms_norm`; train and eval are the same.

    Example:
        >>> import torch, normkit
        >>> normkit.RMSNorm(2, eps=1e-6)(torch.tensor([[3.0, 4.0]])).detach()
        tensor([[0.8485, 1.1314]])

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """

    weight_offset: float = 0.0

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if shard_group is not None:
            self.shard_group = shard_group
        if weight_offset:
            self.weight_offset = weight_offset
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma such that the gain, weight + weight_offset, is 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        if self._shard is None:
            return functional.rms_norm(
                x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset
            )
        group = self._group_to_call()
        return functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset, shard_group=group
        )

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset + ("" if self._shard is None else f", {self._shard}")
