"""normkit: normalization in deep networks, for PyTorch.

Here: the public names; no logic.
Read next: layers/rows.py, where the walk from a layer to the arithmetic starts.
"""

import torch as _torch  # first: the compiled core shares the OpenMP runtime that torch brings  # noqa: F401

from normkit import functional
from normkit.backends import BackendUnavailable, reasons, set_kept_bytes, use_backend
from normkit.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from normkit.placement import Placement, PostNorm, PreNorm, Residual, ResidualStack

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Placement",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Residual",
    "ResidualStack",
    "functional",
    "reasons",
    "set_kept_bytes",
    "use_backend",
]
