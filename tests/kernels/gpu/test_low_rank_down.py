# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Without a GPU these run in Triton's interpreter, on shapes that it can bear."""

from typing import Optional

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases.low_rank_down import aot_cases
from operator_oracle import UNIT, f64, ids_for

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.low_rank_down import (
    CONFIGS,
    choose,
    low_rank_down,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
RANKS = [(3,), (2, 5), (0, 4), (4, 0), (1, 0, 6), (20, 5, 17), (0, 0), (2, 1, 3, 0, 2)]
TILES = [
    TileConfig.of(4, 3, BLOCK_M=16, BLOCK_R=16, BLOCK_K=64, SPLIT_K=1),
    TileConfig.of(4, 3, BLOCK_M=32, BLOCK_R=16, BLOCK_K=64, SPLIT_K=3),
]
tiles = pytest.mark.parametrize("tile", TILES, ids=["one pass", "split"])


def run(
    q: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    ids: torch.Tensor,
    ranks: tuple[int, ...],
    low_rank_scale: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
) -> torch.Tensor:
    given = None if low_rank_scale is None else low_rank_scale.to(DEVICE)
    tensors = [t.to(DEVICE) for t in (q, scale, l1, ids)]
    return low_rank_down(*tensors, ranks, given, config).cpu()


def inputs(
    tokens: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens + width)
    l1 = torch.randn(width, sum(ranks))
    return (
        torch.randint(-127, 128, (tokens, width), dtype=torch.int8),
        torch.rand(tokens, 1) + 0.1,
        (40 * l1).clamp(-127, 127).to(dtype),
        ids_for(tokens, len(ranks) + 1),
    )


def own_columns(ids: torch.Tensor, ranks: tuple[int, ...]) -> np.ndarray:
    """(T, R) whether a column belongs to the token's modality, by a plain loop."""
    mask = np.zeros((len(ids), sum(ranks)), dtype=bool)
    for t, m in enumerate(ids.tolist()):
        if 0 < m <= len(ranks):
            start = sum(ranks[: m - 1])
            mask[t, start : start + ranks[m - 1]] = True
    return mask


def check(
    q: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    ids: torch.Tensor,
    ranks: tuple[int, ...],
    low_rank_scale: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
) -> None:
    hidden = run(q, scale, l1, ids, ranks, low_rank_scale, config)
    assert hidden.shape == (len(q), sum(ranks)) and hidden.dtype == torch.float32
    assert hidden.is_contiguous()
    mask = own_columns(ids, ranks)
    # Exact, and no -0.0.
    assert not hidden.view(torch.int32).numpy()[~mask].any()
    down = f64(l1)
    sums = q.numpy().astype(np.float64) @ down
    sizes = np.abs(q.numpy().astype(np.float64)) @ np.abs(down)
    factors = f64(scale)
    if low_rank_scale is not None:
        factors = factors * f64(low_rank_scale)
    if l1.dtype == torch.int8:
        # The sum is exact; it is rounded to float32, and so are two products.
        tolerance = 3 * UNIT * np.abs(sums * factors)
        again = (sums.astype(np.float32) * scale.numpy()).astype(np.float32)
        if low_rank_scale is not None:
            again = again * low_rank_scale.numpy()
        assert np.array_equal(hidden.numpy()[mask], again[mask])
    else:
        # One sum for each of K exact products, of at most three parts; two products.
        parts = 3 if l1.dtype == torch.float32 else 1
        roundings = parts * q.shape[1] + (config or TILES[1])["SPLIT_K"] + 2
        tolerance = roundings * UNIT * np.abs(factors) * sizes
    error = np.abs(f64(hidden) - sums * factors)
    assert (error <= 1.001 * tolerance)[mask].all()
    # The reference rounds s * q as well, and sums K products in float32.
    close = 1.001 * tolerance + (q.shape[1] + 3) * UNIT * np.abs(factors) * sizes
    expected = reference.low_rank_down(q, scale, l1, ids, ranks, low_rank_scale)
    assert (np.abs(f64(hidden) - f64(expected)) <= close).all()


def factors_for(ranks: tuple[int, ...], dtype: torch.dtype) -> Optional[torch.Tensor]:
    return torch.rand(sum(ranks)) / 127 + 1e-4 if dtype == torch.int8 else None


@tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_ranks(tile: TileConfig, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    q, scale, l1, ids = inputs(21, 70, ranks, dtype)
    check(q, scale, l1, ids, ranks, factors_for(ranks, dtype), tile)


@tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 1), (1, 33), (12, 31), (40, 200), (3, 0)], ids=str
)
def test_ragged_shapes(
    tile: TileConfig, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(*shape, ranks, dtype)
    check(q, scale, l1, ids, ranks, factors_for(ranks, dtype), tile)


@tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("with_scale", [False, True])
def test_a_scale_of_columns_with_any_type(
    tile: TileConfig, dtype: torch.dtype, with_scale: bool
) -> None:
    q, scale, l1, ids = inputs(9, 40, (2, 5), dtype)
    given = torch.rand(7) + 0.1 if with_scale else None
    check(q, scale, l1, ids, (2, 5), given, tile)


MIXES = {
    "all base": lambda t: torch.zeros_like(t),
    "all of one": lambda t: torch.full_like(t, 2),
    "alternating": lambda t: t % 3,
    "spans across tiles": lambda t: (t // 11) % 3,
    "an empty modality": lambda t: 2 * (t % 2),
    "one token": lambda t: (t == 20).long(),
    "ids of no modality": lambda t: t % 5 - 1,
}


@tiles
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(tile: TileConfig, mix: str) -> None:
    # Columns of each modality in tiles of their own, and one tile with both.
    ranks = (18, 20)
    q, scale, l1, _ = inputs(37, 50, ranks)
    check(q, scale, l1, MIXES[mix](torch.arange(37)), ranks, None, tile)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_types_of_ids(dtype: torch.dtype) -> None:
    q, scale, l1, ids = inputs(12, 16, (2, 5))
    check(q, scale, l1, ids.to(dtype), (2, 5), None, TILES[0])


@tiles
def test_tiles_without_own_columns_read_nothing(tile: TileConfig) -> None:
    """What they would read here is nan, and tokens there without a modality."""
    ranks = (16, 16)
    q, scale, l1, _ = inputs(64, 40, ranks)
    ids = torch.zeros(64, dtype=torch.int64)
    ids[32:] = 2
    expected = run(q, scale, l1, ids, ranks, None, tile)
    l1[:, :16] = float("nan")
    scale[:32] = float("nan")
    hidden = run(q, scale, l1, ids, ranks, None, tile)
    assert not hidden[:32].any() and not hidden[:, :16].any()
    assert torch.equal(hidden, expected) and hidden[32:, 16:].all()


@tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_broken_token_stays_in_its_own_columns(
    tile: TileConfig, value: float
) -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 16, ranks)
    clean = run(q, scale, l1, ids, ranks, None, tile)
    broken = [int((ids == m).nonzero()[0]) for m in (0, 1, 2)]
    scale[broken] = value
    hidden = run(q, scale, l1, ids, ranks, None, tile)
    mask = torch.from_numpy(own_columns(ids, ranks))
    assert (hidden[~mask] == 0).all()
    for t in broken[1:]:
        assert not torch.isfinite(hidden[t][mask[t]]).any()
    rest = [t for t in range(12) if t not in broken]
    assert torch.equal(hidden[rest], clean[rest])


@tiles
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_broken_column_stays_alone(tile: TileConfig, dtype: torch.dtype) -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 16, ranks, dtype)
    clean = run(q, scale, l1, ids, ranks, None, tile)
    for value in (float("nan"), float("inf")):
        l1[3, 4] = value
        hidden = run(q, scale, l1, ids, ranks, None, tile)
        others = [0, 1, 2, 3, 5, 6]
        assert torch.equal(hidden[:, others], clean[:, others])
        assert not torch.isfinite(hidden[ids == 2, 4]).any()
        assert not hidden[ids != 2, 4].any()


