# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import numpy as np
import pytest
import torch
from operator_oracle import UNIT, f64, ids_for

low_rank_down = torch.ops.masquant.low_rank_down

RANKS = [(3,), (2, 5), (0, 4), (4, 0), (1, 0, 6)]


def inputs(
    tokens: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens + width)
    return (
        torch.randint(-127, 128, (tokens, width), dtype=torch.int8),
        torch.rand(tokens, 1) + 0.1,
        torch.randn(width, sum(ranks)).to(dtype),
        ids_for(tokens, len(ranks) + 1),
    )


def own_columns(ids: torch.Tensor, ranks: tuple[int, ...]) -> np.ndarray:
    """(T, R) whether a column belongs to the token's modality, by a plain loop."""
    mask = np.zeros((len(ids), sum(ranks)), dtype=bool)
    for t, m in enumerate(ids.tolist()):
        if m > 0:
            start = sum(ranks[: m - 1])
            mask[t, start : start + ranks[m - 1]] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 33), (12, 31), (40, 128)], ids=str)
def test_against_float64(
    shape: tuple[int, int], ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, scale, l1, ids = inputs(*shape, ranks, dtype)
    hidden = low_rank_down(q, scale, l1, ids, ranks)
    assert hidden.shape == (shape[0], sum(ranks)) and hidden.dtype == torch.float32
    mask = own_columns(ids, ranks)
    assert (hidden.numpy()[~mask] == 0).all()
    tokens = f64(q) * f64(scale)
    error = np.abs(f64(hidden) - tokens @ f64(l1))
    # One product with the scale, then K products and as many sums.
    tolerance = (shape[1] + 2) * UNIT * (np.abs(tokens) @ np.abs(f64(l1)))
    assert (error <= tolerance)[mask].all()
    if mask.any():
        assert (hidden.numpy()[mask] != 0).all()


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 33), (12, 31), (40, 128)], ids=str)
def test_int8_against_float64(shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    q, scale, _, ids = inputs(*shape, ranks)
    l1 = torch.randint(-127, 128, (shape[1], sum(ranks)), dtype=torch.int8)
    low_rank_scale = torch.rand(sum(ranks)) / 127 + 1e-4
    hidden = low_rank_down(q, scale, l1, ids, ranks, low_rank_scale)
    assert hidden.shape == (shape[0], sum(ranks)) and hidden.dtype == torch.float32
    mask = own_columns(ids, ranks)
    assert (hidden.numpy()[~mask] == 0).all()
    down = f64(l1) * f64(low_rank_scale)
    tokens = f64(q) * f64(scale)
    error = np.abs(f64(hidden) - tokens @ down)
    # One product with each scale, then K products and as many sums.
    tolerance = (shape[1] + 3) * UNIT * (np.abs(tokens) @ np.abs(down))
    assert (error <= tolerance)[mask].all()


def test_ids_of_int32() -> None:
    q, scale, l1, ids = inputs(12, 16, (2, 5))
    a = low_rank_down(q, scale, l1, ids, (2, 5))
    assert torch.equal(a, low_rank_down(q, scale, l1, ids.int(), (2, 5)))


def test_all_base_is_all_zero() -> None:
    q, scale, l1, ids = inputs(12, 16, (2, 5))
    hidden = low_rank_down(q, scale, l1, torch.zeros_like(ids), (2, 5))
    assert (hidden == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_stays_in_its_own_columns(value: float) -> None:
    """A product with a 0/1 mask would turn other modalities' columns into nan."""
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 16, ranks)
    clean = low_rank_down(q, scale, l1, ids, ranks)
    broken = [int((ids == m).nonzero()[0]) for m in (0, 1, 2)]
    scale[broken] = value
    hidden = low_rank_down(q, scale, l1, ids, ranks)
    mask = torch.from_numpy(own_columns(ids, ranks))
    assert (hidden[~mask] == 0).all()
    for t in broken[1:]:
        assert not torch.isfinite(hidden[t][mask[t]]).any()
    rest = [t for t in range(12) if t not in broken]
    assert torch.equal(hidden[rest], clean[rest])


def test_a_broken_column_stays_with_its_modality() -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 16, ranks)
    clean = low_rank_down(q, scale, l1, ids, ranks)
    l1[:, :2] = float("nan")
    hidden = low_rank_down(q, scale, l1, ids, ranks)
    assert torch.equal(hidden[ids != 1], clean[ids != 1])


def test_non_contiguous() -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 16, ranks)
    expected = low_rank_down(q, scale, l1, ids, ranks)
    hidden = low_rank_down(q.t().contiguous().t(), scale, l1, ids, ranks)
    # The order in which a matmul adds may depend on the layout: K + 2 roundings.
    bound = 2 * 18 * UNIT * ((q.abs() * scale).double() @ l1.abs().double())
    assert ((hidden - expected).abs() <= bound).all()
    assert hidden.is_contiguous()
