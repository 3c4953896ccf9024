"""observe: its numbers are those of hand computation and of the study, and a model is afterwards what it was before.

Here: restoring, numbers, ways to call, blocks, saturation, norms, transformers' models, the page, TensorBoard.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normkit
import normkit.study
from normkit.placement import PostNorm, PreNorm
from normkit.report import observation as report_observation
from normkit.report import wording
from normkit.study import Observation, measure, observe
from normkit.study.models import Transformer
from normkit.study.observation import numbers
from normkit.study.observation.restore import as_found
from pages import Page, browse

# ---------------------------------------------------------------------------------------------- models to look at


class Block(nn.Module):
    """x + scale * linear(tanh(linear(norm(x)))), or with the norm after the add."""

    def __init__(self, width: int = 6, post: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(width), nn.Linear(width, 8), nn.Tanh(), None
        self.down = nn.Linear(8, width)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            return self.norm(x + self.down(self.act(self.up(x))))
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 3, post: bool = False) -> None:
        super().__init__()
        self.inward = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(post=post) for _ in range(depth))
        self.outward = nn.Linear(6, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.inward(x) * scale
        for block in self.blocks:
            x = block(x)
        return self.outward(x)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


class Untidy(nn.Module):
    """Everything that a forward may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.ours = normkit.BatchNorm1d(5, nonfinite="skip")
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.seen, self.last, self.ema = 0, None, torch.zeros(5)
        self.register_buffer("fresh", torch.zeros(5))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = x
        self.new = "left behind"
        self.ema.mul_(0.9).add_(x.detach().mean(0))
        self.fresh = self.fresh + 1.0  # another tensor in the buffer's place
        self.norm.train()
        x = self.frozen(self.drop(self.linear(self.ours(self.norm(x)))))
        random.random(), np.random.rand()  # noqa: NPY002
        if self.fail:
            raise RuntimeError("the model fails")
        return x + torch.randn_like(x)


HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


def everything(model: nn.Module) -> dict[str, Any]:
    """All that observe promises to leave: contents as bytes, objects by identity."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bytes": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "grads": {name: (id(p.grad), None if p.grad is None else p.grad.tolist()) for name, p in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(getattr(module, name))
            for module in model.modules()
            for name in HOOKS
            if hasattr(module, name) and hasattr(getattr(module, name), "__len__")
        ],
        "names": [list(vars(module)) for module in model.modules()],
        "plain": [
            {name: value for name, value in vars(module).items() if isinstance(value, int | str | None)}
            for module in model.modules()
        ],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


def untidy() -> Untidy:
    model = Untidy()
    model(torch.randn(7, 5)).sum().backward()
    model.drop.eval()  # mixed modes
    model.norm.register_forward_hook(lambda module, args, out: out)
    return model


def test_everything_is_afterwards_as_before_bit_for_bit() -> None:
    model, x = untidy(), torch.randn(7, 5)
    before, ema = everything(model), model.ema.clone()
    seen = observe(model, x, lambda out: out.square().mean())
    assert seen.calls
    after = everything(model)
    for name in before:
        assert after[name] == before[name], name
    assert torch.equal(model.ema, ema)


@pytest.mark.parametrize("where", ["forward", "loss", "not a scalar", "backward"])
def test_everything_is_as_before_after_an_exception_too(where: str) -> None:
    model, x = untidy(), torch.randn(7, 5)
    model.fail = where == "forward"
    before = everything(model)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("the backward fails")

    def loss(out: Tensor) -> Tensor:
        if where == "loss":
            raise RuntimeError("the loss fails")
        return out if where == "not a scalar" else Fails.apply(out.mean())

    with pytest.raises((RuntimeError, ValueError), match=r"fails|must be one floating-point number"):
        observe(model, x, loss)
    after = everything(model)
    for name in before:
        assert after[name] == before[name], name


def test_the_check_of_restoring_sees_what_a_plain_call_leaves() -> None:
    """Without observe's care each of these changes."""
    model = untidy()
    before = everything(model)
    model.train()(torch.randn(7, 5))
    after = everything(model)
    assert {name for name in before if after[name] != before[name]} >= {"bytes", "objects", "modes", "plain", "random"}


def test_buffers_come_back_through_a_kernel_that_hides_its_writes() -> None:
    """normkit's core writes running statistics where torch's version counter does not see it."""
    model = nn.Sequential(normkit.BatchNorm1d(4), nn.Linear(4, 1))
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    observe(model, torch.randn(9, 4) + 3, lambda out: out.mean())
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert int(model[0].num_batches_tracked) == 0


def test_a_graph_that_the_caller_holds_can_still_be_differentiated() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    loss = model(torch.randn(9, 4)).mean()
    observe(model, torch.randn(9, 4), lambda out: out.mean())
    loss.backward()  # running_mean was saved for it: restoring must not count as a write
    assert model[1].weight.grad is not None


