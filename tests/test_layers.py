"""Our layers in torch's place: constructors, state dicts, initialisation, copies, printing, and torch's own tools."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
import normkit.functional as NF
from interop_calls import D

BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
INSTANCE_NORMS = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
NAMES = ("LayerNorm", "RMSNorm", *BATCH_NORMS, *INSTANCE_NORMS)  # made of one size; GroupNorm has two
DATA = {
    "GroupNorm": (5, D, 3),
    "InstanceNorm1d": (5, D, 4),
    "InstanceNorm2d": (5, D, 2, 3),
    "InstanceNorm3d": (5, D, 2, 3, 2),
    "LayerNorm": (5, D),
    "RMSNorm": (5, D),
    "BatchNorm1d": (5, D),
    "BatchNorm2d": (5, D, 2, 3),
    "BatchNorm3d": (5, D, 2, 3, 2),
}

# Arguments by position and by name, in every combination that changes parameters or buffers.
ROW_ARGUMENTS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((D,), {}),
    (([5, D],), {}),
    ((torch.Size([D]), 1e-3), {}),
    ((D, 1e-3, False), {}),
    ((D, 1e-3, True), {"dtype": torch.float64}),
)
BATCH_ARGUMENTS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((D,), {}),
    ((D, 1e-3, 0.2), {}),
    ((D, 1e-3, None, False), {}),
    ((D, 1e-5, 0.1, True, False), {}),
    ((D, 1e-5, 0.1, True, True, "cpu", torch.float64), {}),
    # torch's BatchNorm has the argument only in newer versions; ours has it in all
    *([((D,), {"bias": False})] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []),
)
VARIANTS = [
    *((name, *arguments) for name in NAMES[:2] for arguments in ROW_ARGUMENTS),
    ("LayerNorm", (D, 1e-5, True, False, "cpu", torch.float64), {}),
    ("LayerNorm", (D,), {"bias": False}),
    ("RMSNorm", (D, None, True, "cpu", torch.float64), {}),
    *((name, *arguments) for name in BATCH_NORMS for arguments in BATCH_ARGUMENTS),
    *((name, *arguments) for name in INSTANCE_NORMS for arguments in BATCH_ARGUMENTS[:5]),
    ("GroupNorm", (4, D), {}),
    ("GroupNorm", (D, D, 1e-3, False), {}),
    ("GroupNorm", (1, D, 1e-5, True, "cpu", torch.float64), {}),
]
every_variant = pytest.mark.parametrize(
    ("name", "args", "kwargs"), VARIANTS, ids=lambda value: str(value).replace(" ", "")
)
every_layer = pytest.mark.parametrize("name", NAMES)
every_batch_norm = pytest.mark.parametrize("name", BATCH_NORMS)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's of one name, made of the same arguments."""
    return getattr(normkit, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)


def data(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(DATA[name], generator=torch.Generator().manual_seed(3)).mul(2.0).add(0.5).to(dtype)


def same(ours: Any, torchs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------- names and signatures


@every_layer
def test_our_layers_are_torchs_layers(name: str) -> None:
    ours, torchs = pair(name, D)
    assert isinstance(ours, type(torchs))
    assert type(ours).__module__.startswith("normkit")
    assert type(ours).__name__ == name
    if name in BATCH_NORMS:
        assert isinstance(ours, nn.modules.batchnorm._BatchNorm)  # what weight-decay rules and update_bn ask for


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@every_layer
def test_constructors_take_torchs_arguments_in_torchs_order_with_torchs_defaults(name: str) -> None:
    expected = parameters(getattr(nn, name))
    found = parameters(getattr(normkit, name))
    assert found[: len(expected)] == expected
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in found[len(expected) :])


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"])
def test_functions_take_torchs_arguments_in_torchs_order_with_torchs_defaults(name: str) -> None:
    expected = parameters(getattr(nn.functional, name))
    found = parameters(getattr(NF, name))
    assert found[: len(expected)] == expected
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in found[len(expected) :])


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_the_fused_functions_take_the_plain_ones_arguments_after_the_residual(name: str) -> None:
    plain, fused = parameters(getattr(NF, name)), parameters(getattr(NF, f"add_{name}"))
    assert [p[0] for p in fused[:2]] == ["x", "residual"]
    assert fused[2:] == [p for p in plain[1:] if p[0] != "shard_group"]


# -------------------------------------------------------------------------------------------- state and values


