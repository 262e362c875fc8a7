# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

from typing import Any, Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernel_cases.int_linear import aot_cases
from operator_oracle import UNIT, assert_within, ids_for, int_linear_f64

from torchao_masquant.kernels.gpu.int_linear import int_linear
from torchao_masquant.kernels.gpu.int_linear_tilings import CONFIGS
from torchao_masquant.kernels.gpu.launching import TileConfig


def tiling(m: int, n: int, k: int, split_k: int = 1) -> TileConfig:
    return TileConfig.of(
        4,
        2,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        BLOCK_R=16,
        GROUP_M=2,
        SPLIT_K=split_k,
    )


# Tiles of fewer than 64 tokens are computed transposed.
ONE_PASS = tiling(64, 32, 64)
TRANSPOSED = tiling(16, 32, 32)
SPLIT = tiling(16, 32, 32, 3)
TILINGS = {"one pass": ONE_PASS, "transposed": TRANSPOSED, "split": SPLIT}

# Tokens, K, N.
SHAPES = [
    (0, 8, 5),
    (1, 1, 1),
    (1, 33, 7),
    (5, 31, 3),
    (17, 64, 32),
    (66, 70, 35),
]

every_tiling = pytest.mark.parametrize("config", TILINGS.values(), ids=TILINGS.keys())


def packed(values: np.ndarray) -> torch.Tensor:
    """Two nibbles a byte, low one first; the one left over is not zero, but noise."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)), constant_values=-3)
    nibbles = values.astype(np.uint8) & 15
    return torch.from_numpy((nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).astype("uint8"))


def integers(
    tokens: int, in_features: int, out_features: int, weight_bits: int, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Activations, weights and the weights as the operator wants them."""
    rng = np.random.default_rng([seed, in_features])
    qx = torch.from_numpy(
        rng.integers(-127, 128, (tokens, in_features)).astype(np.int8)
    )
    least, most = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1)
    weight = rng.integers(least, most, (out_features, in_features)).astype(np.int8)
    stored = packed(weight) if weight_bits <= 4 else torch.from_numpy(weight)
    return qx, weight, stored


def hidden_for(ids: Optional[torch.Tensor], tokens: int, ranks: list[int]) -> Any:
    """(T, R) as ``low_rank_down`` leaves it: zeros in the columns of other modalities."""
    hidden = torch.randn(tokens, sum(ranks))
    if ids is not None:
        owner = torch.repeat_interleave(
            torch.arange(1, len(ranks) + 1), torch.tensor(ranks)
        )
        hidden[ids.long()[:, None] != owner] = 0.0
    return hidden


