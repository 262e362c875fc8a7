# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Weights made from known parts, and what they must compute, in numpy float64.

The expectations never call the package: stored bytes are decoded here. ``UNIT`` is
float32's unit roundoff: one float32 operation has a relative error of at most it.
"""

import math
from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
import torch
from hadamard_oracle import hadamard_f64, rotated_f64

from torchao_masquant.tensor_subclasses import MASQuantTensor

UNIT = 2.0**-24

# Unit roundoff and smallest subnormal number of the types a result may have.
OUT = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-24),
}

SCHEMES = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a6": (4, 6),
    "w4a4": (4, 4),
    "w3a3": (3, 3),
    "w4a16": (4, 16),
}

NAMES = ("text", "vision", "audio", "touch")


@dataclass
class Case:
    """A quantized weight and what it was made from."""

    weight: torch.Tensor
    smoothing_factor: torch.Tensor
    ranks: tuple[int, ...]
    l1: Optional[torch.Tensor]
    l2: Optional[torch.Tensor]
    modality_bias: Optional[torch.Tensor]
    act_shift: Optional[torch.Tensor]
    tensor: MASQuantTensor


def make(
    scheme: str = "w8a8",
    *,
    shape: tuple[int, int] = (6, 16),
    modalities: int = 3,
    ranks: Sequence[int] = (2, 3),
    with_bias: bool = True,
    with_shift: Optional[bool] = None,
    group_size: Optional[int] = None,
    symmetric: Optional[bool] = None,
    low_rank_bits: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    hadamard_size: Optional[int] = None,
) -> Case:
    """``symmetric`` and ``with_shift``: None for zero points, and no shift, where
    activations are not quantized."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    n, k = shape
    weight_bits, act_bits = SCHEMES[scheme]
    weight = normal(n, k).to(dtype)
    smoothing_factor = normal(modalities, k).exp()
    rank = sum(ranks)
    l1, l2 = (normal(k, rank) / 4, normal(rank, n) / 4) if rank else (None, None)
    bias = normal(modalities, n) if with_bias else None
    shift = None
    if with_shift or (with_shift is None and with_bias and act_bits != 16):
        shift = normal(modalities, k)
    tensor = MASQuantTensor.from_hp(
        weight,
        weight_bits=weight_bits,
        act_bits=act_bits,
        group_size=group_size,
        symmetric=act_bits != 16 if symmetric is None else symmetric,
        modalities=NAMES[:modalities],
        smoothing_factor=smoothing_factor,
        ranks=ranks,
        l1=l1,
        l2=l2,
        modality_bias=bias,
        act_shift=shift,
        low_rank_bits=low_rank_bits,
        hadamard_size=hadamard_size,
    )
    return Case(weight, smoothing_factor, tuple(ranks), l1, l2, bias, shift, tensor)


def unrouted(scheme: str = "w8a8", **kwargs: object) -> MASQuantTensor:
    return make(scheme, modalities=1, ranks=(), with_bias=False, **kwargs).tensor  # type: ignore[arg-type]


def ids_for(*shape: int, modalities: int = 3) -> torch.Tensor:
    count = int(np.prod(shape))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return (torch.arange(count) % modalities)[order].reshape(shape)


def f64(tensor: torch.Tensor) -> np.ndarray:
    """Exact: float64 holds every value of the narrower types."""
    return tensor.detach().to(torch.float64).numpy()


def integers(tensor: MASQuantTensor) -> np.ndarray:
    """(N, K) the stored integers, decoded byte by byte."""
    stored = tensor.qdata.numpy()
    if tensor.weight_bits == 8:
        return stored.astype(np.int64)
    pairs = stored[..., None].astype(np.int64) >> np.array([0, 4]) & 15
    values = pairs.reshape(stored.shape[0], 2 * stored.shape[1])
    values = values[:, : tensor.in_features]
    return np.where(values > 7, values - 16, values)


def smoothed_f64(tensor: MASQuantTensor) -> np.ndarray:
    """(N, K) what the integers stand for; of rotated channels where there is a rotation."""
    width = tensor.in_features // tensor.scale.shape[1]
    levels = integers(tensor)
    if tensor.zero_point is not None:
        levels = levels - np.repeat(tensor.zero_point.numpy(), width, 1).astype(int)
    return levels * np.repeat(f64(tensor.scale), width, axis=1)


