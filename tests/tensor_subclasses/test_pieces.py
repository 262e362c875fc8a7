# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows, columns, chunks and experts: taken apart, put together, filled one by one."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from operator_oracle import UNIT, f64, ids_for
from tensor_cases import CASES, every_case, storages
from tensor_oracle import (
    assert_linear,
    assert_same,
    assert_same_linear,
    inner_tensors,
    make,
    pair_f64,
    smoothed_f64,
    unrouted,
)
from torch import nn

from torchao_masquant.tensor_subclasses import MASQuantTensor

linear = torch.ops.masquant.linear


@every_case
def test_rows(name: str) -> None:
    tensor = CASES[name]()
    x = torch.randn(7, tensor.shape[1], generator=torch.Generator().manual_seed(0))
    ids = ids_for(7) if tensor.is_routed else None
    whole = {m: tensor.dequantize(modality=m) for m in tensor.modalities}
    for start, end in ((0, 2), (2, 5), (1, 1), (0, 100), (-3, -1), (4, 2)):
        part = tensor[start:end]
        count = len(range(tensor.shape[0])[start:end])
        assert isinstance(part, MASQuantTensor)
        assert part.shape == (count, tensor.shape[1])
        for modality, dense in whole.items():
            assert torch.equal(part.dequantize(modality=modality), dense[start:end])
        y = linear(x, tensor, ids, None)[:, start:end]
        assert_same_linear(linear(x, part, ids, None), y, part, x, ids)
        if count:
            assert_linear(linear(x, part, ids, None), part, x, ids)
    row, chosen = tensor[4], tensor[torch.tensor([4, -5])]
    assert isinstance(row, MASQuantTensor) and row.shape == tensor.shape[1:]
    for modality, dense in whole.items():
        assert torch.allclose(row.dequantize(modality=modality), dense[4])
        found = chosen.dequantize(modality=modality)
        assert torch.allclose(found, dense[[4, -5]])
    mask = torch.zeros(tensor.shape[0], dtype=torch.bool)
    mask[[0, 3]] = True
    assert_same(tensor[mask], tensor.index_select(0, torch.tensor([0, 3])))
    for dim in (0, 1, -1):
        if tensor.shape[dim] % 2 == 0:
            assert_same(torch.cat(tensor.chunk(2, dim=dim), dim=dim), tensor)


@every_case
def test_columns_add_up(name: str) -> None:
    """As row-parallel ranks add theirs: weights side by side, biases summed once."""
    tensor = CASES[name]()
    k = tensor.shape[1]
    cuts = [0, 4, 12, k]
    parts = [tensor[:, a:b] for a, b in zip(cuts, cuts[1:])]
    for index, modality in enumerate(tensor.modalities):
        whole = tensor.dequantize(torch.float32, modality)
        together = torch.cat([p.dequantize(torch.float32, modality) for p in parts], 1)
        # The r products of L1 L2 may be added in another order for fewer columns.
        down, up = pair_f64(tensor, index)
        size = np.abs(smoothed_f64(tensor)) + (np.abs(down) @ np.abs(up)).T
        pre_scale = f64(tensor.act_pre_scale)[index if tensor.is_routed else 0]
        if tensor.hadamard_size:
            # Of a block all values are in each.
            size = size.max(1, keepdims=True) * tensor.hadamard_size
        bound = 2 * (down.shape[1] and down.shape[1] + 2) * UNIT * size * pre_scale
        assert (np.abs(f64(together) - f64(whole)) <= bound).all()
    if tensor.modality_bias is None:
        assert all(p.modality_bias is None for p in parts)
    else:
        total = sum(p.modality_bias for p in parts)
        assert torch.equal(total, tensor.modality_bias)
    for a, b, part in zip(cuts, cuts[1:], parts):
        assert part.in_features == b - a and part.shape == (tensor.shape[0], b - a)
        x = torch.randn(5, b - a, generator=torch.Generator().manual_seed(b))
        ids = ids_for(5) if tensor.is_routed else None
        assert_linear(linear(x, part, ids, None), part, x, ids)


