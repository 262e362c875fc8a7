# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``masquant::float_linear`` in Triton: ``y = t_x t_w sum_g s_g,x s_g,w q_x q_w^T + ...``.

One GEMM with everything else in its epilogue
(:mod:`torchao_masquant.kernels.gpu.linear_epilogue`), as ``int_linear`` is. PRODUCT says
what multiplies (:class:`~torchao_masquant.kernels.float_instructions.Product`):

- E4M3: both sides are e4m3, or fit in it but for a power of two that the sum is multiplied
  by (:mod:`~torchao_masquant.kernels.gpu.float_codes`). FNUZ is the same on MI300.
- SCALED: the instruction reads the scales of groups too, of 8 bits each.
- DECODED: codes become bfloat16 in registers, times the scales of 8 bits of their groups.
  That is exact: both together have at most 8 significant bits.

float32 scales of groups are in none of them: a block of K lies within one group of either
side, and its sum is multiplied by both scales and added. Sums are float32, but that Hopper
adds those of e4m3 to about 14 bits within an instruction; those of a block are added to
the others in float32.
"""

import math
from typing import Optional

import torch
import triton
import triton.language as tl

from torchao_masquant.kernels.float_instructions import (
    Product,
    product_on,
    warn_of_decoding,
)
from torchao_masquant.kernels.gpu import tuning
from torchao_masquant.kernels.gpu.float_codes import (
    E4M3,
    FLOAT32,
    NONE,
    Operand,
    as_bytes,
    as_e4m3,
    as_fnuz,
    decoded,
    factor_of_e4m3,
    load_scale,
    spread,
)
from torchao_masquant.kernels.gpu.float_linear_tilings import (
    fallback,
    fitted,
    fitting,
    transposed,
)
from torchao_masquant.kernels.gpu.int4_unpacking import load_nibbles
from torchao_masquant.kernels.gpu.launching import (
    TileConfig,
    launch,
    rows_contiguous,
    shares_of,
    size_hint,
)
from torchao_masquant.kernels.gpu.linear_epilogue import (
    add_shares,
    additions,
    epilogue,
)
from torchao_masquant.kernels.gpu.linear_tiles import (
    block_of_k,
    grid,
    load_block,
    share_of_k,
    store_share,
    tile,
)

__all__ = ["float_linear", "float_linear_kernel", "operand_flags"]

_E4M3 = tl.constexpr(Product.E4M3.value)
_FNUZ = tl.constexpr(Product.FNUZ.value)
_SCALED = tl.constexpr(Product.SCALED.value)


@triton.jit
def _codes(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    inner_bytes: tl.tensor,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(ROWS, BLOCK_K), one a byte."""
    if PACKED:
        codes = load_nibbles(
            rows, k, left, inner, inner_bytes, WIDTH, EVEN_K, ROWS, BLOCK_K
        )
    else:
        codes = load_block(rows, k, left, inner, EVEN_K)
    return codes