def test_no_hook_that_steps_an_optimizer_runs() -> None:
    model, stepped = Net(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(stepped.append)
    observe(model, torch.randn(5, 4), lambda out: out.mean())
    assert stepped == []
    model(torch.randn(5, 4)).mean().backward()
    assert len(stepped) == len(list(model.parameters()))


def test_what_the_loss_does_to_gradients_and_frozen_parameters_is_undone() -> None:
    model, x = Net(), torch.randn(5, 4)
    model(x).mean().backward()
    before = everything(model)

    def loss(out: Tensor) -> Tensor:
        model.zero_grad()
        model.inward.requires_grad_(False)
        return out.mean()

    observe(model, x, loss)
    assert everything(model) == before


def test_as_found_restores_a_buffer_that_was_deleted_or_emptied() -> None:
    model = nn.BatchNorm1d(3)
    with as_found(model):
        del model.running_mean
        model.register_buffer("extra", torch.ones(1))
        model.num_batches_tracked = None
    assert list(model.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


# ---------------------------------------------------------------------------------------------- numbers


def test_a_tiny_residual_net_gets_the_numbers_of_hand_computation() -> None:
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    seen = observe(model, x, lambda out: out.square().mean())

    stream = [model.inward(x)]
    for block in model.blocks:
        stream.append(block(stream[-1]))
    for each in stream:
        each.retain_grad()
    loss = model.outward(stream[-1]).square().mean()
    loss.backward()
    assert seen.loss == pytest.approx(loss.item(), rel=1e-12)
    assert [(b.path, b.call, b.type, b.chain, b.position) for b in seen.blocks] == [
        (f"blocks.{i}", 1, "Block", "blocks", i + 1) for i in range(3)
    ]
    for i, block in enumerate(seen.blocks):
        a, b = stream[i].detach().numpy().ravel(), stream[i + 1].detach().numpy().ravel()
        by_hand = {
            "input_rms": np.sqrt(np.mean(a**2)),
            "output_rms": np.sqrt(np.mean(b**2)),
            "growth": np.sqrt(np.mean(b**2) / np.mean(a**2)),
            "identity": np.sum(a * b) / np.sum(a * a),
            "cosine": np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)),
            "gradient": math.sqrt(sum(float((p.grad**2).sum()) for p in model.blocks[i].parameters())),
            "output_gradient": float(stream[i + 1].grad.norm()),
        }
        for name, value in by_hand.items():
            assert getattr(block, name) == pytest.approx(float(value), rel=1e-12), (i, name)
    own = {module.path: module for module in seen.gradients}
    weight, bias = model.inward.weight.grad, model.inward.bias.grad
    assert own["inward"].gradient == pytest.approx(math.sqrt(float((weight**2).sum() + (bias**2).sum())), rel=1e-12)
    assert (own["inward"].parameters, own["inward"].trainable) == (30, 30)
    assert [module.path for module in seen.gradients][:3] == ["inward", "blocks.0.norm", "blocks.0.up"]


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("placement", [PreNorm, PostNorm], ids=["pre", "post"])
def test_the_studys_own_model_gets_the_studys_own_measurements(norm: str, placement: Any) -> None:
    model = Transformer(depth=2, width=16, heads=2, seq=12, norm=norm, placement=placement)
    ids = torch.randint(0, 256, (3, 12))
    targets = torch.randint(0, 256, (3, 12))
    seen = observe(model, ids, lambda out: nn.functional.cross_entropy(out.flatten(0, 1), targets.flatten()))
    stream = measure.stream(model, ids)
    assert [b.chain for b in seen.blocks] == ["stack.sublayers"] * 4
    assert [b.output_rms for b in seen.blocks] == pytest.approx(stream.residual_rms, rel=1e-5)
    assert [b.skip_weight for b in seen.blocks] == pytest.approx(stream.skip_weight, rel=1e-5)
    assert [b.identity_weight for b in seen.blocks] == pytest.approx(stream.identity_weight, rel=1e-5)
    found = [b.gradient for b in seen.blocks]
    by_block = [math.hypot(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
    assert by_block == pytest.approx(measure.gradient_norms(model, (ids, targets)), rel=1e-4)


def test_an_uncorrelated_branch_of_equal_size_gives_cosine_one_over_root_two_before_and_after_a_norm() -> None:
    class Adds(nn.Module):
        def __init__(self, post: bool) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4096, elementwise_affine=False) if post else nn.Identity()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.gain * torch.randn_like(x))

    for post in (False, True):
        seen = observe(nn.Sequential(Adds(post), Adds(post)), torch.randn(64, 4096), lambda out: out.mean())
        first = seen.blocks[0]
        assert first.cosine == pytest.approx(0.5**0.5, abs=5e-3)
        assert first.identity == pytest.approx(0.5**0.5 if post else 1.0, abs=5e-3)
        assert first.growth == pytest.approx(1.0 if post else 2**0.5, abs=5e-3)


def test_blocks_and_activations_that_write_into_their_input_are_measured_on_what_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x.mul_(3.0))

    x = torch.randn(50, 8).double()
    model = nn.Sequential(nn.Linear(8, 8), InPlace()).double()
    seen = observe(model, x, lambda out: out.mean(), blocks=["1"])
    before = model[0](x).detach()
    out = (3 * before).clamp(min=0)
    assert seen.blocks[0].identity == pytest.approx(float((out * before).sum() / before.square().sum()), rel=1e-12)
    assert seen.activations[0].share == pytest.approx(float((before <= 0).double().mean()), rel=1e-12)


def test_half_precision_is_summed_in_float64() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 1)).half()
    x = torch.full((2**12, 3), 300.0).half()  # the sum of squares is beyond float16 by far
    seen = observe(model, x, lambda out: out.float().mean())
    assert seen.calls[1].output_rms == 300.0


def test_nothing_is_read_from_the_device_while_the_model_runs() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += "_local_scalar_dense" in str(func) or "equal.default" in str(func)
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())
    with Reads():
        observe(model, torch.randn(6, 4), lambda out: out.mean())
        assert Reads.count == 0
        observe(model, torch.randn(6, 4), lambda out: out.mean() * out.max().item())
        assert Reads.count == 1  # a read would be seen


# ---------------------------------------------------------------------------------------------- ways to call


