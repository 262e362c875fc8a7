# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchao_masquant.kernels import pack_int4, unpack_int4


@st.composite
def int4_values(draw: st.DrawFn) -> torch.Tensor:
    rows = draw(st.integers(0, 4))
    columns = draw(st.integers(0, 17))
    values = draw(
        st.lists(st.integers(-8, 7), min_size=rows * columns, max_size=rows * columns)
    )
    return torch.tensor(values, dtype=torch.int8).reshape(rows, columns)


def packed_by_hand(values: torch.Tensor) -> np.ndarray:
    """Byte by byte: value 2 j in the low nibble, value 2 j + 1 in the high one."""
    rows, columns = values.shape
    out = np.zeros((rows, (columns + 1) // 2), dtype=np.uint8)
    for r in range(rows):
        for c in range(columns):
            nibble = int(values[r, c]) % 16
            out[r, c // 2] |= nibble << (4 * (c % 2))
    return out


@settings(max_examples=100, deadline=None)
@given(int4_values())
def test_round_trip(values: torch.Tensor) -> None:
    packed = pack_int4(values)
    restored = unpack_int4(packed, values.shape[1])
    assert restored.dtype == torch.int8
    assert torch.equal(restored, values)


@settings(max_examples=100, deadline=None)
@given(int4_values())
def test_layout(values: torch.Tensor) -> None:
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (values.shape[0], (values.shape[1] + 1) // 2)
    np.testing.assert_array_equal(packed.numpy(), packed_by_hand(values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.booleans())
def test_every_byte_is_two_values(octets: list[int], odd: bool) -> None:
    packed = torch.tensor(octets, dtype=torch.uint8)
    count = 2 * len(octets) - odd
    signed = [n - 16 if n > 7 else n for b in octets for n in (b % 16, b // 16)]
    assert unpack_int4(packed, count).tolist() == signed[:count]


def test_known_bytes() -> None:
    values = torch.tensor([[-8, 7, -1, 0, 3]], dtype=torch.int8)
    assert pack_int4(values).tolist() == [[0x78, 0x0F, 0x03]]


def test_the_padding_of_an_odd_row_is_zero() -> None:
    values = torch.full((3, 5), -1, dtype=torch.int8)
    assert (pack_int4(values)[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("columns", [6, 7])
def test_non_contiguous(columns: int) -> None:
    values = torch.randint(-8, 8, (columns, 4), dtype=torch.int8).t()
    assert not values.is_contiguous()
    packed = pack_int4(values)
    assert torch.equal(packed, pack_int4(values.contiguous()))
    strided = torch.stack((packed, torch.zeros_like(packed)), -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack_int4(strided, columns), values)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert pack_int4(values).shape == (*shape[:-1], 3)
    assert torch.equal(unpack_int4(pack_int4(values), 5), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_pack_takes_int8_only(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"pack_int4 takes int8 values, got {dtype}"):
        pack_int4(torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_unpack_takes_uint8_only(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"unpack_int4 takes uint8 bytes, got {dtype}"):
        unpack_int4(torch.zeros(2, 4, dtype=dtype), 8)


@pytest.mark.parametrize("in_features", [0, 5, 6, 9, 10])
def test_unpack_refuses_another_width(in_features: int) -> None:
    with pytest.raises(ValueError, match=f"4 bytes a row cannot hold {in_features} "):
        unpack_int4(torch.zeros(2, 4, dtype=torch.uint8), in_features)
