# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""How programs walk over the tiles of a linear's product, and over K, in two forms.

- One pass: a fixed number of programs walks over the tiles, in an order that keeps
  the rows and columns of neighbours in L2. For long prompts.
- Split K, for few tokens, whose tiles alone would leave most of a GPU idle: each of
  SPLIT_K programs sums its share of K into a workspace (SPLIT_K, T, N), and
  :func:`torchao_masquant.kernels.gpu.linear_epilogue.add_shares` ends it.

A block of K lies within one group: WIDTH is that of a group of K with one scale, or 0
for one scale a channel. EVEN_K says that blocks cover groups, or all of K, with nothing
over.
"""

from typing import Any, Callable, Iterable

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.gpu import tuning
from torchao_masquant.kernels.gpu.launching import TileConfig, size_hint

__all__ = [
    "block_k",
    "block_of_k",
    "choose",
    "grid",
    "load_block",
    "share_of_k",
    "store_share",
    "tile",
    "tiling",
    "weight_flags",
    "with_block_k",
    "within_registers",
]


@triton.jit
def tile(
    index: tl.tensor,
    tiles_m: tl.tensor,
    tiles_n: tl.tensor,
    GROUP_M: tl.constexpr,
) -> tuple:
    """Row and column of a tile: GROUP_M rows of tiles side by side, down then right."""
    span = GROUP_M * tiles_n
    first = (index // span) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = index % span
    return first + within % height, within // height


@triton.jit
def share_of_k(
    split: tl.tensor,
    in_features: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> tuple:
    """Where share number ``split`` begins and ends, in blocks of K."""
    if WIDTH:
        blocks = (in_features // WIDTH) * ((WIDTH + BLOCK_K - 1) // BLOCK_K)
    else:
        blocks = tl.cdiv(in_features, BLOCK_K)
    share = tl.cdiv(blocks, SPLIT_K)
    begin = split * share
    return begin, tl.minimum(begin + share, blocks)


@triton.jit
def block_of_k(
    block: tl.tensor,
    in_features: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple:
    """Group of a block of K, where the block begins, and what is left to sum there."""
    if WIDTH:
        blocks_per_group = (WIDTH + BLOCK_K - 1) // BLOCK_K
        group = block // blocks_per_group
        offset = (block % blocks_per_group) * BLOCK_K
        k = group * WIDTH + offset
        left = WIDTH - offset
    else:
        group = 0
        k = block * BLOCK_K
        left = in_features - k
    return group, k, left


@triton.jit
def load_block(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    EVEN_K: tl.constexpr,
) -> tl.tensor:
    """Columns k + inner of rows; zeros past what is left."""
    at = rows + (k + inner)[None, :]
    inside = (inner < left)[None, :]
    if EVEN_K:
        block = tl.load(at)
    elif rows.dtype.element_ty == tl.float8e4nv:
        # No integer is converted to it.
        block = tl.load(at, mask=inside, other=0.0)
    else:
        block = tl.load(at, mask=inside, other=0)
    return block


@triton.jit
def store_share(
    workspace: tl.tensor,
    y: tl.tensor,
    split: tl.tensor,
    tile_m: tl.tensor,
    tile_n: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A tile of the sums of share number ``split``."""
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.expand_dims(row, 0 if TRANSPOSED else 1)
    column = tl.expand_dims(column, 1 if TRANSPOSED else 0)
    tl.store(
        workspace + (split.to(tl.int64) * tokens + row) * out_features + column,
        y,
        mask=(row < tokens) & (column < out_features),
    )


def tiling(
    num_warps: int, num_stages: int, m: int, n: int, k: int, split_k: int = 1
) -> TileConfig:
    """Of m tokens by n channels, k features at a time."""
    return TileConfig.of(
        num_warps,
        num_stages,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        # The least that tensor cores take: the sums of a tile leave few registers.
        BLOCK_R=16,
        GROUP_M=8,
        SPLIT_K=split_k,
    )


def within_registers(
    configs: Iterable[TileConfig], most: int
) -> tuple[TileConfig, ...]:
    """Those of which each thread has no more sums of the tile than ``most``."""
    return tuple(
        c for c in configs if c["BLOCK_M"] * c["BLOCK_N"] <= most * 32 * c.num_warps
    )


def block_k(wanted: int, width: int) -> int:
    """A block of K for groups of this width: no wider, and dividing it if one can."""
    if width == 0 or width % wanted == 0:
        return wanted
    divisor = width & -width
    # Tensor cores take at least 32 neighbours of int8.
    if divisor >= 32:
        return min(wanted, divisor)
    return min(wanted, max(32, triton.next_power_of_2(width)))


def with_block_k(config: TileConfig, wanted: int, width: int) -> TileConfig:
    """A tiling whose blocks of K fit groups of this width."""
    blocks = {**dict(config.blocks), "BLOCK_K": block_k(wanted, width)}
    return TileConfig.of(config.num_warps, config.num_stages, **blocks)


def choose(
    operator: str,
    sizes: tuple[int, int, int],
    weight_bits: int,
    grouped: bool,
    configs: tuple[TileConfig, ...],
    fallback: Callable[[int, tuple[TileConfig, ...]], TileConfig],
    device: torch.device,
) -> TileConfig:
    """The tiling for (T, K) tokens by (N, K) weights: a measured one, else by T.

    Args:
        operator: "int_linear" or "weight_only_linear".
        sizes: T, which may be symbolic, N and K.
        weight_bits: up to 4 are packed, two to a byte.
        grouped: a channel has several scales.
        configs: those that the call may take.
        fallback: one of them, by the number of tokens.
        device: of the call.
    """
    return tuning.choose(
        tuning.linear_name(operator, weight_bits, grouped),
        tuning.tuning_key(*sizes),
        configs,
        fallback(size_hint(sizes[0]), configs),
        device,
    )


def grid(config: TileConfig, device: torch.device) -> tuple[int, int]:
    """Programs for the tiles, and shares of K.

    As many as a device can hold at once, or more: no size of the call is in it.
    """
    held = 3
    # Not in Triton's interpreter, nor where a graph is traced for a GPU that is not there.
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        held = properties.multi_processor_count * (16 // config.num_warps)
    return triton.cdiv(held, config["SPLIT_K"]), config["SPLIT_K"]


def weight_flags(
    config: TileConfig, weight_bits: int, in_features: int, width: int, on: torch.device
) -> dict[str, Any]:
    """Constexprs that say how weights lie, and how they are read.

    Args:
        config: the tiling, fitted to the width.
        weight_bits: up to 4 are packed, two to a byte.
        in_features: K.
        width: of a group of K, or 0.
        on: the device.
    """
    return {
        "PACKED": weight_bits <= 4,
        "WIDTH": width,
        "EVEN_K": (width or in_features) % config["BLOCK_K"] == 0,
        "PTX": on.type == "cuda" and torch.version.hip is None,
    }