def assert_matches(
    y: torch.Tensor,
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    weight: np.ndarray,
    terms: list[Any],
) -> None:
    """Within what float32, and bfloat16 parts of the hidden state, may lose."""
    expected, size = int_linear_f64(qx, x_scale, weight, *terms)
    scale, hidden, l2 = terms[:3]
    groups = scale.shape[1]
    # Of a block of K (32 at least): the conversion and scale of its sum, and adding it;
    # the token's scale, and three sums of terms.
    blocks = groups * -(-(weight.shape[1] // groups) // 32)
    tolerance = (2 + blocks + 4) * size
    # Triton's interpreter cuts off what does not fit in bfloat16, where a GPU rounds.
    if y.dtype == torch.bfloat16:
        tolerance += 2.0**-8 / UNIT * np.abs(expected)
    if hidden is not None:
        magnitude = (hidden.abs().double() @ l2.abs().double()).numpy()
        # Roundings of up to six products of parts, each a sum of R.
        tolerance += 6 * (l2.shape[0] + 1) * magnitude
        # Left over after one, two or three parts of 7 bits, of h; and of an L2 that one
        # part does not hold, and of their product.
        lost = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-14}.get(y.dtype, 2.0**-21)
        exact = l2.dtype in (torch.bfloat16, torch.int8)
        tolerance += (1 if exact else 4) * lost / UNIT * magnitude
    assert_within(y, expected, tolerance, 1)


@pytest.mark.parametrize("weight_bits", [8, 6, 4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_tiling
def test_integer_part_is_exact(
    config: TileConfig, shape: tuple[int, int, int], weight_bits: int
) -> None:
    """Scales of one: K * 127 * 128 stays below 2 ** 24, where float32 is exact."""
    qx, weight, stored = integers(*shape, weight_bits)
    y = int_linear(
        qx,
        torch.ones(shape[0], 1),
        stored,
        torch.ones(shape[2], 1),
        *[None] * 5,
        weight_bits,
        torch.float32,
        config=config,
    )
    exact = qx.numpy().astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(y.numpy().astype(np.int64), exact)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 32])
def test_extreme_integers_do_not_overflow(groups: int, weight_bits: int) -> None:
    """4096 of the largest products: 2 ** 26 of 8-bit weights, over int16 and 2 ** 24."""
    least = -(2 ** (weight_bits - 1))
    qx = torch.full((3, 4096), -127, dtype=torch.int8)
    weight = np.full((5, 4096), least, dtype=np.int8)
    y = int_linear(
        qx,
        torch.ones(3, 1),
        packed(weight) if weight_bits == 4 else torch.from_numpy(weight),
        torch.ones(5, groups),
        *[None] * 5,
        weight_bits,
        torch.float32,
        config=tiling(16, 16, 256, 4),
    )
    # 127 times a power of two has 7 significant bits.
    assert (y == 127 * -least * 4096).all()


def test_more_features_than_int32_sums() -> None:
    qx = torch.zeros(1, 132105, dtype=torch.int8)
    weight = torch.zeros(1, 132105, dtype=torch.int8)
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="132105"):
        int_linear(qx, one, weight, one, *[None] * 5, 8, torch.float32)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "parts",
    ["bare", "bias", "bf16 pair", "fp16 pair", "fp32 pair", "int8 pair", "all"],
)
@pytest.mark.parametrize("config", [ONE_PASS, SPLIT], ids=["one pass", "split"])
def test_against_float64(
    config: TileConfig,
    parts: str,
    groups: int,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> None:
    tokens, in_features, out_features, ranks = 21, 120, 19, [12, 9]
    torch.manual_seed(0)
    qx, weight, stored = integers(tokens, in_features, out_features, weight_bits)
    x_scale = torch.rand(tokens, 1) / 127
    scale = torch.rand(out_features, groups) / 2**weight_bits
    ids = ids_for(tokens, 3)
    hidden = l2 = modality_bias = bias = None
    if "pair" in parts or parts == "all":
        hidden = hidden_for(ids, tokens, ranks)
        dtype = {"fp16 pair": torch.float16, "fp32 pair": torch.float32}.get(
            parts, torch.bfloat16
        )
        l2 = torch.randn(sum(ranks), out_features).to(dtype)
        if parts == "int8 pair":
            hidden /= 127
            l2 = torch.randint(-127, 128, l2.shape, dtype=torch.int8)
    if parts == "all":
        modality_bias = torch.randn(3, out_features).to(out_dtype)
    if parts in ("bias", "all"):
        bias = torch.randn(out_features).to(out_dtype)
    terms: list[Any] = [scale, hidden, l2, modality_bias, ids, bias]
    y = int_linear(qx, x_scale, stored, *terms, weight_bits, out_dtype, config=config)
    assert y.dtype == out_dtype
    assert_matches(y, qx, x_scale, weight, terms)


@pytest.mark.parametrize("width", [3, 6, 20, 32, 48, 96])
@pytest.mark.parametrize("weight_bits", [8, 4])
@every_tiling
def test_groups_of_any_width(config: TileConfig, weight_bits: int, width: int) -> None:
    """Of an odd width a group may begin in the middle of a byte."""
    shape = (5, 3 * width, 7)
    qx, weight, stored = integers(*shape, weight_bits)
    x_scale, scale = torch.rand(5, 1), torch.rand(7, 3)
    terms: list[Any] = [scale, None, None, None, None, None]
    y = int_linear(
        qx, x_scale, stored, *terms, weight_bits, torch.float32, config=config
    )
    assert_matches(y, qx, x_scale, weight, terms)


MIXES = {
    "none": None,
    "all base": [0] * 70,
    "all one": [2] * 70,
    "alternating": [0, 1, 2, 0, 2] * 14,
    "spans": [0] * 20 + [1] * 15 + [0] * 3 + [2] * 32,
    "one token": [0] * 69 + [1],
    "an empty modality": [0, 2] * 35,
}


@pytest.mark.parametrize(
    "mix, dtype",
    [
        *((mix, torch.int64) for mix in MIXES),
        ("spans", torch.int32),
        ("spans", torch.uint8),
    ],
    ids=str,
)
@every_tiling
def test_modalities(config: TileConfig, mix: str, dtype: torch.dtype) -> None:
    """Spans end inside of tiles of 16 and of 64 tokens, and at none of their ends."""
    tokens, in_features, out_features, ranks = 70, 40, 9, [5, 14]
    torch.manual_seed(1)
    qx, weight, stored = integers(tokens, in_features, out_features, 4)
    x_scale, scale = torch.rand(tokens, 1) / 127, torch.rand(out_features, 1)
    row = MIXES[mix]
    ids = None if row is None else torch.tensor(row, dtype=dtype)
    hidden = hidden_for(ids, tokens, ranks)
    l2 = torch.randn(sum(ranks), out_features).bfloat16()
    terms: list[Any] = [
        *(scale, hidden, l2, torch.randn(3, out_features), ids),
        torch.randn(out_features),
    ]
    y = int_linear(qx, x_scale, stored, *terms, 4, torch.float32, config=config)
    assert_matches(y, qx, x_scale, weight, terms)


@every_tiling
def test_base_tokens_have_no_low_rank_part(config: TileConfig) -> None:
    """Where there is none of it, neither of its sides is read: they are nan here."""
    qx, _, stored = integers(70, 40, 9, 8)
    x_scale, scale = torch.rand(70, 1), torch.rand(9, 1)
    rest = (None, 8, torch.float32)
    bare = int_linear(
        qx, x_scale, stored, scale, None, None, None, None, *rest, config=config
    )
    hidden = torch.full((70, 64), torch.nan)
    base = torch.zeros(70, dtype=torch.int64)
    l2 = torch.full((64, 9), torch.nan)
    y = int_linear(
        qx, x_scale, stored, scale, hidden, l2, None, base, *rest, config=config
    )
    assert torch.equal(y, bare)

    # The second of two modalities has no token, and the first one columns of its own.
    ids = torch.tensor([0] * 35 + [1] * 35)
    hidden[35:, :32] = torch.randn(35, 32)
    hidden[35:, 32:] = 0.0
    l2[:32] = torch.randn(32, 9)
    y = int_linear(
        qx, x_scale, stored, scale, hidden, l2, None, ids, *rest, config=config
    )
    assert torch.equal(y[:35], bare[:35])
    assert torch.isfinite(y).all()
    assert (y[35:] != bare[35:]).any(1).all()


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_split_k_equals_one_pass(split_k: int, weight_bits: int) -> None:
    """Bit by bit, of one scale a channel; 8 parts of 5 blocks leave some with none."""
    tokens, in_features, out_features = 18, 150, 21
    torch.manual_seed(2)
    qx, weight, stored = integers(tokens, in_features, out_features, weight_bits)
    ids = ids_for(tokens, 3)
    hidden = hidden_for(ids, tokens, [4, 4])
    l2 = torch.randn(8, out_features).bfloat16()
    modality_bias, bias = torch.randn(3, out_features), torch.randn(out_features)
    for groups in (1, 5):
        x_scale, scale = torch.rand(tokens, 1) / 127, torch.rand(out_features, groups)
        terms: list[Any] = [scale, hidden, l2, modality_bias, ids, bias]
        split, again, one_pass = (
            int_linear(
                qx, x_scale, stored, *terms, weight_bits, torch.float32, config=config
            )
            for config in (
                tiling(16, 32, 32, split_k),
                tiling(16, 32, 32, split_k),
                tiling(16, 32, 32),
            )
        )
        assert torch.equal(split, again)
        if groups == 1:
            assert torch.equal(split, one_pass)
        assert_matches(split, qx, x_scale, weight, terms)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tilings_to_tune_over(
    config: TileConfig, groups: int, weight_bits: int
) -> None:
    qx, weight, stored = integers(19, 70, 37, weight_bits)
    x_scale, scale = torch.rand(19, 1), torch.rand(37, groups)
    terms: list[Any] = [scale, None, None, None, None, None]
    y = int_linear(
        qx, x_scale, stored, *terms, weight_bits, torch.bfloat16, config=config
    )
    assert_matches(y, qx, x_scale, weight, terms)


@pytest.mark.parametrize("tokens", [1, 16, 40, 100, 300])
@pytest.mark.parametrize("groups", [1, 2])
def test_own_choice_of_tiling(tokens: int, groups: int) -> None:
    qx, weight, stored = integers(tokens, 64, 33, 4)
    x_scale, scale = torch.rand(tokens, 1), torch.rand(33, groups)
    ids = ids_for(tokens, 2)
    hidden, l2 = hidden_for(ids, tokens, [3]), torch.randn(3, 33)
    terms: list[Any] = [scale, hidden, l2, None, ids, None]
    y = int_linear(qx, x_scale, stored, *terms, 4, torch.float32)
    assert_matches(y, qx, x_scale, weight, terms)


def test_modality_bias_of_the_base_without_ids() -> None:
    """A base-only call adds the first row, and so do base tokens of a mixed call."""
    qx, _, stored = integers(6, 16, 5, 8)
    x_scale, scale = torch.rand(6, 1), torch.rand(5, 1)
    modality_bias = torch.tensor([[0.0], [1e6], [2e6]]).expand(3, 5)
    rest = (None, 8, torch.float32)
    common = (qx, x_scale, stored, scale, None, None)
    bare = int_linear(*common, None, None, *rest, config=TRANSPOSED)
    without_ids = int_linear(*common, modality_bias, None, *rest, config=TRANSPOSED)
    assert torch.equal(bare, without_ids)
    ids = torch.tensor([0, 1, 2, 0, 2, 1])
    mixed = int_linear(*common, modality_bias, ids, *rest, config=TRANSPOSED)
    assert torch.equal(mixed[ids == 0], bare[ids == 0])
    assert ((mixed[ids == 1] > 9e5) & (mixed[ids == 1] < 1.1e6)).all()
    assert (mixed[ids == 2] > 1.9e6).all()


@pytest.mark.parametrize("groups", [1, 4])
@every_tiling
def test_non_contiguous_operands(config: TileConfig, groups: int) -> None:
    qx, _, stored = integers(9, 16, 5, 8)
    x_scale, scale = torch.rand(9, 1), torch.rand(5, groups)
    ids = ids_for(9, 2)
    hidden, l2 = hidden_for(ids, 9, [3]), torch.randn(3, 5)
    modality_bias, bias = torch.randn(2, 5), torch.randn(5)
    operands = [qx, x_scale, stored, scale, hidden, l2, modality_bias, ids, bias]
    rest = (8, torch.float32)
    expected = int_linear(*operands, *rest, config=config)
    for spread in (
        # Rows apart from each other, elements apart from each other.
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]] if t.dim() == 2 else t,
        lambda t: torch.stack((t, t), -1)[..., 0],
    ):
        y = int_linear(*[spread(t) for t in operands], *rest, config=config)
        assert torch.equal(y, expected)
        assert y.is_contiguous()


