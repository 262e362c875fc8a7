# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A MASQuantTensor whose channels are rotated."""

import copy
import io
from typing import Any, Optional

import numpy as np
import pytest
import torch
from hadamard_oracle import hadamard_f64
from tensor_oracle import (
    NAMES,
    SCHEMES,
    assert_linear,
    assert_same,
    f64,
    ids_for,
    make,
    pair_f64,
    smoothed_f64,
)
from torch import nn

from torchao_masquant.tensor_subclasses import (
    MASQuantTensor,
    masquant_tensor,
    quantize_smoothed_weight,
)

linear = torch.ops.masquant.linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 8, 32])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_against_float64(
    scheme: str, group_size: Optional[int], size: int, dtype: torch.dtype
) -> None:
    """Groups are of rotated channels, and may be smaller or larger than blocks."""
    case = make(
        scheme, shape=(7, 96), group_size=group_size, dtype=dtype, hadamard_size=size
    )
    x, ids, bias = torch.randn(19, 96).to(dtype), ids_for(19), torch.randn(7).to(dtype)
    for given in (ids, None):
        y = linear(x, case.tensor, given, bias)
        assert_linear(y, case.tensor, x, given, bias)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("low_rank_bits", [16, 8])
def test_dequantize_is_in_the_channels_as_they_come(
    scheme: str, low_rank_bits: int
) -> None:
    case = make(scheme, low_rank_bits=low_rank_bits, hadamard_size=8)
    tensor, rotation = case.tensor, hadamard_f64(16, 8)
    for m, name in enumerate(NAMES[:3]):
        down, up = pair_f64(tensor, m)
        rotated = smoothed_f64(tensor) + (down @ up).T
        expected = (rotated @ rotation) * f64(tensor.act_pre_scale)[m]
        given = tensor.dequantize(torch.float32, name)
        np.testing.assert_allclose(f64(given), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tensor[2].dequantize(), tensor.dequantize()[2])


def test_it_stands_for_the_weight_it_was_made_of() -> None:
    """At 8 bits half a step of a row's largest rotated value is all that is lost."""
    weight = torch.randn(5, 64)
    factor = torch.randn(1, 64).exp()
    tensor = MASQuantTensor.from_hp(weight, smoothing_factor=factor, hadamard_size=16)
    smoothed = f64(weight) / f64(tensor.act_pre_scale)[0]
    widest = np.abs(smoothed @ hadamard_f64(64, 16)).max(1, keepdims=True)
    error = np.abs(f64(tensor.dequantize()) - f64(weight)) / f64(tensor.act_pre_scale)
    # Half a step of 16 rotated values goes into each.
    assert (error <= np.sqrt(16) * widest / 255 * 1.001).all()


def test_from_integers_takes_rotated_ones() -> None:
    case = make("w4a8", group_size=4, hadamard_size=8)
    qdata, scale, _ = quantize_smoothed_weight(
        case.weight, case.tensor.act_pre_scale[0], 4, 4, hadamard_size=8
    )
    ready = MASQuantTensor.from_integers(
        qdata,
        scale,
        weight_bits=4,
        act_bits=8,
        modalities=NAMES[:3],
        smoothing_factor=case.smoothing_factor,
        dtype=torch.float32,
        ranks=case.ranks,
        l1=case.l1,
        l2=case.l2,
        modality_bias=case.modality_bias,
        act_shift=case.act_shift,
        hadamard_size=8,
    )
    assert_same(ready, case.tensor)


@pytest.mark.parametrize("size", [3, 32, 1])
def test_sizes_that_do_not_fit_are_refused(size: int) -> None:
    for made in (
        lambda: MASQuantTensor.from_hp(torch.randn(4, 48), hadamard_size=size),
        lambda: make(shape=(4, 48), hadamard_size=size),
    ):
        with pytest.raises(ValueError, match=f"hadamard_size={size} .* width of 48"):
            made()


def test_it_is_kept_wherever_the_tensor_goes() -> None:
    tensor = make("w4a8", hadamard_size=8).tensor
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    for other in (
        tensor.clone(),
        tensor.detach(),
        copy.deepcopy(tensor),
        torch.load(file),
        tensor.to("cpu", copy=True),
    ):
        assert_same(other, tensor)
    assert tensor.bfloat16().hadamard_size == 8
    assert torch.empty_like(tensor).hadamard_size == 8
    assert tensor[torch.tensor([1, 3])].hadamard_size == 8
    assert tensor[1].hadamard_size == 8
    assert "hadamard_size=8" in repr(tensor)
    bare = make("w4a8").tensor
    assert "hadamard" not in repr(bare)
    assert not bare.same_layout(tensor)
    assert bare._stable_hash_for_caching() != tensor._stable_hash_for_caching()