@tiles
def test_sums_past_sixteen_bits_are_exact(tile: TileConfig) -> None:
    """The largest integers there are, of one sign."""
    ranks = (1, 16)
    q, scale, l1, ids = inputs(6, 300, ranks, torch.int8)
    q.fill_(127)
    l1.fill_(-127)
    hidden = run(q, torch.ones_like(scale), l1, ids, ranks, None, tile)
    mask = torch.from_numpy(own_columns(ids, ranks))
    assert (hidden[mask] == -127 * 127 * 300).all()


@tiles
def test_float32_is_not_rounded_to_fewer_bits(tile: TileConfig) -> None:
    """A single product shows every bit of L1: TF32 would keep eleven of them."""
    q, scale, l1, _ = inputs(8, 16, (16,), torch.float32)
    q = torch.eye(8, 16, dtype=torch.int8)
    hidden = run(q, torch.ones_like(scale), l1, torch.ones(8).long(), (16,), None, tile)
    assert torch.equal(hidden, l1[:8])


@tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(tile: TileConfig, dtype: torch.dtype) -> None:
    ranks = (2, 5)
    q, scale, l1, ids = inputs(12, 40, ranks, dtype)
    wide = torch.cat((q, torch.full_like(q, 99)), 1)
    factors = factors_for(ranks, dtype)
    for other in (q.t().contiguous().t(), wide[:, :40]):
        check(other, scale, l1, ids, ranks, factors, tile)
    check(q, scale, l1.t().contiguous().t(), ids, ranks, factors, tile)
    check(q, scale, torch.cat((l1, l1), 1)[:, :7], ids, ranks, factors, tile)
    strided = torch.stack((scale, torch.full_like(scale, 7.0)), 1)[:, 0]
    check(q, strided, l1, torch.stack((ids, ids + 1), 1)[:, 0], ranks, factors, tile)


