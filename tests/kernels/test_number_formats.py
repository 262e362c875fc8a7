# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Grids of floats against all of their bit patterns, written down again."""

import math

import number_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked

from torchao_masquant.kernels.number_formats import (
    FORMATS,
    INTEGERS,
    number_format,
)
from torchao_masquant.options import SCHEMES

E4M3, E2M1 = FORMATS["e4m3"].grid, FORMATS["nvfp4"].grid
GRIDS = [(E4M3, oracle.E4M3), (E2M1, oracle.E2M1)]
SIZES = st.floats(width=32, allow_nan=False)


def all_codes(bits: int) -> torch.Tensor:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    return ((codes ^ 8) - 8 if bits == 4 else codes).view(torch.int8)


@pytest.mark.parametrize("grid, values", GRIDS, ids=["e4m3", "e2m1"])
def test_codes_stand_for_the_values_of_their_bits(grid, values) -> None:
    found = grid.decode(all_codes(grid.bits)).double()
    expected = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.signbit(), torch.arange(len(values)) >= len(values) // 2)
    assert grid.largest == expected.nan_to_num().max()


@pytest.mark.parametrize("grid, values", GRIDS, ids=["e4m3", "e2m1"])
def test_what_is_on_a_grid_keeps_its_bits(grid, values) -> None:
    codes = all_codes(grid.bits)
    codes = codes[~grid.decode(codes).isnan()]
    on_grid = grid.decode(codes)
    assert torch.equal(grid.encode(on_grid), codes)
    assert torch.equal(grid.nearest(on_grid), on_grid)


@pytest.mark.parametrize("grid, values", GRIDS, ids=["e4m3", "e2m1"])
def test_ties_go_to_the_even_code_and_their_neighbours_do_not(grid, values) -> None:
    sizes = [v for v in values[: len(values) // 2] if not math.isnan(v)]
    ties = torch.tensor([(a + b) / 2 for a, b in zip(sizes, sizes[1:])])
    wide = torch.tensor([math.inf])
    tried = torch.cat(
        [ties, torch.nextafter(ties, wide), torch.nextafter(ties, -wide), wide]
    )
    assert_rounds(grid, values, torch.cat([tried, -tried]))


@pytest.mark.parametrize("grid, values", GRIDS, ids=["e4m3", "e2m1"])
@given(st.lists(SIZES | st.floats(-7, 7, width=32), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest(grid, values, numbers) -> None:
    assert_rounds(grid, values, torch.tensor(numbers))


def assert_rounds(grid, values, numbers: torch.Tensor) -> None:
    expected = [oracle.nearest_code(v, values) for v in numbers.tolist()]
    found = grid.encode(grid.nearest(numbers)).view(torch.uint8)
    assert (found & 2**grid.bits - 1).tolist() == expected


def test_e2m1_is_torchaos() -> None:
    values = torch.linspace(-8, 8, 4001)
    found = E2M1.encode(E2M1.nearest(values)).view(torch.uint8) & 0xF
    assert torch.equal(found, _f32_to_floatx_unpacked(values, 2, 1))


@pytest.mark.parametrize(
    "grid", [E4M3, E2M1, INTEGERS[4], INTEGERS[8]], ids=lambda g: str(g.bits)
)
@given(st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_packed_codes_come_back(grid, rows: int, pairs: int) -> None:
    codes = all_codes(grid.bits)
    codes = codes[torch.randint(len(codes), (rows, 2 * pairs))]
    held = grid.pack(codes)
    assert held.dtype == grid.dtype and held.shape == (rows, 2 * pairs // grid.per_byte)
    assert torch.equal(grid.unpack(held, 2 * pairs), codes)


@pytest.mark.parametrize("name", FORMATS)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_scales_are_those_of_the_rule(name: str, numbers: list[float]) -> None:
    form, again = FORMATS[name], oracle.FORMATS[name]
    group = form.group_size or 32
    # Two groups a row; most of a group is small beside its largest.
    rows = torch.tensor(numbers).view(2, 2, 1) * torch.linspace(0.1, 1, group)
    rows = rows.flatten(1)
    scale, row = form.scales(
        rows.abs().unflatten(1, (-1, form.group_size or 64)).amax(-1)
    )
    expected, expected_row = again.scales(rows)
    assert torch.equal(scale, expected)
    assert torch.equal(scale, scale.to(form.scale_dtype).float())
    assert (row is None) == (expected_row is None)
    if row is not None:
        assert torch.equal(row, expected_row)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-45, 0.0, 3e38])
def test_no_scale_underflows(name: str, size: float) -> None:
    form = FORMATS[name]
    rows = size * torch.linspace(-1, 1, 128)[None]
    scale, row = form.scales(
        rows.abs().unflatten(1, (-1, form.group_size or 128)).amax(-1)
    )
    step = scale if row is None else scale * row
    assert (step >= 2.0**-126).all() and step.isfinite().all()
    _, exact = oracle.FORMATS[name].rounded(rows)
    if size >= 1e-30:
        assert (exact - rows).norm() < 0.15 * rows.double().norm()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_makes_its_scale_nan(name: str, value: float) -> None:
    form = FORMATS[name]
    scale, row = form.scales(torch.tensor([[1.0, value], [1.0, 2.0]]))
    of_row = scale if row is None else scale * row
    assert of_row[0, 1].isnan() and of_row[1].isfinite().all()
    assert scale.to(form.scale_dtype).float()[0, 1].isnan() or row is not None


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown number format 'fp3': choose one of"):
        number_format("fp3")


def test_schemes_say_what_their_formats_do() -> None:
    """Where torch is not at hand, a scheme says bits and groups itself."""
    named = [scheme for scheme in SCHEMES.values() if scheme.floats]
    assert len(named) == 6
    for scheme in named:
        assert scheme.act_bits == number_format(scheme.act_format).grid.bits
        if scheme.weight_format is not None:
            weight = number_format(scheme.weight_format)
            found = (scheme.weight_bits, scheme.group_size)
            assert found == (weight.grid.bits, weight.group_size), scheme.name
