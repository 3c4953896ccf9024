"""normkit: normalization in deep networks, for PyTorch.

Here: the public names; no logic.
Read next: layers/rows.py, where the walk from a layer to the arithmetic starts.
"""

import torch as _torch  # first: the compiled core shares the OpenMP runtime that torch brings  # noqa: F401

from normkit import convert, functional
from normkit.backends import BackendUnavailable, reasons, set_kept_bytes, use_backend
from normkit.layers import (
    Accumulation,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DyT,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    Recomputation,
    Recomputed,
    RMSNorm,
    SyncBatchNorm,
    accumulate_statistics,
    frozen_statistics,
    recompute_statistics,
    statistics_step,
)
from normkit.layers.columns import LayerNorm2d
from normkit.placement import LearnedScale, Placement, PostNorm, PreNorm, Residual, ResidualStack, placements

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "BackendUnavailable",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DyT",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "LearnedScale",
    "Placement",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Recomputation",
    "Recomputed",
    "Residual",
    "ResidualStack",
    "SyncBatchNorm",
    "accumulate_statistics",
    "convert",
    "frozen_statistics",
    "functional",
    "placements",
    "reasons",
    "recompute_statistics",
    "set_kept_bytes",
    "statistics_step",
    "use_backend",
]
