"""DyT, the tanh that takes a norm's place: a comparison without statistics.

Here: `DyT`.
May import: torch.
Read next: rows.py, the norms that it is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DyT(nn.Module):
    """Squashes every element by a tanh with a learned slope; in a norm's place, without statistics.

        out = tanh(alpha * x) * weight + bias

    Args:
        normalized_shape: the trailing shape of `weight` and `bias`; an int means one axis.
        alpha: the slope before training, one number for all elements; 0.5, the paper's.
        device, dtype: of the parameters.

    Shape: x (..., *normalized_shape) -> the same shape and dtype.

    Numerics: torch's operations, in x's dtype.

    Example:
        >>> import torch, normkit
        >>> normkit.DyT(2)(torch.tensor([[2.0, -200.0]])).detach()
        tensor([[ 0.7616, -1.0000]])

    Source: Zhu et al., "Transformers without Normalization", 2025, section 4.
    """

    def __init__(
        self, normalized_shape: int | list[int] | torch.Size, alpha: float = 0.5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape = shape
        self.start = alpha
        self.alpha = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.start)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        if tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"DyT: x must end with normalized_shape {shape}, got x of shape {tuple(x.shape)}")
        return torch.tanh(self.alpha * x) * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, alpha={self.start}"
