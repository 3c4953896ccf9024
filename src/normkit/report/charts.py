"""Charts: cells -> what each figure shows, as plain data.

Here: which series stand in which panel, and the figure's data as rows for its CSV. Pure; knows nothing of drawing.
May import: numpy, report.cells, report.load, report.shapes, report.wording.
Read next: figures.py, which draws these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from normkit.report.cells import Cell, on_scale, spread
from normkit.report.load import NAN, Record
from normkit.report.shapes import Chart, Panel, Points, Reference, Series, shared_limits
from normkit.report.wording import listing, loss, plural, significant

MOMENTS = {"init": "at init", "end": "after training"}
LOSS_UNIT = "nats per byte"


def depths_of(cells: Sequence[Cell]) -> tuple[int, ...]:
    return tuple(sorted({cell.depth for cell in cells}))


def blocks(depth: int) -> str:
    return plural(depth, "block")


def _identity(record: Record) -> tuple[object, ...]:
    return record.norm, record.placement or "", record.depth, record.lr, record.seed


IDENTITY = ("norm", "placement", "depth", "lr", "seed")


# ---------------------------------------------------------------------------------------------- dots


def _dots(cell: Cell, value: Callable[[Record], float], variant: str = "", note: str = "") -> Series:
    points = tuple((value(r), 0.0) for r in cell.counted if math.isfinite(value(r)))
    return Series(cell.label, cell.norm, cell.placement, points, variant=variant, note="" if points else note)


def validation_loss(cells: Sequence[Cell]) -> Chart:
    guess = spread(cell.guess_loss for cell in cells).median
    shown = [r.val_loss for cell in cells for r in cell.counted if on_scale(r)]
    limits = shared_limits([*shown, guess], log=False)

    def row(cell: Cell) -> Series:
        series = _dots(cell, lambda record: record.val_loss if on_scale(record) else NAN)
        note = (
            ""
            if series.points
            else cell.status
            if not math.isfinite(cell.val_loss.median)
            else (f"{loss(cell.val_loss.median)}, off the scale")
        )
        return replace(series, note=note, stopped=not cell.ok)

    panels = tuple(
        Panel(
            blocks(depth),
            f"validation loss ({LOSS_UNIT})",
            "",
            tuple(row(cell) for cell in cells if cell.depth == depth),
            (Reference("guessing by byte frequency", level=guess),),
            limits,
        )
        for depth in depths_of(cells)
    )
    rows = tuple((*_identity(r), r.status, r.val_loss, r.guess_loss) for cell in cells for r in cell.records)
    columns = (*IDENTITY, "status", "val_loss", "guess_loss")
    return Chart("validation-loss", "Validation loss", "dots", panels, columns, rows)


def batch_statistics(cells: Sequence[Cell]) -> Chart:
    """BatchNorm's validation loss with running and with batch statistics."""
    batch = [cell for cell in cells if cell.norm == "batch" and cell.val_loss_batch_statistics]
    values = [v for cell in batch for r in cell.counted for v in (r.val_loss, r.val_loss_batch_statistics)]
    limits = shared_limits(values, log=False)
    panels = tuple(
        Panel(
            blocks(depth),
            f"validation loss ({LOSS_UNIT})",
            "",
            tuple(
                series
                for cell in batch
                if cell.depth == depth
                for series in (
                    _dots(cell, lambda r: r.val_loss, note=cell.status),
                    _dots(cell, lambda r: r.val_loss_batch_statistics, variant="batch"),
                )
            ),
            limits=limits,
        )
        for depth in depths_of(batch)
    )
    rows = tuple(
        (*_identity(r), r.status, r.val_loss, r.val_loss_batch_statistics) for cell in batch for r in cell.records
    )
    columns = (*IDENTITY, "status", "val_loss_running_statistics", "val_loss_batch_statistics")
    return Chart("batchnorm-at-eval", "BatchNorm at evaluation", "dots", panels, columns, rows)


