"""The six primitives in Triton under the names of the Backend protocol, and whole calls of BatchNorm.

Here: names only.
May import: the modules that hold them.
Read next: triton_rows.py.
"""

from normkit.kernels.triton_batch_norm import (
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_with_running,
    commit_running,
)
from normkit.kernels.triton_channels import (
    channels_affine,
    channels_backward_affine,
    channels_backward_moments,
    channels_moments,
)
from normkit.kernels.triton_rows import rows_backward, rows_forward

__all__ = [
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_with_running",
    "channels_affine",
    "channels_backward_affine",
    "channels_backward_moments",
    "channels_moments",
    "commit_running",
    "rows_backward",
    "rows_forward",
]
