# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command: what it reads, what it writes, and what it says where it cannot."""

import functools
import json
import os

import numpy as np
import pytest
import report_sources as made
from page_reader import read_page

from torchao_masquant.__main__ import main
from torchao_masquant.report import page as page_module
from torchao_masquant.report.result_rows import rows_of_results

# What figures look like is another file's subject.
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def folder(tmp_path):
    """A folder with everything in it."""
    path = tmp_path / "run"
    path.mkdir()
    made.recipe(method="smoothquant").save(path / "recipe.safetensors")
    made.analysis().save(path / "analysis.json")
    # quantize_() leaves no trace of the method: the files' names tell it.
    for method in ("rtn", "smoothquant"):
        evaluation = made.evaluation("w4a8", None, accuracy=0.5)
        evaluation.save(path / f"evaluation-w4a8-{method}.json")
    made.evaluation("w8a8", "masquant").save(path / "evaluation.json")
    (path / "results.json").write_text(json.dumps(made.results()))
    return path


def _report(*arguments):
    return main(["report", *map(str, arguments)])


def test_a_folder_becomes_a_page(folder, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert _report(folder, "-o", output, "--title", "My model") == 0
    assert str(output) in capsys.readouterr().out
    page = read_page(output)
    assert page.one("h1").text == "My model"
    assert {s.attributes["id"] for s in page.all("section")} == {
        "evaluations",
        "results",
        "layers",
        "modalities",
        "compensation",
        "recipe",
    }
    names = page.one("section", id="evaluations").one("tbody").all("th")
    assert [n.text for n in names] == [
        "dense",
        "w8a8 MASQuant",
        "w4a8 round-to-nearest",
        "w4a8 SmoothQuant",
    ]
    assert "w4a8, SmoothQuant" in page.one("p", class_="subtitle").text
    values = page.one("dl", class_="numbers").all("dd", class_="value")
    assert values[1].text == "50.0 %"


def test_files_tell_what_they_are(folder, tmp_path, capsys):
    names = {
        "recipe.safetensors": "first.bin",
        "analysis.json": "second.json",
        "evaluation.json": "third.json",
        "results.json": "fourth.json",
    }
    paths = [tmp_path / name for name in names.values()]
    for name, path in zip(names, paths):
        path.write_bytes((folder / name).read_bytes())
    assert _report(*paths, "-o", tmp_path / "report.html", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == [] and "recipe" in told["sections"]
    assert _report(paths[0], folder, "-o", tmp_path / "report.html") == 1
    assert "a second recipe" in _sentence(capsys)


@pytest.mark.parametrize(
    "name, method",
    [
        ("evaluation-w4a8-smoothquant.json", "SmoothQuant"),
        ("evaluation_masquant-paper.json", "MASQuant, as published"),
        ("evaluation.json", "method not named"),
        # No methods.
        ("evaluation-run3.json", "method not named"),
        ("evaluation-w4a8-of-monday.json", "method not named"),
        ("evaluation-cartn.json", "method not named"),
    ],
)
def test_a_file_gives_its_name_to_no_method(tmp_path, name, method):
    made.evaluation(method=None).save(tmp_path / name)
    assert _report(tmp_path, "-o", tmp_path / "report.html") == 0
    section = read_page(tmp_path / "report.html").one("section", id="evaluations")
    rows = [row.text for row in section.one("tbody").all("th")]
    assert rows == ["dense", f"w4a8 {method}"]


def test_seeds_are_averaged_and_variants_kept_apart(tmp_path, capsys):
    data = made.quality_rows()
    (tmp_path / "quality.json").write_text(json.dumps(data))
    assert _report(tmp_path, "-o", tmp_path / "report.html") == 0
    page = read_page(tmp_path / "report.html")
    for section, variant in (("results", "plain"), ("results1", "outliers")):
        section = page.one("section", id=section)
        assert variant in section.one("h2").text
        assert "rank 5 %" in section.one("p", class_="aside").text
        rows = section.one("tbody").all("tr")
        assert [r.one("th").text for r in rows] == [
            "dense",
            "w4a8 round-to-nearest",
            "w4a8 MASQuant, rank 2 %",
            "w4a8 MASQuant, rank 5 %",
            "w4a4 round-to-nearest",
            "w4a4 MASQuant, rank 2 %",
            "w4a4 MASQuant, rank 5 %",
        ]
        wanted = (variant, "w4a4", "masquant", 0.05)
        same = [
            r
            for r in data
            if (r["variant"], r["scheme"], r["method"], r["rank"]) == wanted
        ]
        assert len(same) == 3
        cells = [c.text for c in rows[-1].all("td")]
        for task, cell in zip(made.TASKS, cells):
            values = [100 * r["tasks"][task] for r in same]
            mean, deviation = np.mean(values), np.std(values, ddof=1)
            assert cell.startswith(f"{mean:.1f} ± {deviation:.1f}")
        told = [float(c) for c in cells[4:7]]
        assert told == pytest.approx(
            [np.mean([r["sqnr"][m] for r in same]) for m in made.MODALITIES], abs=0.051
        )
    # Figures show one rank: two schemes, two methods.
    for rows in rows_of_results(data):
        assert [row.rank for row in rows.drawn] == ["", "rank 5 %"] * 2


def test_rows_may_leave_out_what_is_not_known(tmp_path):
    row = {"scheme": "w4a8", "method": "mine", "bytes": None}
    rows = [{**row, "tasks": {"see": {"accuracy": 0.5, "kl": None}, "hear": "nan"}}]
    (tmp_path / "quality.json").write_text(json.dumps(rows))
    assert _report(tmp_path, "-o", tmp_path / "report.html") == 0
    page = read_page(tmp_path / "report.html")
    (shown,) = page.one("section", id="results").one("tbody").all("tr")
    assert [c.text for c in shown.all("td")] == ["50.0", "–", "–"]


def test_a_recipe_becomes_a_page_and_the_rest_is_named(folder, tmp_path, capsys):
    output = tmp_path / "report.html"
    assert _report(folder / "recipe.safetensors", "-o", output) == 0
    assert "Without analysis, evaluations and benchmark results" in (
        capsys.readouterr().out
    )
    assert [s.attributes["id"] for s in read_page(output).all("section")] == [
        "recipe",
        "missing",
    ]


def test_scripts_are_told_in_json(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page_module, "write_png", lambda figure, path: path.touch())
    output, png = tmp_path / "report.html", tmp_path / "png"
    assert _report(folder, "-o", output, "--png", png, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(output) and told["bytes"] == output.stat().st_size
    assert told["missing"] == [] and "ranges" in told["figures"]
    assert sorted(told["png"]) == sorted(str(p) for p in png.iterdir())


def _write(name, content, folder):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)


def _changed(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def _truncate(name, folder):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


DAMAGES = {
    "analysis cut short": (
        "analysis.json",
        functools.partial(_truncate, "analysis.json"),
    ),
    "analysis too deep": (
        "analysis.json",
        functools.partial(_write, "analysis.json", "[" * 200_000),
    ),
    "evaluation without a field": (
        "evaluation.json",
        lambda f: _changed(f, "evaluation.json", lambda d: d.pop("tasks")),
    ),
    "evaluation that is an analysis": (
        "evaluation.json",
        lambda f: (f / "evaluation.json").write_text((f / "analysis.json").read_text()),
    ),
    "results without rows": (
        "results.json",
        functools.partial(_write, "results.json", "{}"),
    ),
    "a row without accuracy": (
        "results.json",
        lambda f: _changed(f, "results.json", lambda d: d["rows"][1].pop("accuracy")),
    ),
    "a row of texts": (
        "results.json",
        lambda f: _changed(
            f, "results.json", lambda d: d["rows"][1]["accuracy"].update(read="high")
        ),
    ),
    "a row that is there twice": (
        "results.json",
        lambda f: _changed(f, "results.json", lambda d: d["rows"].append(d["rows"][1])),
    ),
    "a row that is none": (
        "results.json",
        lambda f: _changed(f, "results.json", lambda d: d["rows"].append(3)),
    ),
    "recipe cut short": (
        "recipe.safetensors",
        functools.partial(_truncate, "recipe.safetensors"),
    ),
    "recipe of text": (
        "recipe.safetensors",
        functools.partial(_write, "recipe.safetensors", "no recipe"),
    ),
}


def _sentence(capsys):
    """Check that a failed command said one sentence, and nothing else."""
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and line.endswith(".")
    return line


@pytest.mark.parametrize("name, damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(folder, tmp_path, capsys, name, damage):
    damage(folder)
    output = tmp_path / "report.html"
    output.write_text("old")
    assert _report(folder, "-o", output) == 1
    assert str(folder / name) in _sentence(capsys)
    assert output.read_text() == "old"


def test_a_damaged_row_is_named(folder, tmp_path, capsys):
    _changed(folder, "results.json", lambda d: d["rows"][2].pop("scheme"))
    assert _report(folder, "-o", tmp_path / "report.html") == 1
    assert "rows[2] has no 'scheme'" in _sentence(capsys)


def test_a_source_that_is_not_there_is_named(tmp_path, capsys):
    assert _report(tmp_path / "nowhere", "-o", tmp_path / "report.html") == 1
    assert "there is no" in (said := _sentence(capsys)) and "nowhere" in said


def test_a_folder_with_nothing_in_it_is_named(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert _report(tmp_path, "-o", tmp_path / "report.html") == 1
    said = _sentence(capsys)
    assert str(tmp_path) in said and "analysis.json" in said


@pytest.mark.parametrize(
    "output, words",
    [("no/such/report.html", "there is no folder"), ("run", "it is a folder")],
)
def test_a_target_that_cannot_be_written_is_named(
    folder, tmp_path, capsys, output, words
):
    assert _report(folder, "-o", tmp_path / output) == 1
    said = _sentence(capsys)
    assert words in said and str(tmp_path / output) in said


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_may_not_be_written_is_named(folder, capsys):
    folder.chmod(0o500)
    assert _report(folder, "-o", folder / "report.html") == 1
    assert "Permission denied" in _sentence(capsys)
    folder.chmod(0o700)


def test_figures_cannot_go_into_a_file(folder, tmp_path, capsys):
    (tmp_path / "png").touch()
    output = tmp_path / "report.html"
    assert _report(folder, "-o", output, "--png", tmp_path / "png") == 1
    assert "it is no folder" in _sentence(capsys)
    assert not output.exists()
