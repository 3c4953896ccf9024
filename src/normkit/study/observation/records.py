"""What `observe` returns: frozen records of numbers, one per call.

Here: ModuleCall, Block, Activation, Norm, ModuleGradient.
May import: the standard library.
Read next: ../observe.py, which fills them.

A number is None where it was not measured: no gradient reached the output, the module is frozen, the norm has no
gamma. `path` is the module's path in the model ("" is the model itself), `call` counts the module's calls from 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module: its first floating-point output."""

    path: str
    call: int
    type: str
    shape: tuple[int, ...]
    dtype: str
    output_rms: float | None
    output_gradient: float | None  # L2 norm of the loss's gradient with respect to the output


@dataclass(frozen=True)
class Block:
    """One call of one residual block.

    Args:
        chain: path of the container whose blocks follow each other.
        position: the call's place in the chain, from 1.
        growth: rms(out) / rms(in).
        identity: <out, in> / <in, in>, what the output keeps of the input.
        cosine: <out, in> / (|out| |in|).
        skip_weight, identity_weight: the study's own measures (normkit.study.measure), for normkit.Residual blocks.
        gradient: L2 norm of the loss's gradient with respect to all of the block's parameters that train, over all
            its calls.
        output_gradient: L2 norm of the loss's gradient with respect to this call's output.
    """

    path: str
    call: int
    type: str
    chain: str
    position: int
    input_rms: float
    output_rms: float
    growth: float
    identity: float
    cosine: float
    skip_weight: float | None
    identity_weight: float | None
    gradient: float | None
    output_gradient: float | None


@dataclass(frozen=True)
class Activation:
    """One call of one activation: `share` of elements where it is flat by `rule`, and ReLU units never active."""

    path: str
    call: int
    type: str
    rule: str
    share: float
    dead_units: float | None


@dataclass(frozen=True)
class Norm:
    """One call of one norm; distances of BatchNorm's batch from its running statistics, in running std."""

    path: str
    call: int
    type: str
    input_rms: float
    input_mean: float
    output_rms: float | None
    output_mean: float | None
    gamma_mean: float | None  # mean |gamma|
    gamma_max: float | None  # max |gamma|
    mean_distance: float | None  # mean over channels
    mean_distance_max: float | None
    std_distance: float | None
    std_distance_max: float | None


@dataclass(frozen=True)
class ModuleGradient:
    """L2 norm of the loss's gradient with respect to the parameters that a module holds itself, over all its calls."""

    path: str
    type: str
    parameters: int
    trainable: int
    gradient: float | None
