# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What the operators must compute, in numpy float64, and how far float32 may be from it.

Nothing here calls the package: stored bytes are decoded here. Each ``*_f64`` takes the
arguments of the operator that it is named for. ``UNIT`` is float32's unit roundoff: one
float32 operation has a relative error of at most ``UNIT``.
"""

import math
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
import torch
from hadamard_oracle import hadamard_f64, rotated_f64

UNIT = 2.0**-24
TINY = float(torch.finfo(torch.float32).tiny)

# Unit roundoff and smallest subnormal number of the types a result may have.
OUT = {
    torch.float64: (2.0**-53, 2.0**-1074),
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-24),
}


def f64(tensor: torch.Tensor) -> np.ndarray:
    """Exact: float64 holds every value of the narrower types."""
    return tensor.detach().to(torch.float64).numpy()


def ids_for(*shape: int, modalities: int = 3, seed: int = 0) -> torch.Tensor:
    """Every modality occurs, where there are tokens enough; in no order."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(count) % modalities)[order].reshape(shape)


def _rows(ids: Optional[torch.Tensor], tokens: int) -> np.ndarray:
    return np.zeros(tokens, dtype=int) if ids is None else ids.numpy().astype(int)


class Quantized(NamedTuple):
    """Rounded levels of an activation.

    Attributes:
        levels: (T, K) ``H (x * p - o) / s``, not yet rounded.
        scale: (T, 1).
        slack: (T, K) how far float32 may be from a level.
        reach: (T, 1) how far float32 may be from the scale.
    """

    levels: np.ndarray
    scale: np.ndarray
    slack: np.ndarray
    reach: np.ndarray

    @property
    def tie(self) -> np.ndarray:
        """(T, K) whether float32 may round the level to either neighbour."""
        return np.abs(self.levels - np.floor(self.levels) - 0.5) <= self.slack


