"""DTensor: sharded and replicated tensors take the composite formulas, in one process and over two ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import normkit
from interop_calls import CALLS, Call, gradients, inputs, scalar, watch_core

every_call = pytest.mark.parametrize("call", CALLS, ids=str)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)


def sharded_step(call: Call, mesh: Any) -> list[Tensor]:
    """Outputs and gradients, whole again, of a call whose data are split over the mesh along the batch."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    spread = []
    for argument in inputs(call):
        placement = Shard(0) if argument.dim() > 1 else Replicate()
        spread.append(distribute_tensor(argument.detach(), mesh, [placement]).requires_grad_(argument.requires_grad))
    outputs = call.ours(*spread)
    found = torch.autograd.grad(scalar(outputs), spread[: call.differentiable])
    return [whole.full_tensor() for whole in (*(out.detach() for out in outputs), *found)]


def whole_step(call: Call) -> list[Tensor]:
    return [*(out.detach() for out in call.torchs(*inputs(call))), *gradients(call.torchs, inputs(call))]


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this one process over gloo."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_call
def test_distributed_tensors_take_the_composite(call: Call, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch_core(monkeypatch.setattr, lambda name: pytest.fail(f"the compiled core ran {name}"))
    close(sharded_step(call, mesh), whole_step(call))


def test_reasons_name_the_distributed_tensor(mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    spread = distribute_tensor(torch.ones(2, 3), mesh)
    assert (
        str(normkit.reasons(spread)[0]) == "cpu (not chosen): x is a DTensor, kernels take exact torch.Tensor objects"
    )
    with normkit.use_backend("cpu"), pytest.raises(normkit.BackendUnavailable, match="x is a DTensor"):
        normkit.functional.rms_norm(spread, 3)


def _rank(rank: int, meeting: str, sender: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = [[whole.numpy() for whole in sharded_step(call, mesh)] for call in CALLS]
    if rank == 0:
        sender.send(results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_ranks_that_share_a_batch_compute_what_one_does(tmp_path: Path) -> None:
    """batch_norm's statistics are the whole batch's, and parameter gradients are summed over the ranks."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "meeting"), sender), daemon=True) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        assert receiver.poll(90), "the ranks did not answer"
        results = receiver.recv()
    finally:
        for rank in ranks:
            rank.join(20)
            if rank.is_alive():
                rank.kill()
    for call, found in zip(CALLS, results, strict=True):
        close([torch.from_numpy(array) for array in found], whole_step(call))
