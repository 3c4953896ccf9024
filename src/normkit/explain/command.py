"""`normkit explain`: the command's flags.

Here: `explain_command`, which cli.py registers.
May import: typer, rich; its package's modules when it runs.
Read next: steps.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def explain_command(
    topic: Annotated[
        str, typer.Argument(metavar="TOPIC", help="batchnorm, layernorm, rmsnorm, running, placement or saturation.")
    ],
    lang: Annotated[str, typer.Option(help="en (English) or zh (Chinese).")] = "en",
    csv: Annotated[
        Path | None,
        typer.Option(
            help="A table of your own. batchnorm, layernorm, rmsnorm: samples by features; running, saturation: the "
            "first column; placement: two rows, x and f(x)."
        ),
    ] = None,
) -> None:
    """Work one example step by step, with the numbers that the library computes."""
    from normkit import explain
    from normkit.explain.show import show

    if lang not in explain.LANGUAGES:
        raise typer.BadParameter(f"expected one of {', '.join(explain.LANGUAGES)}, got {lang!r}", param_hint="--lang")
    if topic not in explain.TOPICS:
        raise typer.BadParameter(f"expected one of {', '.join(explain.TOPICS)}, got {topic!r}", param_hint="TOPIC")
    try:
        table = None if csv is None else explain.read_csv(csv)
        steps = explain.explain(topic, table)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="TOPIC" if csv is None else "--csv") from None
    show(topic, steps, lang, Console())