@every_variant
def test_state_dicts_go_both_ways_and_outputs_agree(name: str, args: Any, kwargs: Any) -> None:
    ours, torchs = pair(name, *args, **kwargs)
    state = ours.state_dict()
    assert {key: (v.shape, v.dtype) for key, v in state.items()} == {
        key: (v.shape, v.dtype) for key, v in torchs.state_dict().items()
    }
    assert list(state) == list(torchs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in torchs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in torchs.named_buffers()]
    dtype = kwargs.get("dtype", torch.float64 if torch.float64 in args else torch.float32)
    x = data(name, dtype)
    with torch.no_grad():
        for index, parameter in enumerate(torchs.parameters()):
            parameter.copy_(torch.linspace(-1.0, 2.0 + index, parameter.numel()).view(parameter.shape))
    same(ours.load_state_dict(torchs.state_dict(), strict=True).missing_keys, [])
    for module in (ours, torchs):
        module.train()
    for _ in range(3):
        same(ours(x), torchs(x))
    same(dict(ours.state_dict()), dict(torchs.state_dict()))
    back = getattr(nn, name)(*args, **kwargs)
    back.load_state_dict(ours.state_dict(), strict=True)
    same(back.eval()(x), ours.eval()(x))


@every_batch_norm
def test_a_state_dict_of_before_num_batches_tracked_loads(name: str) -> None:
    """torch's own migration of version 1 checkpoints, which `_load_from_state_dict` of the superclass does."""
    ours, torchs = pair(name, D)
    state = torchs.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    ours.load_state_dict(state, strict=True)
    assert int(ours.num_batches_tracked) == 0


@every_batch_norm
def test_batch_norm_counts_batches_and_ignores_refused_ones(name: str) -> None:
    layer = getattr(normkit, name)(D)
    layer(data(name))
    before = copy.deepcopy(layer.state_dict())
    x = data(name)
    one_value = torch.ones(1, D, *[1] * (x.dim() - 2))
    for wrong in (one_value, x[:, :-1], x[0, 0], x.long()):
        with pytest.raises((ValueError, TypeError)):
            layer(wrong)
        same(dict(layer.state_dict()), dict(before), 0.0)
    layer(x)
    assert int(layer.num_batches_tracked) == 2


@every_batch_norm
def test_a_frozen_or_evaluated_layer_leaves_its_statistics_alone(name: str) -> None:
    layer = getattr(normkit, name)(D)
    layer(data(name))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(data(name))
    layer.train()
    layer.track_running_stats = False
    layer(data(name))
    same(dict(layer.state_dict()), dict(before), 0.0)


@every_batch_norm
def test_decay_is_one_minus_momentum_and_they_exclude_each_other(name: str) -> None:
    make = getattr(normkit, name)
    layer = make(D, decay=0.9)
    assert (layer.decay, layer.momentum) == (0.9, pytest.approx(0.1))
    assert make(D, momentum=0.25).decay == 0.75
    assert make(D, momentum=None).decay is None
    for momentum in (0.1, 0.2, None):
        with pytest.raises(ValueError, match="exclude each other") as caught:
            make(D, momentum=momentum, decay=0.9)
        assert str(caught.value) == (
            f"{name}: momentum (weight of the new batch) and decay (weight of the old average, 1 - momentum) "
            f"exclude each other, got momentum={momentum} and decay=0.9; pass one of them"
        )
    for key, value in (("momentum", 1.5), ("decay", -0.1), ("decay", float("nan"))):
        with pytest.raises(ValueError, match="must lie between") as caught:
            make(D, **{key: value})
        assert str(caught.value) == (
            f"{name}: {key} must lie between 0 and 1, got {value}; usual are momentum=0.1, decay=0.9"
        )
    other = nn.BatchNorm1d(D, momentum=0.1)
    x = torch.randn(7, D)
    ours = normkit.BatchNorm1d(D, decay=0.9)
    for _ in range(5):
        ours(x), other(x)
    same(dict(ours.state_dict()), dict(other.state_dict()))


# --------------------------------------------------------------------------------------------- initialisation


def test_a_weight_offset_starts_the_gain_at_one_and_follows_gemmas_formula() -> None:
    layer = normkit.RMSNorm(D, eps=1e-6, weight_offset=1.0)
    assert torch.equal(layer.weight, torch.zeros(D))
    x = data("RMSNorm")
    same(layer(x), nn.RMSNorm(D, eps=1e-6)(x))
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.5, 0.5, D))
    gemma = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + layer.weight)
    same(layer(x), gemma)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.zeros(D))
    loaded = normkit.RMSNorm(D, weight_offset=1.0)
    loaded.load_state_dict(nn.RMSNorm(D).state_dict(), strict=True)  # the offset is the layer's, not the checkpoint's
    assert torch.equal(loaded.weight, torch.ones(D))
    assert copy.deepcopy(layer).weight_offset == pickle.loads(pickle.dumps(layer)).weight_offset == 1.0
    assert normkit.RMSNorm(D, elementwise_affine=False, weight_offset=1.0)(x).shape == x.shape


