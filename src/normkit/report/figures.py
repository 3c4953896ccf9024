"""Figures: charts -> SVG panels for the page and one PNG per chart.

Here: the only module that imports matplotlib, through its object interface (no pyplot, no global figure).
May import: matplotlib, report.shapes, report.style, report.wording.
Read next: page.py, which places the panels.

A panel is one SVG, so that panels stand side by side on a desk and below each other on a phone. Text stays text. The
colours in the SVG are CSS variables, so that the page's light, dark and print themes colour the figures too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.ticker as ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normkit.report.shapes import Chart, Panel, Reference, Series
from normkit.report.style import CARD, FONT, INK, MUTED, REFERENCE, RULE, VARIANTS, LegendEntry, css_variables, look
from normkit.report.wording import tick

PANEL_WIDTH, PANEL_HEIGHT, ROW_HEIGHT = 4.2, 2.8, 0.26  # inches; at 72 dpi a phone's width is about 4.7
TOP, RIGHT, BOTTOM = 0.3, 0.14, 0.52  # inches around a panel's axes
PNG_DPI = 160
DASH_DOT = (0, (5, 2, 1, 2))


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's defaults plus ours for the duration of one drawing, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9.5,
                "axes.titlesize": 10,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.labelsize": 9,
                "axes.titlecolor": INK,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": RULE,
                "grid.linewidth": 0.7,
                "text.color": INK,
                "text.parse_math": False,  # a "$" in a record is a dollar sign
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "xtick.labelsize": 8.5,
                "ytick.labelsize": 8.5,
                "svg.fonttype": "none",
                "svg.hashsalt": "normkit",
            }
        )
        yield


# ---------------------------------------------------------------------------------------------- drawing on axes


def _tick_text(value: float, _position: object = None) -> str:
    return tick(value)


def _scale(axes: Axes, panel: Panel, log: bool) -> None:
    low, high = panel.limits
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick_text))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick_text))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        decades = math.log10(high / low) if math.isfinite(low) and low > 0 else 0.0
        if decades < 0.6:
            axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        elif decades < 2.5:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3)))
        else:
            axes.yaxis.set_major_locator(ticker.LogLocator(numticks=7))
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
    if math.isfinite(low):
        axes.set_ylim(low, high)


def _line(axes: Axes, series: Series, log: bool) -> None:
    style = look(series.norm, series.placement)
    for curve in series.faint:
        axes.plot(*zip(*curve, strict=True), color=style.color, linewidth=0.6, alpha=0.22) if curve else None
    points = [(x, y) for x, y in series.points if y > 0 or not log]
    if not points:
        return
    if series.band:
        x, low, high = zip(*series.band, strict=True)
        axes.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)
    x, y = zip(*points, strict=True)
    if series.variant:
        axes.plot(x, y, color=style.color, linestyle=(0, VARIANTS[series.variant][1]), linewidth=1.3)
        return
    many = len(points) > 30  # curves carry a marker now and then, profiles one per sublayer
    axes.plot(
        x,
        y,
        color=style.color,
        linestyle=style.mpl_dash,
        linewidth=1.6,
        marker=style.marker,
        markersize=4.6 if many else 4.2,
        markevery=(0.02 + 0.02 * style.index, 0.17) if many else None,  # apart, where lines lie on each other
        markerfacecolor=style.color if style.filled else CARD,
        markeredgecolor=style.color,
        markeredgewidth=1.1,
    )
    if series.stopped:
        axes.plot(x[-1], y[-1], marker="X", markersize=8, color=style.color, markeredgecolor=CARD)


def _reference(reference: Reference) -> dict[str, Any]:
    if reference.solid:
        return {"color": REFERENCE, "linewidth": 2.2, "linestyle": "-"}
    return {"color": REFERENCE, "linewidth": 1.1, "linestyle": DASH_DOT}


def _draw_lines(axes: Axes, chart: Chart, panel: Panel) -> None:
    _scale(axes, panel, chart.log)
    for reference in panel.references:
        if math.isfinite(reference.level):
            axes.axhline(reference.level, **_reference(reference))
        if reference.points:
            axes.plot(*zip(*reference.points, strict=True), **_reference(reference))
    for series in panel.series:
        _line(axes, series, chart.log)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7, integer=True, min_n_ticks=1))
    if chart.kind == "profile":
        lines = [line.points for line in panel.series] + [reference.points for reference in panel.references]
        last = max((x for points in lines for x, _ in points), default=1.0)
        axes.set_xlim(0.6, last + 0.4)


def _rows_of(panel: Panel) -> list[str]:
    return list(dict.fromkeys(series.label for series in panel.series))


def _draw_dots(axes: Axes, panel: Panel, from_zero: bool) -> None:
    labels = _rows_of(panel)
    low, high = panel.limits
    if math.isfinite(low):
        axes.set_xlim(low, high)
    start = low if math.isfinite(low) else 0.0
    for reference in panel.references:
        if math.isfinite(reference.level):
            axes.axvline(reference.level, **_reference(reference))
    for series in panel.series:
        row = labels.index(series.label)
        style = look(series.norm, series.placement)
        values = [value for value, _ in series.points]
        if series.note:
            axes.text(start, row, f" {series.note}", color=MUTED, fontsize=8.5, va="center")
        if not values:
            continue
        if from_zero:
            axes.plot([0, sorted(values)[len(values) // 2]], [row, row], color=style.color, linewidth=2.2, alpha=0.45)
        elif len(values) > 1:
            axes.plot([min(values), max(values)], [row, row], color=style.color, linewidth=1.2, alpha=0.5)
        filled = style.filled if not series.variant else not style.filled
        axes.plot(
            values,
            [row] * len(values),
            linestyle="none",
            marker="X" if series.stopped else style.marker if not series.variant else "|",
            markersize=7 if not series.variant else 11,
            markerfacecolor=style.color if filled else CARD,
            markeredgecolor=style.color,
            markeredgewidth=1.3 if not series.variant else 2.2,
        )
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick_text))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))


def _draw(axes: Axes, chart: Chart, panel: Panel) -> None:
    axes.set_title(panel.title)
    if chart.kind == "dots":
        _draw_dots(axes, panel, chart.from_zero)
    else:
        _draw_lines(axes, chart, panel)


def _panel_height(chart: Chart) -> float:
    if chart.kind != "dots":
        return PANEL_HEIGHT
    return TOP + BOTTOM + ROW_HEIGHT * max(len(_rows_of(panel)) for panel in chart.panels)


def _add_panel(figure: Figure, chart: Chart, panel: Panel, left: float, bottom: float) -> None:
    """One panel with its lower left corner at (left, bottom) inches; axes of a chart's panels line up."""
    width, height = figure.get_size_inches()
    names = [len(label) for each in chart.panels for label in _rows_of(each)] if chart.kind == "dots" else []
    indent = min(0.18 + 0.073 * max(names, default=0), 0.5 * PANEL_WIDTH) if names else 0.72
    inner = (left + indent, bottom + BOTTOM, PANEL_WIDTH - indent - RIGHT, _panel_height(chart) - TOP - BOTTOM)
    axes = figure.add_axes((inner[0] / width, inner[1] / height, inner[2] / width, inner[3] / height))
    _draw(axes, chart, panel)


