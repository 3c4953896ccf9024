"""The studies beside `placement`: every cell measures what it says, sentences hold the records' numbers, runs resume.

Read next: studies/protocol.py.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from typer.testing import CliRunner

from normkit import theory
from normkit.cli import app
from normkit.report import lab
from normkit.report.parts import draw as draw_chart
from normkit.report.placement import placement_section
from normkit.studies import (
    STUDIES,
    batch_size,
    claims,
    cost,
    digits,
    padding,
    running,
    saturation,
    trained_claims,
    warmup,
)
from normkit.studies.protocol import Settings, Study, median
from normkit.studies.run import key, measure, report_studies, run_study
from normkit.study.processes import Processes
from normkit.study.records import RecordStore
from pages import browse

# a cell of each that takes a second
SMALL: dict[str, Settings] = {
    "warmup": {"steps": 30, "width": 16, "batch": 2, "seq": 16, "depth": 1, "warmup": 0},
    "batch-size": {"epochs": 1, "batch": 64},
    "running": {"steps": 30, "batch": 32},
    "saturation": {"steps": 30},
    "padding": {"steps": 5},
    "claims": {},
    "cost": {"rounds": 2, "depth": 1, "width": 32, "batch": 2, "seq": 8},
}
every_study = pytest.mark.parametrize("name", STUDIES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers run: two processes of two threads each wait for each other on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_models_of_other_tests() -> Iterator[None]:
    """Deep models are kept by placement and seed; tests change the settings behind those, and the models."""
    yield
    trained_claims._trained_deep.cache_clear()


def small_cell(name: str, index: int = 0) -> Settings:
    return {**STUDIES[name].cells(False)[index], **SMALL[name]}


@every_study
def test_cells_are_told_apart_and_the_thorough_form_has_more_work(name: str) -> None:
    cells, thorough = (STUDIES[name].cells(flag) for flag in (False, True))
    assert len({key(name, cell) for cell in cells}) == len(cells) > 1
    assert len(thorough) > len(cells) or thorough[0] != cells[0]
    json.dumps(cells)


@every_study
def test_a_cell_gives_the_same_numbers_again_and_all_that_the_table_shows(name: str) -> None:
    cell = small_cell(name)
    first, second = (STUDIES[name].run(cell) for _ in range(2))
    json.dumps(first, allow_nan=False)
    if name != "cost":  # times are never the same
        assert first == second
    (row, *_) = STUDIES[name].table_rows([{**cell, **first}])
    assert {field for field, _, _ in STUDIES[name].columns if field != "over_copy"} <= row.keys()


# -------------------------------------------------------------------------------------------------- what is measured


def test_saturation_at_init_is_what_theory_predicts() -> None:
    cell = {**small_cell("saturation"), "activation": "sigmoid", "std": 1.0, "batchnorm": False}
    found = saturation._run(cell)
    spread = theory.preactivation_std(1.0, 64, float(digits.digits()[0].double().square().mean()))
    assert found["predicted"] == theory.saturation_probability("sigmoid", spread, saturation.SHARE)
    assert found["first_saturated"] == pytest.approx(found["predicted"], abs=0.05)
    assert len(found["saturated"]) == len(found["gradients"]) == saturation.LAYERS
    with_norm = saturation._run({**cell, "batchnorm": True})
    assert with_norm["first_saturated"] < 0.01


def test_running_statistics_meet_the_exact_ones_sooner_with_a_short_memory() -> None:
    short, long = (running._run({**small_cell("running"), "decay": decay, "steps": 60}) for decay in (0.9, 0.999))
    assert short["end_distance"] < long["end_distance"]
    assert [point["step"] for point in short["curve"]] == running._looked_at(60)
    assert [point["exact_error"] for point in short["curve"]] == [point["exact_error"] for point in long["curve"]]


def test_with_the_mask_more_padding_changes_nothing() -> None:
    masked, plain = (padding._run({**small_cell("padding"), "masked": masked}) for masked in (True, False))
    assert masked["more_padding"] == pytest.approx(0.0, abs=1e-5)
    assert abs(plain["more_padding"]) > 1e-3
    assert 0.3 < masked["padding"] == plain["padding"] < 0.9


def test_a_rate_works_where_it_beats_guessing_by_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses made up by rate: one that learns up to 2^-4.5, one that never gets far below guessing."""
    cell = small_cell("warmup")
    guessing = warmup.guessing(cell)
    monkeypatch.setattr(warmup, "_end_loss", lambda cell, lr: guessing - (0.5 if lr <= 2.0**-4.5 else -0.1))
    learns = warmup._run(cell)
    assert learns["largest_lr"] == 2.0**-4.5
    assert learns["best_loss"] == guessing - 0.5
    monkeypatch.setattr(warmup, "_end_loss", lambda cell, lr: guessing - 0.19)
    hardly = warmup._run(cell)
    assert hardly["largest_lr"] is None
    assert hardly["best_loss"] == guessing - 0.19
    monkeypatch.setattr(warmup, "_end_loss", lambda cell, lr: math.inf)
    assert (warmup._run(cell)["largest_lr"], warmup._run(cell)["best_loss"]) == (None, None)
    json.dumps(warmup._run(cell), allow_nan=False)
    far = lambda cell, lr: guessing - 0.5 + 0.4 * abs(math.log2(lr) + 8.75)  # noqa: E731
    monkeypatch.setattr(warmup, "_end_loss", far)  # works from 2^-9.5 to 2^-8, between the rates tried first
    assert warmup._run(cell)["largest_lr"] == 2.0**-8
    monkeypatch.setattr(warmup, "_end_loss", lambda cell, lr: guessing - 0.5 + 0.4 * abs(math.log2(lr) + 9.0))
    assert warmup._run(cell)["largest_lr"] == 2.0**-8.25