@every_tiling
def test_a_broken_token_stays_alone(config: TileConfig) -> None:
    qx, _, stored = integers(5, 16, 4, 8)
    x_scale, scale = torch.rand(5, 1), torch.rand(4, 1)
    hidden, l2 = torch.randn(5, 3), torch.randn(3, 4)
    ids = torch.tensor([0, 1, 1, 0, 1])
    rest = (None, ids, None, 8, torch.float32)
    clean = int_linear(qx, x_scale, stored, scale, hidden, l2, *rest, config=config)
    x_scale[2], hidden[2] = torch.nan, torch.nan
    y = int_linear(qx, x_scale, stored, scale, hidden, l2, *rest, config=config)
    assert torch.isnan(y[2]).all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 70),
    groups=st.integers(1, 3),
    out_features=st.integers(1, 40),
    weight_bits=st.sampled_from([8, 6, 4, 3]),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    tile=st.sampled_from([(16, 16), (16, 32), (32, 16), (64, 32)]),
    block_k=st.sampled_from([32, 64]),
    split_k=st.integers(1, 3),
    given_ids=st.booleans(),
    out_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_call(
    tokens: int,
    width: int,
    groups: int,
    out_features: int,
    weight_bits: int,
    ranks: list[int],
    tile: tuple[int, int],
    block_k: int,
    split_k: int,
    given_ids: bool,
    out_dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    qx, weight, stored = integers(
        tokens, width * groups, out_features, weight_bits, seed
    )
    x_scale = torch.rand(tokens, 1) / 127
    scale = torch.rand(out_features, groups) / 2**weight_bits
    ids = torch.randint(0, len(ranks) + 1, (tokens,)) if given_ids else None
    hidden = hidden_for(ids, tokens, ranks)
    l2 = torch.randn(sum(ranks), out_features).bfloat16()
    modality_bias = torch.randn(len(ranks) + 1, out_features)
    terms: list[Any] = [scale, hidden, l2, modality_bias, ids, None]
    y = int_linear(
        qx,
        x_scale,
        stored,
        *terms,
        weight_bits,
        out_dtype,
        config=tiling(*tile, block_k, split_k),
    )
    assert_matches(y, qx, x_scale, weight, terms)


@pytest.mark.parametrize("architecture", [None, "sm_80", "sm_90", "gfx942"])
def test_cases_to_compile_name_every_argument(architecture: Optional[str]) -> None:
    cases = aot_cases(architecture)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        blocks = dict(case.config.blocks)
        named = [*case.signature, *case.constexprs, *blocks]
        assert sorted(named) == sorted(case.kernel.arg_names), case.name
        assert set(case.divisible) <= set(case.signature)
    if architecture == "sm_90":
        assert set(CONFIGS) <= {case.config for case in cases}