def test_many_modalities() -> None:
    """More than one launch tells apart."""
    ranks = (1, 0, 2, 3, 0, 1, 17, 2, 1, 0, 0, 3)
    q, scale, l1, _ = inputs(26, 40, ranks)
    for tile in TILES:
        check(q, scale, l1, torch.arange(26) % 13, ranks, None, tile)


@pytest.mark.parametrize("ranks", [(2, 4), (), (7, 1)], ids=str)
def test_ranks_of_another_sum_raise(ranks: tuple[int, ...]) -> None:
    q, scale, l1, ids = inputs(4, 8, (2, 5))
    with pytest.raises(ValueError, match="but l1 has 7 columns"):
        run(q, scale, l1, ids, ranks)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 130),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=6).map(tuple),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    data=st.data(),
)
def test_any_call(
    tokens: int,
    width: int,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    tile: TileConfig,
    data: st.DataObject,
) -> None:
    q, scale, l1, _ = inputs(tokens, width, ranks, dtype)
    one = st.integers(0, len(ranks))
    ids = torch.tensor(data.draw(st.lists(one, min_size=tokens, max_size=tokens)))
    check(q, scale, l1, ids, ranks, factors_for(ranks, dtype), tile)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(dict(c.blocks)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tiling(config: TileConfig, dtype: torch.dtype) -> None:
    ranks = (20, 30)
    q, scale, l1, ids = inputs(18, 300, ranks, dtype)
    check(q, scale, l1, ids, ranks, factors_for(ranks, dtype), config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 16, 100, 500, 100000])
@pytest.mark.parametrize("rank", [1, 32, 64, 512])
def test_a_tiling_is_chosen_for_every_size(
    tokens: int, rank: int, dtype: torch.dtype
) -> None:
    assert choose(tokens, rank, 3584, dtype, torch.device("cpu")) in CONFIGS


def test_the_tiling_of_the_tables_is_taken() -> None:
    q, scale, l1, ids = inputs(5, 40, (2, 5))
    check(q, scale, l1, ids, (2, 5))


def test_cases_name_every_argument_once() -> None:
    cases = aot_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [*case.signature, *case.constexprs, *dict(case.config.blocks)]
        assert sorted(names) == sorted(case.kernel.arg_names)
        assert set(case.divisible) <= set(case.signature)
        assert case.int8_dot == ("*i8" in (case.signature.get("l1"),))
