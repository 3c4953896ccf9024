"""The report: what it says of fixed records, what it does with bad ones, and that a browser shows it.

Here: golden findings and summary.csv (`pytest --renew-golden` writes them anew; read the diff), the page's structure,
    edge cases, headless Chromium. The records in tests/golden are made up.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import normkit
from normkit.report import cells, charts, figures, findings, style, summary_rows, table, wording, write
from normkit.report.captions import CAPTIONS, MEASURED
from normkit.report.load import PROFILES, load
from normkit.report.view import view, with_range
from pages import Page, browse

PACKAGE = Path(normkit.__file__).parent / "report"
GOLDEN = Path(__file__).parent / "golden"


# ---------------------------------------------------------------------------------------------- records to try it on


def record(norm: str = "rms", placement: str | None = "post", depth: int = 2, seed: int = 0, **changes: Any) -> Any:
    """A small plausible record."""
    weight = 0.9 if placement == "post" else 1.0
    profile = {name: [weight] * 2 * depth for name in PROFILES} | {
        "grad_norm_by_layer": [0.1 * 2**i for i in range(depth)]
    }
    product = [weight**i for i in range(1, 2 * depth + 1)]
    profile |= {"identity_weight_by_sublayer": product, "identity_weight_with_gain_by_sublayer": product}
    made = {
        "key": f"{norm}-{placement}-{depth}-{seed}-{changes.get('lr', 0.003)}",
        "task": "text",
        "norm": norm,
        "placement": placement,
        "depth": depth,
        "seed": seed,
        "lr": 0.003,
        "status": "ok",
        "reason": None,
        "val_loss": 2.5 + 0.01 * seed,
        "val_loss_batch_statistics": None,
        "guess_loss": 3.3,
        "train_loss": [[1, 5.5], [10, 3.4], [20, 2.6]],
        "seconds": 1.0,
        "seconds_per_step": 0.01,
        "parameters": 1000,
        **{name: {"init": values, "end": values} for name, values in profile.items()},
        "versions": {"normkit": "0.1.0", "torch": "2.13.0"},
    }
    return made | changes


def nothing_measured(status: str, reason: str) -> dict[str, Any]:
    empty = {name: {"init": None, "end": None} for name in PROFILES}
    numbers = dict.fromkeys(("val_loss", "guess_loss", "seconds", "seconds_per_step", "parameters"))
    return {"status": status, "reason": reason, "train_loss": [], **numbers, **empty}


def folder_of(folder: Path, records: list[Any], **study: Any) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "study.json").write_text(json.dumps({"study": "placement", "settings": {"init": "xavier"}, **study}))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the one-seed golden records: its folder."""
    folder = tmp_path_factory.mktemp("report") / "study"
    shutil.copytree(GOLDEN / "one_seed", folder, ignore=shutil.ignore_patterns("findings.txt", "summary.csv"))
    assert write(folder) == folder / "report.html"
    return folder


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


# ---------------------------------------------------------------------------------------------- golden


def everything_said(folder: Path) -> str:
    of = view(load(folder))
    lines = [findings.opening(of), findings.scope(of), *findings.notes(of)]
    lines += [f"{finding.topic}: {finding.text}" for finding in findings.findings(of)]
    lines += [f"[{name}] {sentence}" for name, caption in CAPTIONS.items() for sentence in caption(of)]
    lines += [f"[{name}] {note}" for name, chart in charts.all_charts(of.shown, 0.7).items() for note in chart.notes]
    lines += [findings.init_paragraph(of), findings.batch_paragraph(of)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["one_seed", "five_seeds"])
@pytest.mark.parametrize("file", ["findings.txt", "summary.csv"])
def test_fixed_records_give_the_same_words_and_numbers(name: str, file: str, request: pytest.FixtureRequest) -> None:
    folder = GOLDEN / name
    found = everything_said(folder) if file == "findings.txt" else table.summary_csv(view(load(folder)).cells)
    if request.config.getoption("--renew-golden"):
        (folder / file).write_text(found)
    assert found == (folder / file).read_text()


