"""GroupNorm and InstanceNorm: what the case table does not ask: running statistics, single samples, who shares what.

Read next: cases.py, the rows that run through every other check.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
import normkit.functional as NF
from cases import DTYPES, Oracle
from tolerance import assert_exact_enough, assert_same_bits, threads

INSTANCE_NORMS = {"InstanceNorm1d": (5, 6, 7), "InstanceNorm2d": (5, 6, 3, 4), "InstanceNorm3d": (5, 6, 2, 3, 2)}
every_instance_norm = pytest.mark.parametrize("name", INSTANCE_NORMS)


def batch(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_instance_norm
@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_running_statistics_are_torchs_over_many_batches(name: str, momentum: float | None) -> None:
    arguments = {"momentum": momentum, "affine": True, "track_running_stats": True}
    ours, torchs = (getattr(module, name)(6, **arguments) for module in (normkit, nn))
    for seed in range(5):
        x = batch(INSTANCE_NORMS[name], seed)
        close(ours(x), torchs(x))
    close(dict(ours.state_dict()), dict(torchs.state_dict()))
    x = batch(INSTANCE_NORMS[name], 9)
    close(ours.eval()(x), torchs.eval()(x))


@every_instance_norm
def test_a_refused_or_empty_batch_leaves_running_statistics_alone(name: str) -> None:
    layer = getattr(normkit, name)(6, track_running_stats=True)
    x = batch(INSTANCE_NORMS[name])
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    one_position = x[(..., *(slice(0, 1),) * (x.dim() - 2))]
    for wrong in (one_position, x[:, :-1], x[0, 0, 0], x.long()):
        with pytest.raises((ValueError, TypeError)):
            layer(wrong)
    assert layer(x[:0]).shape == x[:0].shape
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key], key)


@every_instance_norm
def test_a_single_sample_is_a_batch_of_one(name: str) -> None:
    x = batch(INSTANCE_NORMS[name])
    layer = getattr(normkit, name)(6, affine=True)
    assert_same_bits(layer(x[0]), layer(x)[0], "a sample alone")
    close(layer(x[0]), getattr(nn, name)(6, affine=True)(x[0]))


def test_an_instance_norm_without_parameters_warns_of_another_number_of_channels_as_torch_does() -> None:
    x = batch((2, 5, 7))
    for layer in (normkit.InstanceNorm1d(6), nn.InstanceNorm1d(6)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = layer(x)
        assert len(caught) == 1
        close(out, nn.functional.instance_norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((9, 6, 50, 40), 1), ((9, 6, 50, 40), 2), ((9, 6, 50, 40), 6), ((33, 96, 7, 5), 32), ((33, 96, 7, 5), 96)],
    ids=str,
)
def test_a_sample_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    """With the smaller maps a thread takes several groups at once, and how many depends on batch and threads."""
    x, dout = (batch(shape, seed).to(dtype) for seed in (1, 2))
    weight = batch(shape[1:2], 3).to(dtype)

    def results(x: Tensor, dout: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = NF.group_norm(leaf, groups, weight)
        return [out.detach(), *torch.autograd.grad(out, leaf, dout)]

    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid, dlaid = (values.contiguous(memory_format=memory_format) for values in (x, dout))
        whole = results(laid, dlaid)
        for i, name in enumerate(("out", "dx")):
            assert whole[i].is_contiguous(memory_format=memory_format), name
            for b in (0, 5, 8):
                alone = results(laid[b : b + 1], dlaid[b : b + 1])
                assert_same_bits(alone[i], whole[i][b : b + 1], f"{name} of sample {b} alone")
            with threads(1):
                assert_same_bits(results(laid, dlaid)[i], whole[i], f"{name} with one thread")


def test_as_many_groups_as_channels_are_an_instance_norm_and_one_group_is_a_layer_norm() -> None:
    x, weight, bias = batch((4, 6, 11)), batch((6,), 1), batch((6,), 2)
    assert_same_bits(NF.group_norm(x, 6, weight, bias), NF.instance_norm(x, weight=weight, bias=bias), "G = C")
    close(NF.group_norm(x, 1), NF.layer_norm(x, (6, 11)))


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_channels_with_far_apart_means_keep_their_precision_in_one_group(last: bool) -> None:
    """|mean| >> std within a channel and means of 1e4 between: E[x^2] - E[x]^2 would lose all digits."""
    x = batch((2, 4, 8, 9)) + 1e4 + torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1, 1)
    x = x.to(memory_format=torch.channels_last) if last else x
    for groups in (1, 2, 4):
        exact = Oracle(x.dtype).group_norm(x.double(), groups)
        assert_exact_enough(NF.group_norm(x, groups), exact, nn.functional.group_norm(x, groups), f"{groups} groups")


def test_a_constant_group_becomes_the_bias() -> None:
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = NF.group_norm(torch.full((2, 4, 5), 7.25), 2, None, bias)
    assert_same_bits(out, bias.view(1, 4, 1).expand(2, 4, 5).contiguous(), "constant")


def test_groups_of_one_value_each_become_the_bias_where_torch_takes_them() -> None:
    """torch refuses a single value in all, not one value per group; its own result is off by rounding times rstd."""
    x, bias = batch((3, 4)), torch.tensor([0.5, -1.0, 2.0, 0.0])
    assert_same_bits(NF.group_norm(x, 4, None, bias), bias.expand(3, 4).contiguous(), "one value each")
    torch.testing.assert_close(nn.functional.group_norm(x, 4, None, bias), bias.expand(3, 4), rtol=0, atol=1e-3)