@dataclass
class Answer:
    score: Tensor
    loss: Tensor
    extra: Any = None


class Answers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(3, 3), kind

    def forward(self, x: Tensor, *, y: Tensor) -> Any:
        score = self.linear(x)
        loss = (score - y).square().mean()
        return {"dataclass": Answer(score, loss), "dict": {"loss": loss, "score": score}, "scalar": loss}[self.kind]


@pytest.mark.parametrize("kind", ["dataclass", "dict", "scalar"])
def test_keyword_arguments_go_in_and_a_loss_comes_out_of_any_output(kind: str) -> None:
    model, x, y = Answers(kind), torch.randn(4, 3), torch.randn(4, 3)
    seen = observe(model, {"x": x, "y": y})
    (model.linear(x) - y).square().mean().backward()
    gradient = math.hypot(float(model.linear.weight.grad.norm()), float(model.linear.bias.grad.norm()))
    assert seen.gradients[0].gradient == pytest.approx(gradient, rel=1e-6)
    assert [(call.path, call.type, call.shape) for call in seen.calls] == [
        ("", "Answers", (4, 3) if kind == "dataclass" else ()),
        ("linear", "Linear", (4, 3)),
    ]


def test_a_tuple_is_positional_arguments_and_a_tensor_is_one() -> None:
    model, x = Net(), torch.randn(5, 4)
    one = observe(model, x, lambda out: out.mean())
    two = observe(model, (x, 2.0), lambda out: out.mean())
    assert observe(model, (x,), lambda out: out.mean()) == one
    assert two.calls[1].output_rms == one.calls[1].output_rms
    assert two.blocks[0].input_rms == pytest.approx(2 * one.blocks[0].input_rms)


def test_blocks_that_are_called_with_keywords_and_return_tuples_are_measured() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *, mask: Tensor, hidden: Tensor) -> tuple[None, Tensor]:
            return None, hidden + self.linear(hidden) * mask.unsqueeze(-1)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Keyword(), Keyword()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                _, x = layer(mask=torch.ones(5, dtype=torch.long), hidden=x)
            return x

    x = torch.randn(5, 4)
    seen = observe(model := Stack(), x, lambda out: out.mean())
    assert [block.path for block in seen.blocks] == ["layers.0", "layers.1"]
    out = (x + model.layers[0].linear(x)).detach()
    assert seen.blocks[0].growth == pytest.approx(float(out.norm() / x.norm()), rel=1e-5)


def test_the_mode_is_the_models_unless_training_says_otherwise() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(9, 4) * 3 + 1
    train, evaluated = (observe(model.train(mode), x, lambda out: out.mean()) for mode in (True, False))
    assert (train.training, evaluated.training) == (True, False)
    assert train.norms[0].output_rms == pytest.approx(1.0, rel=1e-4)
    assert evaluated.norms[0].output_rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
    assert observe(model, x, lambda out: out.mean(), training=True) == train
    assert not model.training
    assert not model[0].training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_gradients_are_measured_where_the_caller_switched_them_off(context: Callable[[], Any]) -> None:
    model, x = Net(), torch.randn(5, 4)
    usual = observe(model, x, lambda out: out.mean())
    with context():
        assert observe(model, x, lambda out: out.mean()) == usual
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert not torch.is_grad_enabled()


def test_a_batch_made_in_inference_mode_is_taken() -> None:
    with torch.inference_mode():
        x = torch.ones(5, 4)
    for batch in (x, (x,), {"x": x}):
        assert observe(Net(), batch, lambda out: out.mean()).gradients[0].gradient > 0
    assert x.is_inference()


def test_frozen_parameters_have_no_gradient_and_the_others_do() -> None:
    model = Net()
    model.blocks.requires_grad_(False)
    model.inward.requires_grad_(False)
    seen = observe(model, torch.randn(5, 4), lambda out: out.mean())
    assert [module.path for module in seen.gradients if module.gradient is not None] == ["outward"]
    assert {block.gradient for block in seen.blocks} == {None}
    assert all(block.identity > 0 for block in seen.blocks)
    frozen = seen.parameters - seen.trainable
    assert seen.notes[0] == (
        f"{frozen:,} of {seen.parameters:,} parameters require no gradient, so none is measured for them."
    )
    model.requires_grad_(False)
    seen = observe(model, torch.randn(5, 4), lambda out: out.mean())
    assert {module.gradient for module in seen.gradients} == {None}
    assert {call.output_gradient for call in seen.calls} == {None}


def test_a_module_called_twice_has_two_records_and_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(3, 3)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x)))

    model, x = Twice(), torch.randn(4, 3)
    seen = observe(model, x, lambda out: out.square().mean())
    assert [(call.path, call.call) for call in seen.calls] == [("", 1), ("first", 1), ("act", 1), ("first", 2)]
    model(x).square().mean().backward()
    total = math.hypot(float(model.first.weight.grad.norm()), float(model.first.bias.grad.norm()))
    assert [module.gradient for module in seen.gradients] == [pytest.approx(total, rel=1e-6)]
    assert seen.calls[1].output_rms == pytest.approx(rms(model.first(x)), rel=1e-6)
    assert seen.calls[3].output_rms == pytest.approx(rms(model(x)), rel=1e-6)


def test_recomputation_in_the_backward_is_not_counted_as_calls() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            x = self.inward(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.outward(x)

    torch.manual_seed(1)
    plain = Net()
    saving = Checkpointed()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4)
    one, two = (observe(model, x, lambda out: out.mean()) for model in (plain, saving))
    assert [call.path for call in two.calls] == [call.path for call in one.calls]
    assert two.blocks == one.blocks
    assert two.gradients == one.gradients


