"""The study's measurements on any model of one's own: gradients, residual growth, identity branch, saturation, norms.

Here: observe, and Observation with its table, its page, its JSON and its scalars for TensorBoard.
May import: torch, study.observation, study.records, report (inside `save` only).
Read next: observation/calls.py, the hooks; observation/numbers.py, the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit import __version__
from normkit.study.observation import numbers
from normkit.study.observation.blocks import Blocks, candidates, named
from normkit.study.observation.calls import Recorder
from normkit.study.observation.reading import Reading, name, table
from normkit.study.observation.records import Activation, Block, ModuleCall, ModuleGradient, Norm
from normkit.study.observation.restore import as_found
from normkit.study.records import finite

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


class SummaryWriter(Protocol):
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Observation:
    """What `observe` measured of one model on one batch.

    Args:
        model: the model's class.
        training: whether it ran in train mode.
        loss: the loss of the batch.
        parameters, trainable: how many there are, and how many of them require a gradient.
        calls: every call of every module, in the order in which they began.
        blocks, activations, norms: those calls by what they are.
        gradients: every module that holds parameters itself.
        notes: what could not be measured, in sentences.
        versions: of normkit and torch.
    """

    model: str
    training: bool
    loss: float
    parameters: int
    trainable: int
    calls: tuple[ModuleCall, ...]
    blocks: tuple[Block, ...]
    activations: tuple[Activation, ...]
    norms: tuple[Norm, ...]
    gradients: tuple[ModuleGradient, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and numbers that JSON takes; NaN and infinities are None.

        Example:
            >>> import json, torch, normkit.study
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
            >>> seen = normkit.study.observe(model, torch.ones(2, 4), lambda out: out.mean())
            >>> json.loads(json.dumps(seen.as_dict()))["activations"][0]["path"]
            '1'
        """
        made = finite(asdict(self))
        assert isinstance(made, dict)
        return made

    def save(self, path: str | Path) -> Path:
        """Write one self-contained page, report.html say, with tables that sort and figures as inline SVG.

        Args:
            path: the file; one that is there is replaced, atomically.

        Returns:
            The path.

        Raises:
            ValueError: the folder does not exist.

        Example:
            >>> import pathlib, tempfile, torch, normkit.study
            >>> seen = normkit.study.observe(torch.nn.Linear(4, 1), torch.ones(2, 4), lambda out: out.mean())
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     print(seen.save(pathlib.Path(folder) / "report.html").name)
            report.html
        """
        from normkit.report.observation import save  # loads jinja2 and matplotlib

        return save(self.as_dict(), Path(path))

    def write(self, writer: SummaryWriter, step: int) -> None:
        """Write the numbers as scalars for TensorBoard: "identity/PATH", "gradient_norm/PATH" and so on.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or anything with its `add_scalar(tag, value, step)`.
            step: the training step of the model.

        A later call of a module than its first has "#2", "#3" after its path. Numbers that are missing are left out.

        Example:
            >>> import torch, normkit.study
            >>> class Prints:
            ...     def add_scalar(self, tag, scalar_value, global_step=None):
            ...         print(tag, round(scalar_value, 2), global_step)
            >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
            >>> normkit.study.observe(model, torch.ones(1, 1), lambda out: 0 * out.sum() + 0.5).write(Prints(), step=3)
            loss/(model) 0.5 3
        """
        for tag, value in self._scalars():
            if value is not None:
                writer.add_scalar(tag, value, step)

    def _scalars(self) -> Iterator[tuple[str, float | None]]:
        yield "loss/(model)", self.loss
        for module in self.gradients:
            yield f"gradient_norm/{module.path or '(model)'}", module.gradient
        for block in self.blocks:
            where = name(block.path, block.call)
            if block.call == 1:
                yield f"block_gradient_norm/{where}", block.gradient
            for tag, field in _BLOCK_TAGS.items():
                yield f"{tag}/{where}", getattr(block, field)
        for activation in self.activations:
            yield f"saturated_share/{name(activation.path, activation.call)}", activation.share
            yield f"dead_units/{name(activation.path, activation.call)}", activation.dead_units
        for norm in self.norms:
            for field in (each.name for each in fields(Norm)[3:]):
                yield f"norm_{field}/{name(norm.path, norm.call)}", getattr(norm, field)

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        lines = [f"{self.model} in {mode} mode, loss {self.loss:.6g}, {self.parameters:,} parameters"]
        if self.blocks:
            titles: tuple[str, ...] = ("block", "gradient", "rms", "growth", "identity", "cosine")
            lines += table(
                titles,
                [(name(b.path, b.call), b.gradient, b.output_rms, b.growth, b.identity, b.cosine) for b in self.blocks],
            )
        else:
            lines += table(("module", "gradient"), [(m.path or "(model)", m.gradient) for m in self.gradients])
        if self.activations:
            titles = ("activation", "saturated", "dead units")
            lines += table(titles, [(name(a.path, a.call), a.share, a.dead_units) for a in self.activations])
        if self.norms:
            titles = ("norm", "rms in", "rms out", "|gamma|", "batch to running")
            lines += table(
                titles,
                [(name(n.path, n.call), n.input_rms, n.output_rms, n.gamma_mean, n.mean_distance) for n in self.norms],
            )
        return "\n".join([*lines, *self.notes])


