"""The goals of normkit's CPU kernels and layers, checked on a result file.

    python benchmarks/goals.py [benchmarks/results/cpu.json]

Prints for each goal the worst cell, the median and how many cells pass, then every cell that falls short; writes the
same beside the result file as Markdown. Read next: goal_list.py, the goals themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import results
from goal_list import Check, Goal, all_goals
from rich.console import Console
from rich.table import Table

COLUMNS = ("goal", "limit", "worst", "worst cell", "median", "pass")
RATIO_COLUMNS = ("norm", "shape", "layout", "dtype", "mode", "allocation")
PEERS = tuple((direction, peer) for direction in ("forward", "forward+backward") for peer in ("torch", "compile"))


def goal_row(goal: Goal) -> list[str]:
    if not goal.checks:
        return [goal.title, goal.limit, "", "not measured in this file", "", ""]
    worst = goal.worst()
    passing = sum(check.ok for check in goal.checks)
    return [
        goal.title,
        goal.limit,
        f"{worst.value:.2f}",
        worst.label,
        f"{goal.median():.2f}",
        f"{passing} of {len(goal.checks)}",
    ]


def goal_table(goals: Iterable[Goal]) -> Table:
    shown = Table(title="Goals")
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column in ("worst", "median", "pass") else "left")
    for goal in goals:
        short = any(not check.ok for check in goal.checks)
        shown.add_row(*goal_row(goal), style="yellow" if short else "" if goal.checks else "dim")
    return shown


def shortfalls(goal: Goal) -> list[str]:
    """The cells that miss a goal, the furthest first."""
    missed = sorted((check for check in goal.checks if not check.ok), key=lambda check: -check.shortfall)
    return [f"{check.value:.2f} (limit {check.limit:.2f}) {check.label}{_parts(check)}" for check in missed]


def _parts(check: Check) -> str:
    return "" if check.parts is None else f"; {check.parts:.2f} by its parts"


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(columns)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def ratio_rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    """A line per input: torch's and torch.compile's time over our layer's, forward and forward+backward."""
    found: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for cell in cells:
        layer = results.time_us(cell, "layer")
        if layer is None:
            continue
        shape = "x".join(map(str, cell["shape"]))
        key = (cell["norm"], shape, cell["layout"], cell["dtype"], cell["mode"] or "", cell["allocation"])
        for peer in ("torch", "compile"):
            time = results.time_us(cell, peer)
            if time is not None:
                found.setdefault(key, {})[cell["direction"], peer] = f"{time / layer:.2f}"
    return [[*key, *(ratios.get(peer, "") for peer in PEERS)] for key, ratios in found.items()]


def markdown(result: dict[str, Any], goals: list[Goal]) -> str:
    environment = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    lines = ["# CPU benchmark", "", "Written by `python benchmarks/goals.py`; do not edit.", "", environment, ""]
    lines += ["## Goals", "", *markdown_table(COLUMNS, map(goal_row, goals)), ""]
    for goal in goals:
        lines += [f"- {goal.title}: {note}" for note in goal.notes]
    lines += ["", "### Cells that fall short", ""]
    for goal in goals:
        missed = shortfalls(goal)
        if missed:
            lines += [f"- {goal.title}", *(f"  - {line}" for line in missed)]
    columns = [*RATIO_COLUMNS, *(f"{direction}: {peer}/layer" for direction, peer in PEERS)]
    lines += ["", "## Time of torch and torch.compile over our layer's", ""]
    lines += markdown_table(columns, ratio_rows(result["cells"]))
    return "\n".join(lines) + "\n"


def report(path: Path, console: Console) -> None:
    """Print the goals of a result file and write them beside it."""
    result = results.read(path)
    goals = all_goals(result)
    console.print(goal_table(goals))
    for goal in goals:
        for note in goal.notes:
            console.print(f"{goal.title}: {note}", highlight=False)
    console.print("\n[bold]Cells that fall short[/bold]")
    for goal in goals:
        missed = shortfalls(goal)
        if missed:
            console.print(f"{goal.title}, {goal.limit}", highlight=False)
            for line in missed:
                console.print(f"  {line}", highlight=False, soft_wrap=True)
    written = path.with_suffix(".md")
    written.write_text(markdown(result, goals))
    console.print(f"\n{path} and {written} written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=results.RESULTS / "cpu.json")
    console = Console()
    report(parser.parse_args().path, console if console.is_terminal else Console(width=190))


if __name__ == "__main__":
    main()
