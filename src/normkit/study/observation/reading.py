"""From a Recorder's sums to records: everything here runs after the model, on plain numbers.

Here: Reading, and the lines of a table as text.
May import: torch, study.observation.
Read next: records.py, what a record holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from normkit.study.observation import numbers
from normkit.study.observation.calls import Call, Index, Recorder
from normkit.study.observation.records import Activation, Block, ModuleCall, ModuleGradient, Norm

ROWS_SHOWN = 12
NAMES_SHOWN = 3


class Reading:
    """The records of a run.

    Args:
        model: the module that ran, as it was before.
        recorder: its calls.
        squares: parameter that trains -> place of its gradient's sum of squares, None without a gradient.
        named: whether the user said which modules are blocks; then each of them must be one.
    """

    def __init__(
        self, model: nn.Module, recorder: Recorder, squares: dict[nn.Parameter, int | None], *, named: bool
    ) -> None:
        self.values = recorder.sums.values()
        self._model, self._recorder, self._squares, self._named = model, recorder, squares, named

    def calls(self) -> tuple[ModuleCall, ...]:
        return tuple(
            ModuleCall(
                *_which(call), call.shape, call.dtype, self._at(call.output, "rms"), self._at(call.output, "gradient")
            )
            for call in self._recorder.calls
        )

    def blocks(self) -> tuple[Block, ...]:
        """The calls of residual blocks; of those that were found, in containers where at least two modules are blocks.

        Raises:
            ValueError: a named block was not called, or its output does not have its input's shape and dtype.
        """
        calls = [call for call in self._recorder.calls if call.path in self._recorder.chains]
        if self._named:
            self._check_named(calls)
        measured = [call for call in calls if call.block is not None]
        modules = Counter(self._recorder.chains[path] for path in {call.path for call in measured})
        positions: Counter[str] = Counter()
        found = []
        for call in measured:
            chain = self._recorder.chains[call.path]
            if self._named or modules[chain] >= 2:
                positions[chain] += 1
                found.append(self._block(call, chain, positions[chain]))
        return tuple(found)

    def activations(self) -> tuple[Activation, ...]:
        found = []
        for call in self._recorder.calls:
            if call.activation is not None:
                kind = numbers.activation_kind(call.module)
                assert kind is not None
                share = self.values[call.activation["share"]]
                dead = self._at(call.activation, "dead_units")
                found.append(Activation(*_which(call), numbers.RULES[kind], share, dead))
        return tuple(found)

    def norms(self) -> tuple[Norm, ...]:
        return tuple(
            Norm(
                *_which(call),
                input_rms=self.values[call.norm["input_rms"]],
                input_mean=self.values[call.norm["input_mean"]],
                output_rms=self._at(call.norm, "output_rms"),
                output_mean=self._at(call.norm, "output_mean"),
                gamma_mean=self._at(call.norm, "gamma_mean"),
                gamma_max=self._at(call.norm, "gamma_max"),
                mean_distance=self._at(call.norm, "mean_distance"),
                mean_distance_max=self._at(call.norm, "mean_distance_max"),
                std_distance=self._at(call.norm, "std_distance"),
                std_distance_max=self._at(call.norm, "std_distance_max"),
            )
            for call in self._recorder.calls
            if call.norm is not None
        )

    def gradients(self) -> tuple[ModuleGradient, ...]:
        """In the order of the first calls, modules that were never called as such at the end."""
        order = {call.path: place for place, call in reversed(list(enumerate(self._recorder.calls)))}
        found = []
        for path, module in self._model.named_modules():
            own = list(module.parameters(recurse=False))
            if own:
                trainable = sum(parameter.numel() for parameter in own if parameter in self._squares)
                size = sum(parameter.numel() for parameter in own)
                found.append(ModuleGradient(path, type(module).__name__, size, trainable, self._gradient(own)))
        return tuple(sorted(found, key=lambda one: order.get(one.path, len(order))))

    def notes(self, blocks: Sequence[Block], loss: float) -> tuple[str, ...]:
        """What could not be measured, in sentences."""
        notes = []
        if not math.isfinite(loss):
            notes.append(f"The loss is {loss}: gradients are not to be trusted.")
        size = sum(parameter.numel() for parameter in self._model.parameters())
        frozen = size - sum(parameter.numel() for parameter in self._squares)
        if frozen:
            notes.append(f"{frozen:,} of {size:,} parameters require no gradient, so none is measured for them.")
        without = [place for place in self._squares.values() if place is None]
        if without:
            notes.append(f"The loss does not depend on {len(without)} of the parameter tensors that train.")
        called = {call.path for call in self._recorder.calls}
        silent = [one.path for one in self.gradients() if one.path not in called]
        if silent:
            notes.append(
                f"Holds parameters and was never called as a module, so no output is known: {_listing(silent)}."
            )
        if not blocks:
            notes.append("No residual blocks were found: name them with blocks=.")
        return tuple(notes)

    # ------------------------------------------------------------------------------------------ one record

    def _at(self, index: Index, field: str) -> float | None:
        return self.values[index[field]] if field in index else None

    def _gradient(self, parameters: Iterable[nn.Parameter]) -> float | None:
        """L2 norm over these parameters together; 0 where the loss does not depend on them, None where none trains."""
        places = [self._squares[parameter] for parameter in parameters if parameter in self._squares]
        if not places:
            return None
        return math.sqrt(math.fsum(self.values[place] for place in places if place is not None))

    def _block(self, call: Call, chain: str, position: int) -> Block:
        assert call.block is not None
        return Block(
            *_which(call),
            chain=chain,
            position=position,
            input_rms=self.values[call.block["input_rms"]],
            output_rms=self.values[call.block["output_rms"]],
            growth=self.values[call.block["growth"]],
            identity=self.values[call.block["identity"]],
            cosine=self.values[call.block["cosine"]],
            skip_weight=self._at(call.block, "skip_weight"),
            identity_weight=self._at(call.block, "identity_weight"),
            gradient=self._gradient(call.module.parameters()),
            output_gradient=self._at(call.output, "gradient"),
        )

    def _check_named(self, calls: Sequence[Call]) -> None:
        for path in self._recorder.chains:
            mine = [call for call in calls if call.path == path]
            if not mine:
                raise ValueError(f"observe: blocks must be modules that the model calls, {path!r} was never called")
            wrong = next((call.mismatch for call in mine if call.mismatch), None)
            if wrong is not None:
                raise ValueError(
                    f"observe: a block's output must have the shape and dtype of its input, {path!r} {wrong}; "
                    f"leave it out of blocks"
                )


def _which(call: Call) -> tuple[str, int, str]:
    return call.path, call.number, type(call.module).__name__


def name(path: str, call: int) -> str:
    """The path, with the call's number from the second on."""
    return f"{path or '(model)'}#{call}" if call > 1 else path or "(model)"


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def table(titles: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> list[str]:
    """Lines of a table; of more than ROWS_SHOWN rows the first and the last ones."""
    text = [[value if isinstance(value, str) else _number(value) for value in row] for row in rows]
    if len(text) > ROWS_SHOWN:
        half = ROWS_SHOWN // 2
        text = [*text[:half], [f"... {len(text) - ROWS_SHOWN} more", *[""] * (len(titles) - 1)], *text[-half:]]
    widths = [max(len(row[column]) for row in [list(titles), *text]) for column in range(len(titles))]
    lines = []
    for row in [list(titles), *text]:
        first, *rest = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *rest]).rstrip())
    return ["", *lines]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