def cost(cells: Sequence[Cell]) -> Chart:
    timed = [cell for cell in cells if cell.seconds_per_step]
    limits = shared_limits([1000 * cell.seconds_per_step.high for cell in timed], log=False, from_zero=True)

    def row(cell: Cell) -> Series:
        points = tuple((1000 * r.seconds_per_step, 0.0) for r in cell.records if math.isfinite(r.seconds_per_step))
        return Series(cell.label, cell.norm, cell.placement, points, note="" if points else "not timed")

    panels = tuple(
        Panel(
            blocks(depth),
            "time per training step (ms)",
            "",
            tuple(row(cell) for cell in cells if cell.depth == depth),
            limits=limits,
        )
        for depth in depths_of(timed)
    )
    rows = tuple((*_identity(r), r.seconds_per_step) for cell in cells for r in cell.records)
    return Chart("cost", "Cost", "dots", panels, (*IDENTITY, "seconds_per_step"), rows, from_zero=True)


# ---------------------------------------------------------------------------------------------- loss curves


def smoothing_window(count: int) -> int:
    """Points on each side that a smoothed loss averages over: a window of about one twentieth of the curve."""
    return count // 40


def smooth(values: Sequence[float]) -> list[float]:
    """Centered moving average of the finite values; the window shrinks at both ends."""
    half = smoothing_window(len(values))
    out = []
    for position in range(len(values)):
        reach = min(half, position, len(values) - 1 - position)
        window = [v for v in values[position - reach : position + reach + 1] if math.isfinite(v)]
        out.append(sum(window) / len(window) if window else NAN)
    return out


def smoothed_curve(cell: Cell) -> Points:
    """Median over seeds of the smoothed training loss, at the steps that every counted seed reached."""
    curves = []
    for record in cell.counted:
        finite = [(step, value) for step, value in record.train_loss if math.isfinite(value)]
        curves.append(dict(zip((step for step, _ in finite), smooth([value for _, value in finite]), strict=True)))
    curves = [curve for curve in curves if curve]
    if not curves:
        return ()
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    return tuple((step, spread(curve[step] for curve in curves).median) for step in steps)


def loss_curves(cells: Sequence[Cell]) -> Chart:
    guess = spread(cell.guess_loss for cell in cells).median
    raw = [value for cell in cells for r in cell.counted for _, value in r.train_loss]
    finite = [value for value in raw if math.isfinite(value)]
    ceiling = guess + max(guess - min(finite, default=guess), 0.4)  # the fall from the start would flatten the rest
    low, high = shared_limits([*(v for v in finite if not v > ceiling), guess], log=False)
    above = [value for value in finite if value > high]

    def line(cell: Cell) -> Series:
        faint = tuple(tuple(p for p in r.train_loss if math.isfinite(p[1])) for r in cell.counted)
        points = smoothed_curve(cell)
        stopped = bool(cell.count("diverged") and not cell.count("ok"))
        return Series(cell.label, cell.norm, cell.placement, points, faint=faint, stopped=stopped)

    panels = tuple(
        Panel(
            blocks(depth),
            "training step",
            f"training loss ({LOSS_UNIT})",
            tuple(line(cell) for cell in cells if cell.depth == depth),
            (Reference("guessing by byte frequency", level=guess),),
            (low, high),
        )
        for depth in depths_of(cells)
    )
    rows = tuple((*_identity(r), step, value) for cell in cells for r in cell.records for step, value in r.train_loss)
    notes = (
        (f"Losses above {high:.2f} lie outside the frame; the highest is {significant(max(above))}.",) if above else ()
    )
    return Chart("loss-curves", "Loss curves", "curves", panels, (*IDENTITY, "step", "train_loss"), rows, notes=notes)


# ---------------------------------------------------------------------------------------------- profiles by depth


def profile_series(cell: Cell, name: str, moment: str, variant: str = "") -> Series:
    """Median and range over seeds of one profile, by position from 1."""
    table = cell.profile(name, moment)
    spreads = [spread(column) for column in table.T]
    points = tuple((float(i), s.median) for i, s in enumerate(spreads, 1) if s)
    band = tuple((float(i), s.low, s.high) for i, s in enumerate(spreads, 1) if s.count > 1)
    return Series(cell.label, cell.norm, cell.placement, points, band=band, variant=variant)


