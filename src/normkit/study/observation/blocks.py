"""Which modules are residual blocks: those that are named, or those that the shape of a model suggests.

Here: candidates (may be blocks, to be told by their outputs), named (what the user says).
May import: torch, study.observation.numbers.
Read next: reading.py, which keeps of the candidates those that turned out to be blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from normkit.study.observation import numbers

Blocks = Sequence[str] | Callable[[str, nn.Module], bool]


def candidates(model: nn.Module) -> dict[str, str]:
    """Path of a module that may be a residual block -> its container's path."""
    first = {module: path for path, module in model.named_modules()}
    return {
        first[child]: first[container]
        for container in first
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for child in container
        if _may_add(child)
    }


def _may_add(module: nn.Module) -> bool:
    if type(module).forward is nn.Sequential.forward or numbers.is_norm(module):
        return False
    if numbers.activation_kind(module) is not None:
        return False
    inside = next(module.children(), None) is not None
    return inside or (not type(module).__module__.startswith("torch.nn.") and any(True for _ in module.parameters()))


def named(model: nn.Module, blocks: Blocks) -> dict[str, str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {module: path for path, module in model.named_modules()}  # the path that a shared module goes by
    if callable(blocks):
        paths = [path for module, path in first.items() if blocks(path, module)]
        if not paths:
            raise ValueError("observe: blocks must choose at least one module, the function chose none")
    else:
        if isinstance(blocks, str):
            raise TypeError(f"observe: blocks must be a list of paths, got the one text {blocks!r}; pass [{blocks!r}]")
        paths = list(blocks)
        for path in paths:
            if path not in modules:
                raise ValueError(
                    f"observe: blocks must be paths of model.named_modules(), got {path!r}; the model has "
                    f"{', '.join(repr(name) for name in list(modules)[1:6])} and others"
                )
    own = [first[modules[path]] for path in paths]
    return {path: path.rpartition(".")[0] for path in own}