def test_every_figure_has_two_sentences_and_how_it_was_measured() -> None:
    of = view(load(GOLDEN / "one_seed"))
    assert {name: len(caption(of)) for name, caption in CAPTIONS.items()} == dict.fromkeys(CAPTIONS, 2)
    assert list(MEASURED) == list(CAPTIONS) == list(charts.all_charts(of.shown, 0.7))


def test_one_seed_is_called_an_observation_and_never_a_median() -> None:
    said = everything_said(GOLDEN / "one_seed")
    assert "One seed per setting: every number here is one observation in this run, not a verdict" in said
    assert not re.search(r"\b(always|never better|proves|shows that|median|in general|significant)\b|\[[+−\d]", said)


def test_the_identity_branch_stands_beside_the_product_that_the_measured_variances_make(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(GOLDEN / "one_seed", folder)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for record in records:
        size = 2 * record["depth"]
        record["uncorrelated_identity_weight_by_sublayer"] = {"init": [0.125] * size, "end": [0.25] * size}
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    of = view(load(folder))
    assert "where 1/√(1 + v) with the measured v makes 0.125" in findings.init_paragraph(of)
    chart = charts.all_charts(of.shown, 0.7)["identity-weight"]
    assert {row[chart.columns.index("uncorrelated")] for row in chart.rows} == {0.125, 0.25}
    beside = [(panel.title, line) for panel in chart.panels for line in panel.series if line.variant == "uncorrelated"]
    assert beside
    assert all(title.endswith("at init") for title, _ in beside)
    assert {y for _, line in beside for _, y in line.points} == {0.125}
    assert [entry.label for entry in style.legend(chart) if entry.variant == "uncorrelated"] == [
        f"{label}, ∏ 1/√(1+v)" for label in dict.fromkeys(line.label for _, line in beside)
    ]


def test_few_seeds_give_ranges_and_five_give_intervals() -> None:
    assert with_range(cells.spread([2.5])) == "2.500"
    assert with_range(cells.spread([2.5, 2.7, math.nan])) == "2.600 (2.500 to 2.700)"
    assert with_range(cells.spread([1, 2, 3, 4, 9])) == "3.000 [1.000, 9.000]"
    assert cells.range_coverage(5) == 1 - 2 * 0.5**5


# ---------------------------------------------------------------------------------------------- numbers


def test_differences_are_paired_by_seed() -> None:
    post = [record(seed=seed, val_loss=loss) for seed, loss in ((0, 3.0), (1, 9.0), (2, 3.2))]
    pre = [record(placement="pre", seed=seed, val_loss=loss) for seed, loss in ((2, 2.0), (0, 2.5), (3, 1.0))]
    by_label = {cell.label: cell for cell in cells.group(view_records([*post, *pre]))}
    difference = cells.paired(by_label["RMSNorm post"], by_label["RMSNorm pre"])
    assert (difference.count, difference.low) == (2, 0.5)
    assert difference.high == pytest.approx(1.2)


def view_records(raw: list[Any]) -> Any:
    from normkit.report.load import parse_records

    return parse_records(raw)[0]


def test_a_seed_that_ended_just_above_guessing_takes_part_in_differences() -> None:
    """It is "diverged" by the records' rule; to leave it out would flatter its setting. One that blew up does not."""
    changes = ({"val_loss": 3.4}, {"val_loss": 80_000.0}, {"val_loss": None})
    post = [record(seed=seed, status="diverged", **change) for seed, change in enumerate(changes)]
    pre = [record(placement="pre", seed=seed, val_loss=2.5) for seed in range(3)]
    by_label = {cell.label: cell for cell in cells.group(view_records([*post, *pre]))}
    difference = cells.paired(by_label["RMSNorm post"], by_label["RMSNorm pre"])
    assert (difference.count, round(difference.median, 9)) == (1, 0.9)


def test_a_cell_that_blew_up_does_not_stretch_the_figures() -> None:
    blown = {"grad_norm_by_layer": {"init": [1e6, 1e3], "end": [1e12, 1e9]}, "val_loss": 80_000.0, "status": "diverged"}
    made = charts.all_charts(cells.group(view_records([record(), record("none", None, **blown)])), 0.7)
    assert {panel.limits[1] < 1 for panel in made["gradients"].panels} == {True}
    assert made["gradients"].notes == ("Not all inside the frame: no norm at 2 blocks, 1,000 to 1.00×10¹².",)
    assert made["validation-loss"].panels[0].limits[1] < 4
    assert [s.note for s in made["validation-loss"].panels[0].series] == ["80,000, off the scale", ""]


def test_a_diverged_seed_counts_in_the_status_and_not_in_the_loss() -> None:
    (cell,) = cells.group(view_records([record(), record(seed=1, status="diverged", val_loss=8.0, reason="NaN.")]))
    assert (cell.status, cell.val_loss.median, cell.val_loss.count, cell.reasons) == (
        "1 ok, 1 diverged",
        2.5,
        1,
        ("NaN.",),
    )


def test_the_best_cell_of_a_depth_ended_well() -> None:
    made = [record(), record(norm="layer", val_loss=2.0, status="diverged"), record(norm="batch", depth=4)]
    best = cells.best_by_depth(cells.group(view_records(made)))
    assert {depth: cell.norm for depth, cell in best.items()} == {2: "rms", 4: "batch"}


def test_smoothing_keeps_constants_and_ends_and_skips_nan() -> None:
    assert charts.smooth([2.0] * 100) == [2.0] * 100
    ramp = [float(i) for i in range(200)]
    assert charts.smooth(ramp) == pytest.approx(ramp)
    assert charts.smooth([1.0] * 99 + [math.nan])[:99] == [1.0] * 99
    assert charts.smooth([1.0, 5.0]) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("written_as", "text"),
    [
        (wording.significant(2**-12), "2.44×10⁻⁴"),
        (wording.significant(0.3), "0.300"),
        (wording.significant(1164.6), "1,165"),
        (wording.significant(-1.5e-7), "−1.50×10⁻⁷"),
        (wording.significant(3.0e6), "3.00×10⁶"),
        (wording.significant(0.0), "0.00"),
        (wording.significant(math.inf), "–"),
        (wording.tick(1e-4), "10⁻⁴"),
        (wording.tick(0.25), "0.25"),
        (wording.tick(100.0), "100"),
        (wording.tick(2e5), "2×10⁵"),
        (wording.signed(0.0004), "0.000"),
        (wording.signed(-0.25), "−0.250"),
        (wording.signed(math.nan), "–"),
        (wording.factor(0.244), "0.24"),
        (wording.factor(11651.0), "11,651"),
        (wording.loss(2.3678), "2.368"),
        (wording.loss(1.2e7), "1.20×10⁷"),
        (wording.milliseconds(0.0456), "45.6 ms"),
        (wording.duration(201.4), "3 min 21 s"),
        (wording.size(7412345), "7.41 MB"),
        (wording.listing(["a"]), "a"),
        (wording.listing(["a", "b", "c"]), "a, b and c"),
        (wording.listing(list("abcd"), most=3), "a, b and 2 more"),
    ],
)
def test_numbers_and_lists_are_written_for_readers(written_as: str, text: str) -> None:
    assert written_as == text


