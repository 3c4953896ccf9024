"""LayerNorm2d: LayerNorm over the channels of images.

Here: torch.nn.LayerNorm's parameters and state dict, with normkit's forward over dimension 1.
May import: torch, functional, _checks.
Read next: functional/columns.py, where the call is checked and computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import _checks, functional


class LayerNorm2d(torch.nn.LayerNorm):
    """Normalizes each position of each image over its channels, the LayerNorm of ConvNeXt; a torch.nn.LayerNorm.

        out = (x - mean) / sqrt(var + eps) * weight + bias,     mean and var over C, per sample and position

    It stands for x.permute(0, 2, 3, 1), torch.nn.LayerNorm(num_channels) and the permutation back, with the same
    state dict, and copies x in neither memory format.

    Args:
        num_channels: C.
        eps: added to the variance under the root; default 1e-5 (ConvNeXt uses 1e-6).
        elementwise_affine: whether gamma (`weight`, ones) and beta (`bias`, zeros), one number per channel, are
            learned; default True.
        bias: whether beta is learned; default True.
        device, dtype: of the parameters.

    Shape: x (B, C, ...), as (B, C, H, W) -> the same shape, dtype and memory format.

    Raises:
        ValueError, TypeError: as `normkit.functional.layer_norm_channels`; x has another number of channels.

    Numerics: as `normkit.functional.layer_norm_channels`; train and eval are the same.

    Example:
        >>> import torch, normkit
        >>> normkit.LayerNorm2d(3)(torch.tensor([90.0, 80.0, 70.0]).view(1, 3, 1, 1)).flatten().detach()
        tensor([ 1.2247,  0.0000, -1.2247])

    Source: Liu et al., "A ConvNet for the 2020s", 2022, section 2.6.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        channels = self.normalized_shape[0]
        if input.dim() > 1 and input.shape[1] != channels:
            raise ValueError(
                f"LayerNorm2d: x must have num_channels={channels} channels in dimension 1, got x of shape "
                f"{_checks.shape_text(input.shape)}; pass num_channels={input.shape[1]} or transpose x"
            )
        return functional.layer_norm_channels(input, self.weight, self.bias, self.eps)
