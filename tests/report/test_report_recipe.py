# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the page says of a real recipe, against the model that it makes."""

import copy

import numpy as np
import pytest
import report_sources as made
import torch
from page_reader import read_page
from torchao.quantization import quantize_

from torchao_masquant import (
    LayerRecipe,
    analyze,
    calibrate,
    evaluate,
    masquant_config,
)
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.options import SolverOptions
from torchao_masquant.report import write_report
from torchao_masquant.report.recipe_bytes import LayerBytes, layer_bytes, recipe_bytes
from torchao_masquant.report.recipe_figures import shared_inputs
from torchao_masquant.testing import digits

LAYER = r"re:model\.(language_model\.)?layers\.0\..*"


@pytest.fixture(scope="module")
def model():
    return digits.load_model("outliers")


@pytest.fixture(scope="module")
def samples():
    return digits.calibration_samples(8)


def _tensor_bytes(weight):
    names, _ = weight.__tensor_flatten__()
    return {
        name: getattr(weight, name).numel() * getattr(weight, name).element_size()
        for name in names
    }


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w4a8", "low_rank_bits": 8},
        {"scheme": "w8a8", "method": "smoothquant"},
        {"scheme": "w4a16", "rounding": "nearest", "group_size": 32},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_bytes_are_those_of_the_quantized_model(model, samples, options):
    recipe = calibrate(model, samples, include=LAYER, progress=False, **options)
    quantized = copy.deepcopy(model)
    quantize_(quantized, masquant_config(recipe))
    sizes = recipe_bytes(recipe)
    linears = {
        n: m for n, m in quantized.named_modules() if isinstance(m, MASQuantLinear)
    }
    assert set(sizes) == set(linears)
    for name, linear in linears.items():
        held = _tensor_bytes(linear.weight.data)
        assert sizes[name] == LayerBytes(
            integers=held["qdata"],
            scales=held["scale"] + held.get("zero_point", 0),
            factors=held["act_pre_scale"],
            pairs=sum(held.get(n, 0) for n in ("l1", "l2", "low_rank_scale")),
            offsets=held.get("modality_bias", 0) + held.get("act_shift", 0),
            bfloat16=2 * linear.in_features * linear.out_features,
        )


@pytest.mark.parametrize("bits, integers", [(8, 9 * 7), (4, 9 * 4), (3, 9 * 4)])
def test_ready_integers_count_packed(bits, integers):
    parts = dict(
        smoothing_factor=torch.ones(2, 7),
        ranks=(3,),
        l1=torch.zeros(7, 3),
        l2=torch.zeros(3, 9),
        modality_bias=torch.zeros(2, 9),
        act_shift=torch.zeros(2, 7),
    )
    ready = dict(qdata=torch.zeros(9, 7, dtype=torch.int8), scale=torch.ones(9, 1))
    options = SolverOptions({8: "w8a8", 4: "w4a4", 3: "w3a3"}[bits], low_rank_bits=8)
    for more in ({}, ready):
        layer = LayerRecipe((9, 7), "0" * 16, **parts, **more)
        assert layer_bytes(layer, options, modalities=2) == LayerBytes(
            integers=integers,
            scales=4 * 9,
            factors=4 * 2 * 7,
            # One byte a value, and one float32 for each of the rank.
            pairs=3 * (7 + 9) + 4 * 3,
            offsets=4 * (2 * 9 + 2 * 7),
            bfloat16=2 * 9 * 7,
        )


def test_options_that_calibration_chose_are_told(tmp_path):
    recipe = made.recipe()
    recipe.options = SolverOptions(
        "w4a8",
        alpha="auto",
        separation=0.5,
        rank="auto",
        modality_weights={"audio": 0.5},
        asymmetric_calibration=True,
    )
    path = tmp_path / "report.html"
    write_report(path, recipe=recipe)
    (table,) = (
        t for t in read_page(path).all("table") if "Options" in t.one("caption").text
    )
    told = {r.one("th").text: r.one("td").text for r in table.one("tbody").all("tr")}
    assert told["alpha"] == "for each input, one of 0.3, 0.5 and 0.7"
    assert told["separation of the modalities"] == "0.5"
    assert told["low-rank pairs"] == "rank chosen for each linear, 16 bits"
    assert told["weights of the modalities"] == "audio 0.5"
    assert "GPTQ" in told["rounding of the weights"]
    assert "asymmetric calibration" in told["rounding of the weights"]


def test_a_real_model_is_reported(model, samples, tmp_path, undrawn):
    """What the page says; a real model's figures are drawn by the commands of the pages."""
    recipe = calibrate(model, samples, scheme="w4a4", include=LAYER, progress=False)
    quantized = copy.deepcopy(model)
    quantize_(quantized, masquant_config(recipe))
    labelled = {}
    for task in digits.TASKS:
        inputs = next(digits.heldout_batches(task, 4, append_answer=True)).inputs
        labels = inputs["input_ids"].clone()
        labels[:, :-1] = -100
        labelled[task] = [{**inputs, "labels": labels}]
    evaluation = evaluate(quantized, labelled, reference=model, progress=False)
    path = tmp_path / "report.html"
    report = write_report(
        path,
        recipe=recipe,
        analysis=analyze(model, samples, scheme="w4a4", include=LAYER, progress=False),
        evaluations={"masquant": evaluation},
    )
    assert report.missing == ("benchmark results",)
    page = read_page(path)
    assert page.one("h1").text == type(model).__name__

    # The memory at the top is what the linears of the recipe weigh.
    held = sum(
        sum(_tensor_bytes(m.weight.data).values())
        for m in quantized.modules()
        if isinstance(m, MASQuantLinear)
    )
    memory = page.one("dl", class_="numbers").all("dd", class_="value")[0].text
    assert memory == f"{held / 2**10:.2f} KiB"
    dense = sum(2 * n * k for n, k in (layer.shape for layer in recipe.layers.values()))
    share = page.one("dl", class_="numbers").all("dd", class_="note")[0].text
    assert share.startswith(f"{100 * held / dense:.0f} % of ")

    # The ratios are those of the recipe's factors.
    (table,) = (
        t for t in page.all("table") if "Smoothing factors" in t.one("caption").text
    )
    rows = [[c.text for c in r.all("td")] for r in table.one("tbody").all("tr")]
    groups = shared_inputs(recipe)
    assert [
        sorted(n.rpartition(".")[2] for n in names) for names in groups.values()
    ] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    expected = []
    for first in groups:
        factor = recipe.layers[first].smoothing_factor.numpy().astype(np.float64)
        for index, modality in enumerate(recipe.modalities):
            ratio = factor[index] / factor[0]
            expected.append((modality, factor[index], ratio))
    assert len(rows) == len(expected)
    for row, (modality, factor, ratio) in zip(rows, expected):
        assert row[0] == modality
        told = [float(cell) for cell in row[1:4]]
        # Three digits.
        assert told == pytest.approx(
            [factor.min(), np.median(factor), factor.max()], rel=5e-3
        )
        if modality != "text":
            told = [float(cell) for cell in row[4:]]
            assert told == pytest.approx(
                [ratio.min(), np.median(ratio), ratio.max()], rel=5e-3
            )
