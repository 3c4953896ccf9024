"""What the tests of observe share.

Here: Net and its Block, rms; everything, which observe must leave as it was.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
