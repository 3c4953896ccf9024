"""Each wrong call, the type of its error and its sentence, word for word. Read next: src/normkit/_checks.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import normkit
import normkit.theory
from normkit import functional as F
from normkit.kernels import gpu

X = torch.ones(2, 3)
IMAGE = torch.ones(2, 3, 4, 4)
THREE, FOUR = torch.ones(3), torch.ones(4)


@dataclass(frozen=True)
class Wrong:
    call: Callable[[], object]
    error: type[Exception]
    sentence: str


TABLE = (
    # ------------------------------------------------------------------------------------------------ row norms
    Wrong(
        lambda: F.rms_norm(torch.ones(2, 77, 768), (4096,)),
        ValueError,
        "rms_norm: x must end with normalized_shape (4096,), got x of shape (2, 77, 768); "
        "pass normalized_shape=768 or transpose x",
    ),
    Wrong(
        lambda: F.layer_norm(torch.ones(2, 768), 4096),
        ValueError,
        "layer_norm: x must end with normalized_shape (4096,), got x of shape (2, 768); "
        "pass normalized_shape=768 or transpose x",
    ),
    Wrong(
        lambda: F.layer_norm(X, (2, 4)),
        ValueError,
        "layer_norm: x must end with normalized_shape (2, 4), got x of shape (2, 3); "
        "pass normalized_shape=3 or transpose x",
    ),
    Wrong(
        lambda: F.layer_norm(THREE, (2, 3)),
        ValueError,
        "layer_norm: x must end with normalized_shape (2, 3), got x of shape (3,); "
        "pass normalized_shape=3 or transpose x",
    ),
    Wrong(
        lambda: F.layer_norm(torch.tensor(1.0), 1),
        ValueError,
        "layer_norm: x must end with normalized_shape (1,), got x of shape (); pass an x with at least one dimension",
    ),
    Wrong(
        lambda: F.rms_norm(X, ()),
        ValueError,
        "rms_norm: normalized_shape must name at least one dimension, got (); "
        "pass x.shape[-1:] to normalize the last one",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, FOUR),
        ValueError,
        "layer_norm: weight must have shape normalized_shape (3,), got shape (4,); "
        "pass a weight of that shape, or None",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, None, torch.ones(1, 3)),
        ValueError,
        "layer_norm: bias must have shape normalized_shape (3,), got shape (1, 3); pass a bias of that shape, or None",
    ),
    Wrong(
        lambda: F.rms_norm(X, 3, torch.ones(())),
        ValueError,
        "rms_norm: weight must have shape normalized_shape (3,), got shape (); pass a weight of that shape, or None",
    ),
    Wrong(
        lambda: F.rms_norm(X, X.shape, THREE),
        ValueError,
        "rms_norm: weight must have shape normalized_shape (2, 3), got shape (3,); "
        "pass a weight of that shape, or None",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, torch.ones(3, device="meta")),
        ValueError,
        "layer_norm: weight must be on x's device cpu, got meta; move it with weight.to(x.device)",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, torch.ones(3, dtype=torch.int64)),
        TypeError,
        "layer_norm: weight must have a floating-point dtype, got torch.int64; convert it with weight.float()",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, None, torch.ones(3, dtype=torch.bool)),
        TypeError,
        "layer_norm: bias must have a floating-point dtype, got torch.bool; convert it with bias.float()",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, [1.0, 1.0, 1.0]),
        TypeError,
        "layer_norm: weight must be a torch.Tensor, got list; pass a tensor",
    ),
    Wrong(
        lambda: F.layer_norm([[1.0, 2.0, 3.0]], 3),
        TypeError,
        "layer_norm: x must be a torch.Tensor, got list; pass a tensor",
    ),
    Wrong(lambda: F.rms_norm(None, 3), TypeError, "rms_norm: x must be a torch.Tensor, got NoneType; pass a tensor"),
    Wrong(
        lambda: F.layer_norm(torch.ones(2, 3, dtype=torch.int64), 3),
        TypeError,
        "layer_norm: x must have a floating-point dtype, got torch.int64; convert it with x.float()",
    ),
    Wrong(
        lambda: F.rms_norm(torch.ones(2, 3, dtype=torch.bool), 3),
        TypeError,
        "rms_norm: x must have a floating-point dtype, got torch.bool; convert it with x.float()",
    ),
    Wrong(
        lambda: F.layer_norm(torch.ones(2, 3, dtype=torch.complex64), 3),
        TypeError,
        "layer_norm: x must have a floating-point dtype, got torch.complex64; normalize x.real and x.imag apart",
    ),
    Wrong(
        lambda: F.layer_norm(X, 3, eps=-1e-5),
        ValueError,
        "layer_norm: eps must be zero or positive, got -1e-05; 1e-5 is torch's default",
    ),
    Wrong(
        lambda: F.rms_norm(X, 3, eps=float("nan")),
        ValueError,
        "rms_norm: eps must be zero or positive, got nan; 1e-5 is torch's default",
    ),
    # -------------------------------------------------------------------------------------------------- fused adds
    Wrong(
        lambda: F.add_layer_norm(X, THREE, 3),
        ValueError,
        "add_layer_norm: residual must have x's shape (2, 3), got (3,); expand it to that shape first",
    ),
    Wrong(
        lambda: F.add_rms_norm(X, torch.ones(2, 4), 3),
        ValueError,
        "add_rms_norm: residual must have x's shape (2, 3), got (2, 4); expand it to that shape first",
    ),
    Wrong(
        lambda: F.add_rms_norm(X, None, 3),
        TypeError,
        "add_rms_norm: residual must be a torch.Tensor, got NoneType; pass a tensor",
    ),
    Wrong(
        lambda: F.add_layer_norm(1.0, X, 3),
        TypeError,
        "add_layer_norm: x must be a torch.Tensor, got float; pass a tensor",
    ),
    Wrong(
        lambda: F.add_rms_norm(X, X, 4),
        ValueError,
        "add_rms_norm: x must end with normalized_shape (4,), got x of shape (2, 3); "
        "pass normalized_shape=3 or transpose x",
    ),
    # -------------------------------------------------------------------------------------------------- batch_norm
    Wrong(
        lambda: F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True),
        ValueError,
        "batch_norm: training needs more than 1 value per channel, got x of shape (1, 3, 1, 1); "
        "use a larger batch, or eval mode",
    ),
    Wrong(
        lambda: F.batch_norm(THREE, None, None, training=True),
        ValueError,
        "batch_norm: x must have at least 2 dimensions (batch, channels, ...), got x of shape (3,); "
        "add a batch dimension with x.unsqueeze(0)",
    ),
    Wrong(
        lambda: F.batch_norm(X, None, None),
        ValueError,
        "batch_norm: running_mean and running_var are needed outside training, got None; "
        "pass them, or training=True to use the batch's statistics",
    ),
    Wrong(
        lambda: F.batch_norm(X, THREE, None, training=True),
        ValueError,
        "batch_norm: running_mean and running_var go together, got no running_var; pass both or neither",
    ),
    Wrong(
        lambda: F.batch_norm(X, None, THREE, training=True),
        ValueError,
        "batch_norm: running_mean and running_var go together, got no running_mean; pass both or neither",
    ),
    *(
        Wrong(
            lambda name=name: F.batch_norm(X, **{"running_mean": THREE, "running_var": THREE, name: FOUR}),
            ValueError,
            f"batch_norm: {name} must have one value per channel, shape (3,), got shape (4,); "
            f"pass a {name} of that shape, or None",
        )
        for name in ("running_mean", "running_var", "weight", "bias")
    ),
    Wrong(
        lambda: F.batch_norm(X, None, None, training=True, eps=0.0),
        ValueError,
        "batch_norm: eps must be positive in training, got 0.0; 1e-5 is torch's default",
    ),
    Wrong(
        lambda: F.batch_norm(X, THREE, THREE, eps=-1.0),
        ValueError,
        "batch_norm: eps must be zero or positive, got -1.0; 1e-5 is torch's default",
    ),
    Wrong(
        lambda: F.batch_norm(torch.ones(2, 3, dtype=torch.int32), None, None, training=True),
        TypeError,
        "batch_norm: x must have a floating-point dtype, got torch.int32; convert it with x.float()",
    ),
    Wrong(
        lambda: F.batch_norm(torch.ones(2, 3, dtype=torch.complex64), None, None, training=True),
        TypeError,
        "batch_norm: x must have a floating-point dtype, got torch.complex64; normalize x.real and x.imag apart",
    ),
    Wrong(
        lambda: F.batch_norm("x", None, None, training=True),
        TypeError,
        "batch_norm: x must be a torch.Tensor, got str; pass a tensor",
    ),
    # ------------------------------------------------------------------------------------ group_norm, instance_norm
    *(
        Wrong(
            lambda groups=groups: F.group_norm(torch.ones(2, 4, 5), groups),
            ValueError,
            f"group_norm: num_groups must divide the channels, got {groups} groups for x of shape (2, 4, 5); "
            "pass a divisor of 4",
        )
        for groups in (0, -2, 3, 8)
    ),
    Wrong(
        lambda: F.group_norm(torch.ones(1, 4, 1), 4),
        ValueError,
        "group_norm: a group needs more than 1 value, got 4 groups for x of shape (1, 4, 1); use fewer groups",
    ),
    Wrong(
        lambda: F.group_norm(X, 1, weight=FOUR),
        ValueError,
        "group_norm: weight must have one value per channel, shape (3,), got shape (4,); "
        "pass a weight of that shape, or None",
    ),
    Wrong(
        lambda: F.group_norm(X, 1, eps=-1.0),
        ValueError,
        "group_norm: eps must be zero or positive, got -1.0; 1e-5 is torch's default",
    ),
    Wrong(
        lambda: F.group_norm(torch.ones(2, 3, dtype=torch.int32), 1),
        TypeError,
        "group_norm: x must have a floating-point dtype, got torch.int32; convert it with x.float()",
    ),
    Wrong(
        lambda: F.instance_norm(torch.ones(2, 3, 1)),
        ValueError,
        "instance_norm: each channel needs more than 1 value, got x of shape (2, 3, 1); "
        "pass x with space, (B, C, L) or more",
    ),
    Wrong(
        lambda: F.instance_norm(torch.ones(2, 3, 4), use_input_stats=False),
        ValueError,
        "instance_norm: running_mean and running_var are needed without use_input_stats, got None; "
        "pass them, or use_input_stats=True to use the samples' statistics",
    ),
    Wrong(
        lambda: F.instance_norm(torch.ones(2, 3, 4), THREE),
        ValueError,
        "instance_norm: running_mean and running_var go together, got no running_var; pass both or neither",
    ),
    Wrong(
        lambda: F.instance_norm(torch.ones(2, 3, 4), eps=0.0),
        ValueError,
        "instance_norm: eps must be positive with use_input_stats, got 0.0; 1e-5 is torch's default",
    ),
    Wrong(
        lambda: normkit.GroupNorm(2, 4, affine=False)(torch.ones(2, 6, 5)),
        ValueError,
        "GroupNorm: x must have num_channels=4 channels in dimension 1, got x of shape (2, 6, 5); "
        "pass num_channels=6 or transpose x",
    ),
    Wrong(
        lambda: normkit.InstanceNorm1d(3)(IMAGE),
        ValueError,
        "InstanceNorm1d: x must have 2 or 3 dimensions (C, L) or (B, C, L), got x of shape "
        f"{tuple(IMAGE.shape)}; reshape x or use the InstanceNorm of its dimension",
    ),
    Wrong(
        lambda: normkit.InstanceNorm1d(4, affine=True)(torch.ones(2, 3, 5)),
        ValueError,
        "InstanceNorm1d: x must have num_features=4 channels, got x of shape (2, 3, 5); "
        "pass num_features=3 or transpose x",
    ),
    # ------------------------------------------------------------------------------------------------------ layers
    Wrong(
        lambda: normkit.BatchNorm1d(3)(IMAGE),
        ValueError,
        "BatchNorm1d: x must have 2 or 3 dimensions (B, C) or (B, C, L), got x of shape (2, 3, 4, 4); "
        "reshape x or use the BatchNorm of its dimension",
    ),
    Wrong(
        lambda: normkit.BatchNorm2d(3)(X),
        ValueError,
        "BatchNorm2d: x must have 4 dimensions (B, C, H, W), got x of shape (2, 3); "
        "reshape x or use the BatchNorm of its dimension",
    ),
    Wrong(
        lambda: normkit.BatchNorm3d(3)(IMAGE),
        ValueError,
        "BatchNorm3d: x must have 5 dimensions (B, C, D, H, W), got x of shape (2, 3, 4, 4); "
        "reshape x or use the BatchNorm of its dimension",
    ),
    Wrong(
        lambda: normkit.BatchNorm2d(5)(IMAGE),
        ValueError,
        "BatchNorm2d: x must have num_features=5 channels in dimension 1, got x of shape (2, 3, 4, 4); "
        "pass num_features=3 or transpose x",
    ),
    Wrong(
        lambda: normkit.BatchNorm1d(3, momentum=0.1, decay=0.9),
        ValueError,
        "BatchNorm1d: momentum (weight of the new batch) and decay (weight of the old average, 1 - momentum) "
        "exclude each other, got momentum=0.1 and decay=0.9; pass one of them",
    ),
    Wrong(
        lambda: normkit.BatchNorm2d(3, momentum=None, decay=0.9),
        ValueError,
        "BatchNorm2d: momentum (weight of the new batch) and decay (weight of the old average, 1 - momentum) "
        "exclude each other, got momentum=None and decay=0.9; pass one of them",
    ),
    Wrong(
        lambda: normkit.BatchNorm1d(3, momentum=1.5),
        ValueError,
        "BatchNorm1d: momentum must lie between 0 and 1, got 1.5; usual are momentum=0.1, decay=0.9",
    ),
    Wrong(
        lambda: normkit.BatchNorm3d(3, decay=-0.1),
        ValueError,
        "BatchNorm3d: decay must lie between 0 and 1, got -0.1; usual are momentum=0.1, decay=0.9",
    ),
    Wrong(
        lambda: normkit.RMSNorm(4)(X),
        ValueError,
        "rms_norm: x must end with normalized_shape (4,), got x of shape (2, 3); "
        "pass normalized_shape=3 or transpose x",
    ),
    # ------------------------------------------------------------------------------------------ backends, theory
    Wrong(
        lambda: normkit.use_backend("cuda").__enter__(),
        ValueError,
        "use_backend: name must be one of cpu, triton, reference, got 'cuda'; see normkit.reasons()",
    ),
    Wrong(
        lambda: normkit.use_backend("triton").__enter__(),
        normkit.BackendUnavailable,
        'use_backend("triton"): torch finds no CUDA device',
    ),
    Wrong(
        lambda: normkit.theory.post_skip_weight(-0.5),
        ValueError,
        "post_skip_weight: variance_ratio must be zero or positive, got -0.5",
    ),
    Wrong(
        lambda: normkit.theory.post_identity_weight(-1),
        ValueError,
        "post_identity_weight: sublayers must be zero or positive, got -1",
    ),
    Wrong(
        lambda: normkit.theory.post_identity_weight(3, [1.0, 1.0]),
        ValueError,
        "post_identity_weight: variance_ratio must be one number or one for each of the 3 sublayers, got 2 numbers",
    ),
    Wrong(
        lambda: normkit.theory.pre_identity_weight(2, [1.0, -1.0]),
        ValueError,
        "pre_identity_weight: branch_variance must be zero or positive, got -1.0",
    ),
    Wrong(
        lambda: normkit.theory.stream_variances(-1),
        ValueError,
        "stream_variances: sublayers must be zero or positive, got -1",
    ),
    Wrong(
        lambda: normkit.theory.stream_variances(1, start=-1.0),
        ValueError,
        "stream_variances: start must be zero or positive, got -1.0",
    ),
    Wrong(
        lambda: normkit.theory.pre_norm_variance_bounds(-1),
        ValueError,
        "pre_norm_variance_bounds: layers must be zero or positive, got -1",
    ),
    Wrong(
        lambda: normkit.theory.last_layer_gradient_bound("keel", 8, 2),
        ValueError,
        'last_layer_gradient_bound: placement must be "post" or "pre", got \'keel\'',
    ),
    Wrong(
        lambda: normkit.theory.last_layer_gradient_bound("pre", 1, 2),
        ValueError,
        "last_layer_gradient_bound: width must be 2 or more and layers 1 or more, got width 1, layers 2",
    ),
    Wrong(
        lambda: normkit.theory.preactivation_std(1.0, 0),
        ValueError,
        "preactivation_std: fan_in must be 1 or more, got 0",
    ),
    Wrong(
        lambda: normkit.theory.preactivation_std(-1.0, 4),
        ValueError,
        "preactivation_std: weight_std must be zero or positive, got -1.0",
    ),
    Wrong(
        lambda: normkit.theory.saturation_threshold("relu"),
        ValueError,
        'saturation_threshold: activation must be "sigmoid" or "tanh", got \'relu\'',
    ),
    Wrong(
        lambda: normkit.theory.saturation_threshold("tanh", 0.0),
        ValueError,
        "saturation_threshold: share must lie in (0, 1], got 0.0",
    ),
    Wrong(
        lambda: normkit.theory.saturation_probability("tanh", -1.0),
        ValueError,
        "saturation_probability: std must be zero or positive, got -1.0",
    ),
    Wrong(
        lambda: normkit.theory.running_residual(1.1, 3),
        ValueError,
        "running_residual: decay must lie in [0, 1], got 1.1; it is 1 - momentum in torch's terms",
    ),
    Wrong(
        lambda: normkit.theory.running_noise(0.9, -3),
        ValueError,
        "running_noise: updates must be zero or positive, got -3",
    ),
    Wrong(
        lambda: normkit.theory.updates_until(1.0),
        ValueError,
        "updates_until: decay must lie in [0, 1), got 1.0; with 1 the start value stays",
    ),
    Wrong(
        lambda: normkit.theory.updates_until(0.9, 0.0),
        ValueError,
        "updates_until: residual must lie in (0, 1), got 0.0",
    ),
    Wrong(
        lambda: normkit.theory.batch_std_mean(1),
        ValueError,
        "batch_std_mean: count must be 2 or more, got 1; it is batch size times positions",
    ),
)


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences here are those of a machine without a GPU."""
    monkeypatch.setattr(gpu, "unavailable", lambda: "torch finds no CUDA device")


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.sentence[:90])
def test_a_wrong_call_says_so_in_these_words(wrong: Wrong) -> None:
    with pytest.raises(wrong.error) as caught:
        wrong.call()
    assert type(caught.value) is wrong.error
    assert str(caught.value) == wrong.sentence


