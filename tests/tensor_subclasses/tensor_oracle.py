# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Weights made from known parts, and what they must stand for, in numpy float64."""

from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
import torch
from hadamard_oracle import hadamard_f64
from operator_oracle import OUT, UNIT, f64, linear_f64, unpacked

from torchao_masquant.tensor_subclasses import MASQuantTensor

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
class Made:
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
) -> Made:
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
    return Made(weight, smoothing_factor, tuple(ranks), l1, l2, bias, shift, tensor)


def unrouted(scheme: str = "w8a8", **kwargs: object) -> MASQuantTensor:
    return make(scheme, modalities=1, ranks=(), with_bias=False, **kwargs).tensor  # type: ignore[arg-type]


def smoothed_f64(tensor: MASQuantTensor) -> np.ndarray:
    """(N, K) what the integers stand for; of rotated channels where there is a rotation."""
    width = tensor.in_features // tensor.scale.shape[1]
    levels = unpacked(tensor.qdata, tensor.weight_bits, tensor.in_features)
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


def assert_dequantized(tensor: MASQuantTensor, dtype: Optional[torch.dtype]) -> None:
    """Of every modality, in the channels as they come."""
    rotation = hadamard_f64(tensor.in_features, tensor.hadamard_size)
    for index, name in enumerate((None, *tensor.modalities[1:])):
        down, up = pair_f64(tensor, index)
        pre_scale = f64(tensor.act_pre_scale)[index if tensor.is_routed else 0]
        expected = ((smoothed_f64(tensor) + (down @ up).T) @ rotation) * pre_scale
        size = np.abs(smoothed_f64(tensor)) + (np.abs(down) @ np.abs(up)).T
        size = (size @ np.abs(rotation)) * pre_scale
        actual = tensor.dequantize(dtype, name)
        assert actual.dtype == (dtype or tensor.dtype)
        unit, smallest = OUT[actual.dtype]
        # The scale's product, r products and sums of the pair, a sum, a product; a
        # rotation's stages and its factor.
        stages = int(np.log2(tensor.hadamard_size or 1))
        roundings = 4 + down.shape[1] + stages + 2 * (stages > 0)
        tolerance = roundings * UNIT * size + unit * np.abs(expected)
        error = np.abs(f64(actual) - expected)
        assert (error <= tolerance * (1 + unit) + smallest).all()


def assert_linear(
    y: torch.Tensor,
    tensor: MASQuantTensor,
    x: torch.Tensor,
    ids: Optional[torch.Tensor],
    bias: Optional[torch.Tensor] = None,
) -> None:
    assert y.shape == (*x.shape[:-1], tensor.shape[0])
    assert y.dtype == x.dtype
    flat = None if ids is None else ids.reshape(-1)
    found = linear_f64(tensor, x.reshape(-1, x.shape[-1]), flat, bias)
    expected, bound = found.value, found.bound
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
    within ``(K + R) UNIT`` of what it sums, and a few ``UNIT`` of the whole. Integers are
    equal: no rounding tie is forgiven.
    """
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
    assert y.shape == other.shape == size.shape
    bound = 2 * (tensor.in_features + sum(tensor.ranks) + 8) * UNIT * size
    error = np.abs(f64(y) - f64(other))
    assert (error <= bound).all(), (error / bound).max()


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
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
