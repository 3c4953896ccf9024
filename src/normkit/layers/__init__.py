"""The layers: torch.nn's own classes with normkit's forward.

Here: LayerNorm, RMSNorm (rows.py), BatchNorm1d, BatchNorm2d, BatchNorm3d (channels.py).
May import: torch, functional, statistics, _checks.
Read next: layers/rows.py.
"""

from normkit.layers.channels import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normkit.layers.rows import LayerNorm, RMSNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "RMSNorm"]
