"""observe takes every way to call a model, and leaves the model as it was before.

Here: restoring, ways to call, bad arguments, the function's name and examples.
Read next: test_observe_measures.py.
"""

from __future__ import annotations

import doctest
import importlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit
import normkit.study
from normkit.study import observe
from normkit.study.observation.restore import as_found
from observed import Net, everything, rms

# ---------------------------------------------------------------------------------------------- restoring


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


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


# ---------------------------------------------------------------------------------------------- the function itself


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
