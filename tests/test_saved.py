"""What is kept for backward: its bytes, its hooks, changes to it, and what checkpointing computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import checkpoint as checkpointing

import normkit
import normkit.functional as NF
from interop_calls import CALLS, C, Call, gradients, inputs, scalar

every_call = pytest.mark.parametrize("call", CALLS, ids=str)
row_calls = pytest.mark.parametrize("call", CALLS[:4], ids=str)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    close(actual, expected, 0.0)


@every_call
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits(call: Call, reentrant: bool) -> None:
    arguments = inputs(call)

    def body(*args: Tensor) -> tuple[Tensor, ...]:
        first, *rest = args
        return tuple(call.ours(first * 2.0, *rest))

    outputs = checkpointing.checkpoint(body, *arguments, use_reentrant=reentrant)
    found = torch.autograd.grad if not reentrant else None
    if found is None:  # the reentrant kind knows backward() alone
        scalar(outputs).backward()
        grads = [a.grad for a in arguments[: call.differentiable]]
    else:
        grads = list(found(scalar(outputs), arguments[: call.differentiable]))
    same_bits(outputs, body(*arguments))
    same_bits(grads, gradients(body, inputs(call)))


@row_calls
def test_selective_checkpointing_keeps_what_it_is_told(call: Call) -> None:
    """Its policy is a dispatch mode: forward, recomputation and backward all take the composite."""
    kept: list[str] = []

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(str(operation))
        save = "rsqrt" in str(operation)
        return checkpointing.CheckpointPolicy.MUST_SAVE if save else checkpointing.CheckpointPolicy.PREFER_RECOMPUTE

    arguments = inputs(call)
    outputs = checkpointing.checkpoint(
        lambda *args: tuple(call.ours(*args)),
        *arguments,
        use_reentrant=False,
        context_fn=lambda: checkpointing.create_selective_checkpoint_contexts(policy),
    )
    found = torch.autograd.grad(scalar(outputs), arguments[: call.differentiable])
    assert "aten.rsqrt.default" in kept
    close(found, gradients(call.torchs, inputs(call)))


# -------------------------------------------------------------------------------- what is kept for backward


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call keeps for its backward, as they are handed to the saved-tensor hooks."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return packed


@row_calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_norm_keeps_the_total_and_one_or_two_numbers_a_row(call: Call, dtype: torch.dtype) -> None:
    arguments = inputs(call, dtype=dtype)
    results: list[Any] = []
    packed = saved_by(lambda: results.append(call.ours(*arguments)))
    known = {storage(a) for a in arguments} | {storage(out) for out in results[0]}
    rows, statistics = arguments[0].shape[0], 2 if "layer" in call.name else 1
    new_bytes = sum(t.numel() * t.element_size() for t in packed if storage(t) not in known)
    assert new_bytes == rows * statistics * 4  # float32 mean and rstd, also for bfloat16 input
    assert sum(t.numel() == arguments[0].numel() for t in packed) == 1  # the total, never the output beside it
    out, *totals = results[0]
    total = totals[0] if totals else arguments[0]
    (kept,) = [t for t in packed if t.numel() == total.numel()]
    assert storage(kept) == storage(total)
    assert storage(out) not in {storage(t) for t in packed}


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_its_input_and_vectors_of_channels(training: bool) -> None:
    call = CALLS[4 if training else 5]
    arguments = inputs(call, dtype=torch.float32)
    packed = saved_by(lambda: call.ours(*arguments))
    known = {storage(a) for a in arguments[: call.differentiable]}
    assert sum(t.numel() for t in packed if storage(t) not in known) == 2 * C
    assert sum(t.numel() == arguments[0].numel() for t in packed) == 1


def test_a_slice_of_a_fused_qkv_is_read_in_place_and_not_copied() -> None:
    batch, steps, heads, size = 2, 5, 3, 8
    qkv = torch.randn(batch, steps, 3, heads, size, requires_grad=True)
    q = qkv[:, :, 0]
    assert not q.is_contiguous()
    results: list[Tensor] = []
    for call in (lambda: NF.rms_norm(q, size, eps=1e-6), lambda: NF.layer_norm(q, size)):
        packed = saved_by(lambda call=call: results.append(call()))
        assert [storage(t) for t in packed if t.numel() == q.numel()] == [storage(qkv)]
    (found,) = torch.autograd.grad(results[0].sin().sum() + results[1].sin().sum(), qkv)
    plain = q.detach().clone().requires_grad_()
    expected = F.rms_norm(plain, (size,), eps=1e-6).sin().sum() + F.layer_norm(plain, (size,)).sin().sum()
    (dq,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(found[:, :, 0], dq)
    assert not found[:, :, 1:].any()


@every_call
def test_saved_tensors_may_be_packed_away_and_restored(call: Call) -> None:
    """As offloading to disk or another device does: what comes back is a new tensor of equal value."""
    expected = gradients(call.ours, inputs(call))
    arguments = inputs(call)
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), lambda array: torch.from_numpy(array)):
        loss = scalar(call.ours(*arguments))
        same_bits(torch.autograd.grad(loss, arguments[: call.differentiable]), expected)
    with save_on_cpu():
        same_bits(gradients(call.ours, inputs(call)), expected)


@every_call
@pytest.mark.parametrize("changed", ["total", "weight"])
def test_a_change_of_what_was_saved_is_noticed(call: Call, changed: str) -> None:
    arguments = inputs(call)
    x = arguments[0] * 1.0  # no leaf, so that it may be changed in place
    outputs = call.ours(x, *arguments[1:])
    if changed == "weight":
        target = next(a for a in arguments if a.dim() == 1)
    else:
        target = outputs[1] if len(outputs) == 2 else x
    with torch.no_grad():
        target.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_running_statistics_may_change_between_an_eval_forward_and_its_backward() -> None:
    layer = normkit.BatchNorm1d(C).eval()
    x = torch.randn(6, C, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sin().sum(), x)
    out = layer(x)
    layer.running_mean.fill_(7.0)
    layer.running_var.fill_(7.0)
    same_bits(torch.autograd.grad(out.sin().sum(), x), [expected])
