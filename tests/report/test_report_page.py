# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The page: what is in it, that it stands alone, and that nothing in it is wrong."""

import dataclasses
import datetime
import math
import os
import re
import sys
from pathlib import Path

import pytest
import report_sources as made
from page_reader import read_page

from torchao_masquant.report import write_report

SECTIONS = {"evaluations", "results", "layers", "modalities", "compensation", "recipe"}
FIGURES = {
    "accuracy",
    "memory",
    "accuracy_results",
    "memory_results",
    "sqnr_by_layer",
    "sqnr_by_kind",
    "ranges",
    "dominance",
    "own_factors",
    "theorem_1",
    "effective_ranks",
    "sqnr_by_rank",
    "bytes",
    "smoothing",
    "smoothing_ratio",
}
METHODS = ("rtn", "smoothquant", "masquant-paper", "masquant")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report of everything: its path, and what was written."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    report = write_report(
        path,
        recipe=made.recipe(),
        analysis=made.analysis(),
        evaluations=[made.evaluation(method=m) for m in METHODS],
        results=made.results(),
    )
    return path, report


@pytest.fixture(scope="module")
def page(full):
    return read_page(full[0])


def _write(tmp_path, **sources):
    path = tmp_path / "report.html"
    report = write_report(path, **sources)
    return report, read_page(path)


def test_everything_has_a_section_and_a_figure(full, page):
    _, report = full
    assert set(report.sections) == SECTIONS
    assert set(report.figures) == FIGURES
    assert report.missing == ()
    assert {s.attributes["id"] for s in page.all("section")} == SECTIONS
    assert {f.attributes["id"] for f in page.all("figure")} == {
        f"figure-{name}" for name in FIGURES
    }


def test_every_figure_is_titled_captioned_and_drawn(page):
    for figure in page.all("figure"):
        assert figure.one("h3").text
        caption = figure.one("figcaption").text
        # One sentence.
        assert re.fullmatch(r"[A-Z][^.]*\.", caption), caption
        drawing = figure.one("svg", role="img")
        assert re.search(r"\d", drawing.attributes["aria-label"])
        titles = drawing.all("title")
        assert titles and all(title.text for title in titles)
        # Text stays text.
        assert len(drawing.all("text")) > 3


def test_headings_tables_and_ids_are_in_order(page):
    levels = [int(e.tag[1]) for e in page.all() if re.fullmatch(r"h\d", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    for table in page.all("table"):
        assert table.one("caption").text
        width = len(table.one("thead").all("tr")[-1].all("th"))
        for row in table.one("tbody").all("tr"):
            assert len(row.all("th")) == 1
            assert len(row.all("th") + row.all("td")) == width
        for group in table.all("tr", class_="groups"):
            spans = [
                int(c.attributes["colspan"]) for c in group.all("th") + group.all("td")
            ]
            assert sum(spans) == width
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_but_itself(full, page):
    text = full[0].read_text(encoding="utf-8")
    ids = {e.attributes["id"] for e in page.all() if "id" in e.attributes}
    for outside in ("http:", "https:", "@import", "//cdn", "xmlns", "<?xml"):
        assert outside not in text
    assert set(re.findall(r"url\((.*?)\)", text)) <= {f"#{name}" for name in ids}
    for element in page.all():
        assert element.tag not in ("script", "link", "img", "iframe", "object")
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "data") and not name.startswith("on")
            if name == "href":
                assert value[0] == "#" and value[1:] in ids
    # A style in a figure would be one of the whole page.
    assert len(page.all("style")) == 1


def test_colours_follow_light_and_dark_mode(page):
    style = page.one("style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    dark = dark.partition("} }")[0]
    variables = set(re.findall(r"--([\w-]+):", light))
    assert variables == set(re.findall(r"--([\w-]+):", dark))
    # A drawing takes its colours from the style, never from itself.
    used = style
    for element in page.one("main").all():
        own = element.attributes.get("style", "")
        assert not re.search(r"(fill|stroke|color|background): (?!var|none)", own), own
        used += own
    used = set(re.findall(r"var\(--([\w-]+)\)", used))
    assert {"m0", "m1", "m2", "ink", "grid", "part4"} <= used <= variables


def test_no_style_moves_a_mark(page):
    assert not re.search(r"(?<!text-)transform|translate|zoom", page.one("style").text)


