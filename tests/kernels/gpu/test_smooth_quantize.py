# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Without a GPU these run in Triton's interpreter, on shapes that it can bear."""

import os
import re
import subprocess
import sys
from typing import Optional

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases.smooth_quantize import aot_cases
from operator_oracle import UNIT, assert_integers, f64, ids_for, smooth_quantize_f64

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.smooth_quantize import (
    CONFIGS,
    choose,
    smooth_quantize,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = torch.finfo(torch.float32).tiny
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tiles that small tensors fill, in one block and in several (of half as much).
TILES = [
    TileConfig.of(4, 1, BLOCK_M=4, BLOCK_K=512),
    TileConfig.of(4, 1, BLOCK_M=4, BLOCK_K=64),
    TileConfig.of(4, 1, BLOCK_M=1, BLOCK_K=64),
]
tiles = pytest.mark.parametrize("tile", TILES, ids=["one block", "loop", "row loop"])


def run(
    x: torch.Tensor,
    pre_scale: torch.Tensor,
    ids: Optional[torch.Tensor],
    act_bits: int = 8,
    shift: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
    hadamard_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = smooth_quantize(
        x.to(DEVICE),
        pre_scale.to(DEVICE),
        None if ids is None else ids.to(DEVICE),
        act_bits,
        None if shift is None else shift.to(DEVICE),
        hadamard_size,
        config,
    )
    return q.cpu(), scale.cpu()


def inputs(
    tokens: int, width: int, modalities: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens * 1000 + width)
    x = torch.randn(tokens, width).to(dtype)
    pre_scale = torch.exp(torch.randn(modalities, width))
    return x, pre_scale, ids_for(tokens, modalities)


def check(
    x: torch.Tensor,
    pre_scale: torch.Tensor,
    ids: Optional[torch.Tensor],
    act_bits: int = 8,
    shift: Optional[torch.Tensor] = None,
    config: Optional[TileConfig] = None,
    ties: float = 0.01,
    hadamard_size: int = 1,
) -> None:
    """Bit-equal to the reference, and within float32's reach of float64."""
    q, scale = run(x, pre_scale, ids, act_bits, shift, config, hadamard_size)
    assert q.dtype == torch.int8 and q.shape == x.shape and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (len(x), 1)
    expected_q, expected_scale = reference.smooth_quantize(
        x, pre_scale, ids, act_bits, shift, hadamard_size
    )
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    if not len(x):
        return
    expected = smooth_quantize_f64(x, pre_scale, ids, act_bits, shift, hadamard_size)
    assert_integers(q, expected, ties)
    quant_max = 2 ** (act_bits - 1) - 1
    # Of the largest value its own error, in levels, and that of the division.
    slack = expected.slack.max(-1, keepdims=True) * expected.scale / quant_max
    exact = np.maximum(expected.scale, TINY)
    assert (np.abs(f64(scale) - exact) <= slack + UNIT * exact).all()


def spans(tokens: int, modalities: int) -> torch.Tensor:
    """Runs of one modality, whose ends are not those of tiles."""
    return (torch.arange(tokens) // 3) % modalities


MIXES = {
    "none": lambda tokens: None,
    "all base": lambda tokens: torch.zeros(tokens, dtype=torch.int64),
    "all of one": lambda tokens: torch.full((tokens,), 2),
    "alternating": lambda tokens: torch.arange(tokens) % 3,
    "spans": lambda tokens: spans(tokens, 3),
    "an empty modality": lambda tokens: 2 * (torch.arange(tokens) % 2),
}


@tiles
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shifted", [False, True])
def test_mixes(tile: TileConfig, mix: str, shifted: bool) -> None:
    x, pre_scale, _ = inputs(11, 70, 3)
    shift = torch.randn(3, 70) if shifted else None
    check(x, pre_scale, MIXES[mix](11), 8, shift, tile)


@pytest.mark.parametrize("act_bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 1), (1, 33), (2, 64), (7, 31), (5, 257)], ids=str
)
def test_bits_and_ragged_shapes(shape: tuple[int, int], act_bits: int) -> None:
    x, pre_scale, ids = inputs(*shape, 3)
    for tile in TILES[:2]:
        check(x, pre_scale, ids, act_bits, None, tile)


@tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_types_of_x(tile: TileConfig, dtype: torch.dtype, shifted: bool) -> None:
    """They are widened exactly: nothing is rounded to 16 bits on the way."""
    x, pre_scale, ids = inputs(6, 90, 3, dtype)
    shift = torch.randn(3, 90) if shifted else None
    check(x, pre_scale, ids, 8, shift, tile)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_types_of_ids(dtype: torch.dtype) -> None:
    x, pre_scale, ids = inputs(9, 40, 3)
    check(x, pre_scale, ids.to(dtype), config=TILES[0])


@tiles
def test_a_shift_far_larger_than_what_it_leaves(tile: TileConfig) -> None:
    """Where ``x * p - o`` cancels, a product that is not rounded shows."""
    _, pre_scale, ids = inputs(8, 130, 3)
    shift = 1e4 * torch.randn(3, 130)
    x = (torch.randn(8, 130) + shift[ids]) / pre_scale[ids]
    # Float32 has few bits left of a level, so most may be either neighbour.
    check(x, pre_scale, ids, 8, shift, tile, ties=1.0)
    contracted = (x.double() * pre_scale[ids].double() - shift[ids].double()).float()
    rounded = x * pre_scale[ids] - shift[ids]
    assert (contracted != rounded).float().mean() > 0.5


@tiles
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size, width", [(2, 70), (8, 72), (32, 96), (64, 448)])
def test_rotations(tile: TileConfig, size: int, width: int, shifted: bool) -> None:
    """Of blocks as large as a tile's row, or smaller; a row's last tile is not full."""
    x, pre_scale, ids = inputs(6, width, 3, torch.bfloat16)
    shift = torch.randn(3, width) if shifted else None
    for act_bits in (8, 4):
        check(x, pre_scale, ids, act_bits, shift, tile, 0.01, size)


def test_a_rotation_takes_a_tile_that_holds_its_blocks() -> None:
    x, pre_scale, ids = inputs(5, 4096, 3)
    check(x, pre_scale, ids, 8, None, TILES[1], 0.01, 2048)
    x, pre_scale, ids = inputs(1, 32768, 3)
    with pytest.raises(
        ValueError,
        match=r"a rotation of 32768 neighbours does not fit .* hold 16384: quantize with",
    ):
        run(x, pre_scale, ids, hadamard_size=32768)


@pytest.mark.parametrize("act_bits", [8, 6, 4, 2])
def test_halves_round_to_even(act_bits: int) -> None:
    """A row whose maximum is quant_max has scale 1: its halves are exact ties."""
    quant_max = 2 ** (act_bits - 1) - 1
    halves = [h + 0.5 for h in range(-quant_max, quant_max)]
    x = torch.tensor([[float(quant_max), *halves]])
    for tile in TILES[:2]:
        q, scale = run(x, torch.ones_like(x), None, act_bits, config=tile)
        assert scale.item() == 1.0
        # Python's round() rounds halves to even.
        assert q.tolist() == [[round(v) for v in x[0].tolist()]]


@tiles
def test_rows_of_zeros_and_subnormals(tile: TileConfig) -> None:
    x, pre_scale, ids = inputs(5, 70, 3)
    x[2] = 0
    x[3] = 1e-40
    check(x[:3], pre_scale, ids[:3], config=tile)
    q, scale = run(x, pre_scale, ids, config=tile)
    expected_q, expected_scale = reference.smooth_quantize(x, pre_scale, ids, 8)
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)
    assert scale[2].item() == TINY and not q[2].any()


@tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("column", [0, 69])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_a_broken_token_shows_and_stays_alone(
    tile: TileConfig, value: float, column: int
) -> None:
    x, pre_scale, ids = inputs(5, 70, 3)
    clean_x = x.clone()
    x[3, column] = value
    # The largest number is broken by its factor.
    pre_scale[ids[3], column] = 2.0
    clean_q, clean_scale = run(clean_x, pre_scale, ids, config=tile)
    q, scale = run(x, pre_scale, ids, config=tile)
    expected = torch.full((1,), float("inf" if abs(value) > 1 else "nan"))
    torch.testing.assert_close(scale[3], expected, rtol=0, atol=0, equal_nan=True)
    assert not q[3].any()
    rest = [0, 1, 2, 4]
    assert torch.equal(q[rest], clean_q[rest])
    assert torch.equal(scale[rest], clean_scale[rest])


@tiles
@pytest.mark.parametrize("wrong", [3, -1, 2**32, 2**40])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_id_out_of_range_shows_and_stays_alone(tile: TileConfig, wrong: int) -> None:
    x, pre_scale, ids = inputs(5, 70, 3)
    clean_q, clean_scale = run(x, pre_scale, ids, config=tile)
    ids[1] = wrong
    q, scale = run(x, pre_scale, ids, config=tile)
    assert scale[1].isnan().all() and not q[1].any()
    rest = [0, 2, 3, 4]
    assert torch.equal(q[rest], clean_q[rest])
    assert torch.equal(scale[rest], clean_scale[rest])


@tiles
@pytest.mark.parametrize("kind", ["transposed", "columns", "rows", "expanded", "wider"])
def test_layouts_of_x(tile: TileConfig, kind: str) -> None:
    torch.manual_seed(3)
    x = {
        "transposed": torch.randn(70, 9).t(),
        "columns": torch.randn(9, 140)[:, ::2],
        "rows": torch.randn(18, 70)[::2],
        "expanded": torch.randn(1, 70).expand(9, 70),
        "wider": torch.randn(9, 100)[:, 11:81],
    }[kind]
    _, pre_scale, ids = inputs(9, 70, 3)
    check(x, pre_scale, ids, config=tile)


def test_layouts_of_the_others() -> None:
    x, pre_scale, _ = inputs(9, 70, 3)
    ids = spans(18, 3)[::2]
    shift = torch.randn(70, 3).t()
    wide = torch.cat((pre_scale, torch.full((3, 5), float("nan"))), 1)[:, :70]
    for tile in TILES[:2]:
        check(x, wide, ids, 8, shift, tile)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 150),
    modalities=st.integers(1, 4),
    act_bits=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    shifted=st.booleans(),
    data=st.data(),
)
def test_any_call(
    tokens: int,
    width: int,
    modalities: int,
    act_bits: int,
    dtype: torch.dtype,
    tile: TileConfig,
    shifted: bool,
    data: st.DataObject,
) -> None:
    x, pre_scale, _ = inputs(tokens, width, modalities, dtype)
    one = st.integers(0, modalities - 1)
    drawn = data.draw(st.none() | st.lists(one, min_size=tokens, max_size=tokens))
    ids = None if drawn is None else torch.tensor(drawn)
    shift = torch.randn(modalities, width) if shifted else None
    # Of few levels a single tie may be more than a hundredth.
    check(x, pre_scale, ids, act_bits, shift, tile, ties=1.0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(dict(c.blocks)))
