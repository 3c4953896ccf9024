"""Training on several ranks (DistributedDataParallel, fully_shard, checkpointing, compiling) as one process trains."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit
from cases import normal
from digits_training import BATCH, train
from ranks import arrays, on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def assert_same_training(found: dict[str, Any], alone: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-9)
    assert found["state"].keys() == alone["state"].keys()
    for name, values in alone["state"].items():
        np.testing.assert_allclose(found["state"][name], values, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = train(0, [BATCH])
    assert found["losses"][-1] < 0.5 * found["losses"][0]  # it does learn
    return found


@pytest.mark.parametrize("shares", [[24, 24], [40, 8]], ids=["even", "uneven"])
def test_data_parallel_training_on_digits_equals_one_process(shares: list[int], alone: dict[str, Any]) -> None:
    by_rank = on_ranks(train, 2, shares)
    for found in by_rank:
        assert_same_training(found, alone)
    for name, values in by_rank[0]["state"].items():
        assert np.array_equal(by_rank[1]["state"][name], values), name  # the same bits on both ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_torchrun_trains_as_one_process_does(ranks: int, alone: dict[str, Any], tmp_path: Path) -> None:
    script = Path(__file__).with_name("digits_training.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "found.pt")], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same_training(torch.load(tmp_path / "found.pt", weights_only=False), alone)


# ----------------------------------------------------------------------------------------------- fully_shard


class Block(nn.Module):
    """Every kind of norm between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([normkit.RMSNorm(8, eps=1e-6), normkit.LayerNorm(8), normkit.SyncBatchNorm(8)])
        self.linears = nn.ModuleList([nn.Linear(8, 8) for _ in self.norms])

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


def trained(model: nn.Module, x: Tensor) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    state = model.state_dict().values()
    return arrays([values.full_tensor() if hasattr(values, "full_tensor") else values for values in state])


def sharded(rank: int) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return trained(model, normal((6, 8), 5)[3 * rank : 3 * rank + 3])


def test_fully_sharded_training_equals_one_process() -> None:
    torch.manual_seed(0)
    right = trained(nn.Sequential(Block(), Block()).double(), normal((6, 8), 5))
    for found in on_ranks(sharded, 2):
        for ours, expected in zip(found, right, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------- recomputed and compiled


def recomputed(rank: int, reentrant: bool) -> list[Any]:
    layer = normkit.SyncBatchNorm(8).double()
    x = normal((6, 8), 5)[3 * rank : 3 * rank + 3].requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
    return arrays([x.grad, layer.running_var, layer.num_batches_tracked])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointed_ranks_count_once_and_agree(reentrant: bool) -> None:
    layer = normkit.BatchNorm1d(8).double()
    x = normal((6, 8), 5).requires_grad_()
    layer(x).pow(3).sum().backward()
    by_rank = on_ranks(recomputed, 2, reentrant)
    np.testing.assert_allclose(np.concatenate([found[0] for found in by_rank]), x.grad, rtol=1e-9, atol=1e-11)
    for found in by_rank:
        np.testing.assert_allclose(found[1], layer.running_var, rtol=1e-12)
        assert found[2] == 1


def compiled(rank: int) -> list[Any]:
    layer = normkit.SyncBatchNorm(8).double()
    call = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager")
    x = normal((6, 8), 5)[3 * rank : 3 * rank + 3].requires_grad_()
    group = dist.group.WORLD

    @torch.compile(backend="aot_eager")
    def functional(x: Tensor) -> Tensor:
        return normkit.functional.batch_norm(x * 1.0, None, None, training=True, process_group=group)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, where it takes up what the layer returned
        for _ in range(2):
            out = call(x)
            (dx,) = torch.autograd.grad(out.pow(3).sum(), x)
        also = functional(x).relu()
    dist.barrier()
    return arrays([out, dx, also, layer.running_mean])


def test_compiled_ranks_compute_what_eager_ones_do() -> None:
    layer = normkit.BatchNorm1d(8).double()
    x = normal((6, 8), 5).requires_grad_()
    for _ in range(2):
        out = layer(x).relu()
    (dx,) = torch.autograd.grad(out.pow(3).sum(), x)
    by_rank = on_ranks(compiled, 2)
    for i, right in enumerate((out, dx, out)):
        joined = np.concatenate([found[i] for found in by_rank])
        np.testing.assert_allclose(joined, right.detach(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(by_rank[0][3], layer.running_mean, rtol=1e-12)
