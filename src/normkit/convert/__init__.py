"""Checkpoints between conventions: what torch, Keras and Flax call and mean by a BatchNorm's numbers.

Here: the public names.
Read next: batch_norm.py; docs/conventions.md for the conventions side by side.
"""

from normkit.convert.batch_norm import (
    batch_norm_state,
    batch_norm_states,
    find_batch_norms,
    load_batch_norm,
)
from normkit.convert.conventions import momentum, momentum_per_update

__all__ = [
    "batch_norm_state",
    "batch_norm_states",
    "find_batch_norms",
    "load_batch_norm",
    "momentum",
    "momentum_per_update",
]
