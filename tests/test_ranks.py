"""BatchNorm over the ranks of a process group: what one process with the whole batch computes, on gloo."""

from __future__ import annotations

import copy
import datetime
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normkit
from cases import normal
from masked_oracle import normalize
from normkit import functional as NF
from normkit import statistics
from ranks import RankFailed, arrays, on_ranks, outcomes

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

C, L = 5, 7
# How many samples each rank has, and how many positions of each of their samples are valid (None: all).
SHARDS: dict[str, tuple[Sequence[int], Sequence[Sequence[int] | None]]] = {
    "even": ((4, 4), (None, None)),
    "uneven": ((5, 1, 3), (None, None, None)),
    "an empty rank": ((4, 0, 3), (None, None, None)),
    "masked": ((3, 4), ((7, 2, 1), (0, 5, 7, 3))),
    "a fully masked rank": ((3, 2, 4), ((7, 2, 1), (0, 0), (4, 5, 6, 7))),
    "one value a rank": ((1, 1), ((1,), (1,))),
    "nothing valid anywhere": ((2, 2), ((0, 0), (0, 0))),
}


def whole(name: str, mean: float, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """x, dout, weight, bias of all ranks together, and the mask."""
    sizes, valid = SHARDS[name]
    x, dout = normal((sum(sizes), C, L), 1) + mean, normal((sum(sizes), C, L), 2)
    lengths = [n for size, some in zip(sizes, valid, strict=True) for n in (some or [L] * size)]
    mask = torch.arange(L) < torch.tensor(lengths).unsqueeze(1)
    x = torch.where(mask.unsqueeze(1), x, float("nan"))
    return [values.to(dtype) for values in (x, dout, normal((C,), 3) + 1, normal((C,), 4))], mask


def part(rank: int, name: str, values: Tensor) -> Tensor:
    sizes = SHARDS[name][0]
    return values[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def step(x: Tensor, dout: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, group: object) -> list[Tensor]:
    """out, dx, dweight, dbias and both running statistics of one training step."""
    made = [values.detach().requires_grad_() for values in (x, weight, bias)]
    mean, var = torch.full((C,), 0.5, dtype=x.dtype), torch.full((C,), 2.0, dtype=x.dtype)
    out = NF.batch_norm(made[0], mean, var, *made[1:], True, 0.3, mask=mask, process_group=group)
    return [out.detach(), *torch.autograd.grad(out, made, dout), mean, var]


def rank_steps(rank: int, names: Sequence[str], mean: float, backend: str, bytes_of_gather: int) -> list[list[Any]]:
    statistics.GATHER_BYTES = bytes_of_gather
    found = []
    with normkit.use_backend(backend):
        for name in names:
            (x, dout, weight, bias), mask = whole(name, mean)
            given = None if all(valid is None for valid in SHARDS[name][1]) else part(rank, name, mask)
            found.append(
                arrays(step(part(rank, name, x), part(rank, name, dout), weight, bias, given, dist.group.WORLD))
            )
    return found


def exact(name: str, mean: float) -> list[Tensor]:
    """What the NumPy oracle says of the whole batch, in the order of `step`."""
    (x, dout, weight, bias), mask = whole(name, mean)
    found = normalize(x.numpy(), mask.numpy(), weight.numpy(), bias.numpy(), dout.numpy(), None)
    share = 0.3 if found.counts[0] > 1 else 0.0
    means, variances = (np.array(values) for values in (found.means, found.variances))
    results = (found.out, found.dx, found.dweight, found.dbias)
    running = (0.5 * (1 - share) + share * means, 2.0 * (1 - share) + share * variances)
    return [torch.from_numpy(array) for array in (*results, *running)]


@pytest.mark.parametrize("bytes_of_gather", [1 << 40, 0], ids=["gather", "two_sums"])
@pytest.mark.parametrize("kind", ["cpu", "reference"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_ranks_together_compute_what_one_process_does(mean: float, kind: str, bytes_of_gather: int) -> None:
    for ranks in (2, 3):
        names = [name for name, (sizes, _) in SHARDS.items() if len(sizes) == ranks]
        by_rank = on_ranks(rank_steps, ranks, names, mean, kind, bytes_of_gather)
        for i, name in enumerate(names):
            right = exact(name, mean)
            outs, dxs, dweights, dbiases, means, variances = zip(*(found[i] for found in by_rank), strict=True)
            joined = [np.concatenate(outs), np.concatenate(dxs), sum(dweights), sum(dbiases), means[0], variances[0]]
            for which, ours, expected in zip(
                ("out", "dx", "dweight", "dbias", "mean", "var"), joined, right, strict=True
            ):
                torch.testing.assert_close(
                    torch.from_numpy(ours),
                    expected,
                    rtol=1e-9,
                    atol=1e-9,
                    msg=lambda text, w=which, n=name: f"{n}, {w}: {text}",
                )
            for others in (means, variances):  # the same bits everywhere
                assert all(np.array_equal(others[0], other) for other in others)


def sums_of_squares(rank: int) -> list[Any]:
    """Variance by E[x^2] - E[x]^2 over two ranks in float32, the mistake that mean 1e4 punishes."""
    x = part(rank, "even", whole("even", 1e4, torch.float32)[0][0])
    sums = torch.stack([x.sum((0, 2)), (x * x).sum((0, 2))])
    dist.all_reduce(sums)
    mean, square = sums / (8 * L)
    return arrays([square - mean**2])


def test_a_sum_of_squares_would_be_seen() -> None:
    """The wrong variance is far outside what the comparison above allows."""
    wrong = torch.from_numpy(on_ranks(sums_of_squares, 2)[0][0]).double()
    right = whole("even", 1e4)[0][0].var((0, 2), correction=0)
    assert float(((wrong - right).abs() / right).max()) > 0.1


def float32_steps(rank: int, mean: float) -> list[Any]:
    (x, dout, weight, bias), _ = whole("uneven", mean, torch.float32)
    return arrays(step(part(rank, "uneven", x), part(rank, "uneven", dout), weight, bias, None, dist.group.WORLD))


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_float32_ranks_are_as_exact_as_one_process(mean: float) -> None:
    by_rank = on_ranks(float32_steps, 3, mean)
    (x, dout, weight, bias), _ = whole("uneven", mean, torch.float32)
    alone = step(x, dout, weight, bias, None, None)
    outs, dxs, *_ = zip(*by_rank, strict=True)
    for ours, theirs in ((np.concatenate(outs), alone[0]), (np.concatenate(dxs), alone[1])):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


def test_counts_are_exact_beyond_the_integers_of_float32() -> None:
    counts = torch.tensor([[2.0**24], [1.0], [2.0**25 + 1]], dtype=torch.float64)
    found = statistics.pooled(counts, torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    assert int(found.count) == 2**24 + 1 + 2**25 + 1
    first = statistics.Moments(2**24, torch.zeros(2), torch.zeros(2))
    assert int(statistics.merged(first, statistics.Moments(1, torch.ones(2), torch.zeros(2))).count) == 2**24 + 1


# ------------------------------------------------------------------------------------------- second derivatives


def second(rank: int) -> list[Any]:
    (x, dout, weight, bias), _ = whole("even", 1.0)
    made = [part(rank, "even", x).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = NF.batch_norm(made[0], None, None, *made[1:], True, process_group=dist.group.WORLD)
    dx, dweight, _ = torch.autograd.grad(out, made, part(rank, "even", dout), create_graph=True)
    return arrays(torch.autograd.grad((dx**3).sum() + (dweight**2).sum(), made[:2]))


def test_second_derivatives_cross_the_ranks() -> None:
    """Loss: sum over ranks of sum(dx^3) + sum(dweight_of_the_rank^2)."""
    by_rank = on_ranks(second, 2)
    (x, dout, weight, bias), _ = whole("even", 1.0)
    made = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    view = (1, C, 1)
    mean, var = x.mean((0, 2)).view(view), x.var((0, 2), correction=0).view(view)
    xhat = (x - mean) / torch.sqrt(var + 1e-5)
    out = xhat * weight.view(view) + bias.view(view)
    (dx,) = torch.autograd.grad(out, made[:1], dout, create_graph=True)
    shares = [(part(rank, "even", dout * xhat).sum((0, 2)) ** 2).sum() for rank in range(2)]
    right = torch.autograd.grad((dx**3).sum() + sum(shares), made[:2])
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate([found[0] for found in by_rank])), right[0], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(torch.from_numpy(sum(found[1] for found in by_rank)), right[1], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- layers


def layers(rank: int) -> dict[str, Any]:
    """SyncBatchNorm and what it becomes, on 4 ranks in two groups."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    x = normal((rank + 1, C, L), rank)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    everywhere, pair = (
        normkit.SyncBatchNorm(C).double(),
        normkit.SyncBatchNorm(C, process_group=pairs[rank // 2]).double(),
    )
    plain = normkit.BatchNorm1d(C, process_group=pairs[rank // 2]).double()
    for name, layer in (("everywhere", everywhere), ("pair", pair), ("plain", plain)):
        found[name] = arrays([layer(x), layer.running_mean, layer.running_var])
        found[f"{name} eval"] = arrays([layer.eval()(x)])
    copied = copy.deepcopy(pair).train()
    found["copied"] = copied.process_group is pair.process_group
    try:
        import pickle

        pickle.dumps(pair)
    except TypeError as error:
        found["pickle"] = str(error)
    model = nn.Sequential(
        nn.Conv1d(C, C, 1), nn.BatchNorm1d(C, momentum=0.3), normkit.BatchNorm1d(C, decay=0.7)
    ).double()
    weight = model[1].weight
    converted = normkit.SyncBatchNorm.convert_sync_batchnorm(model)
    found["same parameter"] = converted[1].weight is weight
    found["types"] = [type(layer).__name__ for layer in converted]
    found["converted"] = arrays([converted(x), converted[1].running_var, converted[2].running_var])
    return found


def test_layers_share_statistics_over_their_group_only() -> None:
    by_rank = on_ranks(layers, 4)
    xs = [normal((rank + 1, C, L), rank) for rank in range(4)]
    for name, groups in (
        ("everywhere", [range(4)]),
        ("pair", [range(2), range(2, 4)]),
        ("plain", [range(2), range(2, 4)]),
    ):
        for members in groups:
            alone = normkit.BatchNorm1d(C).double()
            outs = alone(torch.cat([xs[rank] for rank in members])).split([rank + 1 for rank in members])
            for rank, out in zip(members, outs, strict=True):
                ours = [torch.from_numpy(array) for array in by_rank[rank][name]]
                for one, other in zip(ours, (out.detach(), alone.running_mean, alone.running_var), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
                evaluated = torch.from_numpy(by_rank[rank][f"{name} eval"][0])
                torch.testing.assert_close(
                    evaluated, copy.deepcopy(alone).eval()(xs[rank]).detach(), rtol=1e-12, atol=1e-12
                )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(C, C, 1), nn.BatchNorm1d(C, momentum=0.3), nn.BatchNorm1d(C, momentum=0.3)).double()
    outs = model(torch.cat(xs)).split([1, 2, 3, 4])
    for rank, found in enumerate(by_rank):
        assert found["copied"]
        assert found["pickle"].startswith("normkit: a layer's process group lives in its process and cannot be pickled")
        assert found["same parameter"]
        assert found["types"] == ["Conv1d", "SyncBatchNorm", "SyncBatchNorm"]
        right = (outs[rank].detach(), model[1].running_var, model[2].running_var)
        for ours, expected in zip(found["converted"], right, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=1e-12, atol=1e-12)


def converted_groups(rank: int) -> dict[str, Any]:
    """Groups that converting keeps, layers that stay shared, a group of others."""
    mine, other = dist.new_group([rank]), None
    for member in range(2):
        group = dist.new_group([member])
        other = other if member == rank else group
        mine = group if member == rank else mine
    found: dict[str, Any] = {}
    layers = (
        nn.SyncBatchNorm(C, process_group=mine),
        normkit.BatchNorm1d(C, process_group=mine),
        normkit.SyncBatchNorm(C, process_group=mine),
    )
    convert = normkit.SyncBatchNorm.convert_sync_batchnorm
    found["kept"] = [convert(layer).process_group is mine for layer in layers]
    found["named"] = [convert(layer, dist.group.WORLD).process_group is dist.group.WORLD for layer in layers]
    found["copied"] = [copy.deepcopy(convert(layer)).process_group is mine for layer in layers]
    shared = nn.BatchNorm1d(C)
    model = convert(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)))
    found["shared"] = model[0] is model[2][0] and type(model[0]) is normkit.SyncBatchNorm
    for name, call in (
        ("lazy", lambda: convert(nn.LazyBatchNorm1d())),
        ("others", lambda: normkit.BatchNorm1d(C, process_group=other)),
        ("functional", lambda: NF.batch_norm(torch.ones(2, C), None, None, training=True, process_group=other)),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_converting_keeps_groups_and_what_is_shared() -> None:
    for found in on_ranks(converted_groups, 2):
        assert found["kept"] == found["named"] == found["copied"] == [True] * 3
        assert found["shared"]
        assert found["lazy"].startswith(
            "ValueError: SyncBatchNorm: convert_sync_batchnorm needs a BatchNorm that knows"
        )
        for name, op in (("others", "BatchNorm1d"), ("functional", "batch_norm")):
            assert found[name].startswith(f"TypeError: {op}: process_group must be a process group"), found[name]


def empty_lengths(rank: int) -> list[Any]:
    x = normal((3, C, L), 1)[: 3 * (1 - rank)]
    lengths = [7, 2, 4][: 3 * (1 - rank)]
    return arrays([NF.batch_norm(x, None, None, training=True, lengths=lengths, process_group=dist.group.WORLD)])


def test_an_empty_rank_may_have_an_empty_list_of_lengths() -> None:
    first, second = on_ranks(empty_lengths, 2)
    right = NF.batch_norm(normal((3, C, L), 1), None, None, training=True, lengths=[7, 2, 4])
    torch.testing.assert_close(torch.from_numpy(first[0]), right, rtol=1e-12, atol=1e-12)
    assert second[0].shape == (0, C, L)


def unlike_gradients(rank: int, backend: str) -> list[Any]:
    """Whether x takes a gradient differs between ranks: forward must not depend on it."""
    x = normal((3, C, L), rank).requires_grad_(rank == 0)
    with normkit.use_backend(backend), torch.set_grad_enabled(rank == 0):
        return arrays([NF.batch_norm(x, None, None, training=True, process_group=dist.group.WORLD)])


def test_ranks_send_the_same_messages_whether_or_not_they_record() -> None:
    right = NF.batch_norm(torch.cat([normal((3, C, L), rank) for rank in range(2)]), None, None, training=True)
    for backend in ("cpu", "reference"):
        found = np.concatenate([outs[0] for outs in on_ranks(unlike_gradients, 2, backend)])
        torch.testing.assert_close(torch.from_numpy(found), right, rtol=1e-12, atol=1e-12)


def test_without_ranks_it_is_a_plain_batch_norm() -> None:
    x = normal((4, C, L), 1)
    ours, plain = normkit.SyncBatchNorm(C).double(), normkit.BatchNorm1d(C).double()
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_var, plain.running_var)
    assert ours(normal((4, C), 1)).shape == (4, C)
    assert normkit.SyncBatchNorm(3, 1e-5, 0.1, True, True, None, "cpu", torch.float64).weight.dtype == torch.float64
    with pytest.raises(
        ValueError, match=re.escape("SyncBatchNorm: x must have at least 2 dimensions (B, C, ...), got x of shape (5,)")
    ):
        ours(torch.zeros(5, dtype=torch.float64))


def policies(rank: int) -> dict[str, Any]:
    x = normal((2, C, L), rank)
    guarded = normkit.SyncBatchNorm(C).double()
    dirty = x.clone()
    if rank == 1:
        dirty[0, 2, 1] = float("nan")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guarded(dirty)
    found: dict[str, Any] = {"skipped": (guarded.nonfinite_batches, int(guarded.num_batches_tracked))}
    accumulated = normkit.SyncBatchNorm(C, momentum=1.0).double()
    with normkit.accumulate_statistics(accumulated):
        accumulated(x)
        accumulated(x + 1e4)
    found["accumulated"] = arrays([accumulated.running_mean, accumulated.running_var])
    alone = normkit.SyncBatchNorm(C).double()
    try:
        alone(x[: 1 - rank, :, :1])  # one value on rank 0, none on rank 1
    except ValueError as error:
        found["one"] = str(error)
    running = normkit.SyncBatchNorm(C, one_value="running").double()
    found["running"] = arrays([running(x[: 1 - rank, :, :1])])
    return found


def test_policies_decide_the_same_on_every_rank() -> None:
    by_rank = on_ranks(policies, 2)
    both = torch.cat([normal((2, C, L), 0), normal((2, C, L), 1)])
    values = torch.cat([both, both + 1e4]).transpose(0, 1).flatten(1)
    for found in by_rank:
        assert found["skipped"] == (1, 0)
        for ours, right in zip(found["accumulated"], (values.mean(1), values.var(1)), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), right, rtol=1e-12, atol=0)
        assert "training needs more than 1 value per channel" in found["one"]
    torch.testing.assert_close(
        torch.from_numpy(by_rank[0]["running"][0]),
        normal((2, C, L), 0)[:1, :, :1] / (1 + 1e-5) ** 0.5,
        rtol=1e-12,
        atol=0,
    )


# ----------------------------------------------------------------------------------------------- what goes wrong


def disagreeing(rank: int, what: str) -> None:
    layer = normkit.SyncBatchNorm(C + (rank if what == "num_features" else 0))
    x = torch.randn(3, layer.num_features, L, dtype=torch.float64 if what == "dtype" and rank else torch.float32)
    (layer.double() if what == "dtype" and rank else layer)(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("num_features", "num_features {}, got 5 on rank 0 and 6 on rank 1; {}"),
        ("dtype", "the dtype of x {}, got torch.float32 on rank 0 and torch.float64 on rank 1; {}"),
    ],
)
def test_ranks_that_disagree_get_a_sentence_and_no_hang(what: str, message: str) -> None:
    for fine, (kind, said, _) in outcomes(disagreeing, 2, what):
        assert not fine
        sentence = message.format(
            "must be the same on all ranks of the process group", "build the same model everywhere"
        )
        assert (kind, said) == ("ValueError", f"SyncBatchNorm: {sentence}")


def dying(rank: int) -> None:
    layer = normkit.SyncBatchNorm(C)
    layer(torch.randn(3, C, L))
    if rank == 1:
        os._exit(3)
    layer(torch.randn(3, C, L))


def absent(rank: int) -> None:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    layer = normkit.SyncBatchNorm(C, process_group=group)
    layer(torch.randn(3, C, L))
    if rank == 1:
        time.sleep(8)
        return
    layer(torch.randn(3, C, L))


@pytest.mark.parametrize("failing", [dying, absent])
def test_a_rank_that_does_not_come_ends_the_wait_with_an_error(failing: Callable[[int], None]) -> None:
    start = time.perf_counter()
    fine, answer = outcomes(failing, 2)[0]
    assert not fine
    assert answer[0] in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert time.perf_counter() - start < 60


def test_a_failing_rank_is_told_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match="SyncBatchNorm"):
        on_ranks(disagreeing, 2, "num_features")