# ---------------------------------------------------------------------------------------------- SVG


_UNWANTED = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", re.DOTALL
)
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")


def _page_svg(text: str, prefix: str) -> str:
    """matplotlib's file as an element of the page: ids unique, no style that leaks, colours as CSS variables."""
    text = _UNWANTED.sub("", text).strip()
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text))
    text = re.sub(r'\s*\bid="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'xlink:href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    text = re.sub(r' (?:d|x|y|points)="[^"]*"', lambda found: _LONG_NUMBER.sub(r"\1", found[0]), text)
    for color, variable in css_variables().items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", rf"font: \1\2 {FONT}", text)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)


def panel_svgs(chart: Chart) -> list[str]:
    """One inline SVG per panel."""
    svgs = []
    for position, panel in enumerate(chart.panels):
        with _settings():
            figure = Figure(figsize=(PANEL_WIDTH, _panel_height(chart)))
            FigureCanvasSVG(figure)
            _add_panel(figure, chart, panel, 0, 0)
            out = io.StringIO()
            options: dict[str, Any] = {"metadata": {"Date": None, "Creator": None}, "transparent": True}
            figure.savefig(out, format="svg", **options)
        svgs.append(_page_svg(out.getvalue(), f"{chart.name}-{position}"))
    return svgs


# ---------------------------------------------------------------------------------------------- PNG


def _legend(figure: Figure, entries: Sequence[LegendEntry]) -> None:
    handles = []
    for entry in entries:
        if entry.norm is None:
            line = _reference(Reference(entry.label, solid=entry.variant == "solid"))
            handles.append(Line2D([], [], **line, label=entry.label))
            continue
        style = look(entry.norm, entry.placement)
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle=(0, VARIANTS[entry.variant][1]) if entry.variant else style.mpl_dash,
                marker="" if entry.variant else style.marker,
                markerfacecolor=style.color if style.filled else CARD,
                label=entry.label,
                markersize=5,
            )
        )
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=_legend_columns(entries),
            frameon=False,
            fontsize=8.5,
            handlelength=3,
        )


def _legend_columns(entries: Sequence[LegendEntry]) -> int:
    return max(1, min(4, 105 // (8 + max((len(entry.label) for entry in entries), default=0))))


def png(chart: Chart, entries: Sequence[LegendEntry]) -> bytes:
    """The whole chart on a white ground, with its legend."""
    columns, panel_height = 2, _panel_height(chart)
    lines = math.ceil(len(chart.panels) / columns)
    legend_height = 0.15 + 0.2 * math.ceil(len(entries) / _legend_columns(entries))
    height = legend_height + lines * panel_height + 0.35
    with _settings():
        figure = Figure(figsize=(PANEL_WIDTH * columns, height), facecolor=CARD)
        FigureCanvasAgg(figure)
        figure.text(0.02, 1 - 0.1 / height, chart.title, fontsize=12, fontweight="bold", va="top")
        for position, panel in enumerate(chart.panels):
            line, column = divmod(position, columns)
            bottom = legend_height + (lines - 1 - line) * panel_height
            _add_panel(figure, chart, panel, column * PANEL_WIDTH, bottom)
        _legend(figure, entries)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return out.getvalue()