@pytest.mark.parametrize("shifted", [False, True])
def test_outputs_of_columns_add_up(shifted: bool) -> None:
    """Where every slice of a token has the same maximum, and so the same step."""
    made = make("w8a8", with_shift=shifted)
    tensor = made.tensor
    ids = ids_for(9)
    levels = torch.randint(-126, 127, (9, 16)).float()
    levels[:, [0, 5, 13]] = 127
    pre_scale, shift = tensor.act_pre_scale, tensor.act_shift
    if shift is not None:
        # Whole numbers and powers of two: x p - o comes out exact, so that the levels
        # above are those of every slice.
        tensor = MASQuantTensor.from_hp(
            made.weight,
            modalities=tensor.modalities,
            smoothing_factor=(2.0 ** made.smoothing_factor.log2().round()),
            ranks=made.ranks,
            l1=made.l1,
            l2=made.l2,
            modality_bias=made.modality_bias,
            act_shift=(shift * 8).round(),
        )
        pre_scale, shift = tensor.act_pre_scale, tensor.act_shift
        x = (levels + shift[ids]) / pre_scale[ids]
        assert torch.equal(x * pre_scale[ids] - shift[ids], levels)
    else:
        x = levels / pre_scale[ids]
    # 127 / p * p may be off by a rounding, and with it a slice's step by two UNIT:
    # well within what assert_same_linear grants a sum of K terms.
    assert_same_linear(_sum(x, tensor, ids), linear(x, tensor, ids), tensor, x, ids)


def test_outputs_of_columns_of_weights_alone_add_up() -> None:
    """Nothing is rounded on the way: any token, to the order of sums."""
    tensor = make("w4a16", group_size=4, low_rank_bits=8).tensor
    ids = ids_for(9)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert_same_linear(_sum(x, tensor, ids), linear(x, tensor, ids), tensor, x, ids)


