# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators for tokens in floats: bits of what is rounded, float64 for what is added."""

import math
from typing import Any, Optional

import number_oracle as oracle
import pytest
import torch

from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.number_formats import FORMATS, INTEGERS

ops = torch.ops.masquant
T, K, N, M, RANKS = 7, 256, 24, 3, (3, 2)
UNIT = 2.0**-24

every_format = pytest.mark.parametrize("name", FORMATS)


def tokens(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, K, generator=generator)
    return x * torch.exp(spread * torch.randn(T, K, generator=generator))


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of powers of two, so that smoothing rounds nothing; shifts; and ids."""
    generator = torch.Generator().manual_seed(4)
    pre_scale = 2.0 ** torch.randint(-3, 4, (M, K), generator=generator)
    shift = torch.randn(M, K, generator=generator)
    return pre_scale, shift, torch.tensor([0, 1, 2, 0, 2, 1, 1])


def quantized(name: str, x: torch.Tensor) -> tuple[Any, Any, Optional[torch.Tensor]]:
    q, scale, of_token = ops.float_smooth_quantize(
        x, torch.ones(1, x.shape[1]), None, name
    )
    return q, scale, of_token if of_token.shape[1] else None


@every_format
@pytest.mark.parametrize("rotation", [1, 16])
def test_rounded_tokens_to_the_bit(name: str, rotation: int) -> None:
    x, (pre_scale, shift, ids) = tokens(), factors()
    q, scale, of_token = ops.float_smooth_quantize(
        x, pre_scale, ids, name, shift, rotation
    )
    seen = hadamard_rotate(x * pre_scale[ids] - shift[ids], rotation)
    codes, _ = oracle.FORMATS[name].rounded(seen)
    scales, rows = oracle.FORMATS[name].scales(seen)
    assert torch.equal(scale.float(), scales)
    assert of_token.shape == (T, 0 if rows is None else 1)
    if rows is not None:
        assert torch.equal(of_token, rows)
    held = q.view(torch.uint8)
    if FORMATS[name].grid.per_byte == 2:
        held = torch.stack([held & 0xF, held >> 4], -1).flatten(1)
    assert torch.equal(held.long(), codes)


@every_format
@pytest.mark.parametrize("integers", [False, True], ids=["own", "int4"])
@pytest.mark.parametrize("loud", [1.0, 1e12, 1e-12])
def test_product_is_as_exact_as_its_sums(
    name: str, integers: bool, loud: float
) -> None:
    x, weight = tokens() * loud, tokens(0.5).repeat(4, 1)[:N].roll(5, 1)
    x_exact = oracle.FORMATS[name].rounded(x)[1]
    row_scale, weight_format = None, None
    if integers:
        grid = INTEGERS[4]
        codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
        qdata, scale = grid.pack(codes), torch.rand(N, 4) + 0.1
        w_exact = codes.double() * scale.double().repeat_interleave(K // 4, 1)
    else:
        qdata, scale, of_row = quantized(name, weight)
        row_scale, weight_format = None if of_row is None else of_row[:, 0], name
        w_exact = oracle.FORMATS[name].rounded(weight)[1]
    hidden, l2 = torch.randn(T, 5), torch.randn(5, N)
    bias, own, ids = torch.randn(N), torch.randn(M, N), factors()[2]
    y = ops.float_linear(
        *quantized(name, x),
        qdata,
        scale,
        row_scale,
        hidden,
        l2,
        own,
        ids,
        bias,
        name,
        weight_format,
        4 if integers else FORMATS[name].grid.bits,
        torch.float32,
    )
    more = hidden.double() @ l2.double() + own[ids].double() + bias.double()
    size = x_exact.abs() @ w_exact.abs().t()
    size = size * (K + 6) + 8 * (hidden.abs() @ l2.abs() + own[ids].abs() + bias.abs())
    error = (y.double() - (x_exact @ w_exact.t() + more)).abs()
    assert (error <= 1.01 * UNIT * (size + y.abs())).all()


@every_format
@pytest.mark.parametrize("int8", [False, True])
def test_pairs_read_rounded_tokens(name: str, int8: bool) -> None:
    x, ids = tokens(), factors()[2]
    l1 = torch.randn(K, sum(RANKS))
    low_rank_scale = None
    if int8:
        l1, low_rank_scale = (l1 * 30).to(torch.int8), torch.rand(sum(RANKS))
    hidden = ops.float_low_rank_down(
        *quantized(name, x), l1, ids, RANKS, name, low_rank_scale
    )
    exact = oracle.FORMATS[name].rounded(x)[1]
    factor = 1.0 if low_rank_scale is None else low_rank_scale.double()
    expected = exact @ l1.double() * factor
    size = exact.abs() @ l1.double().abs() * factor
    owner = torch.tensor([1, 1, 1, 2, 2])
    own = ids[:, None] == owner
    assert (hidden[~own] == 0).all()
    assert ((hidden - expected).abs() <= (K + 6) * UNIT * size)[own].all()


@every_format
def test_a_broken_token_shows_and_stays_alone(name: str) -> None:
    x, weight = tokens(), tokens()
    qdata, scale, of_row = quantized(name, weight)
    row_scale = None if of_row is None else of_row[:, 0]

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.float_linear(
            *quantized(name, x), qdata, scale, row_scale, None, None, None, None, None,
            name, name, FORMATS[name].grid.bits, torch.float32,
        )  # fmt: skip

    clean = run(x)
    rest = [t for t in range(T) if t != 3]
    for value in (math.inf, -math.inf, math.nan):
        broken = x.clone()
        broken[3, 5] = value
        y = run(broken)
        assert y[3].isnan().all()
        assert torch.equal(y[rest], clean[rest])


@every_format
def test_tokens_of_any_size_keep_their_precision(name: str) -> None:
    """A row of 1e-30, one beyond e4m3 by far, and one of zeros."""
    x, weight = tokens(), tokens()
    qdata, scale, of_row = quantized(name, weight)
    row_scale = None if of_row is None else of_row[:, 0]
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e6, 1e-6, 1.0])
    sized = x[:1] * sizes[:, None]
    y = ops.float_linear(
        *quantized(name, sized), qdata, scale, row_scale, None, None, None, None, None,
        name, name, FORMATS[name].grid.bits, torch.float32,
    )  # fmt: skip
    expected = sized.double() @ weight.double().t()
    assert (y[3] == 0).all()
    off = (y - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-40)
    assert off.max() < 2 * off[0] < 0.5


@every_format
def test_what_is_promised_to_tracers(name: str) -> None:
    x, (pre_scale, shift, ids) = tokens(), factors()
    token = quantized(name, x)
    of_row = None if token[2] is None else token[2][:, 0]
    rest = (torch.randn(T, 5), torch.randn(5, T), torch.randn(M, T), ids, None)
    bits = FORMATS[name].grid.bits
    for operator, args in (
        (ops.float_smooth_quantize, (x, pre_scale, ids, name, shift, 16)),
        (ops.float_low_rank_down, (*token, torch.randn(K, 5), ids, RANKS, name)),
        (
            ops.float_linear,
            (*token, *token[:2], of_row, *rest, name, name, bits, torch.bfloat16),
        ),
    ):
        # Its other checks compare by arithmetic, of which torch has none for e4m3.
        checks = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.default, args, test_utils=checks)
    empty = ops.float_smooth_quantize(x[:0], pre_scale, ids[:0], name)
    assert [len(t) for t in empty] == [0, 0, 0]
