# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Moments of inputs, and which linears share one."""

import gc
import weakref

import numpy as np
import pytest
import torch

from torchao_masquant.calibration.groups import SharedInputs
from torchao_masquant.statistics import squares
from torchao_masquant.statistics.input_statistics import (
    InputStatistics,
    Moments,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_moments_equal_numpy_over_chunks(dtype, mean):
    x = (torch.randn(301, 7) + mean).to(dtype)
    moments = Moments.zeros(7, torch.device("cpu"), second=True)
    # Not contiguous, of odd sizes, and once empty.
    for chunk in (x[:100], x[100:100], x[100:].t().contiguous().t()):
        moments.update(chunk)
    exact = x.double().numpy()
    assert moments.count == 301
    np.testing.assert_array_equal(moments.absmax(), np.abs(exact).max(0))
    for center in (exact.mean(0), np.full(7, -1e3), np.full(7, 1e3)):
        np.testing.assert_array_equal(
            moments.absmax(torch.from_numpy(center)), np.abs(exact - center).max(0)
        )
    np.testing.assert_allclose(moments.mean(), exact.mean(0), rtol=1e-12, atol=1e-12)
    uncentered = exact.T @ exact / 301
    np.testing.assert_allclose(
        moments.covariance(False), uncentered, rtol=1e-12, atol=1e-9
    )
    # The subtraction loses what float64 holds of mean^2: 1e5 * 1e-16, times the sum.
    np.testing.assert_allclose(
        moments.covariance(), np.cov(exact.T, bias=True), atol=1e-8 * (1 + mean)
    )


def test_wide_tokens_are_multiplied_a_few_columns_at_a_time(monkeypatch):
    monkeypatch.setattr(squares, "_COLUMNS", 5)
    chunks = torch.randn(3, 40, 13, generator=torch.Generator().manual_seed(0))
    found = Moments.zeros(13, torch.device("cpu"), True)
    for chunk in chunks:
        found.update(chunk)
    x = chunks.flatten(0, 1).double()
    torch.testing.assert_close(found.outer, x.t() @ x, rtol=0, atol=1e-12 * len(x))


def test_a_constant_channel_has_no_covariance():
    x = torch.randn(50, 3)
    x[:, 1] = 1234.567
    moments = Moments.zeros(3, torch.device("cpu"), second=True)
    moments.update(x)
    covariance = moments.covariance()
    assert not covariance[1].any() and not covariance[:, 1].any()
    assert (covariance.diagonal()[[0, 2]] > 0.1).all()


def test_tokens_go_to_their_modality_and_padding_nowhere():
    statistics = InputStatistics(2, ("text", "vision"), torch.device("cpu"), True)
    x = torch.tensor([[1.0, 0], [2, 0], [4, 0], [torch.nan, 8]])
    statistics.update("layer", x, torch.tensor([0, 1, 0, -2]))
    statistics.update("layer", x[:1], None)
    text, vision = statistics.moments
    assert (text.count, vision.count) == (3, 1)
    assert text.absmax().tolist() == [4, 0] and vision.absmax().tolist() == [2, 0]
    assert text.sample.tolist() == [[1, 0], [4, 0], [1, 0]]
    assert vision.sample.tolist() == [[2, 0]]


def test_without_tokens():
    moments = Moments.zeros(3, torch.device("cpu"), second=True)
    assert not moments.absmax().any() and not moments.absmax(torch.ones(3)).any()
    assert moments.sample.shape == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_named(bad):
    statistics = InputStatistics(2, ("text", "vision"), torch.device("cpu"), True)
    x = torch.zeros(3, 2)
    x[1, 0] = bad
    with pytest.raises(ValueError, match="a.b: its input holds nan or inf in vision"):
        statistics.update("a.b", x, torch.tensor([0, 1, 0]))


def test_views_of_one_tensor_share_it():
    inputs = SharedInputs()
    x = torch.randn(2, 3, 4)
    assert inputs.leader("q", x) == "q"
    assert inputs.leader("k", x) == "q"
    assert inputs.leader("v", x.view(6, 4)) == "q"
    assert inputs.leader("other", x.clone()) == "other"
    assert inputs.leader("part", x[1:]) == "part"


def test_a_change_in_place_makes_another_input():
    inputs = SharedInputs()
    x = torch.randn(2, 4)
    assert inputs.leader("first", x) == "first"
    x.add_(1)
    assert inputs.leader("second", x) == "second"


def test_inputs_are_not_kept_alive():
    inputs = SharedInputs()
    x = torch.randn(2, 4)
    alive = weakref.ref(x)
    inputs.leader("q", x)
    del x
    gc.collect()
    assert alive() is None
    # The memory of a dead input says nothing about the next one there.
    for step in range(50):
        assert inputs.leader(f"next {step}", torch.randn(2, 4)) == f"next {step}"