@every_variant
def test_reset_parameters_gives_what_the_constructor_gave(name: str, args: Any, kwargs: Any) -> None:
    layer, torchs = pair(name, *args, **kwargs)
    fresh = copy.deepcopy(layer.state_dict())
    same(dict(fresh), dict(torchs.state_dict()), 0.0)
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.fill_(7)
    layer.reset_parameters()
    same(dict(layer.state_dict()), dict(fresh), 0.0)


@every_variant
def test_a_layer_born_on_meta_gets_memory_later(name: str, args: Any, kwargs: Any) -> None:
    with torch.device("meta"):
        layer = getattr(normkit, name)(*args, **{**kwargs, **({} if "cpu" in args else {"device": "meta"})})
    if "cpu" not in args:
        assert {value.device.type for value in layer.state_dict().values()} <= {"meta"}
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    same(dict(layer.state_dict()), dict(getattr(nn, name)(*args, **kwargs).state_dict()), 0.0)


def test_a_weight_offset_survives_the_meta_device() -> None:
    layer = normkit.RMSNorm(D, weight_offset=1.0, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.zeros(D))


@every_layer
def test_skip_init_makes_an_uninitialised_layer(name: str) -> None:
    layer = nn.utils.skip_init(getattr(normkit, name), D)
    assert type(layer) is getattr(normkit, name)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {
        key: value.shape for key, value in getattr(nn, name)(D).state_dict().items()
    }
    assert {value.device.type for value in layer.state_dict().values()} <= {"cpu"}  # an InstanceNorm has none


# ------------------------------------------------------------------------------------------ copies and printing


def trained(layer: nn.Module, name: str) -> nn.Module:
    layer(data(name).requires_grad_()).sin().sum().backward()  # an InstanceNorm has no parameters by default
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad
    layer.zero_grad()
    return layer


def through_pickle(layer: nn.Module) -> nn.Module:
    restored: nn.Module = pickle.loads(pickle.dumps(layer))
    return restored


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    restored: nn.Module = torch.load(file, weights_only=False)
    return restored


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
def test_copies_compute_and_print_the_same(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = trained(getattr(normkit, name)(D), name)
    other = copied(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    same(other.eval()(data(name)), layer.eval()(data(name)), 0.0)


@every_batch_norm
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_goes_on_stating_decay(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    other = copied(getattr(normkit, name)(D, decay=0.99))
    assert "decay=0.99," in repr(other)
    assert other.decay == pytest.approx(0.99)


@every_layer
def test_weights_alone_are_saved_and_loaded(name: str) -> None:
    layer = trained(getattr(normkit, name)(D), name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = getattr(nn, name)(D)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    same(dict(other.state_dict()), dict(layer.state_dict()), 0.0)


@every_variant
def test_layers_print_what_torchs_print(name: str, args: Any, kwargs: Any) -> None:
    ours, torchs = pair(name, *args, **kwargs)
    assert repr(ours) == repr(torchs)


def test_what_normkit_adds_is_printed_in_its_place() -> None:
    """torch's words, with decay where momentum stands and the offset at the end."""
    for layer, twin, theirs, added in (
        (normkit.BatchNorm1d(3, decay=0.9), nn.BatchNorm1d(3), "momentum=0.1", "decay=0.9"),
        (normkit.BatchNorm2d(3, decay=0.999), nn.BatchNorm2d(3, momentum=0.001), "momentum=0.001", "decay=0.999"),
        (normkit.BatchNorm3d(3, decay=1.0), nn.BatchNorm3d(3, momentum=0.0), "momentum=0.0", "decay=1"),
        (normkit.RMSNorm(3, weight_offset=1.0), nn.RMSNorm(3), ")", ", weight_offset=1.0)"),
    ):
        head, theirs_found, tail = repr(twin).rpartition(theirs)
        assert theirs_found
        assert repr(layer) == head + added + tail
    layer = normkit.BatchNorm1d(3, decay=0.9)
    layer.momentum = None  # as update_bn sets it: nothing is left to state as a decay
    assert "momentum=None" in repr(layer)


@every_layer
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_layers_convert_their_dtype_as_torchs_do(name: str, convert: str) -> None:
    ours, torchs = (getattr(layer, convert)() for layer in pair(name, D))
    expected = {key: value.dtype for key, value in torchs.state_dict().items()}
    assert {key: value.dtype for key, value in ours.state_dict().items()} == expected
    x = data(name, {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[convert])
    out, reference = ours(x), torchs(x)
    assert out.dtype == reference.dtype
    tolerance = 1e-9 if convert == "double" else 2e-2
    same(out, reference, tolerance)
    same(ours.eval()(x), torchs.eval()(x), tolerance)