def test_every_tiling_gives_the_same(config: TileConfig) -> None:
    x, pre_scale, ids = inputs(5, 1100, 3)
    check(x, pre_scale, ids, config=config)


@pytest.mark.parametrize("tokens", [0, 1, 16, 500, 4096, 100000])
@pytest.mark.parametrize("width", [1, 1024, 3584, 11008, 18944, 65536])
def test_a_tiling_is_chosen_for_every_size(tokens: int, width: int) -> None:
    config = choose(tokens, width, torch.device("cpu"))
    assert config in CONFIGS
    # A row that any block holds is read once.
    if width <= max(c["BLOCK_K"] for c in CONFIGS):
        assert width <= config["BLOCK_K"]


def test_the_tiling_is_that_of_the_call() -> None:
    x, pre_scale, ids = inputs(3, 40, 3)
    for a, b in zip(run(x, pre_scale, ids), run(x, pre_scale, ids, config=CONFIGS[3])):
        assert torch.equal(a, b)


def test_cases_name_every_argument_once() -> None:
    cases = aot_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [*case.signature, *case.constexprs, *dict(case.config.blocks)]
        assert sorted(names) == sorted(case.kernel.arg_names)
        assert set(case.divisible) <= set(case.signature)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel_cases.smooth_quantize import aot_cases