# ---------------------------------------------------------------------------------------------- table


def test_the_terminal_gets_the_verdict_table_as_strings() -> None:
    columns, rows = summary_rows([record(), record(placement="pre", val_loss=2.25), {"torn": True}])
    assert columns[:7] == ["norm", "placement", "depth", "status", "val loss", "minus guess", "minus best"]
    assert [row[:7] for row in rows] == [
        ["RMSNorm", "pre", "2", "ok", "2.250", "−1.050", "0.000"],
        ["RMSNorm", "post", "2", "ok", "2.500", "−0.800", "+0.250"],
    ]
    assert summary_rows([]) == (columns, [])


def test_learning_rates_are_told_apart_where_there_are_several() -> None:
    made = [record(lr=0.003), record(lr=0.01, val_loss=2.2)]
    columns, rows = summary_rows(made)
    assert [row[columns.index("lr")] for row in rows] == ["0.0100", "0.00300"]
    of = view(load_of(made))
    assert [cell.label for cell in of.shown] == ["RMSNorm post, lr 0.0100"]
    assert len(of.cells) == 2


def load_of(raw: list[Any]) -> Any:
    from normkit.report.load import Run, Study

    return Run(Study(), view_records(raw))


def test_summary_csv_has_a_row_per_cell_and_full_numbers(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "summary.csv").read_text())))
    raw = [json.loads(line) for line in (written / "records.jsonl").read_text().splitlines()]
    assert len(rows) == len(raw) == 14
    for row, source in zip(rows, raw, strict=True):  # both in the grid's order
        assert (row["norm"], row["placement"] or None, int(row["depth"])) == tuple(
            source[name] for name in ("norm", "placement", "depth")
        )
        assert (float(row["val_loss"]) if row["val_loss"] else None) == source["val_loss"]
        end = source["identity_weight_by_sublayer"]["end"]
        assert row["identity_weight_end"] == ("" if end is None else str(end[-1]))


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_from_outside(written: Path) -> None:
    page = page_of(written)
    for reference in page.values("href") + page.values("src"):
        assert reference.startswith(("#", "data:")), reference
    text = (written / "report.html").read_text()
    assert not re.search(r"https?://|@import|//[a-z]+\.[a-z]", text)
    assert set(re.findall(r"url\(([^)]*)\)", text)) == set(re.findall(r"url\((#[^)]*)\)", text))
    assert str(PACKAGE.resolve().parent) not in text
    assert str(written) not in text