def test_an_exception_that_the_model_catches_leaves_the_other_calls_right() -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.linear = nn.Linear(7, 7), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.fails(x)
            except RuntimeError:
                return self.linear(x)

    seen = observe(Catches(), torch.randn(4, 3), lambda out: out.mean())
    assert [(call.path, call.shape) for call in seen.calls] == [("", (4, 3)), ("fails", ()), ("linear", (4, 3))]


def test_a_compiled_model_runs_as_written_and_stays_compiled() -> None:
    model, x = Net(), torch.randn(5, 4)
    usual = observe(model, x, lambda out: out.mean())
    model.blocks[1].compile(backend="eager")
    compiled = model.blocks[1]._compiled_call_impl
    assert observe(model, x, lambda out: out.mean()) == usual
    assert model.blocks[1]._compiled_call_impl is compiled


def test_non_finite_numbers_are_said_and_are_none_in_json() -> None:
    model = nn.Linear(2, 2)
    seen = observe(model, torch.full((1, 2), math.inf), lambda out: out.mean())
    assert any(note.startswith("The loss is ") for note in seen.notes)
    assert json.loads(json.dumps(seen.as_dict(), allow_nan=False))["loss"] is None


def test_a_data_parallel_model_is_observed_as_the_module_inside() -> None:
    """Its replicas and its reduction of gradients are no part of what is measured."""
    model, x = Net(), torch.randn(5, 4)
    assert observe(nn.DataParallel(model), x, lambda out: out.mean()) == observe(model, x, lambda out: out.mean())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_since_its_calls_have_no_hooks() -> None:
    with pytest.raises(TypeError, match=r"^observe: model must run in Python, got a ScriptModule; pass the module it"):
        observe(torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2), lambda out: out.mean())


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: observe(lambda x: x, torch.ones(1)),  # type: ignore[arg-type]
        TypeError,
        "observe: model must be a torch.nn.Module, got function; pass the module itself",
    ),
    (
        lambda: observe(nn.Linear(2, 2), [torch.ones(1, 2)]),  # type: ignore[arg-type]
        TypeError,
        "observe: batch must be a tensor, a tuple of arguments or a dict of keyword arguments, got list; pass (batch,) "
        "to call the model with it as its one argument",
    ),
    (
        lambda: observe(nn.Linear(2, 2), torch.ones(1, 2)),
        ValueError,
        "observe: the loss must be one floating-point number, got torch.float32 of shape (1, 2); reduce it, with "
        ".mean() say, or pass loss=",
    ),
    (
        lambda: observe(nn.LSTM(2, 2), torch.ones(1, 1, 2)),
        ValueError,
        "observe: loss is None, so the output must be a scalar or have a .loss, got tuple; pass loss=, a function of "
        "the output, or what the model needs to compute its loss",
    ),
    (
        lambda: observe(nn.Linear(2, 2), torch.ones(1, 2), 1.0),  # type: ignore[arg-type]
        TypeError,
        "observe: loss must be a function of the model's output or None, got float",
    ),
    (
        lambda: observe(nn.Linear(2, 2), torch.ones(1, 2), lambda out: out.sum().item()),  # type: ignore[arg-type]
        TypeError,
        "observe: loss must return a scalar tensor, got float",
    ),
    (
        lambda: observe(nn.LazyLinear(2), torch.ones(1, 2), lambda out: out.mean()),
        ValueError,
        "observe: model has parameters without a shape yet; call it once on a batch first",
    ),
    (
        lambda: observe(Net(), torch.ones(1, 4), lambda out: out.mean(), blocks="blocks.0"),
        TypeError,
        "observe: blocks must be a list of paths, got the one text 'blocks.0'; pass ['blocks.0']",
    ),
    (
        lambda: observe(Net(depth=1), torch.ones(1, 4), lambda out: out.mean(), blocks=["block.0"]),
        ValueError,
        "observe: blocks must be paths of model.named_modules(), got 'block.0'; the model has 'inward', 'blocks', "
        "'blocks.0', 'blocks.0.norm', 'blocks.0.up' and others",
    ),
    (
        lambda: observe(Net(), torch.ones(1, 4), lambda out: out.mean(), blocks=["inward"]),
        ValueError,
        "observe: a block's output must have the shape and dtype of its input, 'inward' maps (1, 4) torch.float32 to "
        "(1, 6) torch.float32; leave it out of blocks",
    ),
    (
        lambda: observe(Net(), torch.ones(1, 4), lambda out: out.mean(), blocks=["blocks"]),
        ValueError,
        "observe: blocks must be modules that the model calls, 'blocks' was never called",
    ),
    (
        lambda: observe(Net(), torch.ones(1, 4), lambda out: out.mean(), blocks=lambda path, module: False),
        ValueError,
        "observe: blocks must choose at least one module, the function chose none",
    ),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[9:40] for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------- residual blocks


def test_blocks_are_found_where_two_of_a_container_keep_their_inputs_shape() -> None:
    class Stage(nn.Module):
        """Like a residual net's: the first block of a stage has another shape than its input."""

        def __init__(self, into: int, out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(into, out, 1)
            self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.conv(x)

    model = nn.Sequential(
        nn.Sequential(Stage(3, 4), Stage(4, 4), Stage(4, 4)),
        nn.Sequential(Stage(4, 5), Stage(5, 5)),  # one alone is no chain
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),  # leaves and activations are no blocks
        nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))),  # neither are containers
    )
    seen = observe(model, torch.randn(2, 3, 2, 2), lambda out: out.mean())
    assert [(block.path, block.position) for block in seen.blocks] == [("0.1", 1), ("0.2", 2)]


