"""The field's placements by name, each as a Placement for every sublayer of a stack.

Here: `placements`, PLACEMENT_NAMES.
May import: block.
Read next: block.py.

ResiDual is not among them: it carries two streams from sublayer to sublayer, one normalized and one not, where a
Placement describes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from normkit.placement.block import LearnedScale, Placement, PostNorm, PreNorm

Stack = tuple[Placement, ...]

SandwichNorm = Placement("sandwich", before=True, after=True)  # x + norm(f(norm(x)))
ReorderedNorm = Placement("reordered", after=True)  # x + norm(f(x))
ReZero = Placement("rezero", learned=LearnedScale(0.0))  # x + a f(x), a = 0 at first


def _everywhere(placement: Placement) -> Callable[[int], Stack]:
    return lambda sublayers: (placement,) * sublayers


def _layers(sublayers: int) -> int:
    """Transformer layers: each has an attention and a feed-forward sublayer."""
    return math.ceil(sublayers / 2)


def _deepnorm(sublayers: int) -> Stack:
    """norm(alpha x + f(x)), alpha = (2N)^(1/4); initial weights times beta = (8N)^(-1/4); N layers."""
    layers = _layers(sublayers)
    alpha, beta = (2 * layers) ** 0.25, (8 * layers) ** -0.25
    return (Placement("deepnorm", output=True, skip_scale=alpha, init_gain=beta),) * sublayers


def _keel(sublayers: int) -> Stack:
    """norm(alpha x + f(norm(x))), alpha = the number of sublayers."""
    return (Placement("keel", before=True, output=True, skip_scale=float(sublayers)),) * sublayers


def _mix(sublayers: int) -> Stack:
    """The first quarter of the layers post, the rest pre."""
    first = 2 * (_layers(sublayers) // 4)
    post, pre = replace(PostNorm, name="mix"), replace(PreNorm, name="mix")
    return (post,) * first + (pre,) * (sublayers - first)


def _layernorm_scaling(sublayers: int) -> Stack:
    """x + f(norm(x) / sqrt(l)), l the layer, from 1 on."""
    return tuple(
        Placement("layernorm-scaling", before=True, before_scale=1.0 / math.sqrt(1 + i // 2)) for i in range(sublayers)
    )


def _layerscale(sublayers: int) -> Stack:
    """x + a f(norm(x)), a learned for each feature; it starts at 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond."""
    layers = _layers(sublayers)
    start = 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6
    return (Placement("layerscale", before=True, learned=LearnedScale(start, per_feature=True)),) * sublayers


_NAMED: dict[str, Callable[[int], Stack]] = {
    "pre": _everywhere(PreNorm),
    "post": _everywhere(PostNorm),
    "sandwich": _everywhere(SandwichNorm),
    "reordered": _everywhere(ReorderedNorm),
    "deepnorm": _deepnorm,
    "keel": _keel,
    "mix": _mix,
    "layernorm-scaling": _layernorm_scaling,
    "layerscale": _layerscale,
    "rezero": _everywhere(ReZero),
}
PLACEMENT_NAMES = tuple(_NAMED)


def placements(name: str, sublayers: int) -> tuple[Placement, ...]:
    """One Placement for each sublayer of a stack, by the placement's name in the field.

    | name | block | source |
    |---|---|---|
    | pre | x + f(norm(x)) | Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020 |
    | post | norm(x + f(x)) | Vaswani et al., "Attention Is All You Need", 2017, section 3.1 |
    | sandwich | x + norm(f(norm(x))) | Ding et al., "CogView", 2021; Kim et al., "Peri-LN", 2025 |
    | reordered | x + norm(f(x)) | OLMo team, "2 OLMo 2 Furious", 2025; there with norms on queries and keys |
    | deepnorm | norm(alpha x + f(x)) | Wang et al., "DeepNet", 2022: alpha = (2N)^(1/4), init_gain = (8N)^(-1/4) |
    | keel | norm(alpha x + f(norm(x))) | Chen & Wei, "Keel", 2026; by second hand: alpha = the number of sublayers |
    | mix | a quarter of the layers post, then pre | Li et al., "Mix-LN", 2024 |
    | layernorm-scaling | x + f(norm(x) / sqrt(l)) | Sun et al., "The Curse of Depth in Large Language Models", 2025 |
    | layerscale | x + a f(norm(x)) | Touvron et al., "Going deeper with Image Transformers", 2021, section 2 |
    | rezero | x + a f(x) | Bachlechner et al., "ReZero is All You Need", 2020; SkipInit where f has a BatchNorm |

    Args:
        name: one of `PLACEMENT_NAMES`.
        sublayers: how many; a transformer layer has two, attention first. N and l above count layers.

    Returns:
        As many Placements, from the input on. The last one's `needs_final_norm` says whether a norm follows the stack.

    Raises:
        ValueError: another name, or a negative number of sublayers.

    Example:
        >>> from normkit.placement import placements
        >>> round(placements("deepnorm", 24)[0].skip_scale, 3), round(placements("deepnorm", 24)[0].init_gain, 3)
        (2.213, 0.319)
    """
    if name not in _NAMED:
        raise ValueError(f"placements: name must be one of {', '.join(PLACEMENT_NAMES)}, got {name!r}")
    if sublayers < 0:
        raise ValueError(f"placements: sublayers must be zero or positive, got {sublayers}")
    return _NAMED[name](sublayers)
