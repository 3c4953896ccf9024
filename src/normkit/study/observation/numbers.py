"""What `observe` measures on tensors: pure functions that leave their results on the device.

Here: rms, what a block keeps of its input, saturation of an activation, the statistics of a norm.
May import: torch, functional.
Read next: calls.py, which calls these in hooks; measure.py, the study's own definitions.

Every result is a tensor of no dimensions in float64 (float32 where a device has no float64), so that nothing here
waits for the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from normkit.functional.masks import valid_positions
from normkit.study.models import TokenBatchNorm

# A sigmoid or tanh unit counts as saturated where its derivative is below this share of its largest value. For tanh
# that is |tanh x| > 0.975, |x| > 2.18; for the sigmoid an output outside 0.0127 to 0.9873, |x| > 4.36. GELU and SiLU
# count where the derivative itself is between -0.05 and 0.05 (their largest is 1.13 and 1.10).
SMALL_DERIVATIVE = 0.05

Numbers = dict[str, Tensor]


def wide(x: Tensor) -> torch.dtype:
    """float64, in which sums are kept; float32 on devices that have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def norm(x: Tensor) -> Tensor:
    """sqrt(sum(x^2)), L2."""
    total: Tensor = torch.linalg.vector_norm(x.detach(), dtype=wide(x))
    return total


def rms(x: Tensor) -> Tensor:
    """sqrt(mean(x^2)) over all elements: the residual stream's measure in measure.py."""
    value: Tensor = norm(x) / math.sqrt(max(x.numel(), 1))
    return value


def mean(x: Tensor) -> Tensor:
    """mean(x) over all elements."""
    return x.detach().mean(dtype=wide(x))


def kept(x: Tensor, out: Tensor) -> Numbers:
    """What `out` keeps of `x`, over all elements together.

    identity = <out, x> / <x, x>,  cosine = <out, x> / (|out| |x|),  growth = rms(out) / rms(x)
    """
    a, b = x.detach().to(wide(x)).flatten(), out.detach().to(wide(x)).flatten()
    inner, xx, yy = torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)
    count = max(x.numel(), 1)
    return {
        "input_rms": (xx / count).sqrt(),
        "output_rms": (yy / count).sqrt(),
        "growth": (yy / xx).sqrt(),
        "identity": inner / xx,
        "cosine": inner / (xx.sqrt() * yy.sqrt()),
    }


# ---------------------------------------------------------------------------------------------- saturation


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return 4.0 * s * (1.0 - s)  # over its largest value, 1/4


def _tanh_slope(x: Tensor) -> Tensor:
    return 1.0 - torch.tanh(x).square()


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _flat(slope: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: slope(x).abs() < SMALL_DERIVATIVE


# kind -> where it is flat, as a function of the input
SATURATED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": _flat(_sigmoid_slope),
    "tanh": _flat(_tanh_slope),
    "relu": lambda x: x <= 0,
    "relu6": lambda x: (x <= 0) | (x >= 6),
    "gelu": _flat(_gelu_slope),
    "silu": _flat(_silu_slope),
}
RULES = {
    "sigmoid": "derivative below 0.05 of its largest value: output outside 0.0127 to 0.9873",
    "tanh": "derivative below 0.05 of its largest value: |output| above 0.975",
    "relu": "derivative 0: input at or below 0",
    "relu6": "derivative 0: input at or below 0, or at or above 6",
    "gelu": "derivative of x Phi(x) between -0.05 and 0.05",
    "silu": "derivative of x sigmoid(x) between -0.05 and 0.05",
}
_BY_CLASS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Sigmoid, "sigmoid"),
    (nn.Tanh, "tanh"),
    (nn.ReLU, "relu"),
    (nn.ReLU6, "relu6"),
    (nn.GELU, "gelu"),
    (nn.SiLU, "silu"),
)
_BY_NAME = (  # activations of other libraries, such as transformers' NewGELUActivation
    (re.compile(r"\w*GELU(Tanh|Activation)?"), "gelu"),
    (re.compile(r"(SiLU|Silu|Swish)(Activation)?"), "silu"),
)