case = next(c for c in aot_cases() if c.constexprs["HAS_SHIFT"] and {condition})
names = case.kernel.arg_names
source = ASTSource(
    case.kernel,
    {{name: case.signature.get(name, "constexpr") for name in names}},
    {{**case.constexprs, **{changes}, **dict(case.config.blocks)}},
)
options = dict(num_warps=case.config.num_warps, num_stages=case.config.num_stages)
print(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"])
"""


def products_and_fused(condition: str, changes: str = "{}") -> tuple[int, int]:
    """How many of them are in what a GPU would run; the interpreter contracts nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = _COMPILE.format(condition=condition, changes=changes)
    ptx = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    products = re.findall(r"\bmul(?:\.rn)?\.f32", ptx)
    return len(products), len(re.findall(r"\bfma\.rn\.f32", ptx))


def test_a_gpu_rounds_the_product_before_the_shift() -> None:
    products, fused = products_and_fused("not c.constexprs['STAGES']")
    # Contracted, a product and a difference would be a single fma.
    assert products == fused > 0


def test_a_gpu_rounds_the_product_before_the_rotation() -> None:
    rotated = "c.constexprs['STAGES'] and c.constexprs['ONE_BLOCK']"
    products, fused = products_and_fused(rotated, "{'HAS_SHIFT': False}")
    # Of each value its factor's, the rotation's, and one addition of the first stage.
    assert products == 2 * fused > 0