def _sum(x: torch.Tensor, tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    cuts = ((0, 4), (4, 12), (12, 16))
    return torch.stack([linear(x[:, a:b], tensor[:, a:b], ids) for a, b in cuts]).sum(0)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_slices_are_views(scheme: str) -> None:
    for part_of in (lambda t: t[2:4], lambda t: t[:, 4:8]):
        tensor = make(scheme, group_size=4, low_rank_bits=8).tensor
        part = part_of(tensor)
        shared = storages(tensor)
        for name, t in inner_tensors(part).items():
            if name == "modality_bias" and part.shape[0] == 6:
                continue  # zeros of its own, where column 0 is another slice's
            assert t.untyped_storage().data_ptr() in shared, name
        part.scale.zero_()
        assert (part_of(tensor).dequantize() == 0).all()
        assert (tensor.dequantize() != 0).any()


def test_narrow_is_slicing() -> None:
    tensor = make("w4a8").tensor
    assert_same(tensor.narrow(0, 1, 3), tensor[1:4])
    assert_same(tensor.narrow(1, 2, 6), tensor[:, 2:8])
    assert_same(tensor.narrow(-1, 2, 6), tensor[:, 2:8])
    assert_same(tensor.narrow(-2, 0, 2), tensor[:2])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w3a3", "w4a16"])
def test_loading_shards_as_vllm_does(scheme: str) -> None:
    """``param.data.narrow(...).copy_(loaded.narrow(...))`` fills the parameter."""
    for dim in (0, 1):
        parameter = nn.Parameter(make(scheme, shape=(8, 16), seed=1).tensor, False)
        loaded = make(scheme, shape=(8, 16), seed=2).tensor
        size = parameter.shape[dim] // 2
        for rank in range(2):
            target = parameter.data.narrow(dim, rank * size, size)
            source = loaded.narrow(dim, rank * size, size)
            assert not torch.equal(target.qdata, source.qdata)
            target.copy_(source)
            assert_same(target, source)
        for name, t in inner_tensors(loaded).items():
            assert torch.equal(getattr(parameter.data, name), t), name


def test_merging_projections_as_vllm_does() -> None:
    """q, k and v, of one input and so of one smoothing, into one parameter's rows."""
    merged = make(shape=(12, 16), seed=1).tensor
    for t in inner_tensors(merged).values():
        t.zero_()
    source = make(shape=(12, 16), seed=2).tensor
    for start, size in ((0, 6), (6, 2), (8, 4)):
        merged.narrow(0, start, size).copy_(source[start : start + size].clone())
    assert_same(merged, source)


def test_columns_between_groups_bytes_or_blocks_raise() -> None:
    for options, bounds, multiple, described in (
        (dict(scheme="w4a8"), (1, 8), 2, "4-bit integers, group size 16"),
        (dict(scheme="w4a8"), (2, 7), 2, "4-bit integers, group size 16"),
        (dict(group_size=4), (2, 8), 4, "8-bit integers, group size 4"),
        (dict(group_size=4), (4, 6), 4, "8-bit integers, group size 4"),
        (
            dict(scheme="w4a8", group_size=8),
            *((4, 8), 8, "4-bit integers, group size 8"),
        ),
        (dict(group_size=2), (1, 4), 2, "8-bit integers, group size 2"),
        (dict(scheme="w3a3"), (1, 8), 2, "3-bit integers, group size 16"),
        (
            dict(scheme="w4a16", group_size=4),
            *((2, 8), 4, "4-bit integers, group size 4"),
        ),
        (
            dict(hadamard_size=8),
            *((4, 16), 8, "8-bit integers, group size 16, rotated in blocks of 8"),
        ),
    ):
        tensor = make(**options).tensor  # type: ignore[arg-type]
        message = (
            f"columns {bounds[0]}:{bounds[1]} of a MASQuantTensor of shape (6, 16) must "
            f"start and end on a multiple of {multiple} ({described})."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            tensor[:, bounds[0] : bounds[1]]


def test_choices_that_are_refused() -> None:
    tensor = make().tensor
    step = re.escape("MASQuantTensor slices with step 1 only, got step=2.")
    one_list = "by one list of indices or one mask"
    for index, error, match in (
        (slice(0, 6, 2), ValueError, step),
        ((slice(None), slice(None, None, 2)), ValueError, step),
        ((slice(None), 0), ValueError, "experts and rows are taken one by one"),
        ((torch.tensor([0]), torch.tensor([1])), ValueError, one_list),
        (torch.tensor([True, False]), IndexError, "a mask of 2 values does not fit"),
    ):
        with pytest.raises(error, match=match):
            tensor[index]


def test_the_last_columns_of_an_odd_width() -> None:
    tensor = make("w4a8", shape=(5, 15)).tensor
    part = tensor[:, 10:]
    assert part.shape == (5, 5) and part.qdata.shape == (5, 3)
    assert torch.equal(part.dequantize(), tensor.dequantize()[:, 10:])
    assert_same(torch.cat([tensor[:, :10], part], 1), tensor)
    with pytest.raises(ValueError, match="puts whole bytes together"):
        torch.cat([part, part], 1)


def test_transposed_is_dense() -> None:
    tensor = unrouted("w4a8")
    for transpose in (lambda t: t.t(), lambda t: t.transpose(0, 1), lambda t: t.mT):
        out = transpose(tensor)
        assert not isinstance(out, MASQuantTensor)
        assert torch.equal(out, tensor.dequantize().t())
        # Of one smoothing for all modalities there is one such matrix; else there is
        # not.
        with pytest.raises(RuntimeError, match="transposed weight does not know"):
            transpose(make("w4a8").tensor)


def test_experts_are_put_together_again() -> None:
    tensor = MASQuantTensor.stack([make().tensor] * 4)
    assert_same(torch.cat([tensor[torch.tensor([i])] for i in range(4)]), tensor)


def test_pieces_of_experts_are_those_of_each() -> None:
    each = [make(seed=0).tensor, make(seed=0).tensor]
    tensor = MASQuantTensor.stack(each)
    rows = MASQuantTensor.stack([t[2:5] for t in each])
    assert_same(tensor[:, 2:5], rows)
    columns = [tensor[:, :, :8], tensor[:, :, 8:]]
    for found, expected in zip(columns, (slice(None, 8), slice(8, None))):
        assert_same(found, MASQuantTensor.stack([t[:, expected] for t in each]))
    assert_same(torch.cat([tensor[:, :2], tensor[:, 2:]], 1), tensor)
    assert_same(torch.cat(columns, 2), tensor)
    with pytest.raises(ValueError, match="experts of a MASQuantTensor are not sliced"):
        tensor[:1]


def test_what_was_not_one_weight_is_not_put_together() -> None:
    for others, match in (
        ([make(seed=0).tensor, make(seed=1).tensor], "the act_pre_scale .* differ"),
        ([make().tensor, torch.zeros(6, 16)], "and not both"),
        ([make().tensor, make(ranks=()).tensor], "of one layout"),
        ([make().tensor, make(hadamard_size=8).tensor], "of one layout"),
    ):
        with pytest.raises(ValueError, match=match):
            torch.cat(others)


def test_pieces_hold_whole_blocks_of_a_rotation() -> None:
    tensor: Any = make("w8a8", shape=(6, 32), hadamard_size=8).tensor
    assert_same(tensor[2:5], torch.cat([tensor[2:3], tensor[3:5]]))
    pieces = [tensor[:, :8], tensor[:, 8:]]
    assert_same(torch.cat(pieces, 1), tensor)
    for part in (tensor[2:5], tensor[1], tensor[torch.tensor([1, 3])], *pieces):
        assert part.hadamard_size == 8
    x, ids = torch.randn(9, 24), ids_for(9)
    assert_linear(linear(x, pieces[1], ids), pieces[1], x, ids)
    other = make("w8a8", shape=(6, 32)).tensor
    with pytest.raises(ValueError, match="same smoothing factors, rotation and bits"):
        linear(torch.randn(2, 32), tensor, None, None, other)