def activation_kind(module: nn.Module) -> str | None:
    """The key of SATURATED for this module, None where it is no activation that we know."""
    for kind, name in _BY_CLASS:
        if isinstance(module, kind):
            return name
    called = type(module).__name__
    return next((name for pattern, name in _BY_NAME if pattern.fullmatch(called)), None)


def saturation(kind: str, x: Tensor) -> Numbers:
    """The share of elements where the activation is flat, and for ReLU the share of units that are never active.

    A unit is a feature of the last axis, or a channel (axis 1) of images and volumes, (B, C, H, W) and (B, C, D, H, W).
    """
    x = x.detach()
    flat = SATURATED[kind](x if kind.startswith("relu") else x.to(wide(x)))
    found = {"share": flat.mean(dtype=wide(x))}
    if kind.startswith("relu") and x.dim() >= 2:
        unit = 1 if x.dim() in (4, 5) else x.dim() - 1
        others = [axis for axis in range(x.dim()) if axis != unit]
        found["dead_units"] = flat.all(dim=others).mean(dtype=wide(x))
    return found


# ---------------------------------------------------------------------------------------------- norms


def is_norm(module: nn.Module) -> bool:
    """torch's and normkit's norms by class; others, such as LlamaRMSNorm, by a name in ...Norm and a weight."""
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    return type(module).__name__.endswith("Norm") and isinstance(getattr(module, "weight", None), Tensor)


def norm_input(module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Numbers:
    """rms and mean of a norm's input, its |gamma|, and for BatchNorm how far this batch is from the running statistics.

    mean_distance = |mean - running_mean| / sqrt(running_var + eps)
    std_distance  = |sqrt(var + eps) - sqrt(running_var + eps)| / sqrt(running_var + eps)

    per channel, with the unbiased variance of the batch as in running_var; masked positions do not count.
    """
    found = {"input_rms": rms(x), "input_mean": mean(x)}
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        gamma = (weight.detach().to(wide(weight)) + getattr(module, "weight_offset", 0.0)).abs()
        found |= {"gamma_mean": gamma.mean(), "gamma_max": gamma.max()}
    if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor) and x.dim() >= 2:
        found |= _against_running(module, x.detach(), _valid(module, x, args, kwargs))
    return found


def _valid(module: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B, S), True where a position counts; None without a mask. Only normkit's BatchNorm takes one."""
    if not type(module).__module__.startswith("normkit.layers"):
        return None
    given = dict(zip(("mask", "lengths"), args[1:], strict=False)) | {k: kwargs[k] for k in kwargs if k != "input"}
    return valid_positions("observe", x, given.get("mask"), given.get("lengths"))


def _against_running(module: _BatchNorm, x: Tensor, valid: Tensor | None) -> Numbers:
    assert isinstance(module.running_mean, Tensor)
    assert isinstance(module.running_var, Tensor)
    dtype = wide(x)
    if isinstance(module, TokenBatchNorm):  # features last
        x = x.flatten(0, -2)
    channels = x.to(dtype).reshape(x.shape[0], x.shape[1], -1)  # (B, C, S)
    counted = torch.ones_like(channels[:, :1]) if valid is None else valid.unsqueeze(1).to(dtype)
    channels = torch.where(counted > 0, channels, 0.0)  # padding may hold NaN
    count = counted.sum()
    center = channels.sum((0, 2)) / count
    deviation = torch.where(counted > 0, channels - center[:, None], 0.0)
    variance = deviation.square().sum((0, 2)) / (count - 1.0)  # NaN of one value: there is no estimate
    running_std = (module.running_var.to(dtype) + module.eps).sqrt()
    off = (center - module.running_mean.to(dtype)).abs() / running_std
    spread = ((variance + module.eps).sqrt() - running_std).abs() / running_std
    return {
        "mean_distance": off.mean(),
        "mean_distance_max": off.max(),
        "std_distance": spread.mean(),
        "std_distance_max": spread.max(),
    }
