# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_oracle import packed, unpacked

from torchao_masquant.kernels import pack_int4, unpack_int4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(0, 17), st.integers(0, 99))
def test_layout_and_round_trip(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(
        -8, 8, (rows, columns), dtype=torch.int8, generator=generator
    )
    stored = pack_int4(values)
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, packed(values.numpy(), 4))
    restored = unpack_int4(stored, columns)
    assert restored.dtype == torch.int8 and torch.equal(restored, values)


def test_every_byte_is_two_values() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    for count in (256, 255):
        found = unpack_int4(stored, count).numpy()
        assert (found == unpacked(stored, 4, count)).all()


def test_known_bytes() -> None:
    values = torch.tensor([[-8, 7, -1, 0, 3]], dtype=torch.int8)
    assert pack_int4(values).tolist() == [[0x78, 0x0F, 0x03]]
    assert unpack_int4(torch.tensor([[0x78, 0x0F]]).to(torch.uint8), 4).tolist() == [
        [-8, 7, -1, 0]
    ]


@pytest.mark.parametrize("columns", [6, 7])
def test_non_contiguous(columns: int) -> None:
    values = torch.randint(-8, 8, (columns, 4), dtype=torch.int8).t()
    assert not values.is_contiguous()
    stored = pack_int4(values)
    assert torch.equal(stored, pack_int4(values.contiguous()))
    strided = torch.stack((stored, torch.zeros_like(stored)), -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack_int4(strided, columns), values)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert pack_int4(values).shape == (*shape[:-1], 3)
    assert torch.equal(unpack_int4(pack_int4(values), 5), values)


def test_other_types_and_widths_are_refused() -> None:
    for dtype in (torch.uint8, torch.int32, torch.float32):
        with pytest.raises(
            TypeError, match=f"pack_int4 takes int8 values, got {dtype}"
        ):
            pack_int4(torch.zeros(2, 4, dtype=dtype))
    for dtype in (torch.int8, torch.int32, torch.float32):
        with pytest.raises(
            TypeError, match=f"unpack_int4 takes uint8 bytes, got {dtype}"
        ):
            unpack_int4(torch.zeros(2, 4, dtype=dtype), 8)
    for width in (0, 5, 6, 9, 10):
        with pytest.raises(ValueError, match=f"4 bytes a row cannot hold {width} "):
            unpack_int4(torch.zeros(2, 4, dtype=torch.uint8), width)