def test_what_a_forward_keeps_is_counted_once_and_without_parameters() -> None:
    found = cost._run(small_cell("cost"))
    assert found["saved_bytes"]["layer"] > found["saved_bytes"]["none"] > 0
    width = SMALL["cost"]["width"]
    assert found["parameters"]["layer"] - found["parameters"]["rms"] == 3 * width  # two sublayers and the final norm


@pytest.mark.parametrize("name", claims._CLAIMS)
def test_every_claim_is_measured_to_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained_claims._text_cell
    monkeypatch.setattr(trained_claims, "_text_cell", lambda seed, **more: {**whole(seed, **more), "steps": 12})
    monkeypatch.setattr(trained_claims, "EPOCHS", 1)
    monkeypatch.setattr(trained_claims, "STEPS_A_RATE", 20)
    monkeypatch.setattr(trained_claims, "RATES", (0.01, 0.5))
    found = claims._run({"claim": name, "seed": 0})
    assert math.isfinite(found["value"])
    assert all(math.isfinite(value) for value in found["parts"].values())


def test_the_claims_table_has_every_claim_and_the_reason_of_each_that_is_not_decidable() -> None:
    table = claims._judged([{"claim": name, "seed": 0, "value": 0.0, "parts": {}} for name in claims._CLAIMS])
    assert {row["verdict"] for row in table} == {"holds", "does not hold here", "not decidable here"}
    undecided = [row for row in table if row["verdict"] == "not decidable here"]
    assert 0 < len(undecided) <= 3
    assert all(row["median"] is None and len(row["number"]) > 40 for row in undecided)
    assert len(table) == len(claims._CLAIMS) + len(undecided)


def test_the_angle_of_a_block_that_adds_nothing_is_zero_and_removing_it_costs_nothing() -> None:
    model, ids, targets = trained_claims._trained_deep("pre", 0)
    with torch.no_grad():
        for sublayer in list(model.stack.sublayers)[6:8]:
            for parameter in sublayer.sublayer.parameters():
                parameter.zero_()
    angles = trained_claims._angles(model, ids)
    assert angles[3] == pytest.approx(0.0, abs=1e-7)
    assert min(angles[:3] + angles[4:]) > 1e-3
    whole = trained_claims._loss_without(model, ids, targets, None)
    assert whole == pytest.approx(float(model.loss(ids, targets).detach()), rel=1e-6)
    assert trained_claims._loss_without(model, ids, targets, 3) == pytest.approx(whole, rel=1e-6)
    assert trained_claims._loss_without(model, ids, targets, 0) != pytest.approx(whole, rel=1e-3)


def test_claims_that_theory_derives_hold_and_wrong_ones_would_not() -> None:
    for name in (
        "pre-bounds",
        "post-variance",
        "post-gradient",
        "pre-gradient",
        "batchnorm-linear",
        "no-norm-exponential",
    ):
        values = [claims._run({"claim": name, "seed": seed})["value"] for seed in range(3)]
        assert claims._CLAIMS[name].holds(sorted(values)[1]), name
    assert not claims._CLAIMS["post-gradient"].holds(-0.5)
    assert not claims._CLAIMS["pre-gradient"].holds(0.0)
    assert not claims._CLAIMS["no-norm-exponential"].holds(1.0)


