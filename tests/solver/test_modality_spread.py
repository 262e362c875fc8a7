# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much modalities differ, against float64 formulas written out here."""

import math

import numpy as np
import pytest
import torch
from hadamard_oracle import hadamard_f64

from torchao_masquant.solver.modality_spread import (
    InputSpread,
    ModalitySpread,
    input_spread,
    sinks_of,
    verdict,
)
from torchao_masquant.statistics.input_statistics import InputStatistics

NAMES = ("text", "vision", "audio")
WIDTH = 24  # rotated in blocks of 8


def statistics(tokens):
    found = InputStatistics(WIDTH, NAMES[: len(tokens)], torch.device("cpu"), True)
    for index, rows in enumerate(tokens):
        found.update("linear", rows, torch.full((len(rows),), index))
    return found


def tokens(count=200, modalities=3, seed=0):
    """Outliers that are constant in vision, and loud in audio; no sinks."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(modalities, count, WIDTH, generator=generator)
    if modalities > 1:
        found[1, :, 3] += 50.0
        found[1, :, 7] *= 6.0
    if modalities > 2:
        found[2] *= 10.0
        found[2, :, 12:15] *= 5.0
    return list(found)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(8, WIDTH, generator=generator),
        "b": torch.randn(5, WIDTH, generator=generator),
    }


def gain(x, own, shared, w, rotation):
    """In dB, of centred tokens."""

    def noise(factor):
        steps = np.abs((x / factor) @ rotation).max(1)
        return (steps**2).mean() * ((factor * w) ** 2).sum()

    return 10 * np.log10(noise(shared) / noise(own))


def test_the_formulas():
    given = tokens()
    found = input_spread(statistics(given), weights())
    w = torch.cat(list(weights().values())).double().numpy()
    rms, largest = np.sqrt((w**2).mean(0)), np.abs(w).max(0)
    x = [rows.double().numpy() for rows in given]
    centered = [rows - rows.mean(0) for rows in x]
    r = np.stack([rows.std(0) for rows in x])
    level = r / np.exp(np.log(r).mean(1, keepdims=True))
    ratio = np.exp(np.log(level.max(0) / level.min(0)).mean())
    assert found.range_ratio == pytest.approx(ratio)
    ranges = np.stack([np.abs(rows).max(0) for rows in centered])
    relative = r**2 / ((r * rms) ** 2).sum(1, keepdims=True)
    for index, name in enumerate(NAMES):
        spread = found.modalities[name]
        # One channel is the hundredth of 24.
        loudest = (x[index] ** 2).mean(0).argmax()
        mean, square = x[index].mean(0), (x[index] ** 2).mean(0)
        assert spread.constant_share == pytest.approx(
            mean[loudest] ** 2 / square[loudest]
        )
        assert spread.gain == pytest.approx(
            gain(
                centered[index],
                np.sqrt(ranges[index] / largest),
                np.sqrt(ranges.max(0) / largest),
                rms,
                np.eye(WIDTH),
            )
        )
        assert spread.gain_rotated == pytest.approx(
            gain(
                centered[index],
                np.sqrt(r[index] / rms),
                np.sqrt(np.sqrt(relative.mean(0)) / rms),
                rms,
                hadamard_f64(WIDTH, 8),
            )
        )
        assert not spread.sinks and spread.sink_share == 0
    # Planted: a constant of 50 with a deviation of 1, and nothing such in audio.
    assert found.modalities["vision"].constant_share > 0.99
    assert found.modalities["audio"].constant_share < 0.1
    assert sinks_of({"x": found}) == []


def test_how_loud_all_of_a_modality_is_makes_no_difference():
    same = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(3))
    found = input_spread(statistics([same, 1000 * same]), weights())
    assert found.range_ratio == pytest.approx(1)
    for spread in found.modalities.values():
        assert spread.gain == pytest.approx(0, abs=1e-5)
        assert spread.gain_rotated == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("count", [200, 3000])
@pytest.mark.parametrize("place", [0, 37, 185])
def test_one_sink_of_a_row_is_found_whether_it_was_sampled_or_not(count, place):
    given = tokens(count)
    usual = input_spread(statistics(given), weights())
    given[0][place] = 0
    given[0][place, 5] = -1000.0
    found = input_spread(statistics(given), weights())
    typical = given[0].norm(dim=1).median().item()
    text = found.modalities["text"]
    assert text.sinks and text.loudest == pytest.approx(1000 / typical, rel=0.1)
    sampled = 1 / min(count, 256)
    assert text.sink_share in (0, pytest.approx(sampled))
    # It tells nothing of how the others' ranges differ.
    assert text.gain_rotated == pytest.approx(
        usual.modalities["text"].gain_rotated, abs=0.2
    )
    assert found.range_ratio == pytest.approx(usual.range_ratio, rel=0.02)
    (sentence,) = sinks_of({"layers.0.q": usual, "layers.1.q": found})
    share = "0.5 %" if count == 200 else "0.4 %"
    assert share in sentence and "of text tokens are sinks at 1 of 2" in sentence
    assert "layers.1.q 2" in sentence and "layers.0.q" not in sentence


def test_tokens_that_do_not_vary_say_nothing():
    still = [torch.zeros(1, WIDTH), torch.ones(30, WIDTH)]
    found = input_spread(statistics(still), weights())
    assert math.isnan(found.range_ratio)
    for spread in found.modalities.values():
        assert math.isnan(spread.gain) and math.isnan(spread.gain_rotated)
        assert not spread.sinks
    assert math.isnan(found.modalities["text"].constant_share)
    assert found.modalities["vision"].constant_share == 1
    assert "no activations are rounded that vary" in verdict({"x": found}, 8)


def spreads(*gains):
    return {
        f"input {i}": InputSpread(
            2.0,
            {
                "text": ModalitySpread(0.5, 0.0, 0.0, 0.0, False, 1.0),
                "audio": ModalitySpread(0.5, 9.0, gain, 0.0, False, 1.0),
            },
        )
        for i, gain in enumerate(gains)
    }


@pytest.mark.parametrize(
    "gains, bits, said",
    [
        ((0.5, 2.1), 4, "One factor serves all modalities (up to 2.1 dB less"),
        ((math.nan, 0.1), 8, "One factor serves all modalities (up to 0.1 dB less"),
        ((3.1, 0.5, 5.0), 4, "by much at 2 of 3 inputs (up to 5.0 dB"),
        ((3.1,), 8, "compare separation=1 with separation=0 on held-out data."),
        ((3.1,), 16, "no activations are rounded"),
    ],
)
def test_which_kind_of_model_it_is(gains, bits, said):
    assert said in verdict(spreads(*gains), bits)


def test_one_modality_has_one_factor():
    found = input_spread(statistics(tokens(modalities=1)), weights())
    assert found.range_ratio == pytest.approx(1)
    assert verdict({"x": found}, 8) == "One modality: one factor serves it."
