"""A small network trained on scikit-learn's handwritten digits, in one process or on the ranks that torchrun started.

    torchrun --nproc-per-node 2 tests/digits_training.py FILE

Here: train(), which test_parallel_training.py compares over numbers of ranks; rank 0 writes its result to FILE.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normkit

BATCH, STEPS = 48, 12


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        normkit.BatchNorm2d(8, decay=0.7),
        nn.ReLU(),
        nn.Flatten(),
        normkit.LayerNorm(72),
        nn.Linear(72, 10),
    )
    return normkit.SyncBatchNorm.convert_sync_batchnorm(model).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images / 16.0).view(-1, 1, 8, 8)[order]
    y = torch.from_numpy(labels)[order]
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, STEPS * BATCH, BATCH)]


def train(rank: int, shares: list[int]) -> dict[str, Any]:
    """The state dict after STEPS steps, and the losses of the whole batch; `shares[rank]` samples of each batch."""
    model = network()
    trained: nn.Module = DistributedDataParallel(model) if len(shares) > 1 else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.2, momentum=0.9)
    start, losses = sum(shares[:rank]), []
    for x, y in batches():
        mine = slice(start, start + shares[rank])
        loss = nn.functional.cross_entropy(trained(x[mine]), y[mine], reduction="sum") / BATCH
        optimizer.zero_grad()
        (loss * len(shares)).backward()  # DDP takes the mean over ranks
        optimizer.step()
        total = loss.detach().clone()
        if len(shares) > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return {"losses": losses, "state": {name: values.numpy() for name, values in model.state_dict().items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    found = train(dist.get_rank(), [BATCH // world] * world)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    print(f"rank {dist.get_rank()} of {os.environ['WORLD_SIZE']}: loss {found['losses'][-1]:.3f}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # threads of torch's that still run when the interpreter ends aborted one rank in some dozens of runs ("terminate
    # called without an active exception"); what this script is for is done
    os._exit(0)