def pair_f64(tensor: MASQuantTensor, modality: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, r) and (r, N) of one modality; of rank 0 where it has none."""
    n, k = tensor.shape
    if modality == 0 or tensor.l1 is None:
        return np.zeros((k, 0)), np.zeros((0, n))
    start = sum(tensor.ranks[: modality - 1])
    own = slice(start, start + tensor.ranks[modality - 1])
    down = f64(tensor.l1)[:, own]
    if tensor.low_rank_scale is not None:
        down = down * f64(tensor.low_rank_scale)[own]
    return down, f64(tensor.l2)[own]


def linear_f64(
    tensor: MASQuantTensor,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) ``v Q(W / p_0)^T + v L1_m L2_m + b_m + bias``, ``v = Q(H (x p_m - o_m))``.

    The low-rank branch reads the quantized activations, where they are quantized.
    Token by token.

    Returns:
        The result and how far the operator may be from it before it rounds to the
        output's type.
    """
    if tensor.act_bits == 16:
        return weight_only_f64(tensor, x, ids, bias)
    quant_max = 2 ** (tensor.act_bits - 1) - 1
    base = smoothed_f64(tensor)
    x = x.reshape(-1, x.shape[-1])
    flat = [0] * x.shape[0] if ids is None else ids.reshape(-1).tolist()
    out = np.zeros((x.shape[0], tensor.shape[0]))
    bound = np.zeros_like(out)
    rank = 0 if tensor.l1 is None else tensor.l1.shape[1]
    in_features, groups = tensor.in_features, tensor.scale.shape[1]
    weights = integers(tensor).reshape(tensor.shape[0], groups, -1)
    weight_scale = f64(tensor.scale)
    for t, m in enumerate(flat):
        smoothed, slack = smooth_f64(tensor, x[t], m)
        scale = np.abs(smoothed).max() / quant_max
        levels = smoothed / scale
        q = np.round(levels)
        # Of a level, which may round the other way: what it was smoothed with, and the
        # product and the division behind the scale and the division by it.
        wide = slack.max() / scale * np.abs(levels) / quant_max
        wide = slack / scale + wide + 3 * UNIT * np.abs(levels)
        tie = np.abs(levels - np.floor(levels) - 0.5) <= wide
        down, up = pair_f64(tensor, m)
        # Integers are summed as integers: where they cancel, they cancel exactly.
        parts = np.stack(
            [
                (weights[:, g] @ q.reshape(groups, -1)[g]) * weight_scale[:, g] * scale
                for g in range(groups)
            ]
        )
        main, low = parts.sum(0), (q * scale @ down) @ up
        out[t] = main + low
        size = np.abs(parts).sum(0) + (np.abs(q * scale) @ np.abs(down)) @ np.abs(up)
        bound[t] = tie * scale @ (np.abs(base) + np.abs(down @ up).T).T
        if tensor.modality_bias is not None:
            out[t] += f64(tensor.modality_bias)[m]
            size += np.abs(f64(tensor.modality_bias)[m])
        if bias is not None:
            out[t] += f64(bias)
            size += np.abs(f64(bias))
        # K and R products and sums of the low-rank branch and the scale in between; of
        # a group the conversion of its sum, two scales and an addition; three additions
        # of the terms.
        bound[t] += (in_features + rank + groups + 7) * UNIT * size
    return out, bound


