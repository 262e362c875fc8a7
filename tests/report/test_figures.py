# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Figures: that each carries the data that it says it does, as SVG and as PNG."""

import math
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import report_sources as made
from matplotlib.colors import same_color

from torchao_masquant.evaluation.analysis_figures import (
    compensation_drawings,
    modality_drawings,
)
from torchao_masquant.evaluation.evaluation_figures import kind_drawing, layer_drawing
from torchao_masquant.figures.drawing import drawing
from torchao_masquant.figures.export import to_svg, write_png
from torchao_masquant.figures.places import input_kinds, kinds
from torchao_masquant.figures.style import COLORS, modality_color
from torchao_masquant.report.recipe_bytes import recipe_bytes
from torchao_masquant.report.recipe_figures import (
    bytes_figure,
    ratio_figure,
    smoothing_figure,
)
from torchao_masquant.report.result_rows import rows_of_results
from torchao_masquant.report.row_figures import accuracy_figure, memory_figure
from torchao_masquant.solver.modality_spread import MUCH

ALL = made.MODALITIES
METHODS = ("masquant", "rtn", "smoothquant")


@pytest.fixture(scope="module")
def drawings():
    """Every figure, by name."""
    (rows,) = rows_of_results(made.results())
    recipe, analysis = made.recipe(), made.analysis()
    evaluations = [(m, made.evaluation(method=m)) for m in METHODS]
    found = [
        accuracy_figure(rows, ""),
        memory_figure(rows, ""),
        layer_drawing(evaluations),
        kind_drawing(evaluations[0][1], ALL),
        *modality_drawings(analysis, ALL),
        *compensation_drawings(analysis, ALL),
        bytes_figure(recipe),
        smoothing_figure(recipe, ALL),
        ratio_figure(recipe, ALL),
    ]
    return {figure.name: figure for figure in found}


def _panel(figure, title):
    (panel,) = (p for p in figure.panels if p.axis.get_title(loc="left") == title)
    return panel


def _values(figure, title, label):
    line = _panel(figure, title).legend[label]
    return dict(zip(line.get_xdata(), line.get_ydata()))


def test_ranges_are_those_of_the_inputs(drawings):
    inputs = made.analysis().inputs
    found = _values(drawings["ranges"], "mlp: gate_proj, up_proj", "vision")
    assert found == {
        layer: inputs[f"model.layers.{layer}.mlp.gate_proj"].ranges["vision"].absmax
        for layer in (0, 1)
    }


def test_bars_of_dominance_are_stacked_up_to_all_channels(drawings):
    for panel in drawings["dominance"].panels:
        tops = {}
        for bar in panel.axis.patches:
            x = bar.get_x()
            assert bar.get_y() == pytest.approx(tops.get(x, 0.0))
            tops[x] = bar.get_y() + bar.get_height()
        assert list(tops.values()) == pytest.approx([100.0, 100.0])


def test_what_own_factors_gain_is_drawn_against_what_is_much(drawings):
    spread = made.analysis().inputs["model.layers.1.mlp.down_proj"].spread
    found = _values(drawings["own_factors"], "mlp: down_proj", "audio")
    assert found[1] == spread.modalities["audio"].gain_rotated
    guide = _panel(drawings["own_factors"], "mlp: down_proj").legend[
        f"{MUCH:g} dB: much"
    ]
    assert set(guide.get_ydata()) == {MUCH}


def test_theorem_1_is_drawn_with_its_correlation(drawings):
    losses = [
        loss for i in made.analysis().inputs.values() for loss in i.losses.values()
    ]
    for panel, name in zip(
        drawings["theorem_1"].panels, ("predicted", "predicted_per_token")
    ):
        x, y = (
            [getattr(loss, name) for loss in losses],
            [loss.measured for loss in losses],
        )
        drawn = [
            point
            for modality in ALL
            for point in zip(*panel.legend[modality].get_data())
        ]
        assert sorted(drawn) == sorted(zip(x, y))
        told = panel.axis.get_title(loc="left").split()[-1].replace("−", "-")
        assert float(told) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=5.1e-4)


def test_effective_ranks_are_drawn_whitened_and_not(drawings):
    ranks = made.analysis().effective_ranks["model.layers.1.self_attn.k_proj"]["audio"]
    for how, value in (("whitened", "whitened"), ("without whitening", "plain")):
        label = f"audio, {how}"
        found = _values(drawings["effective_ranks"], "self_attn.k_proj", label)
        assert found[1] == getattr(ranks, value)
    assert _values(drawings["effective_ranks"], "mlp.up_proj", "full rank") == {
        0: 8,
        1: 8,
    }


