# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How much tokens vary, against the definition on all of them."""

import pytest
import torch

from torchao_masquant.learning.token_variation import TokenVariation, tokens_of


@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 300, 17], [0], [0, 3], []])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_it_is_the_sum_over_all_tokens(lengths, mean):
    """Also where they are far from zero: no square of a mean is taken off."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(n, 12, generator=generator) + mean for n in lengths]
    variation = TokenVariation()
    for tokens in samples:
        variation.update(tokens)
    tokens = torch.cat([torch.zeros(0, 12), *samples]).double()
    count = len(tokens)
    assert variation.count == count
    if not count:
        assert variation.energy == 0.0
        return
    expected = (tokens - tokens.mean(0)).square().sum().item() / count
    # Means are off by count eps of their size, and that squared is all of it that stays;
    # sums of squares by count eps of themselves, on either side.
    eps = torch.finfo(torch.float64).eps
    apart = (count * eps * tokens.abs().max().item()) ** 2 * 12
    rounding = 2 * (12 * count) * eps * expected
    cross = 2 * (apart * expected) ** 0.5
    assert abs(variation.energy - expected) <= rounding + cross + apart


def test_tokens_of_a_modality():
    y = torch.arange(12.0).reshape(2, 3, 2)
    ids = torch.tensor([[0, 1, -1], [1, 0, 0]])
    assert torch.equal(tokens_of(y, ids, 1), torch.stack([y[0, 1], y[1, 0]]))
    assert torch.equal(tokens_of(y, None, 0), y.reshape(6, 2))
    assert tokens_of(y, None, 1).shape == (0, 2)