def test_named_blocks_are_taken_by_path_or_by_a_function_and_alone() -> None:
    model, x = Net(), torch.randn(5, 4)
    by_path = observe(model, x, lambda out: out.mean(), blocks=["blocks.1"])
    by_function = observe(model, x, lambda out: out.mean(), blocks=lambda path, module: path == "blocks.1")
    assert [block.path for block in by_path.blocks] == ["blocks.1"]
    assert by_path == by_function
    found = observe(model, x, lambda out: out.mean()).blocks[1]
    assert by_path.blocks[0].identity == found.identity
    assert (by_path.blocks[0].position, found.position) == (1, 2)


def test_one_block_called_many_times_is_a_chain_of_calls() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = self.alias = Block(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    seen = observe(Recurrent(), torch.randn(5, 4), lambda out: out.mean(), blocks=["alias"])
    assert [(block.path, block.call, block.position) for block in seen.blocks] == [("block", i, i) for i in (1, 2, 3)]
    assert len({block.gradient for block in seen.blocks}) == 1
    assert len({block.output_gradient for block in seen.blocks}) == 3
    assert "block#3" in str(seen)


def test_without_blocks_a_note_says_how_to_name_them() -> None:
    seen = observe(nn.Linear(2, 1), torch.ones(3, 2), lambda out: out.mean())
    assert seen.notes == ("No residual blocks were found: name them with blocks=.",)


def test_modules_whose_weights_are_used_without_a_call_are_said() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight

    seen = observe(Reaches(), torch.ones(3, 2), lambda out: out.mean())
    assert seen.notes[:2] == (
        "The loss does not depend on 1 of the parameter tensors that train.",
        "Holds parameters and was never called as a module, so no output is known: inner.",
    )
    assert seen.gradients[0].gradient > 0


# ---------------------------------------------------------------------------------------------- saturation


class NewGELUActivation(nn.Module):
    """By its name, as transformers has it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("module", "largest"),
    [(nn.Sigmoid(), 0.25), (nn.Tanh(), 1.0), (nn.ReLU(), 1.0), (nn.ReLU6(), 1.0), (nn.GELU(), 1.0), (nn.SiLU(), 1.0)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_saturated_means_a_derivative_near_zero_as_autograd_sees_it(module: nn.Module, largest: float) -> None:
    x = (4 * torch.randn(20_000, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    by_autograd = float((slope.abs() < 0.05 * largest).double().mean())
    seen = observe(nn.Sequential(module), x.detach().view(100, 200), lambda out: out.mean())
    assert seen.activations[0].share == by_autograd
    assert 0.02 < by_autograd < 0.98


def test_the_rules_say_where_sigmoid_and_tanh_saturate() -> None:
    outputs = [float(word) for word in re.findall(r"0\.\d{3,}", numbers.RULES["sigmoid"] + numbers.RULES["tanh"])]
    assert outputs == [0.0127, 0.9873, 0.975]
    for output in outputs[:2]:
        assert 4 * output * (1 - output) == pytest.approx(0.05, abs=5e-4)
    assert 1 - outputs[2] ** 2 == pytest.approx(0.05, abs=1e-3)


def test_dead_units_are_features_or_image_channels_that_nothing_activates() -> None:
    rows = torch.tensor([[1.0, -1, -1, 2], [-1, -1, -1, 3], [-1, -1, 0, -1]])
    images = rows.t()[None, :, :, None]  # (1, 4, 3, 1): the same features as channels
    for x in (rows, images, rows[None]):
        (activation,) = observe(nn.Sequential(nn.ReLU()), x, lambda out: out.mean()).activations
        assert activation.share == pytest.approx(9 / 12)
        assert activation.dead_units == 0.5
    assert observe(nn.Sequential(nn.ReLU()), rows[0], lambda out: out.mean()).activations[0].dead_units is None


def test_activations_of_other_libraries_are_known_by_their_names() -> None:
    names = {"NewGELUActivation": "gelu", "GELUTanh": "gelu", "QuickGELUActivation": "gelu", "SiLUActivation": "silu"}
    names |= {"GELUFeedForward": None, "SwiGLU": None, "LogSigmoid": None, "Block": None}
    found = {name: numbers.activation_kind(type(name, (nn.Module,), {})()) for name in names}
    assert found == names
    x = torch.randn(5, 5) - 3
    one, two = (
        observe(nn.Sequential(module), x, lambda out: out.mean()) for module in (NewGELUActivation(), nn.GELU())
    )
    assert one.activations[0].share == two.activations[0].share > 0


# ---------------------------------------------------------------------------------------------- norms


class LlamaRMSNorm(nn.Module):
    """By its name and weight, as transformers has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMS: list[nn.Module] = [
    nn.LayerNorm(6),
    nn.RMSNorm(6),
    nn.BatchNorm1d(6),
    nn.InstanceNorm1d(6, affine=True),
    nn.GroupNorm(2, 6),
    nn.SyncBatchNorm(6).eval(),
    normkit.LayerNorm(6),
    normkit.RMSNorm(6, eps=1e-6),
    normkit.BatchNorm1d(6),
    normkit.GroupNorm(3, 6),
    LlamaRMSNorm(6),
    nn.LayerNorm(6, elementwise_affine=False),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{type(norm).__module__.split('.')[0]}-{norm}")
def test_every_norm_has_its_statistics(norm: nn.Module) -> None:
    x = torch.randn(4, 6, 6) * 2 + 1
    model = nn.Sequential(copy.deepcopy(norm), nn.Linear(6, 1))
    model[0].train(norm.training)
    seen = observe(model, x, lambda out: out.mean())
    (found,) = seen.norms
    with as_found(model):
        out = model[0](x).detach().double()
    assert (found.path, found.type) == ("0", type(norm).__name__)
    assert found.input_rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)
    assert found.input_mean == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert found.output_rms == pytest.approx(float(out.square().mean().sqrt()), rel=1e-5)
    assert found.output_mean == pytest.approx(float(out.mean()), abs=1e-6)
    weight = None if norm.weight is None else norm.weight.detach().double()
    if weight is None:
        assert (found.gamma_mean, found.gamma_max) == (None, None)
    else:
        assert found.gamma_mean == pytest.approx(float(weight.abs().mean()), rel=1e-6)
        assert found.gamma_max == pytest.approx(float(weight.abs().max()), rel=1e-6)
    assert (found.mean_distance is None) == ("BatchNorm" not in type(norm).__name__)


def test_the_gain_of_a_weight_offset_norm_is_offset_plus_weight() -> None:
    norm = normkit.RMSNorm(4, eps=1e-6, weight_offset=1.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 0.5, -3.0, 0.5]))
    (found,) = observe(nn.Sequential(norm), torch.randn(3, 4), lambda out: out.mean()).norms
    assert (found.gamma_mean, found.gamma_max) == (1.5, 2.0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, normkit.BatchNorm1d])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_batch_is_compared_with_running_statistics_in_their_std(kind: Any, training: bool) -> None:
    norm = kind(3).double()
    norm.running_mean.copy_(torch.tensor([1.0, 0.0, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    x = torch.randn(5, 3, 7, dtype=torch.float64)
    (found,) = observe(nn.Sequential(norm).train(training), x, lambda out: out.mean()).norms
    values = x.numpy().transpose(1, 0, 2).reshape(3, -1)
    running_std = np.sqrt(np.array([4.0, 1.0, 0.25]) + norm.eps)
    means = np.abs(values.mean(1) - np.array([1.0, 0.0, -1.0])) / running_std
    stds = np.abs(np.sqrt(values.var(1, ddof=1) + norm.eps) - running_std) / running_std
    measured = (found.mean_distance, found.mean_distance_max, found.std_distance, found.std_distance_max)
    assert measured == pytest.approx((means.mean(), means.max(), stds.mean(), stds.max()), rel=1e-12)


def test_masked_positions_do_not_count_in_batch_norms_distance() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normkit.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)[:, :, :2]

    x, mask = torch.randn(5, 3, 7), torch.arange(7) < 4
    padded = torch.where(mask, x, math.nan)
    masked = observe(Masked(), (padded, mask.expand(5, 7)), lambda out: out.mean()).norms[0]
    plain = observe(nn.Sequential(normkit.BatchNorm1d(3)), x[:, :, :4], lambda out: out.mean()).norms[0]
    assert masked.mean_distance == pytest.approx(plain.mean_distance, rel=1e-12)
    assert masked.std_distance == pytest.approx(plain.std_distance, rel=1e-12)


# ---------------------------------------------------------------------------------------------- transformers


def _ids() -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 16))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