def smooth_f64(
    tensor: MASQuantTensor, x: torch.Tensor, modality: int
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) ``H (x p_m - o_m)`` of one token, and how far float32 may be from it."""
    smoothed = f64(x) * f64(tensor.act_pre_scale)[modality]
    slack = UNIT * np.abs(smoothed)
    if tensor.act_shift is not None:
        smoothed = smoothed - f64(tensor.act_shift)[modality]
        slack = slack + UNIT * np.abs(smoothed)
    return rotated_f64(smoothed, slack, tensor.hadamard_size)


def weight_only_f64(
    tensor: MASQuantTensor,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`linear_f64` of activations that are not quantized."""
    base, pre_scale = smoothed_f64(tensor), f64(tensor.act_pre_scale)
    rotation = hadamard_f64(tensor.in_features, tensor.hadamard_size)
    x = x.reshape(-1, x.shape[-1])
    flat = [0] * x.shape[0] if ids is None else ids.reshape(-1).tolist()
    out = np.zeros((x.shape[0], tensor.shape[0]))
    size = np.zeros_like(out)
    for t, m in enumerate(flat):
        smoothed = f64(x[t]) * pre_scale[m]
        widest = np.abs(smoothed) @ np.abs(rotation)
        smoothed = smoothed @ rotation
        down, up = pair_f64(tensor, m)
        out[t] = base @ smoothed + (smoothed @ down) @ up
        size[t] = np.abs(base) @ widest
        size[t] += (widest @ np.abs(down)) @ np.abs(up)
        if tensor.modality_bias is not None:
            out[t] += f64(tensor.modality_bias)[m]
            size[t] += np.abs(f64(tensor.modality_bias)[m])
    if bias is not None:
        out += f64(bias)
        size += np.abs(f64(bias))
    rank = 0 if tensor.l1 is None else tensor.l1.shape[1]
    # The smoothing and the weight's scale, K products and sums, the pair's scale, R
    # products and sums, three additions of the terms, the stages of the rotation.
    stages = math.log2(tensor.hadamard_size or 1) + 2
    bound = (tensor.in_features + rank + 8 + stages) * UNIT * size
    if x.dtype == torch.bfloat16 and len(x) > 16:
        # Both sides of the product may be rounded to bfloat16, as in any linear of it.
        bound += 2 * 2.0**-8 * size
    return out, bound


def assert_linear(
    y: torch.Tensor,
    tensor: MASQuantTensor,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor] = None,
) -> None:
    assert y.shape == (*x.shape[:-1], tensor.shape[0])
    assert y.dtype == x.dtype
    expected, bound = linear_f64(tensor, x, ids, bias)
    unit, smallest = OUT[y.dtype]
    tolerance = bound * (1 + unit) + unit * np.abs(expected) + smallest
    error = np.abs(f64(y).reshape(expected.shape) - expected)
    assert (error <= tolerance).all(), (error / tolerance).max()


def assert_same_linear(
    y: torch.Tensor,
    other: torch.Tensor,
    tensor: MASQuantTensor,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
) -> None:
    """Two results that differ in the order of float32 sums only.

    Those are the pair's, and those of activations that are not quantized: each is
    within ``(K + R) UNIT`` of what it sums, and a few ``UNIT`` of the whole. Integers are equal: no rounding tie is forgiven.
    """
    q = smooth_levels_size(tensor, x, ids)
    assert y.shape == other.shape == q.shape
    rank = 0 if tensor.l1 is None else tensor.l1.shape[1]
    bound = 2 * (tensor.in_features + rank + 8) * UNIT * q
    error = np.abs(f64(y) - f64(other))
    assert (error <= bound).all(), (error / bound).max()


def smooth_levels_size(
    tensor: MASQuantTensor, x: torch.Tensor, ids: Optional[torch.Tensor]
) -> np.ndarray:
    """(T, N) the sum of the magnitudes of all terms of a result."""
    rows = np.zeros(x.shape[0], dtype=int) if ids is None else ids.numpy()
    smoothed = np.abs(f64(x) * f64(tensor.act_pre_scale)[rows])
    if tensor.act_shift is not None:
        smoothed = smoothed + np.abs(f64(tensor.act_shift)[rows])
    smoothed = smoothed @ np.abs(hadamard_f64(tensor.in_features, tensor.hadamard_size))
    # Rounding moves a value by at most half a step.
    smoothed += smoothed.max(-1, keepdims=True) / (2**tensor.act_bits - 2)
    size = smoothed @ np.abs(smoothed_f64(tensor)).T
    for t, m in enumerate(rows.tolist()):
        down, up = pair_f64(tensor, m)
        size[t] += smoothed[t] @ np.abs(down) @ np.abs(up)
        if tensor.modality_bias is not None:
            size[t] += np.abs(f64(tensor.modality_bias)[m])
    return size


def inner_tensors(tensor: MASQuantTensor) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Bit-exact, in every inner tensor and every attribute."""
    assert isinstance(a, MASQuantTensor) and isinstance(b, MASQuantTensor)
    ours, theirs = inner_tensors(a), inner_tensors(b)
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype, name
        assert torch.equal(t, theirs[name]), name
    assert a.__tensor_flatten__()[1] == b.__tensor_flatten__()[1]
    assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