def test_ids_are_unique_and_every_reference_has_its_target(written: Path) -> None:
    page = page_of(written)
    ids = Counter(page.values("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    text = (written / "report.html").read_text()
    wanted = {href[1:] for href in page.values("href") if href.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", text)
    )
    assert wanted - set(ids) == set()


def test_every_figure_stands_on_the_page_and_as_a_png(written: Path) -> None:
    page = page_of(written)
    names = list(CAPTIONS)
    assert [attributes["id"] for attributes in page.all("section") if attributes.get("id") in names] == names
    assert len(page.all("figure")) == len(names)
    panels = [attributes for attributes in page.all("div") if attributes.get("class") == "panel"]
    assert len(panels) == 2 + 2 + 4 * 4 + 2 + 2
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in panels)
    assert sorted(path.name for path in (written / "figures").iterdir()) == sorted(f"{name}.png" for name in names)
    assert all((written / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_table_headers_say_what_they_head(written: Path) -> None:
    scopes = Counter(attributes.get("scope") for attributes in page_of(written).all("th"))
    assert scopes[None] == 0
    assert scopes["col"] == 12
    assert scopes["row"] >= 14


def test_every_figure_offers_its_data(written: Path) -> None:
    links = {a["download"]: a["href"] or "" for a in page_of(written).all("a") if "download" in a}
    assert set(links) == {f"{name}.csv" for name in CAPTIONS}
    rows = list(csv.DictReader(io.StringIO(unquote(links["gradients.csv"].split(",", 1)[1]))))
    assert len(rows) == 7 * (2 + 12) * 2 - 12  # blocks of seven settings, twice; one cell diverged
    first = json.loads((written / "records.jsonl").read_text().splitlines()[0])
    assert [float(row["grad_norm"]) for row in rows[:2]] == first["grad_norm_by_layer"]["init"]


def test_records_cannot_put_markup_on_the_page(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"'><img src=http://x.invalid onerror=alert(1)> $x_{"
    made = [
        record(),
        record(norm=attack, placement=attack, status="failed", reason=attack),
        record(norm="a$b$", seed=2),
    ]
    folder = folder_of(
        tmp_path, made, command=attack, created=attack, backend=attack, data={"name": attack}, settings={attack: attack}
    )
    write(folder)
    page, text = page_of(folder), (folder / "report.html").read_text()
    assert "<script>alert" not in text
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert page.values("onerror") == []
    assert "alert(1)" in page.words  # shown, as text


def test_the_same_records_give_the_same_bytes_and_stale_figures_go(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [record()])
    (folder / "figures").mkdir()
    stale = folder / "figures" / "batchnorm-at-eval.png"
    stale.write_bytes(b"of an earlier report")
    first = write(folder).read_bytes()
    assert not stale.exists()
    assert write(folder).read_bytes() == first
    assert [path.name for path in folder.rglob(".*")] == []


def test_an_interrupted_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, [])
    before = write(folder).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder)
    assert (folder / "report.html").read_bytes() == before
    assert [path.name for path in folder.rglob(".*")] == []


# ---------------------------------------------------------------------------------------------- bad and odd input


def test_missing_files_are_named_with_the_command_that_writes_them(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught:
        write(absent)
    assert str(caught.value) == (
        f"report: expected a study folder, got '{absent}', which is no folder; "
        f"write one with: normkit study --out {absent}"
    )
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path)
    assert str(caught.value) == (
        f"report: expected records.jsonl in '{tmp_path}', found none; write it with: normkit study --out {tmp_path}"
    )


@pytest.mark.parametrize(("text", "got"), [("{", "unreadable text at line 1"), ("[1]", "list")])
def test_a_study_file_that_is_no_object_is_refused(tmp_path: Path, text: str, got: str) -> None:
    folder = folder_of(tmp_path, [])
    (folder / "study.json").write_text(text)
    with pytest.raises(ValueError, match="must hold one JSON object") as caught:
        write(folder)
    assert str(caught.value) == (
        f"report: study.json must hold one JSON object, got {got}; "
        "run the study again with the same command, finished cells are kept."
    )


def test_torn_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    good = record()
    lines = [json.dumps(good), json.dumps(good)[:50], "", "[]", "null", json.dumps({"norm": "rms"}), "\x00\x01"]
    of = view(load(folder_of(tmp_path, lines)))
    assert len(of.run.records) == 1
    assert findings.notes(of) == ("5 lines of records.jsonl were unreadable (a torn write, or edited) and left out.",)


def test_the_last_record_of_a_key_counts_and_other_grids_are_left_out(tmp_path: Path) -> None:
    made = [record(status="failed", reason="killed"), record(norm="layer"), record(val_loss=2.1)]
    keys = [record()["key"], "to come"]
    run = load(folder_of(tmp_path, made, keys=keys))
    assert [(r.norm, r.val_loss) for r in run.records] == [("rms", 2.1)]
    assert (run.other_records, run.cells_to_come) == (1, 1)
    assert findings.notes(view(run)) == (
        "1 cell of the grid has no record yet; the same command goes on from here.",
        "1 record of other settings in the same folder is left out.",
    )


ODD = {
    "no cell at all": [],
    "one cell": [record(depth=1)],
    "one norm, pre only": [record(placement="pre"), record(placement="pre", depth=3)],
    "all failed": [record(norm, **nothing_measured("failed", "The worker died.")) for norm in ("layer", "rms")],
    "all diverged": [
        record(norm, status="diverged", val_loss=99.0, reason="Loss is NaN.") for norm in ("layer", "rms")
    ],
    "nulls in every series": [
        record(
            train_loss=[[1, 5.0], [2, None]],
            **{name: {"init": [None, 0.5, None, 0.0], "end": [None] * 4} for name in PROFILES},
        ),
        record(norm="layer", **{name: {"init": [0.5] * 4, "end": None} for name in PROFILES}),
    ],
    "series that are missing": [{key: value for key, value in record().items() if key not in PROFILES}],
    "extreme numbers": [record(**{name: {"init": [1e-30, 1e30, 0, -1], "end": [0] * 4} for name in PROFILES})],
    "names of later issues": [record("group", "sandwich"), record("tanh", "keel"), record("none", None, val_loss=3.29)],
    "batch statistics": [record("batch", p, val_loss_batch_statistics=2.4) for p in ("pre", "post")],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_records_still_give_a_page_without_nan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "png", lambda chart, entries: b"")  # the same drawing as the SVG, and slow
    folder = folder_of(tmp_path, ODD[name])
    write(folder)
    page = page_of(folder)
    assert page.open == []
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    drawn = {attributes["aria-label"] for attributes in page.all("figure")}
    assert {"no cell at all": 0, "all failed": 0, "batch statistics": 8}.get(name, len(drawn)) == len(drawn)


def test_without_a_cell_the_page_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [], keys=["a", "b"])
    write(folder)
    words = page_of(folder).words
    assert "No cell of this study has finished yet." in words
    assert "2 cells of the grid have no record yet" in words


def test_diverged_cells_are_rows_with_their_reason(written: Path) -> None:
    words = page_of(written).words
    assert "diverged the training loss was NaN at step 31" in words
    assert "no norm at 12 blocks" in words


# ---------------------------------------------------------------------------------------------- the package


def test_the_report_imports_nothing_of_torch_or_of_the_rest_of_normkit() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "matplotlib", "jinja2"}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("normkit.report"), f"{path.name}: {name}"
                assert not name.startswith("matplotlib") or path.name == "figures.py", f"{path.name}: {name}"
                assert "pyplot" not in name


