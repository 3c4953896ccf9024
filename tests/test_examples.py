"""The examples run as scripts, say what they show, and their numbers are the textbook's."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_textbook_table_goes_down_columns_and_along_rows(capsys: pytest.CaptureFixture[str]) -> None:
    script = run("textbook_table.py")
    printed = capsys.readouterr().out
    found = script["main"]()
    assert printed == capsys.readouterr().out  # the script prints what main() prints, and the same each time
    assert found["column_mean"] == [75.0, 65.0, 55.0]
    assert found["row_mean"] == [80.0, 50.0]
    assert found["column_variance"] == pytest.approx([225.0] * 3)
    assert found["row_variance"] == pytest.approx([200.0 / 3.0] * 2)
    assert found["row_rms"] == pytest.approx([math.sqrt(19400 / 3), math.sqrt(7700 / 3)], rel=1e-6)
    assert found["batch_norm"] == pytest.approx([1.0] * 3 + [-1.0] * 3, rel=1e-6)
    root = math.sqrt(1.5)
    assert found["layer_norm"] == pytest.approx([root, 0.0, -root] * 2, rel=1e-6, abs=1e-6)
    for sentence in (
        "column 1: 90, 60\n    mean            = (90 + 60) / 2 = 75\n",
        "row 1: 90, 80, 70\n    mean            = (90 + 80 + 70) / 3 = 80\n",
        "BatchNorm of the turned table, turned back, is LayerNorm: True",
        "n / (n - 1) times as large: 450, 450, 450",
    ):
        assert sentence in printed


def test_gamma_and_beta_recover_mean_and_variance_by_the_plain_rule(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("recover_mean_and_variance.py")["main"]()
    printed = capsys.readouterr().out
    assert found["mean"] == pytest.approx(5.0, abs=1e-6)
    assert found["variance"] == pytest.approx(10.0, abs=1e-6)
    assert found["gamma"] == pytest.approx(math.sqrt(10.0 + 1e-5), abs=1e-6)
    assert found["beta"] == pytest.approx(5.0, abs=1e-6)
    assert found["loss"] < 1e-12
    start = printed.splitlines()[1].split()
    assert [float(value) for value in start[:5]] == [0, 1, 0, 0, 1]  # step, gamma, beta, mean (0 or -0), variance
    assert " 100    3.1623    5.0000    5.0000   10.0000" in printed