def test_a_forced_backend_that_cannot_take_a_tensor_says_why(core: None) -> None:
    with pytest.raises(normkit.BackendUnavailable) as caught:
        F.rms_norm(torch.ones(2, 3, dtype=torch.complex64), 3)
    assert str(caught.value) == (
        'use_backend("cpu") cannot take this call: x has dtype torch.complex64, the compiled core takes float32, '
        "float64, bfloat16 and float16; leave use_backend or name another (cpu: x has dtype torch.complex64, the "
        "compiled core takes float32, float64, bfloat16 and float16; triton: torch finds no CUDA device; "
        "reference: x has dtype torch.complex64, whose gradient is left to torch)"
    )


def test_a_refused_call_leaves_the_running_statistics_untouched() -> None:
    for x, keywords in (
        (torch.ones(1, 3), {}),
        (torch.ones(2, 3, dtype=torch.int64), {}),
        (X, {"weight": FOUR}),
        (X, {"eps": 0.0}),
    ):
        mean, var = torch.full((3,), 0.25), torch.full((3,), 0.75)
        with pytest.raises((ValueError, TypeError)):
            F.batch_norm(x, mean, var, training=True, **keywords)
        assert mean.tolist() == [0.25] * 3
        assert var.tolist() == [0.75] * 3