_BLOCK_TAGS = {
    "residual_rms": "output_rms",
    "residual_growth": "growth",
    "identity": "identity",
    "identity_cosine": "cosine",
    "skip_weight": "skip_weight",
    "identity_weight": "identity_weight",
    "output_gradient_norm": "output_gradient",
}


def observe(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    blocks: Blocks | None = None,
    training: bool | None = None,
) -> Observation:
    """Measure what normalization and depth do inside a model, on one batch, without editing or training it.

        gradient = |d loss / d parameters|,        identity = <out, in> / <in, in>,
        growth   = rms(out) / rms(in),             cosine   = <out, in> / (|out| |in|)

    The identity weight of a residual block is the regression coefficient of its output on its input, over all elements
    of the batch: 1 for x + f(x) where f(x) is uncorrelated with x, and smaller where a norm after the add takes part
    of the stream away. The cosine is 1 / sqrt(1 + v) for an uncorrelated branch, v = |f(x)|^2 / |x|^2, in PreNorm and
    PostNorm alike. normkit.Residual blocks have the study's own skip weight beside it.

    Args:
        model: any module. Its modules get hooks for the time of the call.
        batch: what the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        loss: the model's output -> a scalar tensor; None (default) where the output is that scalar or has `.loss`, as
            transformers' models do when `labels` are in the batch.
        blocks: which modules are residual blocks: paths as in `model.named_modules()`, or a function of (path, module).
            None (default) finds them: modules in a ModuleList or Sequential whose output has the shape and dtype of
            their first input, where at least two of a container do. Sequential itself, norms, activations and
            torch.nn's modules without children are never taken for blocks; that a found block really adds its input
            is not checked, and its identity weight near 0 says that it does not.
        training: True or False runs the model in that mode; None (default) as it is.

    Returns:
        An Observation: records of every call, a table as `str`, a page by `save`.

    Raises:
        TypeError: model, batch or loss is something else.
        ValueError: the loss is no scalar, a named block is not there or its output has another shape than its input,
            or the model has parameters that were never initialised.
        RuntimeError: torch's own, where the model uses activation checkpointing with use_reentrant=True.

    Numerics: sums are float64 on the device (float32 where it has no float64), brought over once at the end. Forward
        and backward run once each, and all gradients are there at once, as in a training step. Afterwards modes,
        buffers, `.grad`, requires_grad, random states and hooks are as before, also when the model raises; what a
        forward writes into parameters, or into lists and dicts of its own, is not undone.

    Saturated means: sigmoid and tanh where the derivative is below 0.05 of its largest value, ReLU where the input is
    not positive (and, as dead units, features that no element of the batch activates), GELU and SiLU where the
    derivative is between -0.05 and 0.05. Only activations that are modules are seen, not calls of torch.relu and the
    like. A module that runs several times has a record per call and one gradient, the sum over its calls.

    Example:
        >>> import torch, normkit, normkit.study
        >>> blocks = [normkit.Residual(torch.nn.Linear(8, 8), normkit.PostNorm, lambda: normkit.LayerNorm(8))
        ...           for _ in range(2)]
        >>> seen = normkit.study.observe(normkit.ResidualStack(blocks), torch.randn(4, 8), lambda out: out.std())
        >>> [(block.path, round(block.output_rms, 3)) for block in seen.blocks]
        [('sublayers.0', 1.0), ('sublayers.1', 1.0)]

    Source: the measurements are those of `normkit study`; Xiong et al., "On Layer Normalization in the Transformer
        Architecture", 2020, for gradients by depth.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"observe: model must be a torch.nn.Module, got {type(model).__name__}; pass the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("observe: model must run in Python, got a ScriptModule; pass the module it was made from")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module  # its forward prepares a reduction that no backward here would finish
    if any(is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        raise ValueError("observe: model has parameters without a shape yet; call it once on a batch first")
    args, kwargs = _arguments(batch)
    recorder = Recorder(model, candidates(model) if blocks is None else named(model, blocks))
    with as_found(model), recorder.watching(), _eagerly(model), torch.inference_mode(False), torch.enable_grad():
        if training is not None:
            model.train(training)
        mode = model.training
        scalar = _scalar(model(*args, **kwargs), loss)
        recorder.forward_done()
        squares = _squares(model, scalar, recorder)
        at = recorder.sums.add(scalar.reshape(()))
    read = Reading(model, recorder, squares, named=blocks is not None)
    found = read.blocks()
    return Observation(
        model=type(model).__name__,
        training=mode,
        loss=read.values[at],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in squares),
        calls=read.calls(),
        blocks=found,
        activations=read.activations(),
        norms=read.norms(),
        gradients=read.gradients(),
        notes=read.notes(found, read.values[at]),
        versions={"normkit": __version__, "torch": torch.__version__},
    )


# ------------------------------------------------------------------------------------------ before and during the run


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (_differentiable(batch),), {}
    if isinstance(batch, tuple):
        return tuple(_differentiable(each) for each in batch), {}
    if isinstance(batch, Mapping):
        return (), {key: _differentiable(each) for key, each in batch.items()}
    raise TypeError(
        f"observe: batch must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
        f"{type(batch).__name__}; pass (batch,) to call the model with it as its one argument"
    )


def _differentiable(value: Any) -> Any:
    """A tensor made in inference mode as one that autograd may save; anything else as it is."""
    with torch.inference_mode(False):
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextmanager
def _eagerly(model: nn.Module) -> Iterator[None]:
    """Compiled modules run as written: a compiled graph has no calls to hook."""
    compiled = any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _scalar(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is None:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"observe: loss is None, so the output must be a scalar or have a .loss, got {type(output).__name__}; "
                f"pass loss=, a function of the output, or what the model needs to compute its loss"
            )
    elif callable(loss):
        value = loss(output)
    else:
        raise TypeError(f"observe: loss must be a function of the model's output or None, got {type(loss).__name__}")
    if not isinstance(value, Tensor):
        raise TypeError(f"observe: loss must return a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"observe: the loss must be one floating-point number, got {value.dtype} of shape {tuple(value.shape)}; "
            f"reduce it, with .mean() say, or pass loss="
        )
    return value


def _squares(model: nn.Module, scalar: Tensor, recorder: Recorder) -> dict[nn.Parameter, int | None]:
    """Parameter that trains -> the place of its gradient's sum of squares, None where the loss does not depend on it.

    torch.autograd.grad, not backward(): `.grad` stays what it was, and no hook that steps an optimizer runs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters or not scalar.requires_grad:
        return dict.fromkeys(parameters)
    gradients = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {
        parameter: None if gradient is None else recorder.sums.add(numbers.norm(_dense(gradient)).square())
        for parameter, gradient in zip(parameters, gradients, strict=True)
    }


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