def _channel(value):
    value = value / 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _contrast(one, other):
    """WCAG 2's ratio of two "#rrggbb"."""
    weights = (0.2126, 0.7152, 0.0722)
    lights = [
        sum(w * _channel(int(color[i : i + 2], 16)) for w, i in zip(weights, (1, 3, 5)))
        for color in (one, other)
    ]
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out(page, mode):
    style = page.one("style").text
    values = dict(
        re.findall(
            r"--([\w-]+): (#\w+)",
            style.split("@media (prefers-color-scheme: dark)", 1)[mode],
        )
    )
    for text in ("text", "soft", "bad"):
        for ground in ("paper", "card"):
            assert _contrast(values[text], values[ground]) >= 4.5
    # WCAG's bound for graphics, for the colours that carry a series.
    for name in ("ink", "muted", "m0", "m1", "m2"):
        assert _contrast(values[name], values["card"]) >= 3


def test_the_top_tells_the_colours_of_the_modalities(page):
    legend = page.one("ul", class_="modalities")
    assert [item.text for item in legend.all("li")] == ["text base", "vision", "audio"]
    swatches = [item.one("span").attributes["style"] for item in legend.all("li")]
    assert swatches == [f"background: var(--m{place})" for place in range(3)]


ATTACK = "<script>alert('x')</script>&\"'</svg>"


def test_what_files_say_is_never_markup(tmp_path):
    names = [(f"model.layers.{i}.{ATTACK}",) for i in range(2)]
    modalities = ("text", ATTACK)
    recipe = made.recipe(names=names, modalities=modalities)
    recipe.versions[ATTACK] = ATTACK
    results = made.results(schemes=(ATTACK,), methods=(ATTACK,))
    results["rows"][0]["accuracy"][ATTACK] = 0.5
    _, page = _write(
        tmp_path,
        recipe=recipe,
        analysis=made.analysis(names=names, modalities=modalities, model=ATTACK),
        evaluations=[
            made.evaluation(
                scheme=ATTACK,
                method=ATTACK,
                names=names,
                modalities=modalities,
                tasks=(ATTACK,),
            )
        ],
        results=results,
        title=ATTACK,
    )
    assert not page.all("script")
    assert page.one("h1").text == ATTACK
    titles = [t.text for t in page.all("title")]
    assert any(f"layer 1, {ATTACK}: largest" in title for title in titles)
    # Long texts are drawn in lines.
    drawn = "".join(t.text for t in page.all("text")).replace(" ", "")
    assert ATTACK.replace(" ", "") in drawn
    assert any(ATTACK in th.text for th in page.all("th"))


def test_a_large_model_makes_a_page_of_bounded_size(tmp_path):
    layers = 48
    report, _ = _write(
        tmp_path,
        recipe=made.recipe(layers),
        analysis=made.analysis(layers),
        evaluations=[
            made.evaluation(scheme, method, layers)
            for scheme in ("w8a8", "w4a8", "w4a4")
            for method in METHODS
        ],
    )
    assert report.nbytes == (tmp_path / "report.html").stat().st_size
    assert report.nbytes < 1_600_000


def test_the_page_says_what_was_measured_on_what_and_when(tmp_path, undrawn):
    recipe = made.recipe()
    recipe.description = {
        "model": "some-3B",
        "data": "samples.jsonl",
        "samples": 128,
        "tokens": {"text": 4096, "vision": 51200},
    }
    evaluations = [
        dataclasses.replace(made.evaluation(method=m), name="some-3B-w4a8", date=day)
        for m, day in (("rtn", "2026-03-01"), ("masquant", "2026-03-04"))
    ]
    _, page = _write(tmp_path, recipe=recipe, evaluations=evaluations)
    told = page.one("dl", class_="facts")
    facts = dict(
        zip([d.text for d in told.all("dt")], [d.text for d in told.all("dd")])
    )
    tasks = made.TASKS
    assert facts == {
        "Model": "some-3B and some-3B-w4a8",
        "Calibrated on": "samples.jsonl, 128 samples, 4,096 text and 51,200 vision tokens",
        "Evaluated on": f"20 examples each of {', '.join(tasks[:-1])} and {tasks[-1]}, "
        "2026-03-01 to 2026-03-04",
    }
    labels = [d.text for d in page.one("dl", class_="numbers").all("dt")]
    assert labels[1:] == [f"{task}, right answers of 20" for task in tasks]
    assert f"Made on {datetime.date.today().isoformat()}" in page.one("footer").text


def test_what_is_not_known_is_not_made_up(tmp_path, undrawn):
    old = made.evaluation()
    assert old.name is None and old.date is None
    _, page = _write(tmp_path, recipe=made.recipe(), evaluations=[old])
    assert [d.text for d in page.one("dl", class_="facts").all("dt")] == [
        "Evaluated on"
    ]


def test_no_change_looks_like_no_error_bar(tmp_path, undrawn):
    _, page = _write(tmp_path, evaluations=[made.evaluation(accuracy=0.95)])
    notes = page.one("dl", class_="numbers").all("dd", class_="note")
    assert notes[-1].text == "dense 95.0 %, unchanged"
    assert "±" not in page.one("main").text


