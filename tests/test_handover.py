"""Small norms that torch computes on a CUDA device: what is handed over at once, and what is asked first.

Without a GPU: CPU tensors pass for those of a device whose kernels run, and the compiled core declines.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
import normkit.functional as NF
from cases import DTYPES, normal
from normkit import backends
from normkit.functional import handover
from normkit.kernels import cpu
from tolerance import assert_same_bits

F = torch.nn.functional


def seen_by(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Tensor]:
    """The x of every call of that function of handover that torch computes, on CPU tensors that pass for a device's."""
    seen: list[torch.Tensor] = []
    function = getattr(handover, name)

    def spied(x: torch.Tensor, *rest: Any) -> Any:
        result = function(x, *rest)
        if result is not None:
            seen.append(x)
        return result

    monkeypatch.setattr(handover, name, spied)
    monkeypatch.setattr(backends, f"{name.removeprefix('row_')}_now", cpu._never)
    monkeypatch.setattr(backends, "has_kernels", lambda device: device == -1)
    return seen


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The x of every row norm that is handed to torch at once."""
    return seen_by(monkeypatch, "row_norm")


def given(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual (3, 2, 8), weight, bias (8,)."""
    x, residual = normal((3, 2, 8), 1).to(dtype), normal((3, 2, 8), 2).to(dtype)
    return x, residual, normal((8,), 3).to(dtype), normal((8,), 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_call_is_torchs_to_the_bit(handed: list[torch.Tensor], dtype: torch.dtype) -> None:
    x, residual, weight, bias = given(dtype)
    assert_same_bits(NF.layer_norm(x, 8, weight, bias), F.layer_norm(x, (8,), weight, bias), "layer_norm")
    assert_same_bits(NF.layer_norm(x, (2, 8), eps=1e-3), F.layer_norm(x, (2, 8), eps=1e-3), "two axes")
    assert_same_bits(NF.rms_norm(x, [8], weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6), "rms_norm")
    out, total = NF.add_layer_norm(x, residual, (8,), weight, bias)
    assert_same_bits(total, x + residual, "total")
    assert_same_bits(out, F.layer_norm(total, (8,), weight, bias), "add_layer_norm")
    assert isinstance(NF.add_rms_norm(x, residual, 8, weight), NF.AddNorm)
    assert len(handed) == 5


def test_no_eps_is_that_of_the_accumulation_dtype(handed: list[torch.Tensor]) -> None:
    for dtype in DTYPES:
        x = torch.full((2, 8), 1e-3, dtype=dtype)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert_same_bits(NF.rms_norm(x, 8), F.rms_norm(x, (8,), eps=eps), str(dtype))
    assert len(handed) == len(DTYPES)


def test_the_layers_hand_over_with_their_gradients(handed: list[torch.Tensor]) -> None:
    x = given()[0].requires_grad_()
    for ours, torchs in ((normkit.LayerNorm(8), torch.nn.LayerNorm(8)), (normkit.RMSNorm(8), torch.nn.RMSNorm(8))):
        found = torch.autograd.grad(ours(x).pow(3).sum(), (x, *ours.parameters()))
        exact = torch.autograd.grad(torchs(x).pow(3).sum(), (x, *torchs.parameters()))
        for one, other in zip(found, exact, strict=True):
            assert_same_bits(one, other, type(ours).__name__)
    assert len(handed) == 2


X, RESIDUAL, WEIGHT, BIAS = given()
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (lambda: NF.layer_norm(X, 9), r"layer_norm: x must end with normalized_shape \(9,\)"),
    "no axis": (lambda: NF.layer_norm(X, ()), "normalized_shape must name at least one dimension"),
    "weight": (lambda: NF.layer_norm(X, 8, WEIGHT[:7]), "layer_norm: weight must have shape normalized_shape"),
    "weight of rms_norm": (lambda: NF.rms_norm(X, 8, WEIGHT[:7]), "rms_norm: weight must have shape"),
    "one weight for all": (lambda: NF.rms_norm(X, 8, WEIGHT[:1]), "rms_norm: weight must have shape"),
    "bias": (lambda: NF.layer_norm(X, 8, WEIGHT, BIAS[:7]), "layer_norm: bias must have shape normalized_shape"),
    "eps": (lambda: NF.rms_norm(X, 8, eps=-1.0), "rms_norm: eps must be zero or positive, got -1.0"),
    "eps NaN": (lambda: NF.layer_norm(X, 8, eps=float("nan")), "layer_norm: eps must be zero or positive, got nan"),
    "residual": (lambda: NF.add_rms_norm(X, RESIDUAL[:1], 8), "add_rms_norm: residual must have x's shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_in_our_words(handed: list[torch.Tensor], name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call()


class HandsOn(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Watches(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


IN_FORCE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": Watches,
    "a profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "another backend": lambda: normkit.use_backend("reference"),
    "forward differentiation": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", IN_FORCE)
def test_nothing_is_handed_over_while_something_else_is_in_force(handed: list[torch.Tensor], name: str) -> None:
    with IN_FORCE[name]():
        out = NF.layer_norm(X, 8, WEIGHT, BIAS)
    assert handed == []
    torch.testing.assert_close(out, F.layer_norm(X, (8,), WEIGHT, BIAS))


def test_a_function_mode_sees_the_call_before_it_is_handed_over(handed: list[torch.Tensor]) -> None:
    with HandsOn():
        NF.layer_norm(X, 8)
    assert len(handed) == 1  # by the mode, which hands it on


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_and_traces_take_the_formulas(handed: list[torch.Tensor]) -> None:
    torch.func.vmap(lambda x: NF.layer_norm(x, 8))(X)
    torch.func.grad(lambda x: NF.layer_norm(x, 8).sum())(X)
    torch.jit.trace(lambda x: NF.layer_norm(x, 8), X, check_trace=False)
    assert handed == []


NOT_PLAIN: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: NF.layer_norm(X.as_subclass(Subclass), 8),
    "a subclass as weight": lambda: NF.layer_norm(X, 8, WEIGHT.as_subclass(Subclass)),
    "no elements": lambda: NF.layer_norm(X[:0], 8),
    "more bytes than torch is quicker for": lambda: NF.layer_norm(torch.ones(backends.TORCH_ROW_BYTES // 32 + 1, 8), 8),
    "a wider weight": lambda: NF.layer_norm(X.bfloat16(), 8, WEIGHT),
    "a wider residual": lambda: NF.add_layer_norm(X.bfloat16(), RESIDUAL, 8),
    "a gain beside one": lambda: NF.rms_norm(X, 8, WEIGHT, weight_offset=1.0),
    "complex numbers": lambda: NF.rms_norm(X.to(torch.complex64), 8),
    "a jagged batch": lambda: NF.layer_norm(torch.nested.nested_tensor([X[0], X[1, :1]], layout=torch.jagged), 8),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_and_small_is_asked_about_first(handed: list[torch.Tensor], name: str) -> None:
    NOT_PLAIN[name]()
    assert handed == []


def test_autocast_widens_halves_before_anything_is_handed_over(
    handed: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    NF.layer_norm(X.bfloat16(), 8)
    assert handed == []
    NF.layer_norm(X, 8)
    assert len(handed) == 1


# ------------------------------------------------------------------------------------------------ BatchNorm


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The x of every BatchNorm that is handed to torch; the launch that takes a guarded batch's statistics over is here
    a few operations of torch.
    """

    def commit_running(*given: torch.Tensor | None) -> None:
        means, variances, running_mean, running_var, tracked, _ = given
        assert means is not None
        assert variances is not None
        assert running_mean is not None
        assert running_var is not None
        if bool(means.isfinite().all() and variances.isfinite().all()):
            running_mean.copy_(means)
            running_var.copy_(variances)
            if tracked is not None:
                tracked.add_(1)

    monkeypatch.setattr(backends.TRITON, "commit_running", commit_running, raising=False)
    return seen_by(monkeypatch, "batch_norm")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", [{}, {"nonfinite": "allow"}, {"track_running_stats": False}, {"affine": False}])
def test_a_small_batch_norm_is_torchs_to_the_bit(
    batches: list[torch.Tensor], policy: dict[str, Any], training: bool
) -> None:
    ours = normkit.BatchNorm1d(8, **policy).train(training)
    torchs = torch.nn.BatchNorm1d(8, **{name: value for name, value in policy.items() if name != "nonfinite"})
    torchs.train(training)
    for seed in range(3):
        x, dout = normal((5, 8, 3), seed).float().requires_grad_(), normal((5, 8, 3), seed + 9).float()
        found, exact = ours(x), torchs(x)
        assert_same_bits(found, exact, "out")
        for one, other in zip(
            torch.autograd.grad(found, (x, *ours.parameters()), dout),
            torch.autograd.grad(exact, (x, *torchs.parameters()), dout),
            strict=True,
        ):
            assert_same_bits(one, other, "a gradient")
    for (name, one), other in zip(ours.named_buffers(), torchs.buffers(), strict=True):
        assert_same_bits(one, other, name)
    assert len(batches) == 3


def test_a_batch_with_nan_is_handed_over_and_its_statistics_are_not_taken(batches: list[torch.Tensor]) -> None:
    norm = normkit.BatchNorm1d(8)
    norm(X.movedim(1, -1))
    before = norm.running_var.clone()
    version = norm.running_var._version
    bad = X.movedim(1, -1).clone()
    bad[0, 3, 0] = torch.nan
    assert bool(norm(bad).isnan().any())
    assert_same_bits(norm.running_var, before, "running_var")
    assert norm.running_var._version > version
    assert int(norm.num_batches_tracked) == 1
    assert len(batches) == 2


def test_the_function_hands_over_with_and_without_statistics(batches: list[torch.Tensor]) -> None:
    x = X.movedim(1, -1)
    mean, var = torch.zeros(8), torch.ones(8)
    their_mean, their_var = torch.zeros(8), torch.ones(8)
    assert_same_bits(
        NF.batch_norm(x, mean, var, WEIGHT, BIAS, True, 0.3, 1e-3),
        F.batch_norm(x, their_mean, their_var, WEIGHT, BIAS, True, 0.3, 1e-3),
        "training",
    )
    assert_same_bits(mean, their_mean, "running_mean")
    assert_same_bits(var, their_var, "running_var")
    assert_same_bits(NF.batch_norm(x, mean, var), F.batch_norm(x, mean, var), "eval")
    assert_same_bits(NF.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True), "alone")
    assert len(batches) == 3


ONES = torch.ones(8)
REFUSED_BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (
        lambda: NF.batch_norm(X[:, 0], ONES, ONES, WEIGHT[:7]),
        "batch_norm: weight must have one value per channel",
    ),
    "statistics": (
        lambda: NF.batch_norm(X[:, 0], ONES[:7], ONES[:7]),
        "batch_norm: running_mean must have one value per channel",
    ),
    "no statistics": (
        lambda: NF.batch_norm(X[:, 0], None, None),
        "batch_norm: running_mean and running_var are needed outside training",
    ),
    "a weight of another shape": (
        lambda: NF.batch_norm(X[:, 0], ONES, ONES, WEIGHT.view(2, 4)),
        "batch_norm: weight must have one value per channel",
    ),
    "no eps": (
        lambda: NF.batch_norm(X[:, 0], None, None, training=True, eps=0.0),
        "batch_norm: eps must be positive in training",
    ),
    "eps": (lambda: NF.batch_norm(X[:, 0], ONES, ONES, eps=-1.0), "batch_norm: eps must be zero or positive, got -1.0"),
    "one axis": (lambda: NF.batch_norm(X[0, 0], ONES, ONES), "batch_norm: x must"),
    "one value": (
        lambda: NF.batch_norm(X[:1, 0], None, None, training=True),
        "batch_norm: training needs more than 1 value per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BATCHES)
def test_what_torch_refuses_of_a_batch_is_refused_in_our_words(batches: list[torch.Tensor], name: str) -> None:
    call, sentence = REFUSED_BATCHES[name]
    with pytest.raises(ValueError, match=sentence):
        call()
    assert batches == []


@pytest.mark.parametrize("name", IN_FORCE)
def test_no_batch_is_handed_over_at_once_while_something_else_is_in_force(
    batches: list[torch.Tensor], name: str
) -> None:
    with IN_FORCE[name]():
        out = NF.batch_norm(X[:, 0], ONES, ONES)
    assert batches == []
    torch.testing.assert_close(out, F.batch_norm(X[:, 0], ONES, ONES))


NOT_PLAIN_BATCHES: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: NF.batch_norm(X[:, 0].as_subclass(Subclass), ONES, ONES),
    "a subclass as weight": lambda: NF.batch_norm(X[:, 0], ONES, ONES, WEIGHT.as_subclass(Subclass)),
    "no elements": lambda: NF.batch_norm(X[:0, 0], ONES, ONES),
    "more bytes than torch is quicker for": lambda: NF.batch_norm(
        torch.ones(backends.TORCH_BATCH_NORM_BYTES // 32 + 1, 8), ONES, ONES
    ),
    "statistics wider than torch's kernels know": lambda: NF.batch_norm(X[:, 0], ONES.double(), ONES.double()),
    "a weight of another dtype than the statistics": lambda: NF.batch_norm(
        X[:, 0].bfloat16(), ONES, ONES, WEIGHT.bfloat16()
    ),
    "statistics with gaps": lambda: NF.batch_norm(X[:, 0], torch.ones(16)[::2], torch.ones(16)[::2]),
    "a mask": lambda: NF.batch_norm(X.movedim(1, -1), ONES, ONES, mask=torch.ones(3, 2, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", NOT_PLAIN_BATCHES)
def test_a_batch_that_is_not_plain_and_small_is_asked_about_first(batches: list[torch.Tensor], name: str) -> None:
    NOT_PLAIN_BATCHES[name]()
    assert batches == []
