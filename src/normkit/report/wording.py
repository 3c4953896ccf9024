"""Words: how numbers, norms and lists are written in the report.

Here: formatting only; NaN is written as a dash. Pure.
May import: the standard library.
Read next: cells.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

DASH = "–"
MINUS = "−"
NORM_NAMES = {"none": "no norm", "batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm"}
OTHER_NAMES = {"group": "GroupNorm", "dyt": "DyT (tanh)"}  # looks of their own have the norms above
PLACEMENT_NAMES = {"pre": "PreNorm", "post": "PostNorm"}
INIT_NAMES = {
    "xavier": "Xavier: weight variance 2 / (fan_in + fan_out)",
    "torch": "torch's Linear default: weight variance 1 / (3 fan_in)",
    "gpt2": "GPT-2's: weights from N(0, 0.02²)",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def norm_name(norm: str) -> str:
    return NORM_NAMES.get(norm) or OTHER_NAMES.get(norm, norm)


def cell_label(norm: str, placement: str | None) -> str:
    """ "LayerNorm pre"; "no norm" where there is no placement."""
    return norm_name(norm) if placement is None else f"{norm_name(norm)} {placement}"


def _order(known: Sequence[str], value: str) -> tuple[int, str]:
    return (known.index(value) if value in known else len(known), value)


def norm_order(norm: str) -> tuple[int, str]:
    return _order(tuple(NORM_NAMES), norm)


def placement_order(placement: str | None) -> tuple[int, str]:
    return (-1, "") if placement is None else _order(tuple(PLACEMENT_NAMES), placement)


def loss(value: float) -> str:
    """Three decimals: nats per byte."""
    if not math.isfinite(value):
        return DASH
    return f"{value:.3f}".replace("-", MINUS) if abs(value) < 1000 else significant(value)


def signed(value: float) -> str:
    """A difference of losses with its sign, three decimals."""
    if not math.isfinite(value):
        return DASH
    if abs(value) >= 1000:
        return ("+" if value > 0 else "") + significant(value)
    text = f"{abs(value):.3f}"
    return text if float(text) == 0 else (MINUS if value < 0 else "+") + text


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, trailing zeros kept; 2.44×10⁻⁴ below 0.001 and from 100,000."""
    if not math.isfinite(value):
        return DASH
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", MINUS)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".removesuffix(".")
    return text.replace("-", MINUS)


def tick(value: float) -> str:
    """A number on an axis: no more digits than it has."""
    text = significant(value)
    text = re.sub(r"\.?0+(?=×|$)", "", text) if "." in text else text
    return text.replace("1×10", "10") if text.startswith("1×") else text


def factor(value: float) -> str:
    """A ratio: two significant digits below 10, whole numbers from there."""
    if math.isfinite(value) and 10 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    return significant(value, 2)


def milliseconds(seconds: float) -> str:
    return f"{significant(seconds * 1000)} ms" if math.isfinite(seconds) else DASH


def whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else DASH


def duration(seconds: float) -> str:
    """ "42 s", "3 min 5 s"."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{significant(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def size(count: float) -> str:
    """Bytes in the unit that suits: "812 bytes", "4.1 MB"."""
    if not math.isfinite(count):
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{significant(count / scale)} {unit}"
    return f"{count:.0f} bytes"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(items: Sequence[str], most: int = 8) -> str:
    """ "a, b and c"; the rest counted where there are more than `most`."""
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    if len(items) < 2:
        return "".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
