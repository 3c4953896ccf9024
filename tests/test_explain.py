"""`normkit explain`: numbers are those of the formulas, sentences complete in both languages, the CSV reader strict.

Read next: explain/steps.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from normkit import explain, theory
from normkit.cli import app
from normkit.explain import texts
from normkit.explain.tables import SCORES, temperatures

every_topic = pytest.mark.parametrize("topic", explain.TOPICS)
every_language = pytest.mark.parametrize("language", explain.LANGUAGES)


def steps(topic: str, table: explain.Table | None = None) -> dict[str, explain.Step]:
    return {step.key: step for step in explain.explain(topic, table)}


def values(step: explain.Step) -> torch.Tensor:
    assert step.table is not None
    return step.table.values


# ------------------------------------------------------------------------------------------------------- numbers


def test_two_students_become_plus_and_minus_one_in_every_subject() -> None:
    found = steps("batchnorm")
    torch.testing.assert_close(values(found["statistics"])[0], torch.tensor([75.0, 65.0, 55.0], dtype=torch.float64))
    assert values(found["normalize"]).sign().equal(torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64))
    assert values(found["normalize"]).abs().max() == pytest.approx(1.0, abs=1e-7)
    assert values(found["running"])[1, 0] == pytest.approx(0.9 + 0.1 * 450.0)


def test_each_student_alone_becomes_the_same_three_numbers() -> None:
    expected = [math.sqrt(1.5), 0.0, -math.sqrt(1.5)]
    for row in values(steps("layernorm")["normalize"]).tolist():
        assert row == pytest.approx(expected, abs=1e-6)
    assert steps("layernorm")["alone"].numbers["difference"] == 0.0


def test_rms_norm_keeps_signs_and_is_layer_norm_of_centered_rows() -> None:
    found = steps("rmsnorm")
    assert values(found["normalize"])[0, 0] == pytest.approx(90 / math.sqrt((8100 + 6400 + 4900) / 3), abs=1e-6)
    assert (found["sign"].numbers["negative"], found["sign"].numbers["negative_layer"]) == (0, 2)
    assert float(found["same"].numbers["difference"]) < 1e-12  # type: ignore[arg-type]


def test_the_thermometers_are_exponential_averages_of_the_days() -> None:
    series = temperatures()
    found = values(steps("running")["track"])
    for column, decay in enumerate((0.9, 0.99, 0.999), 1):
        weights = (1 - decay) * decay ** torch.arange(364, -1, -1, dtype=torch.float64)
        assert found[-1, column] == pytest.approx(float((weights * series).sum()), rel=1e-12)
    assert found[-1, 4] == pytest.approx(float(series.mean()), rel=1e-12)
    assert values(steps("running")["wait"]).tolist() == [[44.0, 459.0, 4603.0]]
    assert values(steps("running")["noise"])[0].tolist() == pytest.approx(
        [math.sqrt((1 - decay) / (1 + decay)) for decay in (0.9, 0.99, 0.999)]
    )


def test_one_postnorm_step_keeps_one_over_the_root_of_two() -> None:
    numbers = steps("placement")["kept"].numbers
    assert numbers["kept"] == pytest.approx(1 / math.sqrt(2), abs=1e-5)
    assert numbers["expected"] == 1 / math.sqrt(2)
    own = explain.Table(("x", "f(x)"), ("1", "2", "3", "4"), torch.tensor([[1.0, -1, 1, -1], [2, 2, -2, -2]]).double())
    assert steps("placement", own)["kept"].numbers["kept"] == pytest.approx(theory.post_skip_weight(4.0), abs=1e-5)


def test_batch_norm_brings_saturated_units_back() -> None:
    found = steps("saturation")
    assert (found["sigmoid"].numbers["saturated"], found["batchnorm"].numbers["saturated"]) == (6, 0)
    z, out, derivative = values(found["sigmoid"]).T
    torch.testing.assert_close(out, 1 / (1 + torch.exp(-z)))
    torch.testing.assert_close(derivative, 4 * out * (1 - out))


# ------------------------------------------------------------------------------------------------------ sentences


@every_topic
def test_both_languages_have_the_same_sentences_with_the_same_numbers(topic: str) -> None:
    english, chinese = texts._TEXTS["en"][topic], texts._TEXTS["zh"][topic]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert set(re.findall(r"{(\w+)", text)) == set(re.findall(r"{(\w+)", chinese[key])), key


@every_topic
@every_language
def test_every_step_has_its_sentence_and_no_place_stays_empty(topic: str, language: str) -> None:
    for step in explain.explain(topic):
        said = explain.sentence(topic, step, language)
        assert said
        assert "{" not in said
        if language == "zh":
            assert re.search("[\u4e00-\u9fff]", said)


@every_topic
@every_language
def test_the_command_prints_every_step(topic: str, language: str) -> None:
    ran = CliRunner().invoke(app, ["explain", topic, "--lang", language], env={"COLUMNS": "200"})
    assert ran.exit_code == 0
    assert texts.title(topic, language) in ran.output
    for number, step in enumerate(explain.explain(topic), 1):
        said = "".join(explain.sentence(topic, step, language).split())
        assert f"{number}.{said}" in "".join(ran.output.split())
    assert "…" not in ran.output


def test_names_of_the_librarys_tables_are_translated() -> None:
    ran = CliRunner().invoke(app, ["explain", "batchnorm", "--lang", "zh"])
    assert "学生甲" in ran.output
    assert "maths" not in ran.output


# ------------------------------------------------------------------------------------------------------------- csv


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [
        ("1,2\n3,4\n", ("#1", "#2"), ("#1", "#2")),
        ("a,b\n1,2\n3,4\n", ("#1", "#2"), ("a", "b")),
        (",a,b\nx,1,2\ny,3,4\n", ("x", "y"), ("a", "b")),
        ("name,a,b\nx,1,2\n\ny,3,4\n", ("x", "y"), ("a", "b")),
        ("x,1,2\ny,3,4\n", ("x", "y"), ("#1", "#2")),
        ("\ufeffa,b\n 1 ,2\n3,4\n", ("#1", "#2"), ("a", "b")),
    ],
)
def test_tables_are_read_with_and_without_names(
    text: str, rows: tuple[str, ...], columns: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    table = explain.read_csv(path)
    assert (table.rows, table.columns) == (rows, columns)
    assert table.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a table of numbers, got no line that is not empty"),
        ("a,b\n", "expected numbers below the line of names, got none"),
        ("1,2\n3\n", "expected 2 numbers in line 2, got 1"),
        ("1,2\n\n\n3\n", "expected 2 numbers in line 4, got 1"),
        ('1,2\n"3\n",4\n5\n', "expected 2 numbers in line 4, got 1"),
        ("a,b\n1,2\na,b\n", "expected finite numbers in line 3, got 'a, b'"),
        ("a,b\n1,2\n3,oops\n", "expected finite numbers in line 3, got '3, oops'"),
        ("1,2\n3,nan\n", "expected finite numbers in line 2, got '3, nan'"),
        ("x\ny\n", "expected 1 numbers in line 2, got 0"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    ran = CliRunner().invoke(app, ["explain", "batchnorm", "--csv", str(path)])
    assert ran.exit_code == 2
    assert f"{path}: {said}".replace(" ", "") in "".join(ran.output.split())


@every_topic
def test_a_table_of_ones_own_is_explained(topic: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("name,one,two,three\nfirst,1,5,2.5\nsecond,4,-2,0.5\n")
    ran = CliRunner().invoke(app, ["explain", topic, "--csv", str(path)])
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dropout"], "expected one of batchnorm, layernorm, rmsnorm, running, placement, saturation, got 'dropout'"),
        (["batchnorm", "--lang", "fr"], "expected one of en, zh, got 'fr'"),
        (["batchnorm", "--csv", "nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
    ],
)
def test_a_wrong_flag_is_refused_in_a_sentence(arguments: list[str], said: str) -> None:
    ran = CliRunner().invoke(app, ["explain", *arguments])
    assert ran.exit_code == 2
    assert "".join(said.split()) in "".join(ran.output.split())


def test_a_table_that_a_topic_cannot_use_is_refused() -> None:
    one = explain.Table(("a",), ("b", "c"), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^batchnorm: expected 2 or more rows to share a column's statistics, got 1$"):
        explain.explain("batchnorm", one)
    with pytest.raises(
        ValueError, match=r"^placement: expected two rows, x and f\(x\), of 2 or more numbers, got a table"
    ):
        explain.explain("placement", one)
    with pytest.raises(ValueError, match=r"^explain: topic must be one of batchnorm, .*, got 'pooling'$"):
        explain.explain("pooling")
    assert SCORES.values[0, 0] == 90.0
