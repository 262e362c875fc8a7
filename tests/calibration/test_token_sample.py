# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The tokens that solutions are judged by are drawn at random, and always the same ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.statistics.input_statistics import Moments
from torchao_masquant.statistics.token_sample import SAMPLE_TOKENS, TokenSample


def kept(sizes):
    """Numbers of the tokens that are kept of calls of some sizes."""
    moments = Moments.zeros(1, torch.device("cpu"), second=True)
    tokens = torch.arange(sum(sizes), dtype=torch.float32)[:, None]
    for chunk in tokens.split(sizes) if sizes else ():
        moments.update(chunk)
    assert moments.sample[:, 0].tolist() == moments.sampled.numbers.tolist()
    return moments.sampled.numbers


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=8))
def test_however_the_tokens_come_in_calls(sizes):
    found = kept(sizes)
    assert torch.equal(found, kept([sum(sizes)]))
    assert len(found) == min(sum(sizes), SAMPLE_TOKENS)
    assert torch.equal(found, found.unique())


@pytest.mark.parametrize("rows", [64, 128, 256, 1024])
@pytest.mark.parametrize("length", [64, 512, 2048])
def test_rows_of_a_power_of_two_are_not_sampled_at_one_place(rows, length):
    """Every 2^j-th token would be a row's first one: an attention sink."""
    numbers = kept([length] * rows)
    first = (numbers % length == 0).sum().item()
    # Binomial: less than once in 1e6 so many.
    expected = SAMPLE_TOKENS / length
    assert first <= expected + 5 * expected**0.5 + 2
    # As many of each quarter of a row, and of each quarter of all rows, by chi-square
    # with 3 degrees of freedom (1e-5).
    for place in (numbers % length * 4 // length, numbers * 4 // (rows * length)):
        counts = torch.bincount(place, minlength=4).double()
        apart = (counts - SAMPLE_TOKENS / 4).square().sum() / (SAMPLE_TOKENS / 4)
        assert apart < 25.9


def test_every_token_is_as_likely_as_any_other():
    """Among totals of all sizes, by rank: uniform, by Kolmogorov's distance."""
    places = np.sort(
        np.concatenate([kept([n]).numpy() / n for n in range(300, 3000, 90)])
    )
    distance = np.abs(places - (np.arange(len(places)) + 0.5) / len(places)).max()
    assert distance < 2.2 / len(places) ** 0.5


def test_which_are_taken_is_part_of_the_format():
    """Processes of several machines, and runs that go on, agree on it."""
    assert kept([100_000])[:5].tolist() == [89, 178, 544, 743, 799]


def test_rows_of_anything():
    sample = TokenSample.empty(dtype=torch.int64, device=torch.device("cpu"))
    sample.add(torch.arange(600), 0)
    assert torch.equal(sample.rows, sample.numbers)