@pytest.mark.parametrize("training", [True, False])
def test_a_gpt2_of_transformers_is_observed(gpt2: nn.Module, training: bool, tmp_path: Path) -> None:
    batch = _ids()
    before = everything(gpt2.train(training))
    seen = observe(gpt2, batch)
    after = everything(gpt2)
    assert all(after[name] == before[name] for name in before)
    assert [(b.path, b.type, b.chain) for b in seen.blocks] == [
        (f"transformer.h.{i}", "GPT2Block", "transformer.h") for i in range(3)
    ]
    assert [a.type for a in seen.activations] == ["NewGELUActivation"] * 3
    assert len(seen.norms) == 7
    loss = gpt2(**batch).loss
    loss.backward()
    if not training:  # in train mode dropout draws anew
        assert seen.loss == pytest.approx(loss.item(), rel=1e-6)
        for block, module in zip(seen.blocks, gpt2.transformer.h, strict=True):
            squares = sum(float(p.grad.double().square().sum()) for p in module.parameters())
            assert block.gradient == pytest.approx(math.sqrt(squares), rel=1e-5)
        states = gpt2(**batch, output_hidden_states=True).hidden_states
        assert [b.input_rms for b in seen.blocks] == pytest.approx([rms(state) for state in states[:3]], rel=1e-5)
    by_path = {module.path: module for module in seen.gradients}
    assert by_path["lm_head"].gradient == by_path["transformer.wte"].gradient  # one weight, two modules
    assert seen.save(tmp_path / "gpt2.html").stat().st_size > 20_000


def test_a_llama_of_transformers_is_observed(llama: nn.Module) -> None:
    llama.eval()
    batch = _ids()
    seen = observe(llama, batch)
    assert [b.path for b in seen.blocks] == [f"model.layers.{i}" for i in range(3)]
    assert {norm.type for norm in seen.norms} == {"LlamaRMSNorm"}
    assert len(seen.norms) == 7
    assert [norm.output_rms for norm in seen.norms] == pytest.approx([1.0] * 7, abs=0.02)
    assert [a.path for a in seen.activations] == [f"model.layers.{i}.mlp.act_fn" for i in range(3)]
    states = llama(**batch, output_hidden_states=True).hidden_states
    first, second = (state.detach().double().flatten() for state in states[:2])
    assert seen.blocks[0].identity == pytest.approx(float(first @ second / (first @ first)), rel=1e-5)
    assert seen.blocks[0].growth == pytest.approx(float(second.norm() / first.norm()), rel=1e-5)
    assert seen.notes == ()