def test_what_rank_buys_is_drawn_by_method(drawings):
    found = _values(drawings["sqnr_by_rank"], "vision", "MASQuant, as published")
    assert found == {0.0: 1.0, 5.0: 10.0, 20.0: 30.0}


def test_a_layer_has_the_mean_of_its_linears(drawings):
    sqnr = made.evaluation(method="smoothquant").sqnr
    mean = np.mean([r["audio"].centered for n, r in sqnr.items() if ".layers.1." in n])
    found = _values(drawings["sqnr_by_layer"], "w4a8, audio", "SmoothQuant")
    assert found[1] == pytest.approx(mean)
    # Ours lies on top.
    order = [*_panel(drawings["sqnr_by_layer"], "w4a8, audio").legend]
    assert order == ["round-to-nearest", "SmoothQuant", "MASQuant"]


def test_a_kind_of_linear_has_each_of_its_linears(drawings):
    ratios = made.evaluation(method="masquant").sqnr["model.layers.0.mlp.up_proj"]
    for how, value in (("centred", "centered"), ("plain", "plain")):
        found = _values(drawings["sqnr_by_kind"], "mlp.up_proj", f"text, {how}")
        assert found[0] == getattr(ratios["text"], value)


def test_a_mark_is_one_models_accuracy(drawings):
    panel = _panel(drawings["accuracy"], "read")
    assert set(panel.legend["dense"].get_ydata()) == {99.0}
    assert list(panel.legend["MASQuant"].get_ydata()) == [98.0, 98.0]
    assert list(panel.legend["round-to-nearest"].get_ydata()) == [50.0, 50.0]
    low, high = panel.axis.get_ylim()
    assert low < 0 and high > 100
    # Equal marks do not hide each other.
    ours, other = panel.legend["MASQuant"], panel.legend["round-to-nearest"]
    assert not set(ours.get_xdata()) & set(other.get_xdata())


def test_long_names_do_not_lie_on_each_other():
    names = [(f"decoder.a_rather_long_name_{place}.projection",) for place in range(60)]
    figure = layer_drawing([("masquant", made.evaluation(names=names))])
    to_svg(figure)
    for panel in figure.panels:
        boxes = [t.get_window_extent() for t in panel.axis.get_xticklabels()]
        assert 1 < len(boxes) < 10
        # They slant, a line of letters apart.
        ends = [box.x1 for box in boxes]
        assert min(np.diff(ends)) > 10


def test_bars_are_as_long_as_the_bytes(drawings):
    sizes = recipe_bytes(made.recipe())
    total = sum(s.total for n, s in sizes.items() if n.endswith("mlp.gate_proj"))
    panel = drawings["bytes"].panels[0]
    labels = [text.get_text() for text in panel.axis.get_yticklabels()]
    place = labels.index("mlp.gate_proj")
    parts = [b for b in panel.axis.patches if abs(b.get_y() - place) < 0.5]
    assert sum(bar.get_width() for bar in parts) == total and len(parts) == 5
    widths = [bar.get_width() for bar in drawings["memory"].panels[0].axis.patches]
    assert widths == 3 * [1 << 20]


def test_factors_are_drawn_by_median_and_against_the_base(drawings):
    layer = made.recipe().layers["model.layers.1.self_attn.o_proj"]
    text, vision, _ = layer.smoothing_factor.double().numpy()
    found = _values(drawings["smoothing"], "self_attn: o_proj", "vision")
    assert found[1] == pytest.approx(np.median(vision))
    found = _values(drawings["smoothing_ratio"], "self_attn: o_proj", "vision")
    assert found[1] == pytest.approx(np.median(vision / text))


def test_every_panel_has_units_and_what_it_draws_is_in_the_legend(drawings):
    for figure in drawings.values():
        labels = [t.get_text() for found in figure.canvas.legends for t in found.texts]
        for panel in figure.panels:
            assert set(panel.legend) <= set(labels)
            if figure.name not in ("bytes", "memory"):
                first = panel.axis.get_subplotspec().is_first_col()
                assert bool(panel.axis.get_ylabel()) == first
                assert panel.axis.get_title(loc="left")
        assert figure.name == "memory" or len(set(labels)) == len(labels) > 1


def test_a_modality_has_one_colour_in_every_figure(drawings):
    seen = set()
    for figure in drawings.values():
        for label, artist in figure.panels[0].legend.items():
            modality = label.partition(",")[0]
            if modality in ALL:
                bars = getattr(artist, "patches", None)
                found = bars[0].get_facecolor() if bars else artist.get_color()
                assert same_color(found, modality_color(modality, ALL))
                seen.add(figure.name)
    assert {"ranges", "dominance", "theorem_1", "smoothing", "sqnr_by_kind"} <= seen