def _profile_panels(
    cells: Sequence[Cell],
    name: str,
    x_label: str,
    y_label: str,
    *,
    log: bool,
    beside: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    references: Callable[[int], tuple[Reference, ...]] = lambda depth: (),
) -> tuple[Panel, ...]:
    """A panel per depth and moment; the panels of a depth share a scale, which lines that blew up do not stretch.

    `beside`: a variant (style.VARIANTS) -> the profile that it draws, and at which moment.
    """
    panels: list[Panel] = []
    for depth in depths_of(cells):
        here = [cell for cell in cells if cell.depth == depth]
        names = [name, *(other for other, _ in beside.values())]
        limits = _profile_limits(here, names, references(depth), log)
        for moment, when in MOMENTS.items():
            lines = [profile_series(cell, name, moment) for cell in here]
            for variant, (other, at) in beside.items():
                lines += [profile_series(cell, other, moment, variant) for cell in here if moment == at]
            title = f"{blocks(depth)}, {when}"
            panels.append(Panel(title, x_label, y_label, tuple(lines), references(depth), limits))
    return tuple(panels)


def _framed(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that set the scale: those that did not blow up, or all where every one did."""
    return [cell for cell in cells if cell.on_scale] or list(cells)


def _profile_limits(
    cells: Sequence[Cell], names: Sequence[str], references: Sequence[Reference], log: bool
) -> tuple[float, float]:
    tables = [cell.profile(name, moment) for cell in _framed(cells) for name in names for moment in MOMENTS]
    values = [float(value) for table in tables for value in table.flat]
    return shared_limits([*values, *(y for reference in references for _, y in reference.points)], log)


def _outside(cells: Sequence[Cell], name: str) -> tuple[str, ...]:
    """A sentence naming the cells that blew up and leave the frame."""
    parts = []
    for depth in depths_of(cells):
        here = [cell for cell in cells if cell.depth == depth]
        low, high = _profile_limits(here, [name], (), log=True)
        for cell in here:
            values = [float(v) for moment in MOMENTS for v in cell.profile(name, moment).flat if math.isfinite(v)]
            if not cell.on_scale and values and (max(values) > high or min(values) < low):
                parts.append(
                    f"{cell.label} at {blocks(depth)}, {significant(min(values))} to {significant(max(values))}"
                )
    return (f"Not all inside the frame: {'; '.join(parts)}.",) if parts else ()


def _profile_rows(cells: Sequence[Cell], names: Sequence[str]) -> tuple[tuple[object, ...], ...]:
    rows = []
    for cell in cells:
        for record in cell.records:
            for moment in MOMENTS:
                columns = [record.profiles[name].at(moment) for name in names]
                for position in range(max(map(len, columns))):
                    values = [column[position] if position < len(column) else NAN for column in columns]
                    rows.append((*_identity(record), moment, position + 1, *values))
    return tuple(rows)


def _missing(cells: Sequence[Cell], name: str) -> tuple[str, ...]:
    """A sentence naming the cells that a profile lacks at the end of training."""
    lacking = [
        f"{cell.label} at {blocks(cell.depth)} ({cell.status})" for cell in cells if not cell.profile(name, "end").size
    ]
    return (f"Not measured after training: {'; '.join(lacking)}.",) if lacking else ()


def rescales_skip(cell: Cell) -> bool:
    """Whether a norm follows the add, so that the identity branch is rescaled: some skip weight is not 1."""
    return any(
        bool(np.nanmax(np.abs(values - 1)) > 1e-9)
        for moment in MOMENTS
        if (values := cell.profile("skip_weight_by_sublayer", moment)).size
    )


SUBLAYER = "sublayer (odd: attention, even: feed-forward)"


def gradients(cells: Sequence[Cell]) -> Chart:
    name = "grad_norm_by_layer"
    panels = _profile_panels(cells, name, "block, from input to output", "gradient norm of a block (L2)", log=True)
    columns = (*IDENTITY, "moment", "block", "grad_norm")
    rows = _profile_rows(cells, [name])
    notes = (*_outside(cells, name), *_missing(cells, name))
    return Chart("gradients", "Gradients by depth", "profile", panels, columns, rows, log=True, notes=notes)


def residual(cells: Sequence[Cell]) -> Chart:
    name = "residual_rms_by_sublayer"
    panels = _profile_panels(cells, name, SUBLAYER, "RMS of the residual stream", log=True)
    columns = (*IDENTITY, "moment", "sublayer", "residual_rms")
    rows = _profile_rows(cells, [name])
    notes = (*_outside(cells, name), *_missing(cells, name))
    return Chart("residual-growth", "Residual growth", "profile", panels, columns, rows, log=True, notes=notes)


def _unscaled(cells: Sequence[Cell]) -> list[str]:
    """Labels of the cells whose skip keeps weight 1 throughout."""
    measured = [cell for cell in cells if cell.profile("skip_weight_by_sublayer", "init").size]
    return list(dict.fromkeys(cell.label for cell in measured if not rescales_skip(cell)))


def _line_at_one(cells: Sequence[Cell]) -> tuple[str, ...]:
    labels = _unscaled(cells)
    return (f"On the line at 1: {listing(labels)}.",) if labels and any(map(rescales_skip, cells)) else ()


def _identity_panels(
    cells: Sequence[Cell],
    name: str,
    y_label: str,
    beside: Mapping[str, tuple[str, str]],
    log: bool,
    unit_line: Callable[[int], Reference],
) -> tuple[Panel, ...]:
    """Panels of the cells that rescale the skip; all others are one line at 1."""
    rescaling = [cell for cell in cells if rescales_skip(cell)]
    rest = _unscaled(cells)

    def references(depth: int) -> tuple[Reference, ...]:
        sublayers = [float(i) for i in range(1, 2 * depth + 1)]
        ones = Reference("nothing rescales the skip: 1", tuple((i, 1.0) for i in sublayers), solid=True)
        return (ones, unit_line(depth)) if rest else (unit_line(depth),)

    shown = rescaling or cells  # without a norm after the add anywhere, the lines at 1 are the figure
    return _profile_panels(
        shown, name, SUBLAYER, y_label, log=log, beside=beside if rescaling else {}, references=references
    )


def skip_weight(cells: Sequence[Cell], unit_weight: float) -> Chart:
    names = ("skip_weight_by_sublayer", "skip_weight_with_gain_by_sublayer")

    def unit_line(depth: int) -> Reference:
        return Reference("unit-variance line, 1/√2", tuple((float(i), unit_weight) for i in range(1, 2 * depth + 1)))

    beside = {"gain": (names[1], "end")}  # at init every gain is 1
    panels = _identity_panels(cells, names[0], "weight of the identity branch", beside, False, unit_line)
    columns = (*IDENTITY, "moment", "sublayer", "skip_weight", "skip_weight_with_gain")
    rows = _profile_rows(cells, names)
    title = "The identity branch, sublayer by sublayer"
    return Chart("skip-weight", title, "profile", panels, columns, rows, notes=_line_at_one(cells))


def identity_weight(cells: Sequence[Cell], unit_weight: float) -> Chart:
    names = (
        "identity_weight_by_sublayer",
        "identity_weight_with_gain_by_sublayer",
        "uncorrelated_identity_weight_by_sublayer",
    )

    def unit_line(depth: int) -> Reference:
        points = tuple((float(i), unit_weight**i) for i in range(1, 2 * depth + 1))
        return Reference("unit-variance line, 2^(−l/2)", points)

    beside = {"gain": (names[1], "end"), "uncorrelated": (names[2], "init")}
    panels = _identity_panels(cells, names[0], "weight left of the input", beside, True, unit_line)
    columns = (*IDENTITY, "moment", "sublayer", "identity_weight", "identity_weight_with_gain", "uncorrelated")
    rows = _profile_rows(cells, names)
    notes = (*_line_at_one(cells), *_missing(cells, names[0]))
    title = "The identity branch down the stack"
    return Chart("identity-weight", title, "profile", panels, columns, rows, log=True, notes=notes)


def all_charts(cells: Sequence[Cell], unit_weight: float) -> dict[str, Chart]:
    """Every chart by name, in the report's order; a chart without data is `empty`."""
    charts = (
        validation_loss(cells),
        loss_curves(cells),
        gradients(cells),
        residual(cells),
        skip_weight(cells, unit_weight),
        identity_weight(cells, unit_weight),
        batch_statistics(cells),
        cost(cells),
    )
    return {chart.name: chart for chart in charts}
