"""The tables of the worked examples: the one that comes with each topic, and a user's own from a CSV file.

Here: `Table`, `SCORES`, `temperatures`, `read_csv`.
May import: torch.
Read next: steps.py, which normalizes them.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Numbers with the names of their rows and columns. Names that texts.py knows are translated."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor  # (rows, columns), float64

    def __post_init__(self) -> None:
        assert self.values.shape == (len(self.rows), len(self.columns))


# two students, three subjects: small enough to check by hand
SCORES = Table(
    ("student a", "student b"),
    ("maths", "physics", "history"),
    torch.tensor([[90.0, 80.0, 70.0], [60.0, 50.0, 40.0]], dtype=torch.float64),
)


def temperatures() -> Tensor:
    """A year of daily mean temperatures: a season of 12 degrees about 11, and weather of 3 that lasts some days.

    Computed, not measured: day d has 11 - 12 cos(2 pi (d - 20) / 365) + w_d, w an average of white noise with a seed.
    """
    days = torch.arange(365, dtype=torch.float64)
    noise = torch.randn(365 + 4, generator=torch.Generator().manual_seed(2026), dtype=torch.float64)
    weather = noise.unfold(0, 5, 1).mean(1) * 3.0 * math.sqrt(5.0)
    return 11.0 - 12.0 * torch.cos(2 * math.pi * (days - 20) / 365) + weather


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_csv(path: Path) -> Table:
    """A table of numbers from a CSV file, with or without a line and a column of names.

    Raises:
        ValueError: the file holds no table of finite numbers; the sentence names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        # the reader counts the lines of the file, empty ones and those within quotes too
        numbered = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    numbered = [(place, line) for place, line in numbered if any(line)]
    lines = [line for _, line in numbered]
    if not lines:
        raise ValueError(f"{path}: expected a table of numbers, got no line that is not empty")
    # names above the numbers: the first line has a cell that is no number behind its first one, or all are none
    header = any(_number(cell) is None for cell in lines[0][1:]) or all(_number(cell) is None for cell in lines[0])
    body = lines[1:] if header else lines
    if not body:
        raise ValueError(f"{path}: expected numbers below the line of names, got none")
    named = all(_number(line[0]) is None for line in body)
    width = len(body[0]) - named
    rows = []
    for place, line in numbered[-len(body) :]:
        numbers = [_number(cell) for cell in line[named:]]
        if len(numbers) != width or width == 0:
            raise ValueError(f"{path}: expected {max(width, 1)} numbers in line {place}, got {len(numbers)}")
        if any(number is None or not math.isfinite(number) for number in numbers):
            raise ValueError(f"{path}: expected finite numbers in line {place}, got {', '.join(line[named:])!r}")
        rows.append([float(number) for number in numbers if number is not None])
    columns = lines[0][-width:] if header else [f"#{i + 1}" for i in range(width)]
    if len(columns) != width:
        raise ValueError(f"{path}: expected a name for each of {width} columns, got {len(columns)}")
    names = [line[0] for line in body] if named else [f"#{i + 1}" for i in range(len(body))]
    return Table(tuple(names), tuple(columns), torch.tensor(rows, dtype=torch.float64))