def test_a_modality_looks_the_same_whatever_the_others():
    assert modality_color("audio", ("text", "audio")) == modality_color("audio", ALL)
    many = ("text", "vision", "audio", "smell", "touch")
    assert len({modality_color(m, many) for m in many}) == 5
    # Colours are told apart, so that a page can have them dark in dark mode.
    light = [light for light, _ in COLORS.values()]
    assert len(set(light)) == len(light)


def test_linears_are_sorted_by_kind_and_layer():
    first, second, rest = kinds(
        ["m.layers.0.q", "m.layers.0.up", "m.layers.10.q", "head", "other"]
    )
    assert first.title == "q"
    assert first.places == ((0, "m.layers.0.q"), (10, "m.layers.10.q"))
    assert second.places == ((0, "m.layers.0.up"),)
    assert rest.categories == ("head", "other") and rest.place_name(1) == "other"
    (kind,) = input_kinds({"m.0.attn.q": ("m.0.attn.q", "m.0.attn.k")})
    assert kind.title == "attn: q, k"


def _one(log=False, **line):
    with drawing("one", "One", "It is one.", log=log) as found:
        panel = found.panels[0]
        panel.line("line", color="#0072b2", marker="o", **line)
        panel.name("Panel", "y, dB", "x")
    return found


@pytest.mark.parametrize("log", [False, True])
def test_a_mark_says_the_value_that_it_stands_at(log):
    # Gaps are in between, and what has no place on a logarithmic axis.
    y = [3.0, math.nan, 700.0, math.inf, -4.0 if log else 5.0, 20.0]
    figure = _one(log, x=range(6), y=y, hints=[str(value) for value in y])
    root = ElementTree.fromstring(to_svg(figure))
    marks = [e for e in root.iter("use") if e.find("title") is not None]
    told = [float(mark.find("title").text) for mark in marks]
    assert told == [3.0, 700.0] + ([] if log else [5.0]) + [20.0]
    # Pixels are proportional, to a tenth.
    read = np.log(told) if log else np.array(told)
    pixels = [float(mark.get("y")) for mark in marks]
    slope, start = np.polyfit(read, pixels, 1)
    assert slope < 0
    assert pixels == pytest.approx(slope * read + start, abs=0.15)


def test_two_figures_in_one_page_share_no_id():
    figures = [_one(x=[0, 1], y=[1.0, 2.0]), _one(x=[0, 1], y=[1.0, 2.0])]
    figures[1].name = "two"
    ids = [
        {e.get("id") for e in ElementTree.fromstring(to_svg(f)).iter()} - {None}
        for f in figures
    ]
    assert ids[0] and not ids[0] & ids[1]


def test_what_a_file_says_can_be_drawn(tmp_path):
    # A formula that is none, a letter that our font lacks, and what no XML may hold.
    name = r"$\frac{a$ 模型 \x00_" + "\x00\ud800" + "<b>" + 60 * "long"
    with drawing("odd", name, "It is odd.") as figure:
        panel = figure.panels[0]
        panel.line(f"_{name}", [0, 1], [1.0, 2.0], [name, name], marker="o")
        panel.name(name, name)
        panel.categories([name, "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = ElementTree.fromstring(to_svg(figure))
    text = "".join(root.itertext())
    assert r"$\frac{a$ 模型" in text and "\ufffd" in text
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        write_png(figure, tmp_path / "odd.png")
    assert (tmp_path / "odd.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "y",
    [[1.0, 1.0], [0.9, 1.1], [1.0, 1e6], [1e-30, 1e30], [0.0, 0.0], 2 * [math.inf], []],
)
def test_a_logarithmic_axis_has_numbers_whatever_it_spans(y):
    figure = _one(True, x=range(len(y)), y=y)
    root = ElementTree.fromstring(to_svg(figure))
    texts = [text for element in root.iter("text") if (text := element.text)]
    numbers = [text for text in texts if re.fullmatch(r"[\d.]+(e[+-]\d+)?", text)]
    # The x axis has some too.
    assert len(numbers) >= 4
    assert not any("$" in text for text in texts)


def test_a_users_own_settings_change_nothing():
    import matplotlib

    plain = to_svg(_one(x=[0, 1], y=[1.0, 2.0]))
    own = {"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}
    with matplotlib.rc_context(own):
        assert to_svg(_one(x=[0, 1], y=[1.0, 2.0])) == plain
        assert matplotlib.rcParams["font.size"] == 30