def test_a_loss_of_ones_own_replaces_the_one_of_transformers(llama: nn.Module) -> None:
    ids = _ids()["input_ids"]
    seen = observe(llama, {"input_ids": ids}, lambda out: out.logits.square().mean())
    assert seen.loss == pytest.approx(rms(llama(input_ids=ids).logits) ** 2, rel=1e-5)


# ---------------------------------------------------------------------------------------------- what comes out


class Shown(nn.Module):
    """All kinds of records at once, with a name that HTML must escape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(4, post=True)
        self.conv = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 1, 1), nn.Sigmoid())
        self.add_module("<b>&amp", nn.Sequential(Block(1), Block(1)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return getattr(self, "<b>&amp")(self.conv(out[:, None]).mean(2))


@pytest.fixture(scope="module")
def shown() -> Observation:
    torch.manual_seed(5)
    return observe(Shown(), torch.randn(16, 4), lambda out: out.square().mean())


@pytest.fixture(scope="module")
def page(shown: Observation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("observe") / "report.html"
    assert shown.save(path) == path
    return path


def test_fixed_numbers_give_the_same_words_and_tables(request: pytest.FixtureRequest) -> None:
    golden = Path(__file__).parent / "golden" / "observation"
    seen = json.loads((golden / "seen.json").read_text())  # a model like `Shown`, seen once and kept
    text = re.sub(r"<(style|script|svg).*?</\1>", "", report_observation.render(seen), flags=re.DOTALL)
    lines = (line.strip() for line in unescape(re.sub(r"<[^>]*>", " | ", text)).splitlines())
    found = "\n".join(line for line in lines if line.strip(" |")) + "\n"
    if request.config.getoption("--renew-golden"):
        (golden / "words.txt").write_text(found)
    assert found == (golden / "words.txt").read_text()


def test_the_records_are_frozen_and_json_takes_them(shown: Observation) -> None:
    with pytest.raises(FrozenInstanceError):
        shown.loss = 0.0  # type: ignore[misc]
    read = json.loads(json.dumps(shown.as_dict(), allow_nan=False))
    assert set(read) == {
        *("model", "training", "loss", "parameters", "trainable", "calls", "blocks", "activations", "norms"),
        *("gradients", "notes", "versions"),
    }
    assert read["blocks"][0]["identity"] == shown.blocks[0].identity
    assert read["calls"][1] | {"output_gradient": 0} == {
        "path": "net",
        "call": 1,
        "type": "Net",
        "shape": [16, 1],
        "dtype": "float32",
        "output_rms": shown.calls[1].output_rms,
        "output_gradient": 0,
    }


def test_the_text_is_a_short_table(shown: Observation) -> None:
    lines = str(shown).splitlines()
    assert lines[0].startswith("Shown in train mode, loss 0.")
    assert lines[2].split() == ["block", "gradient", "rms", "growth", "identity", "cosine"]
    assert lines[3].split()[0] == "net.blocks.0"
    assert f"{shown.blocks[0].identity:.4g}" in lines[3].split()
    assert max(map(len, lines)) < 120
    deep = str(observe(Net(40), torch.randn(3, 4), lambda out: out.mean())).splitlines()
    assert "... 28 more" in deep
    assert len(deep) < 50


def test_scalars_go_to_a_summary_writer_once_each_with_the_step(shown: Observation) -> None:
    class Recording:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            assert global_step is not None
            self.scalars.append((tag, scalar_value, global_step))

    writer = Recording()
    shown.write(writer, 7)
    found = {tag: value for tag, value, _ in writer.scalars}
    assert len(found) == len(writer.scalars)
    assert {step for _, _, step in writer.scalars} == {7}
    assert found["loss/(model)"] == shown.loss
    assert found["identity/net.blocks.1"] == shown.blocks[1].identity
    assert found["residual_rms/net.blocks.1"] == shown.blocks[1].output_rms
    assert found["saturated_share/conv.2"] == shown.activations[4].share
    assert found["norm_mean_distance/conv.1"] > 0
    assert {tag.split("/")[0] for tag in found} == {
        *("loss", "gradient_norm", "block_gradient_norm", "output_gradient_norm", "residual_rms", "residual_growth"),
        *("identity", "identity_cosine", "saturated_share", "dead_units"),
        *(f"norm_{name}" for name in ("input_rms", "input_mean", "output_rms", "output_mean", "gamma_mean")),
        *("norm_gamma_max", "norm_mean_distance", "norm_mean_distance_max"),
        *("norm_std_distance", "norm_std_distance_max"),
    }


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_the_summary_writer_of_torch_takes_the_scalars(shown: Observation, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        shown.write(writer, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("identity/net.blocks.0")
    assert (event.step, event.value) == (3, pytest.approx(shown.blocks[0].identity, rel=1e-6))


def test_the_page_stands_alone_and_is_well_formed(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    references = [a.get("href") or a.get("src") for _, a in parsed.tags if a.get("href") or a.get("src")]
    assert all(reference.startswith(("#", "data:")) for reference in references if reference)
    assert not re.search(r"https?://|@import|//[a-z]+\.[a-z]", text)
    assert str(Path(normkit.__file__).parent) not in text
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {r[1:] for r in references if r and r.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert wanted - set(ids) == set()
    assert "<b>&amp" not in re.sub(r"data:[^\"]*", "", text)
    assert "&lt;b&gt;&amp;amp.0" in text


def test_the_page_has_the_figures_and_the_tables_with_every_record(page: Path, shown: Observation) -> None:
    parsed = Page(page.read_text())
    sections = [a["id"] for a in parsed.all("section") if "id" in a]
    figures = ["gradients", "residual-growth", "identity", "saturation"]
    tables = ["blocks", "norms", "activations", "parameters", "calls"]
    assert sections == [*figures, *(f"table-{name}" for name in tables), "reproduce"]
    assert len([a for a in parsed.all("div") if a.get("class") == "panel"]) == 2 + 1 + 2 + 2
    assert len([a for a in parsed.all("table") if a.get("class") == "sortable"]) == 5
    counts = (shown.blocks, shown.norms, shown.activations, shown.gradients, shown.calls)
    assert len([a for a in parsed.all("th") if a.get("scope") == "row"]) == sum(map(len, counts))
    sorts = {a["data-sort"] for a in parsed.all("td") if "data-sort" in a}
    for block in shown.blocks:
        assert {str(block.identity), str(block.growth), str(block.gradient)} <= sorts
    words = " ".join(" ".join(parsed.text).split())
    assert f"Shown with {shown.parameters} parameters, in train mode" in words
    first, last = shown.blocks[0], shown.blocks[3]
    assert (
        f"net.blocks: the gradient of the first of 4 is {wording.significant(first.gradient / last.gradient)} times "
        f"that of the last ({wording.significant(first.gradient)} and {wording.significant(last.gradient)})."
    ) in words
    lowest = min(shown.blocks[:4], key=lambda block: block.identity)
    assert (
        f"net.blocks: the weight of the identity branch is between {wording.significant(lowest.identity)} "
        f"(at {lowest.position})"
    ) in words
    assert (
        f"ReLU: the share of elements where it is flat is {wording.significant(shown.activations[4].share)} " in words
    )
    assert "#verdict" not in page.read_text()


def test_the_page_is_for_phones_and_for_light_and_dark(page: Path) -> None:
    text = page.read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media (max-width: 40rem)" in text
    for svg in re.findall(r"<svg viewBox=.*?</svg>", text, re.DOTALL):
        assert not set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", svg)), "a colour that no theme changes"


def test_a_model_without_blocks_still_gets_a_page(tmp_path: Path) -> None:
    seen = observe(nn.Linear(2, 1), torch.ones(3, 2), lambda out: out.mean())
    parsed = Page(seen.save(tmp_path / "one.html").read_text())
    assert [a["id"] for a in parsed.all("section") if "id" in a] == [
        "gradients",
        "table-parameters",
        "table-calls",
        "reproduce",
    ]
    frozen = nn.Linear(2, 1).requires_grad_(False)
    seen = observe(frozen, torch.ones(3, 2), lambda out: out.mean())
    parsed = Page(seen.save(tmp_path / "two.html").read_text())
    assert [a["id"] for a in parsed.all("section") if "id" in a] == ["table-parameters", "table-calls", "reproduce"]


def test_chains_inside_the_blocks_of_a_chain_are_one_line_in_the_figures() -> None:
    class Layer(nn.Module):
        """Two residual sublayers, as in T5."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Block(4), Block(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer[1](self.layer[0](x))

    seen = observe(nn.Sequential(Layer(), Layer(), Layer()), torch.randn(5, 4), lambda out: out.mean())
    assert [(block.path, block.chain) for block in seen.blocks[:3]] == [
        ("0", ""),
        ("0.layer.0", "0.layer"),
        ("0.layer.1", "0.layer"),
    ]
    (panel,) = report_observation.residual(seen.as_dict()).panels
    assert {line.label: [x for x, _ in line.points] for line in panel.series} == {
        "(model)": [1, 2, 3],
        "*.layer": [1, 2, 3, 4, 5, 6],
    }


