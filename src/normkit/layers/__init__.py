"""The layers: torch.nn's own classes with normkit's forward.

Here: LayerNorm, RMSNorm (rows.py), BatchNorm1d, 2d, 3d (channels.py), GroupNorm, InstanceNorm1d, 2d, 3d (samples.py).
May import: torch, functional, statistics, _checks.
Read next: layers/rows.py.
"""

from normkit.layers.channels import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.layers.rows import LayerNorm, RMSNorm
from normkit.layers.samples import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]
