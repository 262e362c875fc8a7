# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Without a GPU these run in Triton's interpreter, on shapes that it can bear."""

import re
from typing import Any, Optional

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import smooth as smooth_cases
from kernel_cases.weight_only_linear import aot_cases
from operator_oracle import UNIT, assert_within, ids_for
from weight_only_problem import Problem

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu.int4_unpacking import UNPACK_BF16, UNPACK_FP16
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.library_products import dense
from torchao_masquant.kernels.gpu.weight_only_linear import weight_only_linear
from torchao_masquant.kernels.gpu.weight_only_tilings import CONFIGS, choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiling(m: int, n: int, k: int, split_k: int = 1) -> TileConfig:
    blocks = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, BLOCK_R=16)
    return TileConfig.of(4, 2, **blocks, GROUP_M=2, SPLIT_K=split_k)


# Tiles of up to 16 tokens are smoothed where they are read, others before.
TILINGS = {
    "one pass": tiling(32, 32, 64),
    "smoothing": tiling(16, 32, 32),
    "split": tiling(16, 32, 32, 3),
}
every_tiling = pytest.mark.parametrize("config", TILINGS.values(), ids=TILINGS.keys())
# Tokens, K, N.
SHAPES = [(0, 8, 5), (1, 1, 1), (1, 33, 7), (5, 31, 3), (17, 64, 32), (34, 70, 35)]


def run(problem: Problem, config: Optional[TileConfig], **other: Any) -> torch.Tensor:
    args = [
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a
        for a in problem.args(**other)
    ]
    return weight_only_linear(*args, config).cpu()


def assert_matches(y: torch.Tensor, problem: Problem, base_only: bool = False) -> None:
    expected, size = problem.expected(base_only)
    # Smoothed tokens are rounded to 16 bits, or cut into three parts of 8 bits; hidden
    # states are in one part, two or three. Triton's interpreter cuts off what does not
    # fit in bfloat16, where a GPU rounds.
    rounded = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    lost = rounded.get(problem.x.dtype, 2.0**-22)
    lost += {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-12}.get(y.dtype, 2.0**-19)
    if y.dtype == torch.bfloat16:
        lost += 2.0**-8
    # Of three parts each product and sum; those of SPLIT_K.
    operations = 3 * problem.operations + 8
    assert_within(y, expected, size * (1 + lost / UNIT / operations), operations)


