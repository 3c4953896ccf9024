"""Observation: what was measured on one model and one batch -> one self-contained page.

Here: the figures and tables of normkit.study.observe, from its `as_dict()`.
May import: jinja2, matplotlib (through figures.py) and the rest of this package.
Read next: templates/observation.html.j2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from normkit.report.load import NAN
from normkit.report.parts import Table, draw, environment, write
from normkit.report.shapes import Chart, Panel, Reference, Series, shared_limits
from normkit.report.table import Column, Entry, csv_rows
from normkit.report.wording import plural, significant, whole

Record = Mapping[str, Any]

# A chain of blocks, or a kind of activation, takes the look of a norm and a placement: the page has no norms in its
# legends, so nothing is confused, and eight lines stay apart in print and for the colour-blind.
LINES_SAID = 4
_LOOKS = [(norm, placement) for placement in ("pre", "post") for norm in ("layer", "batch", "rms", "none")]


# ---------------------------------------------------------------------------------------------- figures


def _value(record: Record, field: str) -> float:
    value = record.get(field)
    return NAN if value is None else float(value)


def _name(record: Record) -> str:
    path = record["path"] or "(model)"
    return f"{path}#{record['call']}" if record.get("call", 1) > 1 else path


def _lines(records: Sequence[Record], group: str, x: Callable[[int, Record], float], field: str) -> tuple[Series, ...]:
    """A line for each value of `group`, in the order in which they come."""
    groups = list(dict.fromkeys(record[group] for record in records))
    made = []
    for place, each in enumerate(groups):
        norm, placement = _LOOKS[place % len(_LOOKS)]
        points = tuple(
            (x(i, record), _value(record, field))
            for i, record in enumerate(records, 1)
            if record[group] == each and math.isfinite(_value(record, field))
        )
        made.append(Series(each or "(model)", norm, placement, points))
    return tuple(made)


def _panel(title: str, labels: tuple[str, str], series: tuple[Series, ...], log: bool = False) -> Panel:
    return Panel(
        title, labels[0], labels[1], series, limits=shared_limits([y for one in series for _, y in one.points], log)
    )


def _blocks(seen: Record) -> list[Record]:
    """The blocks with the line they stand on and their place there.

    A line is a chain. Chains inside the blocks of one chain, such as the sublayers in every layer of a decoder, follow
    each other and are one line, with a "*" for the block.
    """
    paths = {block["path"] for block in seen["blocks"]}
    counts: Counter[str] = Counter()
    found: list[Record] = []
    for block in seen["blocks"]:
        parts = block["chain"].split(".")
        inside = [".".join(parts[:end]) in paths for end in range(1, len(parts) + 1)]
        line = ".".join("*" if is_block else part for part, is_block in zip(parts, inside, strict=True))
        counts[line] += 1
        found.append(block | {"line": line, "place": counts[line]})
    return found


def _place(i: int, record: Record) -> float:
    return float(record["place"])


def gradients(seen: Record) -> Chart:
    """By block, or where none were found by module that holds parameters."""
    records: list[Record] = _blocks(seen)
    labels = ("block, from input to output", "gradient norm (L2)")
    if not records:
        records = [module | {"line": "modules", "place": i} for i, module in enumerate(seen["gradients"], 1)]
        labels = ("module, in order of its first call", "gradient norm (L2)")
    panels = [_panel("by the parameters", labels, _lines(records, "line", _place, "gradient"), log=True)]
    if seen["blocks"]:
        lines = _lines(records, "line", _place, "output_gradient")
        panels.append(_panel("by the block's output", labels, lines, log=True))
    fields = ("path", "call", "chain", "position", "gradient", "output_gradient")
    return Chart(
        "gradients", "Gradients by depth", "profile", tuple(panels), fields, csv_rows(records, fields), log=True
    )


def residual(seen: Record) -> Chart:
    lines = _lines(_blocks(seen), "line", _place, "output_rms")
    panels = (_panel("after each block", ("block, from input to output", "RMS of the output"), lines, log=True),)
    fields = ("path", "call", "chain", "position", "input_rms", "output_rms", "growth")
    rows = csv_rows(seen["blocks"], fields)
    return Chart("residual-growth", "Residual growth", "profile", panels, fields, rows, log=True)


def identity(seen: Record) -> Chart:
    panels = []
    x_label = "block, from input to output"
    for title, field in (("<out, in> / <in, in>", "identity"), ("cosine of output and input", "cosine")):
        lines = _lines(_blocks(seen), "line", _place, field)
        last = max((x for line in lines for x, _ in line.points), default=1.0)
        one = Reference("the input passes whole: 1", ((1.0, 1.0), (last, 1.0)))
        low, high = shared_limits([y for line in lines for _, y in line.points], log=False)
        panels.append(Panel(title, x_label, field, lines, (one,), (min(low, 0.97), max(high, 1.03))))
    fields = ("path", "call", "chain", "position", "identity", "cosine", "skip_weight", "identity_weight")
    rows = csv_rows(seen["blocks"], fields)
    return Chart("identity", "The identity branch, block by block", "profile", tuple(panels), fields, rows)


def saturated(seen: Record) -> Chart:
    records = seen["activations"]
    x_label = "activation, in order of calls"
    lines = _lines(records, "type", lambda i, record: float(i), "share")
    panels = [Panel("elements", x_label, "share of elements where it is flat", lines, limits=(-0.03, 1.03))]
    if any(record["dead_units"] is not None for record in records):
        dead = _lines(records, "type", lambda i, record: float(i), "dead_units")
        panels.append(Panel("units", x_label, "share of units never active", dead, limits=(-0.03, 1.03)))
    fields = ("path", "call", "type", "share", "dead_units")
    return Chart("saturation", "Saturated share", "profile", tuple(panels), fields, csv_rows(records, fields))


_MEASURED = {
    "gradients": "L2 norm of the loss's gradient with respect to all of a block's parameters that train, together and "
    "summed over its calls; beside it with respect to the output of each call.",
    "residual-growth": "square root of the mean square over all elements of the block's output.",
    "identity": "<out, in> / <in, in> and <out, in> / (|out| |in|) over all elements of the batch together.",
    "saturation": "sigmoid and tanh: derivative below 0.05 of its largest value; ReLU: input at or below 0; GELU and "
    "SiLU: derivative between -0.05 and 0.05. A unit is a channel of images, else a feature of the last axis.",
}


def _ends(line: Series) -> tuple[float, float, int]:
    """First and last value of a line, and how many there are."""
    return line.points[0][1], line.points[-1][1], len(line.points)


def _extremes(line: Series) -> str:
    low, high = (choose(line.points, key=lambda point: point[1]) for choose in (min, max))
    if low[1] == high[1]:
        return f"{significant(low[1])} throughout"
    return f"between {significant(low[1])} (at {low[0]:.0f}) and {significant(high[1])} (at {high[0]:.0f})"


def _sentences(chart: Chart) -> list[str]:
    """What the first panel shows, a sentence for each line of at least two points; of many lines the first ones."""
    lines = [line for line in chart.panels[0].series if line.points]
    said = []
    for line in [line for line in lines if len(line.points) > 1 or chart.name == "saturation"][:LINES_SAID]:
        first, last, count = _ends(line)
        ratio = first / last if last else NAN
        if chart.name == "gradients":
            said.append(
                f"{line.label}: the gradient of the first of {count} is {significant(ratio)} times that of the last "
                f"({significant(first)} and {significant(last)})."
            )
        elif chart.name == "residual-growth":
            grown = last / first if first else NAN
            said.append(
                f"{line.label}: from the first block's output to the last's of {count} the RMS changes by the factor "
                f"{significant(grown)} ({significant(first)} to {significant(last)})."
            )
        elif chart.name == "identity":
            said.append(f"{line.label}: the weight of the identity branch is {_extremes(line)}.")
        else:
            said.append(f"{line.label}: the share of elements where it is flat is {_extremes(line)}.")
    return said


# ---------------------------------------------------------------------------------------------- tables


_TABLES: tuple[tuple[str, str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "blocks",
        "Residual blocks",
        "A row per call of a block.",
        (
            ("gradient", "gradient", "L2 norm of the gradient of all of the block's parameters"),
            ("output_gradient", "output gradient", "L2 norm of the gradient of this call's output"),
            ("input_rms", "rms in", "root mean square of the input"),
            ("output_rms", "rms out", "root mean square of the output"),
            ("growth", "growth", "rms out over rms in"),
            ("identity", "identity", "<out, in> / <in, in>: what the output keeps of the input"),
            ("cosine", "cosine", "<out, in> / (|out| |in|)"),
            ("skip_weight", "skip weight", "the study's measure: std(skip) over the std that the norm divides by"),
            ("identity_weight", "identity weight", "running product of skip weights down the chain"),
        ),
    ),
    (
        "norms",
        "Norms",
        "A row per call of a norm. The distances are BatchNorm's: this batch against the running statistics, in "
        "running standard deviations.",
        (
            ("input_rms", "rms in", "root mean square of the input"),
            ("input_mean", "mean in", "mean of the input"),
            ("output_rms", "rms out", "root mean square of the output"),
            ("output_mean", "mean out", "mean of the output"),
            ("gamma_mean", "mean |γ|", "mean of |weight|"),
            ("gamma_max", "max |γ|", "maximum of |weight|"),
            ("mean_distance", "mean apart", "|mean of the batch − running mean| / running std, mean over channels"),
            ("mean_distance_max", "mean apart, max", "the same, largest channel"),
            ("std_distance", "std apart", "|std of the batch − running std| / running std, mean over channels"),
            ("std_distance_max", "std apart, max", "the same, largest channel"),
        ),
    ),
    (
        "activations",
        "Activations",
        "A row per call of an activation module.",
        (
            ("share", "saturated", "share of elements where the activation is flat"),
            ("dead_units", "dead units", "share of ReLU units that no element of the batch activates"),
        ),
    ),
    (
        "parameters",
        "Gradients by module",
        "A row per module that holds parameters itself.",
        (
            ("parameters", "parameters", "how many it holds"),
            ("trainable", "trainable", "how many of them require a gradient"),
            ("gradient", "gradient", "L2 norm of their gradient, over all calls"),
        ),
    ),
    (
        "calls",
        "Every call",
        "In the order in which the calls began.",
        (
            ("output_rms", "rms out", "root mean square of the output"),
            ("output_gradient", "output gradient", "L2 norm of the gradient of the output"),
        ),
    ),
)


def _entry(record: Record, field: str) -> Entry:
    value = record.get(field)
    if isinstance(value, int):
        return Entry(whole(value), value)
    number = _value(record, field)
    return Entry(significant(number), number if math.isfinite(number) else None)


def _table(seen: Record, name: str, title: str, about: str, fields: Sequence[tuple[str, str, str]]) -> Table:
    records = seen["gradients" if name == "parameters" else name]
    shown = [field for field in fields if any(record.get(field[0]) is not None for record in records)]
    columns = [
        Column("#", True, "order"),
        Column("path", False, "the module's path, with the number of its call from the second on"),
        Column("type", False, "its class"),
        *([Column("shape", False, "of the output")] if name == "calls" else []),
        *(Column(heading, True, help) for _, heading, help in shown),
    ]
    rows = []
    for i, record in enumerate(records, 1):
        row = [Entry(_name(record), _name(record)), Entry(str(i), i), Entry(record["type"], record["type"])]
        if name == "calls":
            row.append(Entry(" × ".join(map(str, record["shape"])), " ".join(map(str, record["shape"]))))
        rows.append((*row, *(_entry(record, field) for field, _, _ in shown)))
    columns[0], columns[1] = columns[1], columns[0]  # the path is the row's header
    return Table(name, title, about, tuple(columns), tuple(rows))


# ---------------------------------------------------------------------------------------------- the page


def _opening(seen: Record) -> str:
    loss = significant(_value(seen, "loss"), 4)
    parts = [
        plural(len(seen["calls"]), "call"),
        plural(len(seen["blocks"]), "block call"),
        plural(len(seen["norms"]), "norm call"),
        plural(len(seen["activations"]), "activation call"),
    ]
    mode = "train" if seen["training"] else "eval"
    return (
        f"{seen['model']} with {whole(seen['parameters'])} parameters, in {mode} mode, on one batch with loss {loss}: "
        f"{parts[0]} of modules, among them {parts[1]}, {parts[2]} and {parts[3]}."
    )


def render(seen: Record) -> str:
    """The page as text.

    Args:
        seen: `as_dict()` of a normkit.study.Observation.
    """
    charts = [chart for chart in (make(seen) for make in _CHARTS) if not chart.empty]
    return (
        environment()
        .get_template("observation.html.j2")
        .render(
            model=seen["model"],
            opening=_opening(seen),
            notes=seen["notes"],
            figures=[draw(chart, _sentences(chart), _MEASURED[chart.name]) for chart in charts],
            tables=[table for table in (_table(seen, *each) for each in _TABLES) if table.rows],
            versions=", ".join(f"{name} {version}" for name, version in seen["versions"].items()),
        )
    )


_CHARTS: tuple[Callable[[Record], Chart], ...] = (gradients, residual, identity, saturated)


def save(seen: Record, path: Path) -> Path:
    """Write the page to a file, atomically, and return the path.

    Raises:
        ValueError: the folder does not exist, or the path is a folder.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"save: path must be a file in a folder that exists, got {path}; create {path.parent} first")
    write(path, render(seen).encode())
    return path
