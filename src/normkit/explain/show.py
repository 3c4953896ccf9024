"""Worked examples on a terminal: numbered sentences and their tables.

Here: `show`.
May import: rich, its package's modules.
Read next: steps.py.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Lines

from normkit.explain.steps import Step
from normkit.explain.tables import Table
from normkit.explain.texts import name, sentence, title


def show(topic: str, steps: list[Step], language: str, console: Console) -> None:
    console.print(title(topic, language), style="bold", highlight=False)
    for number, step in enumerate(steps, 1):
        console.print()
        console.print(f"{number}. {sentence(topic, step, language)}", highlight=False, markup=False)
        if step.table is not None:
            console.print(_lines(step.table, language))


def _lines(table: Table, language: str) -> Lines:
    lines = Lines(box=box.SIMPLE, pad_edge=False)
    lines.add_column("")
    for column in table.columns:
        lines.add_column(name(column, language), justify="right", no_wrap=True)
    for row, values in zip(table.rows, table.values.tolist(), strict=True):
        lines.add_row(name(row, language), *map(_number, values))
    return lines


def _number(value: float) -> str:
    """Four decimals where they say something: 90, 1.2247, 3.07e-17."""
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