@pytest.mark.parametrize(
    "weight_bits, asymmetric, dtype",
    [
        (8, True, torch.bfloat16),
        (4, True, torch.float32),
        (4, False, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_tiling
def test_against_float64(
    config: TileConfig,
    shape: tuple[int, int, int],
    weight_bits: int,
    asymmetric: bool,
    dtype: torch.dtype,
) -> None:
    problem = Problem(shape, weight_bits, asymmetric=asymmetric, dtype=dtype)
    assert_matches(run(problem, config), problem)
    base = run(problem, config, ids=None, l1=None, l2=None)
    assert_matches(base, problem, base_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "weight_bits, groups", [(8, 1), (8, 4), (3, 1), (3, 20)], ids=str
)
@pytest.mark.parametrize("ranks, low_rank_bits", [((3,), 8), ((1, 0, 5), 16)], ids=str)
def test_parts(
    ranks: tuple[int, ...],
    low_rank_bits: int,
    weight_bits: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Groups of 3 are odd: they begin in the middle of a byte."""
    problem = Problem(
        (21, 60, 13),
        weight_bits,
        groups=groups,
        ranks=ranks,
        low_rank_bits=low_rank_bits,
        dtype=dtype,
    )
    y = run(problem, TILINGS["one pass"])
    assert y.dtype == dtype
    assert_matches(y, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_bits, groups", [(8, 1), (4, 1), (4, 20)], ids=str)
@every_tiling
def test_no_weight_is_rounded(
    config: TileConfig, weight_bits: int, groups: int, dtype: torch.dtype
) -> None:
    """One feature at a time shows each weight: all bits of it, whatever x's type."""
    problem = Problem((60, 60, 13), weight_bits, groups=groups, dtype=dtype)
    y = run(
        problem,
        config,
        x=torch.eye(60).to(dtype),
        pre_scale=torch.ones(1, 60),
        l1=None,
        l2=None,
        modality_bias=None,
        ids=None,
        bias=None,
        out_dtype=torch.float32,
    )
    assert problem.zero_point is not None
    levels = problem.weight.astype(np.float32)
    levels -= np.repeat(problem.zero_point.numpy(), 60 // groups, 1)
    exact = levels * np.repeat(problem.scale.numpy(), 60 // groups, 1)
    assert np.array_equal(y.numpy(), exact.T)


def test_float32_tokens_keep_their_bits() -> None:
    x = torch.randn(16, 16)
    weight = torch.eye(16, dtype=torch.int8)
    rest = (None, None, None, None, None, None, [], 8, torch.float32)
    for config in TILINGS.values():
        y = weight_only_linear(
            x, torch.ones(1, 16), weight, torch.ones(16, 1), *rest, config=config
        )
        # Three times 8 bits, cut off: all 24 bits.
        assert torch.equal(y, x)


@every_tiling
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotations(config: TileConfig, weight_bits: int, dtype: torch.dtype) -> None:
    """They are never computed where the product reads a part of a token."""
    problem = Problem((18, 64, 7), weight_bits, dtype=dtype, hadamard_size=16)
    assert_matches(run(problem, config), problem)
    y = run(problem, config, ids=None)
    assert_matches(y, problem, base_only=True)


def test_what_is_called_in_place_of_a_kernel_rotates_too() -> None:
    args = Problem((18, 64, 7), 4, hadamard_size=16).args(ids=None)
    expected = reference.weight_only_linear(*args)
    torch.testing.assert_close(dense(*args), expected, rtol=1e-5, atol=1e-5)


MIXES = {
    "all base": lambda t: torch.zeros_like(t),
    "all of one": lambda t: torch.full_like(t, 2),
    "alternating": lambda t: t % 3,
    "spans across tiles": lambda t: (t // 11) % 3,
    "an empty modality": lambda t: 2 * (t % 2),
    "one token": lambda t: (t == 20).long(),
}


@pytest.mark.parametrize(
    "name, paired",
    [("one pass", True), ("split", True), ("one pass", False), ("smoothing", False)],
)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(name: str, mix: str, paired: bool) -> None:
    config = TILINGS[name]
    ranks = (3, 4) if paired else (0, 0)
    problem = Problem((37, 40, 9), 4, groups=2, ranks=ranks, dtype=torch.bfloat16)
    problem.ids = MIXES[mix](torch.arange(37))
    pair = {} if paired else {"l1": None, "l2": None}
    assert_matches(run(problem, config, **pair), problem)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("name", ["one pass", "smoothing"])
def test_types_of_ids(name: str, dtype: torch.dtype) -> None:
    config = TILINGS[name]
    problem = Problem((20, 16, 5), 4, dtype=torch.bfloat16)
    y = run(problem, config, ids=problem.ids.to(dtype))
    assert torch.equal(y, run(problem, config))


@pytest.mark.parametrize("wrong", [3, -1, 2**40])
@every_tiling
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_id_out_of_range_shows_and_stays_alone(
    config: TileConfig, wrong: int
) -> None:
    problem = Problem((20, 16, 5), 4, dtype=torch.bfloat16)
    clean = run(problem, config, l1=None, l2=None)
    ids = problem.ids.clone()
    ids[4] = wrong
    y = run(problem, config, ids=ids, l1=None, l2=None)
    assert y[4].isnan().all()
    rest = [t for t in range(20) if t != 4]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_tiling
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_a_broken_token_stays_alone(config: TileConfig, value: float) -> None:
    problem = Problem((12, 16, 5), 4, low_rank_bits=8, dtype=torch.float16)
    clean = run(problem, config)
    x = problem.x.clone()
    x[3, 7] = value
    y = run(problem, config, x=x)
    assert not torch.isfinite(y[3]).any()
    rest = [t for t in range(12) if t != 3]
    assert torch.equal(y[rest], clean[rest])


@every_tiling
def test_a_base_call_leaves_the_pair_alone(config: TileConfig) -> None:
    problem = Problem((9, 16, 5), 4, dtype=torch.bfloat16)
    bare = run(problem, config, ids=None, l1=None, l2=None)
    broken = torch.full_like(problem.l1, float("nan"))
    assert torch.equal(run(problem, config, ids=None, l1=broken), bare)


@pytest.mark.parametrize("groups", [1, 4])
@every_tiling
def test_non_contiguous_operands(config: TileConfig, groups: int) -> None:
    problem = Problem((9, 16, 5), 8, groups=groups, dtype=torch.bfloat16)
    expected = run(problem, config)
    weight = torch.from_numpy(problem.weight)
    wide = torch.stack((problem.x, problem.x), -1)[..., 0]
    spread = torch.stack((problem.ids, problem.ids + 9), -1)[..., 0]
    assert problem.zero_point is not None
    y = run(
        problem,
        config,
        x=wide,
        pre_scale=problem.pre_scale.t().contiguous().t(),
        qdata=weight.t().contiguous().t(),
        scale=problem.scale.t().contiguous().t(),
        zero_point=problem.zero_point.t().contiguous().t(),
        l1=problem.l1.t().contiguous().t(),
        l2=problem.l2.t().contiguous().t(),
        ids=spread,
    )
    assert torch.equal(y, expected) and y.is_contiguous()


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(dict(c.blocks)))
def test_every_tiling(config: TileConfig, groups: int, weight_bits: int) -> None:
    problem = Problem((19, 140, 37), weight_bits, groups=groups, dtype=torch.bfloat16)
    assert_matches(run(problem, config), problem)


@pytest.mark.parametrize("tokens", [0, 1, 16, 40, 100, 100000])
def test_a_tiling_is_chosen_for_every_size(tokens: int) -> None:
    for dtype in DTYPES:
        config = choose(tokens, 3584, 18944, 4, True, dtype, torch.device("cpu"))
        assert config in CONFIGS


@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_own_choice_of_tiling(tokens: int) -> None:
    problem = Problem((tokens, 40, 9), 4, groups=2, dtype=torch.bfloat16)
    assert_matches(run(problem, None), problem)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    groups=st.integers(1, 3),
    out_features=st.integers(1, 40),
    weight_bits=st.sampled_from([8, 4, 3]),
    asymmetric=st.booleans(),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    config=st.sampled_from(list(TILINGS.values())),
    data=st.data(),
)
def test_any_call(
    tokens: int,
    width: int,
    groups: int,
    out_features: int,
    weight_bits: int,
    asymmetric: bool,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    config: TileConfig,
    data: st.DataObject,
) -> None:
    problem = Problem(
        (tokens, width * groups, out_features),
        weight_bits,
        groups=groups,
        asymmetric=asymmetric,
        ranks=ranks,
        dtype=dtype,
    )
    one = st.integers(0, len(ranks))
    drawn = data.draw(st.none() | st.lists(one, min_size=tokens, max_size=tokens))
    problem.ids = ids_for(tokens, 1) if drawn is None else torch.tensor(drawn)
    if drawn is None:
        y = run(problem, config, ids=None)
    else:
        y = run(problem, config)
    assert_matches(y, problem)


def emulated(asm: str, word: int) -> list[int]:
    """The four registers that the unpacking instructions make of one."""
    registers = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"(\w+)\.b32 ([^;]+);", asm):
        operation, operands = line[0], [o.strip() for o in line[1].split(",")]
        if operation not in ("and", "xor", "shr", "prmt"):
            assert line[0] == "reg" or not operation
            continue
        a, b = value(operands[1]), value(operands[2])
        if operation == "and":
            made = a & b
        elif operation == "xor":
            made = a ^ b
        elif operation == "shr":
            made = a >> b
        else:
            source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            selector = value(operands[3])
            picked = [source[selector >> (4 * i) & 7] for i in range(4)]
            made = int.from_bytes(bytes(picked), "little")
        registers[operands[0]] = made
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    "asm, dtype, offset",
    [(UNPACK_BF16, torch.bfloat16, 136), (UNPACK_FP16, torch.float16, 1032)],
    ids=["bfloat16", "float16"],
)
def test_instructions_that_unpack(asm: Any, dtype: torch.dtype, offset: int) -> None:
    """The interpreter has none, so a model of the four of them runs what a GPU does."""
    for first in range(256):
        stored = bytes([first, (first * 7 + 3) % 256, 255 - first, (first * 31) % 256])
        made = emulated(asm.value, int.from_bytes(stored, "little"))
        halves = np.array(made, dtype="<u4").view("<i2")
        values = torch.from_numpy(halves.astype(np.int16)).view(dtype).float() - offset
        signed = [[(b & 15 ^ 8) - 8, (b >> 4 ^ 8) - 8] for b in stored]
        low, high = zip(*signed)
        assert values.tolist() == [*low, *high]


@pytest.mark.parametrize("architecture", [None, "sm_80", "sm_90", "gfx942"])
def test_cases_to_compile_name_every_argument(architecture: Optional[str]) -> None:
    cases = [*smooth_cases.aot_cases(), *aot_cases(architecture)]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        named = [*case.signature, *case.constexprs, *dict(case.config.blocks)]
        assert sorted(named) == sorted(case.kernel.arg_names), case.name
        assert set(case.divisible) <= set(case.signature)
    found = {case.config for case in cases}
    assert set(CONFIGS) <= found