def test_the_terminal_summary_loads_no_matplotlib() -> None:
    code = "import sys, normkit.report; sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2')))"
    # torch itself may import jinja2 one day: then this test says so
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dark", [False, True])
def test_lines_stand_out_from_their_ground(dark: bool) -> None:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colors = style.theme(dark)
    ground = luminance(colors["--card"])
    for name in ("--ink", "--muted", "--reference", "--norm-none", "--norm-batch", "--norm-layer", "--norm-rms"):
        light, low = max(ground, luminance(colors[name])), min(ground, luminance(colors[name]))
        assert (light + 0.05) / (low + 0.05) > (4.5 if name in ("--ink", "--muted") else 3), name


# ---------------------------------------------------------------------------------------------- a browser

HOOK = """
<script>
window.addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#verdict tbody tr")];
  const losses = () => rows().map((row) => row.cells[4].textContent.trim());
  const headers = [...document.querySelectorAll("#verdict thead th")];
  const button = headers[4].querySelector("button");
  const found = {};
  button.click(); found.up = losses(); found.upMark = headers[4].getAttribute("aria-sort");
  button.click(); found.down = losses();
  headers[0].querySelector("button").click(); found.norms = rows().map((row) => row.cells[0].textContent.trim());
  found.marks = headers.map((header) => header.getAttribute("aria-sort"));
  found.panels = [...document.querySelectorAll(".panel svg")].map((svg) => svg.getBoundingClientRect().width);
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.width = document.documentElement.clientWidth;
  found.texts = document.querySelectorAll(".panel svg text").length;
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


@pytest.mark.parametrize("width", [1200, 500])
def test_the_report_opens_and_its_table_sorts_in_chromium(written: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text((written / "report.html").read_text().replace("</body>", HOOK + "</body>"))
    dom, log = browse(page, tmp_path / "profile", width)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    match = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert match, "the test's hook did not run"
    found = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    numbers = [float(loss.replace(",", "")) for loss in found["up"] if loss != "–"]
    assert len(numbers) == 13
    assert numbers == sorted(numbers)
    assert found["down"][:13] == found["up"][12::-1]
    assert found["up"][-1] == found["down"][-1] == "–"  # missing numbers stay last
    assert found["upMark"] == "ascending"
    assert found["norms"] == sorted(found["norms"], key=["BatchNorm", "LayerNorm", "no norm", "RMSNorm"].index)
    assert found["marks"] == ["ascending", *[None] * (len(found["marks"]) - 1)]
    assert len(found["panels"]) == 24
    assert min(found["panels"]) > 300
    assert found["texts"] > 24 * 5
    assert found["overflow"] <= 0


def test_chromium_tells_of_a_script_that_fails(tmp_path: Path) -> None:
    """The test above would see an error."""
    page = tmp_path / "page.html"
    page.write_text("<script>throw new Error('seen')</script>")
    _, log = browse(page, tmp_path / "profile", 500)
    assert any("CONSOLE" in line and "seen" in line for line in log.splitlines())
