"""Leave a model as it was found, whatever happens while it is looked at.

Here: as_found, a context manager.
May import: torch.
Read next: calls.py, which puts hooks on the model inside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Restore the model and all random states on exit, also after an exception.

    Restored bit for bit: modes, buffers (contents and identity), every plain attribute of every module that a forward
    assigns, tensors among them, requires_grad and `.grad` of every parameter, and the random states of torch (CPU,
    and every CUDA device once CUDA is in use), NumPy and Python.

    Not covered: what a forward changes inside a list, dict or other object that a module holds, and writes into the
    parameters themselves.
    """
    modules = [(module, dict(vars(module)), _tables(module)) for module in model.modules()]
    tensors = _held_tensors(modules)
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    states = _random_states()
    try:
        yield
    finally:
        for module, attributes, tables in modules:
            _restore_attributes(module, attributes, tables)
        for tensor, saved in tensors:
            with torch.inference_mode(tensor.is_inference()):
                tensor.data.copy_(saved)  # through .data: a graph that the caller holds keeps its saved buffers valid
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        _set_random_states(states)


def _tables(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name].copy() for name in _TABLES if name in vars(module)}


def _held_tensors(modules: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> list[tuple[Tensor, Tensor]]:
    """Every buffer and every tensor that is a plain attribute, once, with a copy."""
    found: dict[int, Tensor] = {}
    for _, attributes, tables in modules:
        for value in (*tables.get("_buffers", {}).values(), *attributes.values()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[id(value)] = value
    return [(tensor, tensor.detach().clone()) for tensor in found.values()]


def _restore_attributes(module: nn.Module, attributes: dict[str, Any], tables: dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in attributes]:
        del now[name]
    now.update(attributes)
    for name, saved in tables.items():
        now[name].clear()  # a dict or a set: the object stays, what it holds is put back in its order
        now[name].update(saved)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": None}
    states["numpy"] = np.random.get_state()  # noqa: NPY002 - the global state is what a model may draw from
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
