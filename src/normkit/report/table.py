"""Table: cells -> the verdict table, for the page and the terminal, and summary.csv.

Here: which columns there are and how their numbers are written. Pure.
May import: the standard library, report.cells, report.load, report.wording.
Read next: page.py.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from normkit.report.cells import Cell, Spread, best_by_depth, group, ranked
from normkit.report.load import NAN, parse_records
from normkit.report.wording import (
    DASH,
    factor,
    loss,
    milliseconds,
    norm_name,
    signed,
    significant,
    whole,
)


@dataclass(frozen=True)
class Entry:
    """One table cell: its text, and what it sorts by (None sorts last)."""

    text: str
    sort: float | str | None = None
    detail: str = ""  # smaller, below the text
    mark: str = ""  # "best", "diverged" or "failed"


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool
    help: str


COLUMNS = (
    Column("norm", False, "which norm"),
    Column("placement", False, "pre: before the sublayer; post: after the add"),
    Column("depth", True, "transformer blocks, two sublayers each"),
    Column("lr", True, "learning rate"),
    Column("status", False, "ok, diverged or failed"),
    Column("val loss", True, "validation loss, nats per byte; median and range where there are several seeds"),
    Column("minus guess", True, "difference from guessing by byte frequency, nats per byte; below 0 is better"),
    Column("minus best", True, "difference from the lowest loss at the same depth, nats per byte"),
    Column("time per step", True, "wall time of a training step, from the serial pass"),
    Column("params", True, "parameters of the model"),
    Column("gradient first/last", True, "gradient norm of the first block over that of the last, at init"),
    Column("identity init", True, "weight of the identity branch after the whole stack, at init"),
    Column("identity end", True, "the same after training, without gain"),
)


def _number(value: float, text: str, detail: str = "", mark: str = "") -> Entry:
    return Entry(text, value if math.isfinite(value) else None, detail, mark)


def _range(value: Spread) -> str:
    return f"{loss(value.low)} to {loss(value.high)}" if value.count > 1 else ""


def _entries(cell: Cell, best: Cell | None) -> tuple[Entry, ...]:
    value = cell.val_loss
    below = value.median - cell.guess_loss
    behind = value.median - best.val_loss.median if best and cell.ok else NAN
    identity = [cell.last("identity_weight_by_sublayer", moment).median for moment in ("init", "end")]
    ratio, seconds = cell.gradient_ratio("init").median, cell.seconds_per_step.median
    trouble = "failed" if cell.count("failed") else "diverged" if cell.count("diverged") else ""
    return (
        Entry(norm_name(cell.norm), cell.norm),
        Entry(cell.placement or DASH, cell.placement or ""),
        _number(cell.depth, str(cell.depth)),
        _number(cell.lr, significant(cell.lr)),
        Entry(cell.status, cell.status, " ".join(cell.reasons), trouble),
        _number(value.median, loss(value.median), _range(value), "best" if cell is best else ""),
        _number(below, signed(below)),
        _number(behind, signed(behind)),
        _number(seconds, milliseconds(seconds)),
        _number(cell.parameters, whole(cell.parameters)),
        _number(ratio, factor(ratio)),
        *(_number(weight, significant(weight)) for weight in identity),
    )


def verdict(cells: Sequence[Cell]) -> tuple[tuple[Column, ...], tuple[tuple[Entry, ...], ...]]:
    """Columns and rows, by depth and within it lowest loss first; the learning rate only where there are several."""
    best = best_by_depth(cells)
    ordered = sorted(ranked(cells), key=lambda cell: cell.depth)
    rows = [_entries(cell, best.get(cell.depth)) for cell in ordered]
    several_rates = len({cell.lr for cell in cells if math.isfinite(cell.lr)}) > 1
    keep = [column.title != "lr" or several_rates for column in COLUMNS]
    columns = tuple(column for column, kept in zip(COLUMNS, keep, strict=True) if kept)
    return columns, tuple(tuple(e for e, kept in zip(row, keep, strict=True) if kept) for row in rows)


def summary_rows(records: Iterable[Mapping[str, object]]) -> tuple[list[str], list[list[str]]]:
    """The verdict table as strings, for a terminal.

    Args:
        records: the objects of records.jsonl, as dicts; an object that is no record is left out.

    Returns:
        (columns, rows): titles, and one list of strings per (norm, placement, depth), by depth and within it lowest
        validation loss first. Losses are in nats per byte; missing numbers are a dash.

    Example:
        >>> columns, rows = summary_rows([{"norm": "rms", "placement": "pre", "depth": 2, "status": "ok"}])
        >>> rows[0][:4]
        ['RMSNorm', 'pre', '2', 'ok']
    """
    columns, rows = verdict(group(parse_records(records)[0]))
    return [column.title for column in columns], [[entry.text for entry in row] for row in rows]


# ---------------------------------------------------------------------------------------------- CSV


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV: numbers in full, NaN empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows])
    return out.getvalue()


def csv_rows(records: Sequence[Mapping[str, object]], fields: Sequence[str]) -> tuple[tuple[object, ...], ...]:
    """For a chart's CSV: these fields of each record, empty where it has none."""
    return tuple(tuple("" if record.get(field) is None else record[field] for field in fields) for record in records)


_SUMMARY_COLUMNS = (
    "norm",
    "placement",
    "depth",
    "lr",
    "seeds",
    "ok",
    "diverged",
    "failed",
    "reason",
    "val_loss",
    "val_loss_low",
    "val_loss_high",
    "val_loss_batch_statistics",
    "guess_loss",
    "val_loss_minus_guess",
    "val_loss_minus_best_of_depth",
    "seconds_per_step",
    "parameters",
    "grad_first_over_last_init",
    "grad_first_over_last_end",
    "identity_weight_init",
    "identity_weight_end",
    "identity_weight_with_gain_init",
    "identity_weight_with_gain_end",
    "residual_rms_init",
    "residual_rms_end",
)


def summary_csv(cells: Sequence[Cell]) -> str:
    """summary.csv: a row per cell in the grid's order, medians over the seeds that ended well (all, where none did)."""
    best = best_by_depth(cells)
    rows = []
    for cell in cells:
        value, leader = cell.val_loss, best.get(cell.depth)
        ends = [
            cell.last(name, moment).median
            for name in (
                "identity_weight_by_sublayer",
                "identity_weight_with_gain_by_sublayer",
                "residual_rms_by_sublayer",
            )
            for moment in ("init", "end")
        ]
        rows.append(
            [
                *(cell.norm, cell.placement or "", cell.depth, cell.lr, len(cell.records)),
                *(cell.count("ok"), cell.count("diverged"), cell.count("failed"), " ".join(cell.reasons)),
                *(value.median, value.low, value.high, cell.val_loss_batch_statistics.median),
                *(cell.guess_loss, value.median - cell.guess_loss),
                value.median - leader.val_loss.median if leader and cell.ok else NAN,
                *(cell.seconds_per_step.median, cell.parameters),
                *(cell.gradient_ratio("init").median, cell.gradient_ratio("end").median),
                *ends,
            ]
        )
    exact = [[float(f"{v:.9g}") if isinstance(v, float) else v for v in row] for row in rows]
    return csv_text(_SUMMARY_COLUMNS, exact)
