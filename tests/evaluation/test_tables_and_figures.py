# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What people see of a result."""

import io
import re
import sys
import warnings

import pytest
import records
from rich.console import Console, Group

from torchao_masquant.evaluation.tables import WIDTH, new_table, short_names, to_text


def test_an_evaluation_shows_its_numbers():
    text = str(records.evaluation())
    assert "w4a8: 2.00 KiB of weights in the decoder (reference: 8.00 KiB)" in text
    for cell in ("75.0 (25.0)", "1.500 (2.000)", "1.25e-01", "inf", "50.0", "4.482"):
        assert cell in text
    assert "text+vision" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_an_evaluation_without_a_reference_shows_no_empty_columns():
    text = str(records.evaluation(reference=False))
    assert "75.0" in text
    assert "KL" not in text and "SQNR" not in text and "None" not in text


def test_an_analysis_shows_its_numbers():
    analysis = records.analysis()
    text = str(analysis)
    assert "in model.layers" in text and "0.q" in text
    assert f"correlation {analysis.correlation:.3f} (theorem 1)" in text
    assert re.search(r"masquant-paper +vision +-inf +10\.0", text)
    assert re.search(
        r"1\.q +25 +25 +25 +0\.0 +12\.5 +25\.0 +2\.50 +3\.5 +4\.5 +5\.5", text
    )
    # The geometric mean of 1.5 and 2.5; means and largest of gains.
    assert "over all inputs: range ratio 1.94" in text
    assert re.search(r"smell +25 +3\.8 +5\.5 +nan +nan", text)
    *_, sinks, more, verdict, rest = text.splitlines()
    assert sinks.startswith("25.0 % of smell tokens are sinks at 2 of 2 inputs")
    assert more == "model.layers.1.q 41, model.layers.0.q 40."
    assert verdict.startswith(
        "Modalities differ by much at 1 of 2 inputs (up to 5.5 dB"
    )
    assert rest.endswith("separation=0 on held-out data.")
    assert max(map(len, text.splitlines())) <= WIDTH


def test_an_analysis_of_one_modality_has_no_tables_of_pairs():
    text = str(records.analysis(modalities=("text",), losses=False))
    assert "largest value" in text
    assert "loss" not in text and "nan" not in text
    for absent in ("rank of", "by rank", "range ratio", "own factor"):
        assert absent not in text
    assert "constant, %" in text and text.endswith("one factor serves it.")


@pytest.mark.parametrize("record", [records.evaluation(), records.analysis()])
def test_rich_prints_what_str_gives(record):
    file = io.StringIO()
    Console(file=file, width=WIDTH, no_color=True).print(record)
    printed = "\n".join(line.rstrip() for line in file.getvalue().splitlines())
    assert printed == str(record)


@pytest.mark.parametrize(
    "names, path, short",
    [
        ([], "", []),
        (["a.b.c"], "a.b", ["c"]),
        (["a.b.c", "a.d"], "a", ["b.c", "d"]),
        (["a.b", "a.b.c"], "a", ["b", "b.c"]),
        (["lay.x", "layer.x"], "", ["lay.x", "layer.x"]),
    ],
)
def test_the_shared_path_of_names_is_told_once(names, path, short):
    assert short_names(names) == (path, short)


def _drawn(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Such as a glyph that is missing, or a layout without room.
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    return file.getvalue()


def _panel(figure, title):
    (axis,) = (a for a in figure.axes if a.get_title(loc="left") == title)
    return axis


def test_the_figures_of_an_evaluation():
    figures = records.evaluation().figures()
    assert list(figures) == ["sqnr_by_layer", "sqnr_by_kind"]
    for figure in figures.values():
        assert _drawn(figure).startswith(b"\x89PNG")
        assert "Model: Signal-to-noise ratio" in figure.get_suptitle()
    for name, title in (("sqnr_by_layer", "w4a8, text"), ("sqnr_by_kind", "attn.q")):
        axis = _panel(figures[name], title)
        assert axis.get_xlabel() == "decoder layer"
        (line, *_) = axis.lines
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == [20.0, 20.0, 20.0]
    assert figures["sqnr_by_kind"].axes[0].get_ylabel() == "output SQNR, dB"
    assert records.evaluation(reference=False).figures() == {}


@pytest.mark.parametrize(
    "names",
    [("model.layers.0.q", "model.layers.1.q"), ("first", "second")],
    ids=["layers", "no layers"],
)
def test_the_figures_of_an_analysis(names):
    analysis = records.analysis(names)
    figures = analysis.figures()
    assert list(figures) == [
        "ranges",
        "dominance",
        "own_factors",
        "theorem_1",
        "effective_ranks",
        "sqnr_by_rank",
    ]
    for figure in figures.values():
        assert _drawn(figure).startswith(b"\x89PNG")
        assert figure.get_suptitle().startswith("Model, w4a8: ")
        assert figure.axes[0].get_ylabel()
    axis = _panel(
        figures["theorem_1"], f"Theorem 1: correlation {analysis.correlation:.3f}"
    )
    assert axis.lines[0].get_xydata().tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_figures_of_one_modality_leave_out_what_is_not_there():
    figures = records.analysis(modalities=("text",), losses=False).figures()
    assert list(figures) == ["ranges", "dominance"]
    for figure in figures.values():
        _drawn(figure)


def test_figures_do_not_pile_up():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    records.analysis().figures()
    assert pyplot.get_fignums() == []


def test_a_missing_matplotlib_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for record in (records.evaluation(), records.analysis()):
        with pytest.raises(ImportError, match=r"torchao_masquant\[report\]'\.$"):
            record.figures()


@pytest.mark.parametrize("columns", ["20", "40"])
def test_a_table_keeps_its_numbers_however_narrow_or_wide_it_is(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    name = "a_rather_long_name_of_a_linear." * 5
    table = new_table("title", ["linear"], [str(i) for i in range(12)])
    table.add_row(name, *(f"12.5 / {100_000 + i}" for i in range(12)))
    for shown in (table, Group("some text", table)):
        text = to_text(shown)
        assert name in text and "…" not in text
        assert all(f"12.5 / {100_000 + i}" in text for i in range(12))
