"""Several Python threads at once, forked children and data-loader workers: the same bits, and no one waits for ever."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import normkit
import normkit.functional as NF
from interop_calls import CALLS, C, Call, D, inputs, scalar

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
# Python 3.12 warns of every fork of a process with threads, which is what this file is about.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ROWS = 700  # enough work for a kernel to ask for the thread pool


def step(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients of one forward and backward."""
    arguments = inputs(call, dtype=dtype, rows=ROWS)
    outputs = call.ours(*arguments)
    grads = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    return [out.detach() for out in outputs] + list(grads)


def same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@every_call
def test_two_threads_at_once_give_the_bits_of_one(call: Call) -> None:
    expected = step(call)
    met = threading.Barrier(2, timeout=60)
    found: list[list[Tensor]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            met.wait()
            found.extend(step(call) for _ in range(20))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not failures
    assert len(found) == 40
    for result in found:
        same_bits(result, expected)


def test_threads_that_share_a_layer_accumulate_its_gradients() -> None:
    layer = normkit.LayerNorm(D)
    x = torch.randn(ROWS, D)
    layer(x).square().sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    threads = [threading.Thread(target=lambda: layer(x).square().sum().backward()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    torch.testing.assert_close([p.grad for p in layer.parameters()], [4 * g for g in once])


def in_a_fork(work: Callable[[Any], None]) -> Any:
    """What `work` sends from a forked child, within a minute; the parent's thread pool has been used before."""
    for call in CALLS:
        step(call)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(sender,), daemon=True)
    child.start()
    try:
        assert receiver.poll(60), "the forked child did not answer"
        return receiver.recv()
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()


@forks
def test_a_forked_child_with_one_thread_finishes_forward_and_backward() -> None:
    def work(sender: Any) -> None:
        torch.set_num_threads(1)
        sender.send([[t.numpy() for t in step(call)] for call in CALLS])

    answers = in_a_fork(work)
    for call, answer in zip(CALLS, answers, strict=True):
        found = [torch.from_numpy(a) for a in answer]
        if "batch_norm" in call.name:  # sums over the batch may be split by thread
            torch.testing.assert_close(found, step(call), rtol=1e-5, atol=1e-5)
        else:
            same_bits(found, step(call))


class Samples(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.linspace(0.0, 1.0 + index, C * D).view(C, D)


def collate(samples: list[Tensor]) -> Tensor:
    """Normalizes while collating, as an augmentation pipeline may."""
    batch = NF.layer_norm(torch.stack(samples), D)
    return NF.batch_norm(batch, None, None, training=True)


@forks
def test_a_data_loader_worker_normalizes_and_finishes() -> None:
    for call in CALLS:
        step(call)
    loader = DataLoader(
        Samples(), batch_size=4, num_workers=1, collate_fn=collate, timeout=60, multiprocessing_context="fork"
    )
    found = list(loader)
    expected = [collate([Samples()[i] for i in range(start, start + 4)]) for start in (0, 4, 8)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