def test_what_was_saved_before_there_were_rotations_loads() -> None:
    tensor = make("w4a8").tensor
    older = copy.copy(tensor.__dict__)
    del older["hadamard_size"]
    loaded = tensor.clone()
    loaded.__dict__.clear()
    loaded.__setstate__(older)
    assert_same(loaded, tensor)


def test_a_version_without_rotations_refuses_its_pickles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [io.BytesIO(), io.BytesIO()]
    rotated, bare = make("w4a8", hadamard_size=8).tensor, make("w4a8").tensor
    torch.save({"weight": nn.Parameter(rotated, requires_grad=False)}, files[0])
    torch.save(bare, files[1])
    files[0].seek(0)
    loaded = torch.load(files[0], weights_only=True)["weight"]
    assert isinstance(loaded, nn.Parameter)
    assert_same(loaded.data, rotated)
    monkeypatch.delattr(masquant_tensor, "_rebuild_rotated")
    for file in files:
        file.seek(0)
    assert_same(torch.load(files[1]), bare)
    with pytest.raises(AttributeError, match="_rebuild_rotated"):
        torch.load(files[0], weights_only=False)


def test_pieces_hold_whole_blocks() -> None:
    case = make("w8a8", shape=(6, 32), hadamard_size=8)
    tensor = case.tensor
    assert_same(tensor[2:5], torch.cat([tensor[2:3], tensor[3:5]]))
    assert tensor[2:5].hadamard_size == 8
    pieces = [tensor[:, :8], tensor[:, 8:]]
    assert_same(torch.cat(pieces, 1), tensor)
    x, ids = torch.randn(9, 24), ids_for(9)
    assert_linear(linear(x, pieces[1], ids), pieces[1], x, ids)
    with pytest.raises(
        ValueError, match=r"columns 4:32 .* multiple of 8 .* rotated in blocks of 8"
    ):
        tensor[:, 4:]


def test_weights_of_another_rotation_are_no_neighbours() -> None:
    rotated, bare = (
        make("w8a8", hadamard_size=size, with_bias=False).tensor for size in (8, None)
    )
    with pytest.raises(ValueError, match="torch.cat needs quantized weights of one"):
        torch.cat([rotated, bare])
    with pytest.raises(ValueError, match="experts need weights of one layout"):
        MASQuantTensor.stack([rotated, bare])
    with pytest.raises(ValueError, match="the source's hadamard_size is 8, the target"):
        bare.clone().copy_(rotated)
    with pytest.raises(ValueError, match="same smoothing factors, rotation and bits"):
        linear(torch.randn(2, 16), rotated, None, None, bare)


@pytest.mark.parametrize(
    "scheme, own_shift", [("w8a8", False), ("w8a8", True), ("w4a16", False)]
)
def test_experts(scheme: str, own_shift: bool) -> None:
    """Each expert is a linear of its own, rotated as the others are."""
    cases = [
        make(scheme, seed=seed, hadamard_size=8, with_shift=own_shift)
        for seed in range(3)
    ]
    first = cases[0].tensor
    for case in cases:
        case.tensor.act_pre_scale = first.act_pre_scale
    stacked = MASQuantTensor.stack([case.tensor for case in cases])
    assert stacked.hadamard_size == 8 and stacked[1].hadamard_size == 8
    x, ids = torch.randn(9, 16), ids_for(9)
    ends = torch.tensor([4, 4, 9])
    y = torch.ops.masquant.expert_linear(x, stacked, ends, None, ids)
    for e, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        assert_linear(y[rows], cases[e].tensor, x[rows], ids[rows])


def test_a_rotation_is_part_of_a_compiled_graph() -> None:
    """Weights that differ in it alone get graphs of their own."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, None, None)

    x = torch.randn(4, 16)
    for size in (8, None, 16):
        tensor: Any = make("w8a8", hadamard_size=size).tensor
        assert torch.equal(run(x, tensor), linear(x, tensor, None, None))