def smooth_quantize_f64(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    modality_ids: Optional[torch.Tensor],
    act_bits: int,
    act_shift: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> Quantized:
    quant_max = 2 ** (act_bits - 1) - 1
    rows = _rows(modality_ids, x.shape[0])
    # The product of two 24-bit mantissas has 48 bits: exact in float64.
    smoothed = f64(x.float()) * f64(act_pre_scale)[rows]
    slack = UNIT * np.abs(smoothed) + 2.0**-150
    if act_shift is not None:
        smoothed = smoothed - f64(act_shift)[rows]
        slack = slack + UNIT * np.abs(smoothed)
    smoothed, slack = rotated_f64(smoothed, slack, hadamard_size)
    scale = np.abs(smoothed).max(-1, keepdims=True, initial=0.0) / quant_max
    scale = np.maximum(scale, TINY)
    # Behind a scale lie the errors of the largest value and of the division; behind a
    # level its own, the scale's, and the division by it.
    widest = slack.max(-1, keepdims=True, initial=0.0) / quant_max
    reach = 1.001 * (widest + UNIT * scale)
    levels = smoothed / scale
    of_level = (slack + widest * np.abs(levels)) / scale + 3 * UNIT * np.abs(levels)
    return Quantized(levels, scale, of_level, reach)


def assert_quantized(
    qdata: torch.Tensor, scale: torch.Tensor, *args: Any, ties: float = 0.01
) -> None:
    """Bit-exact, but for levels that float32 can't tell from a rounding boundary.

    Args:
        *args: of ``smooth_quantize``.
        ties: share of the levels that may be such; with more there is nothing to check.
    """
    expected = smooth_quantize_f64(*args)
    assert qdata.dtype == torch.int8 and qdata.shape == expected.levels.shape
    assert scale.dtype == torch.float32 and scale.shape == expected.scale.shape
    # What the fake implementation promises to the compiler.
    assert qdata.is_contiguous() and scale.is_contiguous()
    q = qdata.numpy().astype(np.float64)
    wrong = (q != np.round(expected.levels)) & ~expected.tie
    assert not wrong.any(), (q[wrong], expected.levels[wrong])
    # A tie must still be one of the two neighbours.
    assert (np.abs(q - expected.levels) <= 0.5 + expected.slack).all()
    assert (np.abs(f64(scale) - expected.scale) <= expected.reach).all()
    assert not q.size or expected.tie.mean() <= ties, "nothing is left to check"


class Result(NamedTuple):
    """
    Attributes:
        value: (T, N).
        size: (T, N) the sum of the magnitudes of all terms.
        roundings: float32 operations, in a row, that lie behind an element.
        low_rank: (T, N) what of ``size`` is the pair's.
        stepped: (T, N) sum of the magnitudes that the terms would have if all inputs of a
            block of 128 were as large as its largest.
    """

    value: np.ndarray
    size: np.ndarray
    roundings: int
    low_rank: np.ndarray
    stepped: np.ndarray = np.zeros(())

    @property
    def tolerance(self) -> np.ndarray:
        """Of float32 sums in any order."""
        return self.roundings * UNIT * self.size


def assert_within(
    actual: torch.Tensor, expected: np.ndarray, tolerance: np.ndarray
) -> None:
    """``tolerance`` before the result is rounded to its type; 0 is exact."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    unit, smallest = OUT[actual.dtype]
    given = f64(actual)
    error = np.abs(given - expected)
    most = tolerance * (1 + unit) + unit * np.abs(expected) + smallest
    assert (error <= most).all(), (
        f"error {error.max():.3g}, {(error / most).max():.3g} of the tolerance"
    )
    nothing = (tolerance == 0) & (expected == 0)
    assert not given[nothing].any() and not np.signbit(given[nothing]).any()


def unpacked(stored: torch.Tensor, weight_bits: int, in_features: int) -> np.ndarray:
    """(N, K) the integers, decoded byte by byte: the low nibble is the first."""
    if weight_bits > 4:
        return stored.numpy().astype(np.int64)
    pairs = stored.numpy()[..., None].astype(np.int64) >> np.array([0, 4]) & 15
    values = pairs.reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    values = values[..., :in_features]
    return np.where(values > 7, values - 16, values)


def packed(values: np.ndarray, weight_bits: int, left_over: int = 0) -> torch.Tensor:
    """What holds them; ``left_over`` is in the nibble behind an odd row."""
    if weight_bits > 4:
        return torch.from_numpy(values.astype(np.int8))
    if values.shape[-1] % 2:
        values = np.concatenate(
            (values, np.full_like(values[..., :1], left_over)), axis=-1
        )
    nibbles = values.astype(np.uint8) & 15
    return torch.from_numpy(nibbles[..., ::2] | (nibbles[..., 1::2] << 4))


def _grouped(
    v: np.ndarray, integers: np.ndarray, scale: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) sum of the groups' sums times their scales, and of its magnitudes.

    Where v are integers, each group's sum is exact, and cancels exactly.
    """
    groups = scale.shape[1]
    parts = np.stack(
        [
            (v_g @ w_g.T) * f64(scale)[:, g]
            for g, (v_g, w_g) in enumerate(
                zip(np.split(v, groups, 1), np.split(integers, groups, 1))
            )
        ]
    )
    return parts.sum(0), np.abs(parts).sum(0)


def own_columns(
    ids: Optional[torch.Tensor], ranks: Sequence[int], tokens: int
) -> np.ndarray:
    """(T, R) whether a column belongs to the token's modality, by a plain loop."""
    mask = np.zeros((tokens, sum(ranks)), dtype=bool)
    for t, m in enumerate(_rows(ids, tokens).tolist()):
        if 0 < m <= len(ranks):
            start = sum(ranks[: m - 1])
            mask[t, start : start + ranks[m - 1]] = True
    return mask


def low_rank_down_f64(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    l1: torch.Tensor,
    modality_ids: torch.Tensor,
    ranks: Sequence[int],
    low_rank_scale: Optional[torch.Tensor] = None,
) -> Result:
    own = own_columns(modality_ids, ranks, len(qdata))
    factors = np.ones(l1.shape[1]) if low_rank_scale is None else f64(low_rank_scale)
    value = (f64(qdata) @ f64(l1)) * f64(scale) * factors
    size = (np.abs(f64(qdata)) @ np.abs(f64(l1))) * np.abs(f64(scale)) * factors
    value, size = np.where(own, value, 0.0), np.where(own, size, 0.0)
    # A product with each scale, then K products and as many sums.
    roundings = qdata.shape[1] + 2 + (low_rank_scale is not None)
    return Result(value, size, roundings, size)


def _epilogue(
    y: np.ndarray,
    size: np.ndarray,
    roundings: int,
    hidden: np.ndarray,
    widest: np.ndarray,
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> Result:
    low = np.zeros_like(size)
    if l2 is not None:
        y = y + hidden @ f64(l2)
        low = widest @ np.abs(f64(l2))
        # R products and sums, and adding them.
        roundings += l2.shape[0] + 1
    size = size + low
    terms = [] if bias is None else [f64(bias)]
    if modality_bias is not None:
        terms.append(f64(modality_bias)[_rows(ids, len(y))])
    for term in terms:
        y, size = y + term, size + np.abs(term)
    return Result(y, size, roundings + len(terms), low)


def int_linear_f64(
    qx: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    low_rank_hidden: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    weight_bits: int,
    out_dtype: torch.dtype,
) -> Result:
    integers = unpacked(qdata, weight_bits, qx.shape[1])
    y, size = _grouped(qx.numpy().astype(np.int64), integers, scale)
    hidden = np.zeros(0) if low_rank_hidden is None else f64(low_rank_hidden)
    # Of a group the conversion and its sum, two scales.
    return _epilogue(
        y * f64(x_scale),
        size * np.abs(f64(x_scale)),
        3 + scale.shape[1],
        hidden,
        np.abs(hidden),
        l2,
        modality_bias,
        modality_ids,
        bias,
    )


def weight_only_linear_f64(
    x: torch.Tensor,
    act_pre_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    zero_point: Optional[torch.Tensor],
    l1: Optional[torch.Tensor],
    l2: Optional[torch.Tensor],
    modality_bias: Optional[torch.Tensor],
    modality_ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    ranks: Sequence[int],
    weight_bits: int,
    out_dtype: torch.dtype,
    low_rank_scale: Optional[torch.Tensor] = None,
    hadamard_size: int = 1,
) -> Result:
    tokens, in_features = x.shape
    width = in_features // scale.shape[1]
    levels = unpacked(qdata, weight_bits, in_features).astype(np.float64)
    if zero_point is not None:
        levels -= np.repeat(zero_point.numpy(), width, 1)
    weight = levels * np.repeat(f64(scale), width, 1)
    v = f64(x.float()) * f64(act_pre_scale)[_rows(modality_ids, tokens)]
    rotation = hadamard_f64(in_features, hadamard_size)
    v, widest = v @ rotation, np.abs(v) @ np.abs(rotation)
    hidden = wide_hidden = np.zeros(0)
    paired = l1 is not None and modality_ids is not None
    if l1 is not None and paired:
        own = own_columns(modality_ids, ranks, tokens)
        down = f64(l1) * (1.0 if low_rank_scale is None else f64(low_rank_scale))
        hidden, wide_hidden = own * (v @ down), own * (widest @ np.abs(down))
    # The smoothing and the weight's scale, K products and sums, the pair's scale, the
    # rotation.
    rotating = int(math.log2(hadamard_size)) + 2 if hadamard_size > 1 else 0
    blocks = np.arange(0, in_features, 128)
    largest = np.maximum.reduceat(np.abs(v), blocks, 1) if in_features else v
    stepped = np.add.reduceat(np.abs(weight), blocks, 1) if in_features else weight
    result = _epilogue(
        v @ weight.T,
        widest @ np.abs(weight).T,
        2 + in_features + 2 + rotating,
        hidden,
        wide_hidden,
        l2 if paired else None,
        modality_bias,
        modality_ids,
        bias,
    )
    return result._replace(stepped=largest @ stepped.T)


def lost_in_16_bits(x: torch.Tensor, found: Result) -> np.ndarray:
    """(T, N) what a CPU may lose of a weight-only product beside float32's roundings.

    Where a processor multiplies bfloat16, more than 16 such tokens may meet their
    dequantized weight in it, as in any bfloat16 linear. Tokens of 16 bits may become
    integers of 16 bits, in steps of a block's largest.
    """
    if x.device.type != "cpu" or x.element_size() > 2:
        return np.zeros_like(found.value)
    lost = 2.0**-16 * found.stepped
    if len(x) > 16 and x.dtype == torch.bfloat16:
        lost = np.maximum(lost, 2 * 2.0**-8 * found.size)
    return lost


class Linear(NamedTuple):
    """
    Attributes:
        value: (T, N).
        moved: (T, N) how far levels that may be rounded either way, or what is held in
            16 bits, move it.
        size: (T, N) the sum of the magnitudes of all terms.
        relative: of it, how far float32 may be off beside that.
    """

    value: np.ndarray
    moved: np.ndarray
    size: np.ndarray
    relative: np.ndarray

    @property
    def bound(self) -> np.ndarray:
        return self.moved + self.relative * self.size


def linear_f64(
    tensor: Any,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> Linear:
    """``masquant::linear`` of tokens.

    Args:
        tensor: a MASQuantTensor, of which the parts alone are read.
        x: (T, K).
        ids: (T,).
    """
    parts = (tensor.qdata, tensor.scale)
    if not tensor.is_routed:
        ids = None
    paired = tensor.l1 is not None and ids is not None
    pair = (tensor.l1, tensor.l2) if paired else (None, None)
    rest = (tensor.modality_bias, ids, bias)
    block = tensor.hadamard_size or 1
    if tensor.act_bits == 16:
        found = weight_only_linear_f64(
            *(x, tensor.act_pre_scale, *parts, tensor.zero_point, *pair, *rest),
            *(tensor.ranks, tensor.weight_bits, x.dtype, tensor.low_rank_scale, block),
        )
        roundings = np.array(found.roundings)
        lost = lost_in_16_bits(x, found)
        return Linear(found.value, lost, found.size, roundings * UNIT)
    q = smooth_quantize_f64(
        x, tensor.act_pre_scale, ids, tensor.act_bits, tensor.act_shift, block
    )
    rounded = torch.from_numpy(np.round(q.levels).astype(np.int8))
    scale = torch.from_numpy(q.scale)
    hidden = None
    widest = np.zeros(0)
    # What one level more or less of a tie changes, at most.
    weight = np.abs(unpacked(parts[0], tensor.weight_bits, x.shape[1])) * np.repeat(
        f64(tensor.scale), x.shape[1] // tensor.scale.shape[1], 1
    )
    moved = (q.tie * q.scale) @ weight.T
    if paired:
        down = low_rank_down_f64(
            rounded, scale, pair[0], ids, tensor.ranks, tensor.low_rank_scale
        )
        hidden, widest = torch.from_numpy(down.value), down.size
        ties = torch.from_numpy(q.tie.astype(np.int8))
        of_ties = low_rank_down_f64(
            ties, scale, pair[0].abs(), ids, tensor.ranks, tensor.low_rank_scale
        )
        moved = moved + of_ties.value @ np.abs(f64(pair[1]))
    found = int_linear_f64(
        *(rounded, scale, *parts, hidden, pair[1], *rest, tensor.weight_bits, x.dtype)
    )
    if not paired:
        reach = found.roundings * UNIT + q.reach / q.scale
        return Linear(found.value, moved, found.size, reach)
    size = found.size - found.low_rank + widest @ np.abs(f64(pair[1]))
    # K and R products and sums of the pair and the scale in between; of a group the
    # conversion of its sum, two scales and an addition; three additions of the terms.
    roundings = x.shape[1] + sum(tensor.ranks) + tensor.scale.shape[1] + 7
    return Linear(found.value, moved, size, np.array(roundings * UNIT))