def test_the_headline_is_about_the_recipe(tmp_path, undrawn):
    _, page = _write(
        tmp_path,
        recipe=made.recipe(scheme="w4a8", method="masquant"),
        evaluations=[
            made.evaluation(method="rtn", accuracy=0.25),
            made.evaluation(method="masquant", accuracy=0.9),
        ],
    )
    assert page.one("h1").text == "Model"
    assert "w4a8, MASQuant" in page.one("p", class_="subtitle").text
    numbers = page.one("dl", class_="numbers")
    values = [d.text for d in numbers.all("dd", class_="value")]
    assert values[1:] == ["90.0 %"] * 3
    notes = [d.text for d in numbers.all("dd", class_="note")]
    assert notes[1] == "dense 95.0 %, −5.0 points"
    assert len(numbers.all("div", class_="bad")) == 3


def test_a_model_that_was_not_scored_has_no_accuracy_at_the_top(tmp_path, undrawn):
    _, page = _write(
        tmp_path,
        recipe=made.recipe(scheme="w8a8"),
        evaluations=[made.evaluation(scheme="w4a8")],
    )
    (label,) = page.one("dl", class_="numbers").all("dt")
    assert label.text == "weights of its linears"


def test_the_table_tells_who_fell_behind(page):
    table = page.one("section", id="evaluations").one("table")
    rows = {r.all("th")[0].text: r for r in table.one("tbody").all("tr")}
    assert list(rows) == [
        "dense",
        "w4a8 round-to-nearest",
        "w4a8 SmoothQuant",
        "w4a8 MASQuant, as published",
        "w4a8 MASQuant",
    ]
    cells = [c.text for c in rows["w4a8 MASQuant"].all("td")]
    assert cells[:4] == [*["90.0"] * 3, "3.00 MiB"]
    assert len(rows["w4a8 MASQuant"].all("td", class_="bad")) == 3
    assert not rows["dense"].all("td", class_="bad")


@pytest.mark.parametrize("accuracy, bad", [(0.96, 0), (0.955, 3), (float("nan"), 0)])
def test_two_points_are_the_bound(tmp_path, accuracy, bad, undrawn):
    results = made.results()
    for row, value in zip(results["rows"], [0.98] + 4 * [accuracy]):
        row["accuracy"] = {task: value for task in made.TASKS}
    _, page = _write(tmp_path, results=results)
    rows = page.one("section", id="results").one("tbody").all("tr")
    assert [len(row.all("td", class_="bad")) for row in rows] == [0] + 4 * [bad]


def test_outliers_that_were_trained_in_are_told(page):
    asides = page.one("section", id="results").all("p", class_="aside")
    assert "trained in on purpose" in " ".join(a.text for a in asides)


def test_a_recipe_alone_says_what_is_missing_and_what_makes_it(tmp_path, undrawn):
    report, page = _write(tmp_path, recipe=made.recipe(scheme="w4a4"))
    assert report.sections == ("recipe",)
    assert set(report.missing) == {"analysis", "evaluations", "benchmark results"}
    commands = [c.text for c in page.one("section", id="missing").all("code")]
    assert any(re.match(r'analyze\(.*"w4a4".*analysis.json', c) for c in commands)
    assert any(
        re.match(r"evaluate\(.*evaluation-w4a4-masquant.json", c) for c in commands
    )
    assert any(c.startswith("python -m torchao_masquant demo --json") for c in commands)


def test_one_factor_for_all_has_no_ratio(tmp_path, undrawn):
    report, page = _write(tmp_path, recipe=made.recipe(method="smoothquant"))
    assert "smoothing" in report.figures and "smoothing_ratio" not in report.figures
    assert (
        "no ratio" in page.one("section", id="recipe").all("p", class_="aside")[0].text
    )


def test_a_weight_only_analysis_says_why_theorem_1_is_not_there(tmp_path, undrawn):
    report, page = _write(tmp_path, analysis=made.analysis(losses=False))
    assert "theorem_1" not in report.figures
    assert "w4a16 leaves activations" in page.one("section", id="modalities").text


def test_the_modalities_end_with_which_kind_the_model_is(page):
    asides = page.one("section", id="modalities").all("p", class_="aside")
    sinks, verdict = asides[0].text, asides[-1].text
    assert sinks.startswith("2.0 % of text tokens are sinks at 8 of 8 inputs")
    assert verdict == made.analysis().verdict and "differ by much" in verdict