def test_every_norm_of_the_small_network_learns_digits() -> None:
    for norm in digits.NORMS:
        cell = {**small_cell("batch-size"), "norm": norm, "epochs": 4}
        assert batch_size._run(cell)["test_error"] < 0.5, norm


# -------------------------------------------------------------------------------------- sentences from fixed records


def fixed(name: str) -> list[dict[str, Any]]:
    """Made-up measurements of the default grid, in figures that are easy to find again."""
    made: dict[str, Any] = {
        "warmup": lambda cell: {
            "largest_lr": None if cell["placement"] == "post" else 0.25 if cell["warmup"] else 0.125,
            "best_loss": 2.5,
            "guess_loss": 3.0,
        },
        "batch-size": lambda cell: {
            "train_error": 0.01,
            "test_error": 0.30 if (cell["norm"], cell["batch"]) == ("batch", 2) else 0.10,
            "test_error_own_statistics": 0.20,
        },
        "running": lambda cell: {
            "curve": [
                {"step": step, "distance": 1 / step, "error": 0.9 / step, "exact_error": 0.05} for step in (1, 10, 100)
            ],
            "trusted_from": None if cell["decay"] == 0.999 else 40,
            "end_distance": 0.01,
            "end_error": 0.06,
            "end_exact_error": 0.05,
        },
        "saturation": lambda cell: {
            "saturated": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
            "gradients": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            "first_saturated": 0.0 if cell["batchnorm"] else 0.6,
            "last_saturated": 0.1,
            "predicted": 0.0 if cell["batchnorm"] else 0.59,
            "gradient_ratio": 0.5,
            "losses": [2.3, 1.5, 1.0],
            "end_loss": 1.0,
            "test_error": 0.1 if cell["batchnorm"] else 0.9,
        },
        "padding": lambda cell: {
            "padding": 0.75,
            "eval_loss": 2.0 if cell["masked"] else 2.5,
            "train_mode_loss": 2.0,
            "more_padding": 0.0 if cell["masked"] else 0.125,
        },
        "claims": lambda cell: {
            "value": {"post-variance": 1.5, "pre-profile": 3.0 + cell["seed"]}.get(cell["claim"], 0.0),
            "parts": {"2": 1.0, "16": 2.0},
        },
        "cost": lambda cell: (
            {
                "step_ms": {"none": 10.0, "layer": 20.0, "rms": 15.0, "batch": 30.0, "group": 25.0},
                "saved_bytes": dict.fromkeys(("none", "layer", "rms", "batch", "group"), 4_000_000),
                "parameters": dict.fromkeys(("none", "layer", "rms", "batch", "group"), 1000),
            }
            if cell["what"] == "step"
            else {
                "alone_ms": {
                    "layer forward": 1.0,
                    "layer both": 2.0,
                    "rms forward": 0.5,
                    "rms both": 1.5,
                    "copy": 0.25,
                }
            }
        ),
    }
    return [{**cell, **made[name](cell)} for cell in STUDIES[name].cells(False)]


SAID = {
    "claims": [
        "7 of 22 published claims hold here, by the median over 5 seeds.",
        "Not decidable here: Largest stable learning rates differ by a factor of 30 between placements at 64 layers",
        "Does not hold here: Pre-LN gradients are flat over depth at initialisation (Xiong et al. 2020, arXiv "
        "2002.04745, figure 3): first block's gradient over the last's, 12 blocks is 5 [3, 7], expected 0.5 to 2.",
    ],
    "warmup": [
        "At 6 blocks the largest learning rate that works is: pre 0.12 (best loss 2.50) without and 0.25 (best loss "
        "2.50) with 25 steps of warm-up; post none (best loss 2.50) without",
    ],
    "batch-size": [
        "From batch 128 to batch 2 the test error changes: BatchNorm's by +20.0 points, GroupNorm's by +0.0 points",
        "At batch 2 BatchNorm has 30.0 % test error with its running statistics and 20.0 % with those of test batches",
    ],
    "running": [
        "With decay 0.9 evaluation can be trusted from step 40 on; the start value weighs less than 1 %",
        "With decay 0.999 evaluation can be trusted from later than step 1200 on;",
    ],
    "saturation": [
        "sigmoid, weights of standard deviation 3: 60.0 % of the first layer's units are saturated without and 0.0 %",
        "tanh: of 6 initial standard deviations 0 end below 50 % test error without and 6 with BatchNorm.",
    ],
    "padding": ["Padded to 192 (75 % padding), evaluation ends at 2.500 nats per byte without a mask and 2.000 with"],
    "cost": [
        "A training step of 4 blocks takes 20.0 ms with LayerNorm, 15.0 with RMSNorm (-25.0 %) and 10.0 without a",
        "Alone, forward and backward, RMSNorm takes 0.75 to 0.75 of LayerNorm's time over 5 sizes;",
    ],
}