def test_a_page_goes_only_where_a_folder_is(shown: Observation, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "report.html", tmp_path):
        with pytest.raises(ValueError, match=r"^save: path must be a file in a folder that exists, got "):
            shown.save(path)


SORTS = """<script>
const table = document.querySelector("#table-blocks table");
const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith("identity"));
table.tHead.rows[0].cells[column].querySelector("button").click();
const found = {
  sorted: [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.sort)),
  buttons: document.querySelectorAll("thead button").length,
  panels: [...document.querySelectorAll(".panel svg")].map(svg => svg.getBoundingClientRect().width),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_opens_and_its_tables_sort_in_chromium(
    page: Path, shown: Observation, tmp_path: Path, width: int
) -> None:
    hooked = tmp_path / "page.html"
    hooked.write_text(page.read_text().replace("</body>", SORTS + "</body>"))
    dom, log = browse(hooked, tmp_path / "profile", width)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    match = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert match, "the test's script did not run"
    found = json.loads(match[1])
    assert found["sorted"] == sorted(block.identity for block in shown.blocks)
    assert found["buttons"] > 20
    assert min(found["panels"]) > 300
    assert found["overflow"] <= 0


def test_the_name_is_the_function_also_after_its_module_was_imported() -> None:
    module = importlib.import_module("normkit.study.observe")
    assert normkit.study.observe is observe is module.observe
    assert normkit.study.__all__ == ["Observation", "observe"]


def test_loading_the_observer_draws_nothing_in() -> None:
    """matplotlib and jinja2 are loaded by `save` only."""
    script = "import normkit.study, sys; print({'matplotlib', 'jinja2', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["observe", "observation.numbers", "observation.records"])
def test_docstring_examples_print_what_they_say(name: str) -> None:
    torch.set_printoptions(profile="default")
    failures, _ = doctest.testmod(
        importlib.import_module(f"normkit.study.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert failures == 0


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