def test_one_modality_has_nothing_to_compensate(tmp_path, undrawn):
    report, _ = _write(
        tmp_path,
        analysis=made.analysis(modalities=("text",)),
        evaluations=[made.evaluation(modalities=("text",))],
        recipe=made.recipe(modalities=("text",), method="rtn"),
    )
    assert "compensation" not in report.sections
    assert {"ranges", "dominance", "sqnr_by_layer"} <= set(report.figures)


def test_values_without_a_place_leave_gaps(tmp_path):
    nan, inf = math.nan, math.inf
    analysis = made.analysis()
    for study in analysis.inputs.values():
        for loss in study.losses.values():
            object.__setattr__(loss, "measured", nan)
            object.__setattr__(loss, "predicted", inf)
        object.__setattr__(study.ranges["audio"], "absmax", 0.0)
        object.__setattr__(study.ranges["audio"], "low", 0.0)
        object.__setattr__(study.ranges["audio"], "dominance", nan)
    for curves in analysis.sqnr_by_rank.values():
        curves["audio"] = (-inf, 3.0, inf)
    evaluation = made.evaluation()
    for name, ratios in evaluation.sqnr.items():
        object.__setattr__(ratios["vision"], "centered", inf if ".0." in name else 9.0)
        # A modality without tokens.
        del ratios["audio"]
    _, page = _write(tmp_path, analysis=analysis, evaluations=[evaluation])
    for element in page.one("main").all():
        for name in ("d", "x", "y", "height", "width", "transform"):
            assert not re.search("nan|inf", element.attributes.get(name) or "")
    marks = page.one("figure", id="figure-ranges").all("title")
    assert marks and not any("audio" in mark.text for mark in marks)


def test_linears_without_a_layer_are_named(tmp_path):
    names = [("decoder.query", "decoder.key"), ("decoder.head",)]
    report, page = _write(
        tmp_path,
        recipe=made.recipe(names=names),
        analysis=made.analysis(names=names),
        evaluations=[made.evaluation(names=names)],
    )
    assert FIGURES - {"accuracy_results", "memory_results"} == set(report.figures)
    figure = page.one("figure", id="figure-sqnr_by_layer")
    assert any("decoder.head, text" in t.text for t in figure.all("title"))


def test_a_recipe_without_linears_says_so(tmp_path, undrawn):
    recipe = made.recipe()
    recipe.layers.clear()
    report, page = _write(tmp_path, recipe=recipe)
    assert report.sections == () and "linears in the recipe" in report.missing
    assert page.one("section", id="missing")


def test_evaluations_are_told_apart(tmp_path, undrawn):
    unnamed = [made.evaluation(method=None) for _ in range(2)]
    _, page = _write(tmp_path, evaluations=unnamed)
    rows = page.one("section", id="evaluations").one("tbody").all("th")
    assert [r.text for r in rows] == [
        "dense",
        "w4a8 method not named (1)",
        "w4a8 method not named (2)",
    ]
    _, page = _write(tmp_path, evaluations=dict(zip(("rtn", "mine"), unnamed)))
    rows = page.one("section", id="evaluations").one("tbody").all("th")
    assert [r.text for r in rows] == ["dense", "w4a8 round-to-nearest", "w4a8 mine"]


def test_a_dense_model_alone_can_be_reported(tmp_path, undrawn):
    report, page = _write(
        tmp_path, evaluations=[made.evaluation(None, None, reference=False)]
    )
    assert report.sections == ("evaluations",)
    assert "evaluation against the dense model" in report.missing
    (row,) = page.one("tbody").all("tr")
    assert row.one("th").text == "dense"


def test_figures_are_written_as_png(tmp_path, undrawn):
    png = tmp_path / "a" / "b"
    report, _ = _write(tmp_path, recipe=made.recipe(), png=png)
    assert [p.stem for p in report.png] == list(report.figures)
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {
        p.name for p in report.png
    }
    for path in report.png:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_sources_make_the_same_page(tmp_path, undrawn):
    """As figures do by themselves."""
    for name in ("one.html", "two.html"):
        write_report(
            tmp_path / name,
            recipe=made.recipe(),
            analysis=made.analysis(),
            evaluations=[made.evaluation(method=m) for m in METHODS],
            results=made.results(),
        )
    one, two = ((tmp_path / name).read_bytes() for name in ("one.html", "two.html"))
    assert one == two


def test_nothing_makes_no_page(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    old = '<meta name="generator" content="torchao_masquant">'
    path.write_text(old)

    def full_disk(self, data):
        Path(self).touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="report.html': No space left on device"):
        write_report(path, recipe=made.recipe())
    assert path.read_text() == old and os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install .*\[report\]"):
        write_report(tmp_path / "report.html", recipe=made.recipe())
