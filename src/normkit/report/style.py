"""Style: the look of a norm and a placement, for matplotlib and for the page's legend alike.

Here: colours (Okabe and Ito's, told apart by the colour-blind), markers, dashes, and the CSS variable of each colour.
May import: report.shapes, report.wording.
Read next: figures.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from normkit.report.shapes import Chart
from normkit.report.wording import NORM_NAMES

INK, MUTED, RULE, CARD, REFERENCE = "#1f2429", "#626b75", "#dfe3e8", "#fffffe", "#7a828b"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# (light, dark): each is used nowhere else, so that a colour in the SVG can become its variable
_NORM_COLORS = {
    "none": ("#4a4f55", "#c3c9d0"),
    "batch": ("#d55e00", "#ff9a4d"),
    "layer": ("#0072b2", "#56b4e9"),
    "rms": ("#009e73", "#2fd3a2"),
}
_OTHER_COLORS = (("#cc79a7", "#e5a5c8"), ("#b8860b", "#f0c94a"), ("#7b4fb5", "#b79be6"))
_MARKERS = {"none": "o", "batch": "s", "layer": "^", "rms": "D"}
_OTHER_MARKERS = ("v", "P", "p")
_DASHES = {None: (), "pre": (), "post": (4.0, 2.0)}
_OTHER_DASHES = ((7.0, 2.0), (6.0, 1.5, 1.5, 1.5), (2.0, 1.0))
# thin lines without markers, of a quantity beside the measured one: what the legend says, and the dash
VARIANTS = {"gain": ("with |γ|", (1.0, 1.6)), "uncorrelated": ("∏ 1/√(1+v)", (6.0, 1.5, 1.0, 1.5, 1.0, 1.5))}
_PAGE_COLORS = {"--ink": (INK, "#e6e9ec"), "--muted": (MUTED, "#9aa4ae"), "--rule": (RULE, "#333b44")}
_PAGE_COLORS |= {"--card": (CARD, "#171c21"), "--reference": (REFERENCE, "#8d97a1")}


@dataclass(frozen=True)
class Look:
    color: str  # light theme
    variable: str  # CSS variable that carries the colour on the page
    marker: str  # matplotlib's letter
    dash: tuple[float, ...]  # () is solid
    filled: bool
    index: int

    @property
    def mpl_dash(self) -> tuple[int, tuple[float, ...]] | Literal["-"]:
        return (0, self.dash) if self.dash else "-"


def _stable(value: str, count: int) -> int:
    return sum(value.encode()) % count


def look(norm: str, placement: str | None) -> Look:
    """Colour and marker by norm, dash and filling by placement; names that we do not know get a spare of each."""
    spare = _stable(norm, len(_OTHER_COLORS))
    known = norm in NORM_NAMES
    color = _NORM_COLORS[norm] if known else _OTHER_COLORS[spare]
    dash = _DASHES[placement] if placement in _DASHES else _OTHER_DASHES[_stable(str(placement), len(_OTHER_DASHES))]
    return Look(
        color=color[0],
        variable=f"--norm-{norm}" if known else f"--norm-other{spare}",
        marker=_MARKERS[norm] if known else _OTHER_MARKERS[spare],
        dash=dash,
        filled=placement != "post",
        index=2 * list(NORM_NAMES).index(norm) + (placement == "post") if known else 9,
    )


def _themed() -> dict[str, tuple[str, str]]:
    norms = {f"--norm-{norm}": colors for norm, colors in _NORM_COLORS.items()}
    others = {f"--norm-other{position}": colors for position, colors in enumerate(_OTHER_COLORS)}
    return _PAGE_COLORS | norms | others


def css_variables() -> dict[str, str]:
    """Colour -> the CSS variable that stands for it."""
    return {light: variable for variable, (light, _) in _themed().items()}


def theme(dark: bool) -> dict[str, str]:
    """CSS variable -> colour in that theme."""
    return {variable: colors[dark] for variable, colors in _themed().items()}


@dataclass(frozen=True)
class LegendEntry:
    label: str
    norm: str | None  # None: a reference line
    placement: str | None = None
    variant: str = ""


def legend(chart: Chart) -> tuple[LegendEntry, ...]:
    """Each line of the chart's panels once. Panels of dots name their rows themselves: only references there."""
    drawn = [series for panel in chart.panels for series in panel.series if series.points]
    lines = [] if chart.kind == "dots" else drawn
    plain = [LegendEntry(s.label, s.norm, s.placement) for s in lines if not s.variant]
    beside = [
        LegendEntry(f"{s.label}, {says}", s.norm, s.placement, variant)
        for variant, (says, _) in VARIANTS.items()
        for s in lines
        if s.variant == variant
    ]
    references = [
        LegendEntry(reference.label, None, variant="solid" if reference.solid else "")
        for panel in chart.panels
        for reference in panel.references
        if reference.points or math.isfinite(reference.level)
    ]
    return tuple(dict.fromkeys([*plain, *beside, *references]))
