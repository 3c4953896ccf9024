"""observe shows every record: as JSON, text, scalars for TensorBoard and a page that a browser opens.

Here: golden words (`pytest --renew-golden` writes them anew; read the diff), the page's structure, headless Chromium.
"""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.report import observation as report_observation
from normkit.report import wording
from normkit.study import Observation, observe
from observed import Block, Net
from pages import Page, browse

# ---------------------------------------------------------------------------------------------- all kinds of records


class Shown(nn.Module):
    """All kinds of records at once, with a name that HTML must escape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(4, post=True)
        self.conv = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 1, 1), nn.Sigmoid())
        self.add_module("<b>&amp", nn.Sequential(Block(1), Block(1)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return getattr(self, "<b>&amp")(self.conv(out[:, None]).mean(2))


@pytest.fixture(scope="module")
def shown() -> Observation:
    torch.manual_seed(5)
    return observe(Shown(), torch.randn(16, 4), lambda out: out.square().mean())


@pytest.fixture(scope="module")
def page(shown: Observation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("observe") / "report.html"
    assert shown.save(path) == path
    return path


# ---------------------------------------------------------------------------------------------- JSON, text, scalars


def test_the_records_are_frozen_and_json_takes_them(shown: Observation) -> None:
    with pytest.raises(FrozenInstanceError):
        shown.loss = 0.0  # type: ignore[misc]
    read = json.loads(json.dumps(shown.as_dict(), allow_nan=False))
    assert set(read) == {
        *("model", "training", "loss", "parameters", "trainable", "calls", "blocks", "activations", "norms"),
        *("gradients", "notes", "versions"),
    }
    assert read["blocks"][0]["identity"] == shown.blocks[0].identity
    assert read["calls"][1] | {"output_gradient": 0} == {
        "path": "net",
        "call": 1,
        "type": "Net",
        "shape": [16, 1],
        "dtype": "float32",
        "output_rms": shown.calls[1].output_rms,
        "output_gradient": 0,
    }


def test_the_text_is_a_short_table(shown: Observation) -> None:
    lines = str(shown).splitlines()
    assert lines[0].startswith("Shown in train mode, loss 0.")
    assert lines[2].split() == ["block", "gradient", "rms", "growth", "identity", "cosine"]
    assert lines[3].split()[0] == "net.blocks.0"
    assert f"{shown.blocks[0].identity:.4g}" in lines[3].split()
    assert max(map(len, lines)) < 120
    deep = str(observe(Net(40), torch.randn(3, 4), lambda out: out.mean())).splitlines()
    assert "... 28 more" in deep
    assert len(deep) < 50


def test_scalars_go_to_a_summary_writer_once_each_with_the_step(shown: Observation) -> None:
    class Recording:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            assert global_step is not None
            self.scalars.append((tag, scalar_value, global_step))

    writer = Recording()
    shown.write(writer, 7)
    found = {tag: value for tag, value, _ in writer.scalars}
    assert len(found) == len(writer.scalars)
    assert {step for _, _, step in writer.scalars} == {7}
    assert found["loss/(model)"] == shown.loss
    assert found["identity/net.blocks.1"] == shown.blocks[1].identity
    assert found["residual_rms/net.blocks.1"] == shown.blocks[1].output_rms
    assert found["saturated_share/conv.2"] == shown.activations[4].share
    assert found["norm_mean_distance/conv.1"] > 0
    assert {tag.split("/")[0] for tag in found} == {
        *("loss", "gradient_norm", "block_gradient_norm", "output_gradient_norm", "residual_rms", "residual_growth"),
        *("identity", "identity_cosine", "saturated_share", "dead_units"),
        *(f"norm_{name}" for name in ("input_rms", "input_mean", "output_rms", "output_mean", "gamma_mean")),
        *("norm_gamma_max", "norm_mean_distance", "norm_mean_distance_max"),
        *("norm_std_distance", "norm_std_distance_max"),
    }


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_the_summary_writer_of_torch_takes_the_scalars(shown: Observation, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        shown.write(writer, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("identity/net.blocks.0")
    assert (event.step, event.value) == (3, pytest.approx(shown.blocks[0].identity, rel=1e-6))


# ---------------------------------------------------------------------------------------------- the page


def test_fixed_numbers_give_the_same_words_and_tables(request: pytest.FixtureRequest) -> None:
    golden = Path(__file__).parent / "golden" / "observation"
    seen = json.loads((golden / "seen.json").read_text())  # a model like `Shown`, seen once and kept
    text = re.sub(r"<(style|script|svg).*?</\1>", "", report_observation.render(seen), flags=re.DOTALL)
    lines = (line.strip() for line in unescape(re.sub(r"<[^>]*>", " | ", text)).splitlines())
    found = "\n".join(line for line in lines if line.strip(" |")) + "\n"
    if request.config.getoption("--renew-golden"):
        (golden / "words.txt").write_text(found)
    assert found == (golden / "words.txt").read_text()


def test_the_page_stands_alone_and_is_well_formed(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    references = [a.get("href") or a.get("src") for _, a in parsed.tags if a.get("href") or a.get("src")]
    assert all(reference.startswith(("#", "data:")) for reference in references if reference)
    assert not re.search(r"https?://|@import|//[a-z]+\.[a-z]", text)
    assert str(Path(normkit.__file__).parent) not in text
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {r[1:] for r in references if r and r.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert wanted - set(ids) == set()
    assert "<b>&amp" not in re.sub(r"data:[^\"]*", "", text)
    assert "&lt;b&gt;&amp;amp.0" in text


def test_the_page_has_the_figures_and_the_tables_with_every_record(page: Path, shown: Observation) -> None:
    parsed = Page(page.read_text())
    sections = [a["id"] for a in parsed.all("section") if "id" in a]
    figures = ["gradients", "residual-growth", "identity", "saturation"]
    tables = ["blocks", "norms", "activations", "parameters", "calls"]
    assert sections == [*figures, *(f"table-{name}" for name in tables), "reproduce"]
    assert len([a for a in parsed.all("div") if a.get("class") == "panel"]) == 2 + 1 + 2 + 2
    assert len([a for a in parsed.all("table") if a.get("class") == "sortable"]) == 5
    counts = (shown.blocks, shown.norms, shown.activations, shown.gradients, shown.calls)
    assert len([a for a in parsed.all("th") if a.get("scope") == "row"]) == sum(map(len, counts))
    sorts = {a["data-sort"] for a in parsed.all("td") if "data-sort" in a}
    for block in shown.blocks:
        assert {str(block.identity), str(block.growth), str(block.gradient)} <= sorts
    words = " ".join(" ".join(parsed.text).split())
    assert f"Shown with {shown.parameters} parameters, in train mode" in words
    first, last = shown.blocks[0], shown.blocks[3]
    assert (
        f"net.blocks: the gradient of the first of 4 is {wording.significant(first.gradient / last.gradient)} times "
        f"that of the last ({wording.significant(first.gradient)} and {wording.significant(last.gradient)})."
    ) in words
    lowest = min(shown.blocks[:4], key=lambda block: block.identity)
    assert (
        f"net.blocks: the weight of the identity branch is between {wording.significant(lowest.identity)} "
        f"(at {lowest.position})"
    ) in words
    assert (
        f"ReLU: the share of elements where it is flat is {wording.significant(shown.activations[4].share)} " in words
    )
    assert "#verdict" not in page.read_text()


def test_the_page_is_for_phones_and_for_light_and_dark(page: Path) -> None:
    text = page.read_text()
    assert 'name="viewport" content="width=device-width' in text
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media (max-width: 40rem)" in text
    for svg in re.findall(r"<svg viewBox=.*?</svg>", text, re.DOTALL):
        assert not set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", svg)), "a colour that no theme changes"


def test_a_model_without_blocks_still_gets_a_page(tmp_path: Path) -> None:
    seen = observe(nn.Linear(2, 1), torch.ones(3, 2), lambda out: out.mean())
    parsed = Page(seen.save(tmp_path / "one.html").read_text())
    assert [a["id"] for a in parsed.all("section") if "id" in a] == [
        "gradients",
        "table-parameters",
        "table-calls",
        "reproduce",
    ]
    frozen = nn.Linear(2, 1).requires_grad_(False)
    seen = observe(frozen, torch.ones(3, 2), lambda out: out.mean())
    parsed = Page(seen.save(tmp_path / "two.html").read_text())
    assert [a["id"] for a in parsed.all("section") if "id" in a] == ["table-parameters", "table-calls", "reproduce"]


def test_chains_inside_the_blocks_of_a_chain_are_one_line_in_the_figures() -> None:
    class Layer(nn.Module):
        """Two residual sublayers, as in T5."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Block(4), Block(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer[1](self.layer[0](x))

    seen = observe(nn.Sequential(Layer(), Layer(), Layer()), torch.randn(5, 4), lambda out: out.mean())
    assert [(block.path, block.chain) for block in seen.blocks[:3]] == [
        ("0", ""),
        ("0.layer.0", "0.layer"),
        ("0.layer.1", "0.layer"),
    ]
    (panel,) = report_observation.residual(seen.as_dict()).panels
    assert {line.label: [x for x, _ in line.points] for line in panel.series} == {
        "(model)": [1, 2, 3],
        "*.layer": [1, 2, 3, 4, 5, 6],
    }


def test_a_page_goes_only_where_a_folder_is(shown: Observation, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "report.html", tmp_path):
        with pytest.raises(ValueError, match=r"^save: path must be a file in a folder that exists, got "):
            shown.save(path)


SORTS = """<script>
const table = document.querySelector("#table-blocks table");
const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith("identity"));
table.tHead.rows[0].cells[column].querySelector("button").click();
const found = {
  sorted: [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.sort)),
  buttons: document.querySelectorAll("thead button").length,
  panels: [...document.querySelectorAll(".panel svg")].map(svg => svg.getBoundingClientRect().width),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_opens_and_its_tables_sort_in_chromium(
    page: Path, shown: Observation, tmp_path: Path, width: int
) -> None:
    hooked = tmp_path / "page.html"
    hooked.write_text(page.read_text().replace("</body>", SORTS + "</body>"))
    dom, log = browse(hooked, tmp_path / "profile", width)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    match = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert match, "the test's script did not run"
    found = json.loads(match[1])
    assert found["sorted"] == sorted(block.identity for block in shown.blocks)
    assert found["buttons"] > 20
    assert min(found["panels"]) > 300
    assert found["overflow"] <= 0
