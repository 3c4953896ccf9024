"""Where norms sit in a residual network.

Here: the names of this package's modules.
May import: its modules.
Read next: block.py, one description for all placements; named.py, the field's.
"""

from normkit.placement.block import LearnedScale, Placement, PostNorm, PreNorm, Residual, ResidualStack, add_norm
from normkit.placement.named import PLACEMENT_NAMES, placements

__all__ = [
    "PLACEMENT_NAMES",
    "LearnedScale",
    "Placement",
    "PostNorm",
    "PreNorm",
    "Residual",
    "ResidualStack",
    "add_norm",
    "placements",
]
