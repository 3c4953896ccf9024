"""The layers: torch.nn's own classes with normkit's forward.

Here: LayerNorm, RMSNorm (rows.py), BatchNorm1d, 2d, 3d, SyncBatchNorm (channels.py), GroupNorm, InstanceNorm1d, 2d, 3d
(samples.py), DyT (dynamic_tanh.py, torch.nn has none), what controls the running statistics of a model (control.py)
and computes them anew (recompute.py, watching.py).
May import: torch, functional, statistics, ranks, _checks.
Read next: layers/rows.py.
"""

from normkit.layers.channels import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from normkit.layers.control import Accumulation, accumulate_statistics, frozen_statistics, statistics_step
from normkit.layers.dynamic_tanh import DyT
from normkit.layers.recompute import Recomputation, recompute_statistics
from normkit.layers.rows import LayerNorm, RMSNorm
from normkit.layers.samples import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from normkit.layers.watching import Recomputed

__all__ = [
    "Accumulation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DyT",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Recomputation",
    "Recomputed",
    "SyncBatchNorm",
    "accumulate_statistics",
    "frozen_statistics",
    "recompute_statistics",
    "statistics_step",
]
