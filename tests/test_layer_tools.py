"""torch's own tools find our layers and work on them: update_bn, SyncBatchNorm, parametrizations, functional_call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import update_bn

import normkit
from interop_calls import D

NAMES = ("LayerNorm", "RMSNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
BATCH_NORMS = NAMES[2:]
DATA = {
    "LayerNorm": (5, D),
    "RMSNorm": (5, D),
    "BatchNorm1d": (5, D),
    "BatchNorm2d": (5, D, 2, 3),
    "BatchNorm3d": (5, D, 2, 3, 2),
}

every_layer = pytest.mark.parametrize("name", NAMES)
every_batch_norm = pytest.mark.parametrize("name", BATCH_NORMS)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's of one name, made of the same arguments."""
    return getattr(normkit, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)


def data(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(DATA[name], generator=torch.Generator().manual_seed(3)).mul(2.0).add(0.5).to(dtype)


def same(ours: Any, torchs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


def trained(layer: nn.Module, name: str) -> nn.Module:
    layer(data(name)).sin().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad
    layer.zero_grad()
    return layer


@pytest.mark.parametrize("kwargs", [{}, {"decay": 0.9}, {"momentum": None}], ids=str)
def test_update_bn_finds_our_layers_and_restores_them(kwargs: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(D, D), normkit.BatchNorm1d(D, **kwargs))
    twin = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(D))
    printed = repr(model)
    batches = [torch.randn(8, D, generator=torch.Generator().manual_seed(i)) * (i + 1.0) for i in range(4)]
    for module in (model, twin):
        update_bn(batches, module)
    same(dict(model.state_dict()), dict(twin.state_dict()))
    assert repr(model) == printed


@every_batch_norm
def test_convert_sync_batchnorm_finds_our_layers(name: str) -> None:
    layer = trained(getattr(normkit, name)(D, decay=0.9, eps=1e-3), name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(layer)))[0]
    assert type(converted) is nn.SyncBatchNorm
    assert converted.momentum == pytest.approx(0.1)
    assert converted.eps == 1e-3
    same(dict(converted.state_dict()), dict(layer.state_dict()), 0.0)
    without = nn.SyncBatchNorm.convert_sync_batchnorm(getattr(normkit, name)(D, bias=False))
    assert without.bias is None


class Softplus(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return nn.functional.softplus(raw)


@every_layer
def test_a_parametrized_weight_is_a_tensor_that_passes_its_gradient_on(name: str) -> None:
    ours, torchs = pair(name, D)
    x = data(name)
    for layer in (ours, torchs):
        parametrize.register_parametrization(layer, "weight", Softplus())
        assert not isinstance(layer.weight, nn.Parameter)
        layer(x).sin().sum().backward()
    same(ours.parametrizations.weight.original.grad, torchs.parametrizations.weight.original.grad, 1e-4)


@every_layer
def test_weight_norm_works_on_a_gain(name: str) -> None:
    ours, torchs = pair(name, D)
    x = data(name)
    for layer in (ours, torchs):
        parametrizations.weight_norm(layer)
        layer(x).sin().sum().backward()
    same(ours(x), torchs(x))
    for found, expected in zip(ours.parameters(), torchs.parameters(), strict=True):
        same(found.grad, expected.grad, 1e-4)


@every_layer
def test_functional_call_and_ensembles_replace_the_parameters(name: str) -> None:
    """torch.func.functional_call and stacked modules under vmap, as ensembling does."""
    ours, torchs = (layer.eval() for layer in pair(name, D))
    x = data(name)
    replaced = {"weight": torch.linspace(0.5, 2.0, D)}
    same(torch.func.functional_call(ours, replaced, (x,)), torch.func.functional_call(torchs, replaced, (x,)))
    stacked, buffers = torch.func.stack_module_state([ours, copy.deepcopy(ours)])

    def one(parameters: Any, state: Any) -> Tensor:
        out: Tensor = torch.func.functional_call(ours, (parameters, state), (x,))
        return out

    found = torch.func.vmap(one)(stacked, buffers) if buffers else torch.func.vmap(lambda p: one(p, {}))(stacked)
    same(found, torch.stack([torchs(x)] * 2))


def test_weight_decay_rules_find_our_layers_by_torchs_classes() -> None:
    model = nn.Sequential(nn.Linear(D, D), *(getattr(normkit, name)(D) for name in NAMES))
    found = [
        type(m).__name__ for m in model if isinstance(m, (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))
    ]
    assert found == list(NAMES)
