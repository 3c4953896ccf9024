"""Which positions of a padded batch are valid: `mask` or `lengths`, checked, as one boolean per sample and position.

May import: torch, _checks.
Read next: channel_steps.py, which hands it to the primitives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkit import _checks

Lengths = Tensor | Sequence[int]


def valid_positions(op: str, x: Tensor, mask: Tensor | None, lengths: Lengths | None) -> Tensor | None:
    """(B, S), True = valid, for x (B, C, ...); None without mask and lengths."""
    if mask is not None:
        if lengths is not None:
            raise ValueError(f"{op}: mask and lengths say the same, got both; pass one of them")
        return _from_mask(op, x, mask)
    return None if lengths is None else _from_lengths(op, x, lengths)


def _from_mask(op: str, x: Tensor, mask: Tensor) -> Tensor:
    _checks.tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be boolean, True where x is valid, got {mask.dtype}; pass mask.bool()")
    if mask.device != x.device:
        raise ValueError(
            f"{op}: mask must be on x's device {x.device}, got {mask.device}; move it with mask.to(x.device)"
        )
    positions = (x.shape[0], *x.shape[2:])
    given = mask.squeeze(1) if mask.dim() == x.dim() and mask.shape[1] == 1 else mask
    fits = given.dim() == len(positions) and all(
        have in (1, want) for have, want in zip(given.shape, positions, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: mask must have x's shape without channels, {_checks.shape_text(positions)}, got "
            f"{_checks.shape_text(mask.shape)}; a position is valid for all channels or for none"
        )
    return given.expand(positions).reshape(x.shape[0], x.shape[2:].numel())


def _from_lengths(op: str, x: Tensor, lengths: Lengths) -> Tensor:
    if x.dim() != 3:
        raise ValueError(
            f"{op}: lengths need x of shape (B, C, L), got {_checks.shape_text(x.shape)}; pass mask= for other spaces"
        )
    counts = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths, device=x.device)
    if not isinstance(lengths, Tensor) and len(lengths) == 0:  # torch takes an empty list for floating-point numbers
        counts = counts.long()
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"{op}: lengths must be integers, got {counts.dtype}; pass the number of valid positions")
    if tuple(counts.shape) != (x.shape[0],):
        raise ValueError(
            f"{op}: lengths must have one number per sample, shape ({x.shape[0]},), got shape "
            f"{_checks.shape_text(counts.shape)}; pass how many positions of each sample are valid"
        )
    if counts.device != x.device:
        raise ValueError(
            f"{op}: lengths must be on x's device {x.device}, got {counts.device}; move them with lengths.to(x.device)"
        )
    counts = counts.long()  # a narrow type could not be compared with a long L
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading them would wait for the device
        outside = (counts < 0) | (counts > x.shape[2])
        if bool(outside.any()):
            raise ValueError(
                f"{op}: lengths must lie between 0 and L = {x.shape[2]}, got {int(counts[outside][0])}; "
                f"pass how many positions of each sample are valid"
            )
    return torch.arange(x.shape[2], device=x.device) < counts.unsqueeze(1)