@triton.jit
def _operand(
    rows: tl.tensor,
    group_rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    inner: tl.tensor,
    inner_bytes: tl.tensor,
    PRODUCT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BF16_DOT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(ROWS, BLOCK_K) of what the product multiplies, without scales of its own."""
    PACKED: tl.constexpr = MANTISSA == 0 or MANTISSA == 1
    codes = _codes(
        rows, k, left, inner, inner_bytes, PACKED, WIDTH, EVEN_K, ROWS, BLOCK_K
    )
    if PRODUCT == _E4M3:
        operand = as_e4m3(codes, MANTISSA)
        if PACKED:
            operand = operand.to(tl.float8e4nv, bitcast=True)
    elif PRODUCT == _FNUZ:
        operand = as_fnuz(as_e4m3(codes, MANTISSA))
    else:
        operand = decoded(codes, MANTISSA)
        if SCALE > FLOAT32:
            scale = load_scale(group_rows, k, left, SCALE, GROUP, EVEN_K, BLOCK_K)
            operand = operand * spread(scale, GROUP)
        # Triton's interpreter multiplies no bfloat16 matrices.
        if BF16_DOT:
            operand = operand.to(tl.bfloat16)
    return operand


@triton.jit
def _held_scale(
    rows: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(R, BLOCK_K / GROUP) scales as the instruction reads them."""
    group = tl.arange(0, BLOCK_K // GROUP)
    return load_block(rows, k // GROUP, left // GROUP, group, EVEN_K)


@triton.jit
def float_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    workspace: tl.tensor,
    x_groups: tl.tensor,
    groups: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    l2: tl.tensor,
    modality_bias: tl.tensor,
    ids: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    rank: tl.tensor,
    modalities: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    stride_x_groups: tl.tensor,
    stride_groups: tl.tensor,
    stride_x_scale: tl.tensor,
    stride_scale: tl.tensor,
    stride_hidden: tl.tensor,
    stride_l2: tl.tensor,
    stride_modality_bias: tl.tensor,
    stride_ids: tl.tensor,
    PRODUCT: tl.constexpr,
    X_MANTISSA: tl.constexpr,
    X_SCALE: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_MANTISSA: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    FACTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_MODALITY_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    L2_PARTS: tl.constexpr,
    BF16_DOT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """The GEMM; of SPLIT_K > 1, the part that this program's second index names.

    WIDTH is that of what shares float32 scales of groups, 0 where there are none; it and
    EVEN_K are told in ``linear_tiles``, MANTISSA, SCALE and GROUP of either side in
    ``float_codes``. FACTOR makes up for what codes stand for in e4m3.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    split = tl.program_id(1)
    begin, end = share_of_k(split, in_features, WIDTH, BLOCK_K, SPLIT_K)
    inner = tl.arange(0, BLOCK_K)
    inner_bytes = tl.arange(0, BLOCK_K // 2)
    X_PACKED: tl.constexpr = X_MANTISSA == 1
    W_PACKED: tl.constexpr = W_MANTISSA == 0 or W_MANTISSA == 1
    X_FORMAT: tl.constexpr = "e2m1" if X_PACKED else "e4m3"
    W_FORMAT: tl.constexpr = "e2m1" if W_PACKED else "e4m3"
    # As they are multiplied, blocks go from memory to the tensor cores with no detour.
    if PRODUCT == _E4M3 or PRODUCT == _SCALED:
        if not X_PACKED:
            x = x.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        if not W_PACKED:
            weight = weight.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    if PRODUCT == _SCALED:
        if X_SCALE == E4M3:
            x_groups = x_groups.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            groups = groups.to(tl.pointer_type(tl.float8e4nv), bitcast=True)

    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile(index, tiles_m, tiles_n, GROUP_M)
        # Rows past the end read the last one, and are not stored: no mask in the loop.
        rows = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tokens - 1)
        columns = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), out_features - 1)
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
        x_rows = x + rows[:, None] * stride_x
        weight_rows = weight + columns[:, None] * stride_weight
        x_group_rows = x_groups + rows[:, None] * stride_x_groups
        group_rows = groups + columns[:, None] * stride_groups
        shape: tl.constexpr = (BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N)
        y = tl.zeros(shape, dtype=tl.float32)
        for block in range(begin, end):
            _, k, left = block_of_k(block, in_features, WIDTH, BLOCK_K)
            if PRODUCT == _SCALED:
                if X_PACKED:
                    a = load_block(x_rows, k // 2, left // 2, inner_bytes, EVEN_K)
                else:
                    a = load_block(x_rows, k, left, inner, EVEN_K)
                if W_PACKED:
                    b = load_block(weight_rows, k // 2, left // 2, inner_bytes, EVEN_K)
                else:
                    b = load_block(weight_rows, k, left, inner, EVEN_K)
                s_a = _held_scale(x_group_rows, k, left, X_GROUP, EVEN_K, BLOCK_K)
                s_b = _held_scale(group_rows, k, left, W_GROUP, EVEN_K, BLOCK_K)
                if TRANSPOSED:
                    y = tl.dot_scaled(b, s_b, W_FORMAT, tl.trans(a), s_a, X_FORMAT, y)
                else:
                    y = tl.dot_scaled(a, s_a, X_FORMAT, tl.trans(b), s_b, W_FORMAT, y)
            else:
                # What lies past what is left is zero in x, so in the weights it may be
                # anything that is finite.
                a = _operand(
                    x_rows,
                    x_group_rows,
                    k,
                    left,
                    inner,
                    inner_bytes,
                    PRODUCT,
                    X_MANTISSA,
                    X_SCALE,
                    X_GROUP,
                    WIDTH,
                    EVEN_K,
                    BF16_DOT,
                    BLOCK_M,
                    BLOCK_K,
                )
                b = _operand(
                    weight_rows,
                    group_rows,
                    k,
                    left,
                    inner,
                    inner_bytes,
                    PRODUCT,
                    W_MANTISSA,
                    W_SCALE,
                    W_GROUP,
                    WIDTH,
                    EVEN_K,
                    BF16_DOT,
                    BLOCK_N,
                    BLOCK_K,
                )
                if TRANSPOSED:
                    left_side = b
                    right_side = tl.trans(a)
                else:
                    left_side = a
                    right_side = tl.trans(b)
                if WIDTH:
                    part = tl.dot(left_side, right_side, out_dtype=tl.float32)
                    if X_SCALE == FLOAT32:
                        s = tl.load(x_groups + rows * stride_x_groups + k // X_GROUP)
                        part *= tl.expand_dims(s, 0 if TRANSPOSED else 1)
                    if W_SCALE == FLOAT32:
                        s = tl.load(groups + columns * stride_groups + k // W_GROUP)
                        part *= tl.expand_dims(s, 1 if TRANSPOSED else 0)
                    y += part
                elif PRODUCT == _E4M3:
                    y = tl.dot(left_side, right_side, y, max_num_imprecise_acc=BLOCK_K)
                else:
                    y = tl.dot(left_side, right_side, y)
        if FACTOR != 1:
            y *= FACTOR
        if SPLIT_K > 1:
            store_share(
                workspace,
                y,
                split,
                tile_m,
                tile_n,
                tokens,
                out_features,
                TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            epilogue(
                y,
                tile_m,
                tile_n,
                x_scale,
                scale,
                hidden,
                l2,
                modality_bias,
                ids,
                bias,
                out,
                tokens,
                out_features,
                rank,
                modalities,
                stride_x_scale,
                stride_scale,
                stride_hidden,
                stride_l2,
                stride_modality_bias,
                stride_ids,
                PER_CHANNEL,
                HAS_LOW_RANK,
                HAS_MODALITY_BIAS,
                HAS_IDS,
                HAS_BIAS,
                HIDDEN_PARTS,
                L2_PARTS,
                BF16_DOT,
                TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                HAS_X_SCALE,
            )


def product_of(wanted: Product, x: Operand, weight: Operand) -> Product:
    """What multiplies both sides, where the GPU has ``wanted`` for tokens like ``x``."""
    if wanted is Product.SCALED:
        takes = x.scale == weight.scale and x.scale > FLOAT32.value
    else:
        takes = weight.mantissa >= 0 and max(x.scale, weight.scale) <= FLOAT32.value
    return wanted if takes else Product.DECODED


def width_of(x: Operand, weight: Operand) -> int:
    """Of what shares float32 scales of both sides; 0 where there are none.

    Raises:
        ValueError: groups of one side are not made of whole groups of the other.
    """
    width = math.gcd(*(s.group for s in (x, weight) if s.scale == FLOAT32.value))
    for side in (x, weight):
        if width and side.scale > FLOAT32.value and width % side.group:
            raise ValueError(
                f"masquant::float_linear: groups of {width} with float32 scales are not "
                f"made of whole groups of {side.group}, which the other side has: choose "
                f"a group_size that {side.group} divides."
            )
    return width


def operand_flags(
    product: Product, x: Operand, weight: Operand, block_k: int, in_features: int
) -> dict[str, int]:
    """Constexprs of the kernel that say what it multiplies, and by what."""
    width = width_of(x, weight)
    factor = 1.0
    if product in (Product.E4M3, Product.FNUZ):
        factor = factor_of_e4m3(x.mantissa) * factor_of_e4m3(weight.mantissa)
    if product is Product.FNUZ:
        factor *= 4.0
    return {
        "PRODUCT": int(product),
        "X_MANTISSA": x.mantissa,
        "X_SCALE": x.scale,
        "X_GROUP": x.group,
        "W_MANTISSA": weight.mantissa,
        "W_SCALE": weight.scale,
        "W_GROUP": weight.group,
        "FACTOR": int(factor),
        "WIDTH": width,
        "EVEN_K": (width or in_features) % block_k == 0,
    }


def float_linear(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    token_scale: Optional[torch.Tensor],
    qdata: torch.Tensor,
    scale: torch.Tensor,
    row_scale: Optional[torch.Tensor],
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    act_format: str,
    weight_format: Optional[str],
    weight_bits: int,
    out_dtype: torch.dtype,
    config: Optional[TileConfig] = None,
    product: Optional[Product] = None,
) -> torch.Tensor:
    """``y = t_x t_w sum_g s_x,g s_w,g q_x,g q_w,g^T + h L2 + b_m + b``.

    Arguments and result are those of
    :func:`torchao_masquant.kernels.float_reference.float_linear`, but that rows of
    ``low_rank_hidden`` whose token is of the base are taken for zeros. Without a tiling
    that of the tables is taken, and without ``product`` what the GPU has.

    Raises:
        ValueError: groups of one side are not made of whole groups of the other.
    """
    tokens, out_features = qx.shape[0], qdata.shape[0]
    x_bytes = as_bytes(rows_contiguous(qx))
    weight_bytes = as_bytes(rows_contiguous(qdata))
    in_features = qx.shape[1] * (2 if qx.dtype == torch.uint8 else 1)
    x = Operand.of(act_format, 8, x_scale, in_features)
    weight = Operand.of(weight_format, weight_bits, scale, in_features)
    architecture = tuning.table_name(qx.device)
    if product is None:
        product = product_on(architecture, act_format)
        if architecture is not None and product is Product.DECODED:
            warn_of_decoding(qx.device, act_format)
    product = product_of(product, x, weight)
    width = width_of(x, weight)
    if config is None:
        configs = fitting(width, architecture)
        config = tuning.choose(
            f"float_linear {act_format} {weight_format or f'int{weight_bits}'} "
            f"{product.name.lower()}{' group' if width else ''}",
            tuning.tuning_key(tokens, out_features, in_features),
            configs,
            fallback(size_hint(tokens), configs),
            qx.device,
        )
    config = fitted(config, product, width)
    # Scales of whole rows are the epilogue's; codes stand for what there is not.
    of_token = x_scale if x.scale == NONE.value else token_scale
    of_row = scale if weight.scale == NONE.value else row_scale
    x_groups = rows_contiguous(x_scale)
    groups = rows_contiguous(scale)
    if x.scale != FLOAT32.value:
        x_groups = x_bytes if x.scale == NONE.value else as_bytes(x_groups)
    if weight.scale != FLOAT32.value:
        groups = weight_bytes if weight.scale == NONE.value else as_bytes(groups)
    out = torch.empty((tokens, out_features), dtype=out_dtype, device=qx.device)
    workspace = shares_of(out, config, torch.float32)
    added = additions(
        low_rank_hidden, l2, modality_bias, modality_ids, bias, out_dtype, x_bytes
    )
    launch(
        float_linear_kernel,
        grid(config, qx.device),
        x_bytes,
        weight_bytes,
        workspace,
        x_groups,
        groups,
        x_bytes if of_token is None else of_token,
        x_bytes if of_row is None else of_row,
        *added.tensors,
        out,
        tokens,
        out_features,
        in_features,
        added.rank,
        added.modalities,
        x_bytes.stride(0),
        weight_bytes.stride(0),
        x_groups.stride(0),
        groups.stride(0),
        0 if of_token is None else of_token.stride(0),
        0 if of_row is None else of_row.stride(0),
        *added.strides,
        PER_CHANNEL=of_row is not None,
        HAS_X_SCALE=of_token is not None,
        TRANSPOSED=transposed(config, width),
        config=config,
        **operand_flags(product, x, weight, config["BLOCK_K"], in_features),
        **added.flags,
    )
    if workspace is not out:
        per_channel = of_row is not None
        of_rows = x_bytes if of_row is None else of_row
        add_shares(workspace, of_token, of_rows, per_channel, added, out)
    return out