@every_study
def test_findings_hold_the_numbers_of_the_records(name: str) -> None:
    found = STUDIES[name].findings(fixed(name))
    for said in SAID[name]:
        assert any(sentence.startswith(said) for sentence in found), found


def everything_said(name: str, records: list[dict[str, Any]]) -> str:
    study = STUDIES[name]
    lines = [study.question, study.data, *study.findings(records)]
    for figure in study.figures(records):
        lines += [f"[{figure.chart.name}] {sentence}" for sentence in (*figure.sentences, figure.measured)]
        lines += [
            f"[{figure.chart.name}] {panel.title}: {low:.6g} to {high:.6g}"
            for panel in figure.chart.panels
            for low, high in (panel.limits,)
        ]
        lines += [",".join(map(str, row)) for row in (figure.chart.columns, *figure.chart.rows[:3])]
    table = lab.measured_table(name, study.table_about, study.columns, study.table_rows(records))
    lines += [table.about, " | ".join(column.title for column in table.columns)]
    lines += [" | ".join(entry.text for entry in row) for row in table.rows]
    return "\n".join(lines) + "\n"


@every_study
def test_fixed_records_give_the_same_words_figures_and_tables(name: str, request: pytest.FixtureRequest) -> None:
    golden = Path(__file__).parent / "golden" / "studies" / f"{name}.txt"
    found = everything_said(name, fixed(name))
    if request.config.getoption("--renew-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


@every_study
def test_a_grid_of_which_cells_failed_says_what_is_there_and_never_nan(name: str) -> None:
    records, draw = fixed(name), random.Random(0)
    parts = [[record] for record in records] + [records[:i] + records[i + 1 :] for i in range(len(records))]
    parts += [sorted(draw.sample(records, k=draw.randrange(2, len(records))), key=records.index) for _ in range(40)]
    for index, part in enumerate(parts):
        said = everything_said(name, part)
        found = re.search(r"(?i)\b(nan|inf)\b", said.replace("nan to nan", ""))  # the limits of an empty panel
        assert found is None, said
        for figure in STUDIES[name].figures(part) if index % 20 == 0 else ():  # drawing takes its time
            if not figure.chart.empty:
                draw_chart(figure.chart, figure.sentences, figure.measured)


def test_a_placement_that_was_not_measured_is_not_called_one_that_no_rate_suits() -> None:
    records = [record for record in fixed("warmup") if record["placement"] != "deepnorm" or record["depth"] != 6]
    (said,) = warmup._findings(records)
    assert "deepnorm not measured without and not measured with 25 steps" in said
    assert "post none (best loss 2.50) without" in said
    diverged = [{**record, "largest_lr": None, "best_loss": None} for record in records]
    assert "post none (every one diverges) without" in warmup._findings(diverged)[0]


def test_a_median_over_seeds_counts_those_without_a_number_as_told() -> None:
    records = [{"rate": 0.5}, {"rate": None}, {"rate": None}]
    assert median(records, "rate") == 0.5
    assert median(records, "rate", missing=0.0) == 0.0
    assert median(records, "rate", missing=math.inf) == math.inf
    assert math.isnan(median([], "rate", missing=0.0))


def test_seeds_that_say_otherwise_are_counted_and_named() -> None:
    values = {0: 0.1, 1: 0.3, 2: 0.4, 3: 0.1, 4: 0.5}  # the limit is 0.2
    records = [
        {**record, "value": values[record["seed"]]} if record["claim"] == "deepnorm" else record
        for record in fixed("claims")
    ]
    (row,) = [row for row in claims._judged(records) if row["claim"].startswith("Deep Post-LN")]
    assert (row["verdict"], row["agree"]) == ("holds", "3 of 5")
    said = claims._findings(records)
    named = [sentence for sentence in said if sentence.startswith("Some seeds say otherwise: Deep Post-LN trains")]
    assert len(named) == 1
    assert named[0].endswith("where plain Post-LN does not (holds; 3 of 5 seeds agree).")


def test_a_claim_whose_cells_all_failed_is_a_row_and_a_sentence() -> None:
    records = [record for record in fixed("claims") if record["claim"] != "rms-time"]
    (row,) = [row for row in claims._judged(records) if row["verdict"] == "not measured"]
    assert row["claim"].startswith("RMSNorm saves 7 %")
    assert row["median"] is None
    said = claims._findings(records)
    assert said[0].startswith("7 of 21 published claims hold here")
    assert "Not measured, its cells failed: RMSNorm saves 7 % to 64 % of LayerNorm's time." in said


@every_study
def test_figures_have_points_a_measure_and_their_data(name: str) -> None:
    for figure in STUDIES[name].figures(fixed(name)):
        assert figure.measured
        assert figure.chart.rows
        assert len(figure.chart.columns) == len(figure.chart.rows[0])
        for panel in figure.chart.panels:
            assert any(series.points for series in panel.series)
            assert panel.x_label
            assert panel.y_label


# ----------------------------------------------------------------------------------------------- running and resuming


def small_study(count: int = 2) -> Study:
    cells = [{**small_cell("saturation"), "std": std} for std in (0.1, 0.3, 1.0)[:count]]
    return replace(STUDIES["saturation"], cells=lambda thorough: cells)


def test_a_study_resumes_and_runs_a_failed_cell_again(tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"thorough": False, "jobs": 2, "fresh": False, "say": said.append}
    bad = {**small_cell("saturation"), "activation": "relu"}
    study = small_study()
    broken = replace(study, cells=lambda thorough: [*study.cells(False), bad])
    with Processes() as here:
        records = run_study(broken, tmp_path / "out", here, **options)
    assert [record["status"] for record in records] == ["ok", "ok", "failed"]
    assert records[2]["reason"].startswith("ValueError: saturation_threshold: activation must be")
    before = (tmp_path / "out" / "records.jsonl").read_text()
    said.clear()
    with Processes() as here:
        again = run_study(broken, tmp_path / "out", here, **options)
    assert said[0] == "saturation: 3 cells, 2 of them already done"
    assert len(said) == 2
    assert again[:2] == records[:2]
    assert [json.loads(line)["key"] for line in before.splitlines()] == [
        json.loads(line)["key"] for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    ]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "lab"
    command = [sys.executable, "-m", "normkit.cli", "study", "saturation", "--out", str(out), "--jobs", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a suite that a shell runs in the background was told to ignore interrupts, and its children with it
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    running = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=hears)
    records = out / "saturation" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not records.exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (130, ""), stdout
    assert "Stopped; what is done is kept in" in stdout
    assert "normkit study saturation --out" in stdout.replace("\n", " ")
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    assert 1 <= len(kept) < 24
    assert {record["status"] for record in kept} == {"ok"}


def test_a_worker_measures_on_one_thread_and_says_how_long_it_took() -> None:
    torch.set_num_threads(2)
    record = measure("padding", "some key", small_cell("padding"))
    assert torch.get_num_threads() == 2
    assert record["status"] == "ok"
    assert record["seconds"] > 0.0
    assert record["settings"] == small_cell("padding")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all studies on fixed records, one cell failed."""
    folder = tmp_path_factory.mktemp("lab")
    versions = {"normkit": "0", "torch": "0"}
    records = {
        name: [
            {
                "status": "ok",
                "reason": None,
                "settings": cell,
                "measured": {k: v for k, v in made.items() if k not in cell},
                "seconds": 1.5,
                "versions": versions,
            }
            for cell, made in zip(STUDIES[name].cells(False), fixed(name), strict=True)
        ]
        for name in STUDIES
    }
    records["padding"][0] |= {"status": "failed", "reason": "MemoryError: <all> gone", "measured": {}}
    command = "normkit study {}".format
    first = placement_section(Path(__file__).parent / "golden" / "one_seed", command("placement"))
    return report_studies(records, folder, "all", command, (first,))


def test_the_report_has_every_finding_figure_and_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, study in STUDIES.items():
        records = fixed(name)[1 if name == "padding" else 0 :]
        for sentence in study.findings(records):
            assert escape(sentence) in text, sentence
        assert f'id="{name}"' in text
        assert text.count("data:text/csv") >= len(STUDIES)
    placement = placement_section(Path(__file__).parent / "golden" / "one_seed", "normkit study placement")
    assert len(placement.findings) > 5
    for sentence in placement.findings:
        assert escape(sentence) in text, sentence
    assert text.index('id="placement"') < text.index('id="warmup"')
    assert text.count('<table id="verdict"') == 1
    assert all(f'id="figure-{drawn.chart.name}"' in text for drawn in placement.figures)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    figures = {path.name for path in (page.parent / "figures").iterdir()}
    assert {f"{drawn.chart.name}.png" for drawn in placement.figures} < figures
    assert {"warmup-rates.png", "claims-depth.png", "saturation-learning.png"} < figures
    assert "1 of 6 cells failed; the first: MemoryError: &lt;all&gt; gone" in text
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://www\.w3\.org/[^"\' ]*', "", text)
    assert "<pre><code>normkit study all</code></pre>" in text
    for name in ("placement", *STUDIES):
        assert f"<code>normkit study {name}</code></p>" in text


@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_opens_and_its_tables_sort_in_chromium(page: Path, tmp_path: Path, width: int) -> None:
    script = (
        "<script>addEventListener('load', () => {"
        "const heads = document.querySelectorAll('#table-batch-size th[scope=col]');"
        "const button = heads[4].querySelector('button') || heads[4]; button.click();"
        "document.title = [document.querySelectorAll('svg').length, document.documentElement.scrollWidth <= innerWidth,"
        "document.querySelector('#table-batch-size tbody tr td:nth-child(5)').textContent].join('|'); });</script>"
    )
    changed = tmp_path / "page.html"
    changed.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    dom, log = browse(changed, tmp_path / "profile", width)
    assert "CONSOLE" not in log
    title = re.search(r"<title>([^<]*)</title>", dom)
    assert title is not None
    figures, fits, first = title[1].split("|")
    assert int(figures) >= 10
    assert fits == "true"
    assert first in ("0.100", "0.300")


def test_a_table_entry_is_what_it_is() -> None:
    assert lab._entry(True).text == "yes"
    assert lab._entry(12).sort == 12
    assert lab._entry(math.nan).sort is None
    assert lab._entry(None).sort is None
    assert lab._entry("pre").text == "pre"


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["dropout"],
            "expected placement, warmup, batch-size, running, saturation, padding, cost, claims or all, got 'dropout'",
        ),
        (["cost", "--norms", "rms"], "expected no --norms with cost, it is placement's; cost has a grid of its own"),
    ],
)
def test_a_wrong_study_is_refused_in_a_sentence(arguments: list[str], said: str) -> None:
    ran = CliRunner().invoke(app, ["study", *arguments])
    assert ran.exit_code == 2
    assert "".join(said.split()) in "".join(ran.output.split())


def test_all_is_one_report_with_the_placements_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_study(3)
    for name in list(STUDIES):
        monkeypatch.setitem(STUDIES, name, replace(STUDIES[name], cells=lambda thorough: []))
    monkeypatch.setitem(STUDIES, "saturation", small)

    def from_golden(executor: object, cells: object, corpus: object, store: RecordStore, **options: object) -> None:
        lines = (Path(__file__).parent / "golden" / "one_seed" / "records.jsonl").read_text().splitlines()
        for cell, record in zip(cells, map(json.loads, lines), strict=False):  # type: ignore[call-overload]
            store.add(record | {"key": cell.key})

    monkeypatch.setattr("normkit.study.plan.run_cells", from_golden)
    ran = CliRunner().invoke(
        app, ["study", "all", "--out", str(tmp_path / "lab"), "--jobs", "1"], env={"COLUMNS": "300"}
    )
    assert ran.exit_code in (0, 1), ran.output  # one of the golden cells failed
    report = tmp_path / "lab" / "report.html"
    assert f"Report: {report}" in ran.output
    text = report.read_text(encoding="utf-8")
    assert text.index('id="placement"') < text.index('id="saturation"')
    assert "normkit study all" in text
    assert (tmp_path / "lab" / "placement" / "report.html").exists()
    assert (tmp_path / "lab" / "placement" / "figures").is_dir()


def test_the_command_runs_a_study_and_names_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "saturation", small_study(3))
    arguments = ["study", "saturation", "--out", str(tmp_path / "lab"), "--jobs", "1"]
    ran = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert ran.exit_code == 0, ran.output
    report = tmp_path / "lab" / "saturation" / "report.html"
    assert f"Report: {report}" in ran.output
    assert "normkit study saturation" in report.read_text(encoding="utf-8")
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert "saturation: 3 cells, 3 of them already done" in again.output
