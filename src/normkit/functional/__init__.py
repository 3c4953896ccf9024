"""The public functions: torch.nn.functional's signatures; what normkit adds is keyword-only or a function of its own.

Here: their names. rows.py and channels.py check, differentiate and call the backend.
Read next: functional/rows.py.
"""

from normkit.functional.channels import BatchNormed, batch_norm, batch_norm_with_moments, group_norm, instance_norm
from normkit.functional.columns import layer_norm_channels
from normkit.functional.rows import AddNorm, add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "AddNorm",
    "BatchNormed",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_with_moments",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layer_norm_channels",
    "rms_norm",
]
