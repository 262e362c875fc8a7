# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

from typing import Any, Optional

import numpy as np
import pytest
import torch
from operator_oracle import assert_within, bfloat16_operations, f64, ids_for

weight_only_linear = torch.ops.masquant.weight_only_linear

SHAPES = [(0, 8, 5), (1, 1, 1), (1, 33, 7), (5, 31, 3), (17, 64, 32), (33, 130, 65)]


def stored(weight: np.ndarray, weight_bits: int) -> torch.Tensor:
    """Below 8 bits two nibbles a byte, low one first, written without the package."""
    if weight_bits == 8:
        return torch.from_numpy(weight)
    if weight.shape[1] % 2:
        weight = np.pad(weight, ((0, 0), (0, 1)))
    nibbles = weight.astype(np.uint8) & 15
    return torch.from_numpy((nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).astype("uint8"))


class Problem:
    """Operands of one call, and its result in float64, token by token."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        weight_bits: int,
        *,
        groups: int = 1,
        asymmetric: bool = True,
        ranks: tuple[int, ...] = (2, 4),
        low_rank_bits: int = 16,
        dtype: torch.dtype = torch.float32,
    ):
        tokens, in_features, out_features = shape
        rng = np.random.default_rng(in_features)
        torch.manual_seed(in_features)
        least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1)
        size = (out_features, in_features)
        self.weight = rng.integers(least, most, size).astype(np.int8)
        zero_point = rng.integers(least, most, (out_features, groups)).astype(np.int8)
        self.weight_bits, self.ranks = weight_bits, ranks
        self.x = torch.randn(tokens, in_features).to(dtype)
        self.pre_scale = torch.randn(len(ranks) + 1, in_features).exp()
        self.scale = torch.rand(out_features, groups) / 2**weight_bits + 1e-3
        self.zero_point = torch.from_numpy(zero_point) if asymmetric else None
        self.bias = torch.randn(out_features).to(dtype)
        self.modality_bias = torch.randn(len(ranks) + 1, out_features)
        self.ids = ids_for(tokens, len(ranks) + 1)
        rank = sum(ranks)
        self.low_rank_scale: Optional[torch.Tensor] = None
        if low_rank_bits == 8:
            self.l1 = torch.randint(-127, 128, (in_features, rank), dtype=torch.int8)
            self.l2 = torch.randint(-127, 128, (rank, out_features), dtype=torch.int8)
            self.low_rank_scale = torch.rand(rank) / 127**2 + 1e-6
        else:
            self.l1 = torch.randn(in_features, rank).bfloat16()
            self.l2 = torch.randn(rank, out_features).bfloat16()

    def args(self, **other: Any) -> list[Any]:
        whole: dict[str, Any] = dict(
            x=self.x,
            pre_scale=self.pre_scale,
            qdata=stored(self.weight, self.weight_bits),
            scale=self.scale,
            zero_point=self.zero_point,
            l1=self.l1,
            l2=self.l2,
            modality_bias=self.modality_bias,
            ids=self.ids,
            bias=self.bias,
            ranks=self.ranks,
            weight_bits=self.weight_bits,
            out_dtype=self.x.dtype,
            low_rank_scale=self.low_rank_scale,
        )
        return list({**whole, **other}.values())

    def expected(self, base_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Result and, of each element, the sum of the magnitudes of its terms."""
        width = self.weight.shape[1] // self.scale.shape[1]
        weight = self.weight.astype(np.float64)
        if self.zero_point is not None:
            weight -= np.repeat(self.zero_point.numpy(), width, 1)
        weight *= np.repeat(f64(self.scale), width, 1)
        down, up = f64(self.l1), f64(self.l2)
        if self.low_rank_scale is not None:
            down = down * f64(self.low_rank_scale)
        y = np.zeros((self.x.shape[0], weight.shape[0]))
        size = np.zeros_like(y)
        for t, m in enumerate([0] * len(y) if base_only else self.ids.tolist()):
            smoothed = f64(self.x[t]) * f64(self.pre_scale[m])
            terms = [(weight @ smoothed, np.abs(weight) @ np.abs(smoothed))]
            if m:
                start = sum(self.ranks[: m - 1])
                own = slice(start, start + self.ranks[m - 1])
                a, b = down[:, own], up[own]
                low = (smoothed @ a) @ b
                terms.append((low, (np.abs(smoothed) @ np.abs(a)) @ np.abs(b)))
            extra = f64(self.modality_bias)[m]
            terms.append((extra, np.abs(extra)))
            terms.append((f64(self.bias), np.abs(f64(self.bias))))
            y[t] = sum(term for term, _ in terms)
            size[t] = sum(magnitude for _, magnitude in terms)
        return y, size

    @property
    def operations(self) -> int:
        """The smoothing, the weight's scale, K products and sums; the pair's scale, R
        products and sums; three sums of the terms."""
        exact = 2 + self.weight.shape[1] + 1 + 1 + sum(self.ranks) + 1 + 3
        return exact + bfloat16_operations(self.x)


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("weight_bits", [8, 4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    shape: tuple[int, int, int], weight_bits: int, asymmetric: bool
) -> None:
    problem = Problem(shape, weight_bits, asymmetric=asymmetric)
    y = weight_only_linear(*problem.args())
    assert_within(y, *problem.expected(), problem.operations)
    y = weight_only_linear(*problem.args(ids=None))
    assert_within(y, *problem.expected(base_only=True), problem.operations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_rank_bits", [16, 8])
@pytest.mark.parametrize("groups", [1, 2, 4, 20])
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("ranks", [(3,), (0, 4), (1, 0, 5)], ids=str)
def test_parts(
    ranks: tuple[int, ...],
    weight_bits: int,
    groups: int,
    low_rank_bits: int,
    dtype: torch.dtype,
) -> None:
    """Sums are float32's, whatever the type of the result; groups of 3 are odd."""
    problem = Problem(
        (21, 60, 13),
        weight_bits,
        groups=groups,
        ranks=ranks,
        low_rank_bits=low_rank_bits,
        dtype=dtype,
    )
    y = weight_only_linear(*problem.args())
    assert y.dtype == dtype
    assert_within(y, *problem.expected(), problem.operations)


def test_zero_points_are_subtracted_exactly() -> None:
    """Products of small integers: float32 is exact, and int8 would have wrapped."""
    x = torch.randint(-8, 9, (5, 16)).float()
    weight = torch.full((3, 16), -128, dtype=torch.int8)
    zero_point = torch.tensor([[127], [-128], [0]], dtype=torch.int8)
    rest = (None, None, None, None, None, [], 8, torch.float32)
    y = weight_only_linear(
        x, torch.ones(1, 16), weight, torch.ones(3, 1), zero_point, *rest
    )
    expected = x.sum(1, keepdim=True) * torch.tensor([[-255.0, 0.0, -128.0]])
    assert torch.equal(y, expected)


def test_a_base_call_leaves_the_pair_alone() -> None:
    problem = Problem((9, 16, 5), 4)
    bare = weight_only_linear(*problem.args(ids=None, l1=None, l2=None))
    broken = torch.full_like(problem.l1, float("nan"))
    y = weight_only_linear(*problem.args(ids=None, l1=broken))
    assert torch.equal(y, bare)


@pytest.mark.parametrize("ids", [[0, 3, 1], [-1, 0, 1]])
def test_ids_out_of_range_raise(ids: list[int]) -> None:
    problem = Problem((3, 8, 5), 4)
    with pytest.raises(IndexError):
        weight_only_linear(*problem.args(ids=torch.tensor(ids)))


def test_ids_of_int32() -> None:
    problem = Problem((12, 16, 5), 4)
    y = weight_only_linear(*problem.args(ids=problem.ids.int()))
    assert torch.equal(y, weight_only_linear(*problem.args()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_token_stays_alone(value: float) -> None:
    problem = Problem((12, 16, 5), 4, low_rank_bits=8)
    clean = weight_only_linear(*problem.args())
    for m in range(3):
        broken = int((problem.ids == m).nonzero()[0])
        x = problem.x.clone()
        x[broken, 3] = value
        y = weight_only_linear(*problem.args(x=x))
        assert not torch.isfinite(y[broken]).any()
        rest = [t for t in range(12) if t != broken]
        assert torch.equal(y[rest], clean[rest])


def test_a_broken_column_stays_with_its_modality() -> None:
    problem = Problem((12, 16, 5), 4)
    clean = weight_only_linear(*problem.args())
    problem.l1[:, :2] = float("nan")
    y = weight_only_linear(*problem.args())
    others = problem.ids != 1
    assert torch.equal(y[others], clean[others])
    assert torch.isnan(y[~others]).all()


def test_non_contiguous_operands() -> None:
    problem = Problem((9, 16, 5), 8, groups=4)
    wide = torch.stack((problem.x, problem.x), -1)[..., 0]
    assert not wide.is_contiguous()
    y = weight_only_linear(
        *problem.args(
            x=wide,
            qdata=torch.from_numpy(problem.weight).t().contiguous().t(),
            scale=problem.scale.t().contiguous().t(),
            l1=problem.l1.t().contiguous().t(),
        )
    )
    assert_within(y, *problem.expected(), problem.operations)
    assert y.is_contiguous()


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_default_dtype_has_no_say(default: torch.dtype) -> None:
    problem = Problem((9, 64, 5), 4, groups=4)
    expected = weight_only_linear(*problem.args())
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        y = weight_only_linear(*problem.args())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, expected)
