# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The C++ kernels beside the reference, bit by bit where integers decide.

The other tests of this folder hold the operators of whatever engine runs to float64
references; these hold each engine, on both sides of every change of method: few tokens
and many, one panel of columns and more, whole tiles and rests, one thread and two.
"""

from types import SimpleNamespace
from typing import Any, Iterator, Optional

import pytest
import torch
from operator_oracle import (
    assert_integers,
    assert_within,
    bfloat16_operations,
    ids_for,
    int_linear_f64,
    smooth_quantize_f64,
)

from torchao_masquant.kernels import cpu_lowering, reference
from torchao_masquant.kernels.cpu_engine import (
    CpuEngine,
    choose_engine,
    multiplies_bfloat16,
)
from torchao_masquant.kernels.int4_packing import pack_int4
from torchao_masquant.kernels.library import LOWERED

if choose_engine({}).engine is CpuEngine.REFERENCE:
    pytest.skip(
        f"no C++ kernels here: {choose_engine({}).reason}", allow_module_level=True
    )
if cpu_lowering.engine().engine is CpuEngine.REFERENCE:
    pytest.skip(
        f"the C++ kernels are off: {cpu_lowering.engine().reason}",
        allow_module_level=True,
    )
if cpu_lowering.prepare().engine is CpuEngine.REFERENCE:
    pytest.skip(
        f"the C++ kernels cannot be built: {cpu_lowering.engine().reason}",
        allow_module_level=True,
    )

ops = torch.ops.masquant_cpu
BF16 = torch.bfloat16
# Few and many tokens, panels of 64 columns, K around multiples of 4, 64 and 128.
SHAPES = [
    (1, 1, 1),
    (1, 128, 64),
    (2, 127, 65),
    (5, 129, 3),
    (16, 256, 130),
    (17, 256, 64),
    (17, 63, 1),
    (23, 130, 129),
    (97, 68, 70),
    (200, 131, 66),
]


@pytest.fixture(params=["vnni", "brgemm"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """oneDNN's block kernel runs on VNNI where there is no AMX."""
    ops.use_brgemm(request.param == "brgemm")
    yield request.param
    ops.use_brgemm(cpu_lowering.engine().engine is CpuEngine.AMX)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def integers(shape: tuple[int, int, int], bits: int, seed: int = 0) -> Any:
    """Activations, weights and the weights as the operators want them."""
    tokens, k, n = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int, *size: int) -> torch.Tensor:
        return torch.randint(least, most, size, dtype=torch.int8, generator=generator)

    weight = draw(-(2 ** (bits - 1)), 2 ** (bits - 1), n, k)
    return draw(-127, 128, tokens, k), weight, pack_int4(weight) if bits < 8 else weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_reference(
    shape: tuple[int, int, int], bits: int, engine: str, threads: int
) -> None:
    """Bit by bit: scales are applied in one order, and nothing else is rounded."""
    q, _, stored = integers(shape, bits)
    x_scale, scale = torch.rand(shape[0], 1), torch.rand(shape[2], 1)
    bias, extra = torch.randn(shape[2]), torch.randn(3, shape[2])
    ids = ids_for(shape[0], 3).int()
    for out_dtype in (torch.float32, BF16, torch.float16, torch.float64):
        terms = (q, x_scale, stored, scale, None, None, extra, ids, bias)
        y = ops.int_linear(*terms, bits, out_dtype)
        assert y.dtype == out_dtype
        assert torch.equal(y, reference.int_linear(*terms, bits, out_dtype))


@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 40])
@pytest.mark.parametrize("k", [64, 4096, 8192 + 64])
def test_extremes_do_not_saturate(tokens: int, k: int, engine: str) -> None:
    """vpmaddubsw would: 2 * 255 * 127 is over 2 ** 15. vpdpbusd must not be it."""
    for x in (127, -127, -128):
        for w, bits in ((127, 8), (-128, 8), (7, 4), (-8, 4)):
            q = torch.full((tokens, k), x, dtype=torch.int8)
            weight = torch.full((3, k), w, dtype=torch.int8)
            stored = weight if bits == 8 else pack_int4(weight)
            ones = torch.ones(max(tokens, 3), 1)
            y = ops.int_linear(
                q, ones[:tokens], stored, ones[:3], *[None] * 5, bits, torch.float64
            )
            exact = torch.tensor(float(x * w * k), dtype=torch.float32)
            assert (y == exact.double()).all()


@pytest.mark.parametrize("tokens", [3, 20])
def test_sums_that_only_wrap_on_the_way(tokens: int, engine: str) -> None:
    """With 128 added to the weights the sum passes 2 ** 31; the product does not."""
    k = 80_000
    q = torch.full((tokens, k), 127, dtype=torch.int8)
    weight = torch.full((2, k), 127, dtype=torch.int8)
    ones = torch.ones(tokens, 1)
    terms = (q, ones, weight, torch.ones(2, 1), *[None] * 5, 8)
    y = ops.int_linear(*terms, torch.float64)
    assert (y == float(127 * 127 * k)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
@pytest.mark.parametrize("groups", [2, 3, 32])
def test_groups_are_those_of_the_reference(
    groups: int, tokens: int, bits: int, threads: int
) -> None:
    """Groups of 96, 64, and 6 channels: multiples of 4 and not."""
    q, _, stored = integers((tokens, 192, 70), bits)
    x_scale, scale = torch.rand(tokens, 1), torch.rand(70, groups)
    terms = (q, x_scale, stored, scale, *[None] * 5, bits, torch.float32)
    assert torch.equal(ops.int_linear(*terms), reference.int_linear(*terms))


@pytest.mark.parametrize("l2_dtype", [BF16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("tokens", [1, 9, 16, 21, 110])
def test_pairs_are_for_their_tokens_only(
    tokens: int, l2_dtype: torch.dtype, engine: str, threads: int
) -> None:
    """Base tokens of a mixed call are bit-equal to those of a base-only one."""
    n, k, ranks = 130, 96, (5, 70)
    q, weight, stored = integers((tokens, k, n), 8)
    ids = ids_for(tokens, 3)
    x_scale, scale = torch.rand(tokens, 1) / 127, torch.rand(n, 1) / 128
    l1 = torch.randn(k, sum(ranks)).to(BF16)
    l2 = (torch.randn(sum(ranks), n) * 20).to(l2_dtype)
    hidden = ops.low_rank_down(q, x_scale, l1, ids, ranks)
    torch.testing.assert_close(
        hidden,
        reference.low_rank_down(q, x_scale, l1, ids, ranks),
        rtol=1e-4,
        atol=1e-4 * float(hidden.abs().max()),
    )
    rest = (None, ids, None, 8, torch.float32)
    y = ops.int_linear(q, x_scale, stored, scale, hidden, l2, *rest)
    bare = ops.int_linear(q, x_scale, stored, scale, None, None, *rest)
    assert torch.equal(y[ids == 0], bare[ids == 0])
    terms: list[Optional[torch.Tensor]] = [scale, hidden, l2, None, None, None]
    expected, size = int_linear_f64(q, x_scale, weight.numpy(), *terms)
    assert_within(y, expected, size, 3 + sum(ranks) + 1 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (9, 64), (40, 257)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_quantized_tokens_are_those_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, shifted: bool, threads: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    pre_scale, shift = torch.randn(3, shape[1]).exp(), torch.randn(3, shape[1])
    for ids in (None, ids_for(shape[0], 3), ids_for(shape[0], 3).int()):
        for act_bits in (8, 6, 4, 3, 2):
            terms = (x, pre_scale, ids, act_bits, shift if shifted else None)
            for ours, theirs in zip(
                ops.smooth_quantize(*terms), reference.smooth_quantize(*terms)
            ):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "size, k", [(2, 2), (2, 50), (4, 36), (8, 24), (16, 48), (32, 96), (4096, 8192)]
)
def test_rotated_tokens_are_those_of_the_reference(
    size: int, k: int, shifted: bool, dtype: torch.dtype, threads: int
) -> None:
    """Blocks inside of a vector, of one, and of many; all additions in one order."""
    torch.manual_seed(0)
    x = torch.randn(19, k).to(dtype)
    pre_scale, shift = torch.randn(3, k).exp(), torch.randn(3, k)
    for ids in (None, ids_for(19, 3)):
        for act_bits in (8, 4):
            terms = (x, pre_scale, ids, act_bits, shift if shifted else None, size)
            for ours, theirs in zip(
                ops.smooth_quantize(*terms), reference.smooth_quantize(*terms)
            ):
                assert torch.equal(ours, theirs)


def test_rounding_next_to_halves() -> None:
    """Where a product with the reciprocal would round otherwise than the quotient."""
    steps = torch.arange(-126, 126) + 0.5
    near = torch.stack(
        [steps * 3, torch.nextafter(steps * 3, torch.tensor(1e9)), steps * 3.0000001]
    )
    for factor in (1.0, 1 / 3, 0.7, 1e-20, 1e20):
        x = torch.cat((near * factor, torch.full((3, 1), 381.0 * factor)), 1)
        terms = (x, torch.ones(1, x.shape[1]), None, 8)
        q, scale = ops.smooth_quantize(*terms)
        expected_q, expected_scale = reference.smooth_quantize(*terms)
        assert torch.equal(scale, expected_scale) and torch.equal(q, expected_q)
    assert_integers(q, smooth_quantize_f64(*terms), ties=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize(
    "bits, groups, k", [(4, 2, 256), (4, 1, 301), (4, 8, 256), (8, 2, 514)]
)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 500])
def test_weight_only_products(
    tokens: int,
    bits: int,
    groups: int,
    k: int,
    asymmetric: bool,
    dtype: torch.dtype,
    engine: str,
    threads: int,
) -> None:
    """Few tokens look packed integers up; 500 take more than one chunk of tokens."""
    n = 67
    torch.manual_seed(0)
    _, weight, stored = integers((1, k, n), bits)
    x = torch.randn(tokens, k).to(dtype)
    scale = torch.rand(n, groups) + 0.1
    zero = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if asymmetric else None
    pre_scale, ids = torch.randn(2, k).exp(), ids_for(tokens, 2)
    l1, l2 = torch.randn(k, 4).to(BF16), torch.randn(4, n).to(BF16)
    terms = (x, pre_scale, stored, scale, zero, l1, l2, torch.randn(2, n), ids, None)
    y = ops.weight_only_linear(*terms, [4], bits, torch.float32)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in terms]
    smoothed = wide[0] * wide[1][ids]
    dense = weight.double() - (
        0 if zero is None else zero.double().repeat_interleave(k // groups, 1)
    )
    dense = dense * wide[3].repeat_interleave(k // groups, 1)
    low = (smoothed @ wide[5]) @ wide[6] * (ids[:, None] > 0)
    expected = smoothed @ dense.t() + low + wide[7][ids]
    size = smoothed.abs() @ dense.abs().t() + wide[7][ids].abs()
    size += (smoothed.abs() @ wide[5].abs()) @ wide[6].abs()
    operations = 2 + k + 1 + 4 + 3 + bfloat16_operations(x)
    assert_within(y, expected.numpy(), size.numpy(), operations)


@pytest.mark.parametrize("tokens", [16, 17])
def test_where_bfloat16_is_rounded_to(tokens: int, engine: str) -> None:
    """A smoothed 1 + 2 ** -9 is not one of its numbers: float32 tells it, it does not."""
    _, _, stored = integers((1, 64, 8), 8)
    x = torch.ones(tokens, 64)
    pre_scale = torch.full((1, 64), 1 + 2.0**-9)
    terms = (pre_scale, stored, torch.ones(8, 1), *[None] * 6, [], 8, torch.float32)
    exact = ops.weight_only_linear(x, *terms)
    rounded = ops.weight_only_linear(x.to(BF16), *terms)
    differ = tokens > 16 and multiplies_bfloat16()
    assert torch.equal(exact, rounded) is not differ
    ops.use_bfloat16(False)
    assert torch.equal(exact, ops.weight_only_linear(x.to(BF16), *terms))
    ops.use_bfloat16(multiplies_bfloat16())


def test_operands_that_would_be_read_out_of_bounds_raise() -> None:
    q, _, stored = integers((4, 8, 6), 8)
    ones = torch.ones(6, 1)

    def call(**other: Any) -> torch.Tensor:
        terms = dict(
            q=q,
            x_scale=ones[:4],
            stored=stored,
            scale=ones,
            hidden=None,
            l2=None,
            extra=None,
            ids=None,
            bias=None,
        )
        return ops.int_linear(*{**terms, **other}.values(), 8, torch.float32)

    call()
    for wrong in (
        dict(stored=stored[:, :7]),
        dict(stored=stored.to(torch.uint8)),
        dict(x_scale=ones[:3]),
        dict(scale=ones[:5]),
        dict(scale=torch.ones(6, 3)),
        dict(hidden=torch.ones(4, 2)),
        dict(hidden=torch.ones(3, 2), l2=torch.ones(2, 6)),
        dict(hidden=torch.ones(4, 2), l2=torch.ones(2, 5)),
        dict(extra=torch.ones(2, 5)),
        dict(extra=torch.ones(2, 6), ids=torch.zeros(3, dtype=torch.int64)),
        dict(extra=torch.ones(2, 6), ids=torch.tensor([0, 1, 2, 0])),
        dict(bias=torch.ones(5)),
    ):
        with pytest.raises((RuntimeError, IndexError), match="masquant: "):
            call(**wrong)


def test_kernels_of_another_version_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package exported by it may have brought them, with fewer arguments."""
    cpu_lowering._check_schemas()
    brought = {name: getattr(ops, name) for name in LOWERED}
    brought["smooth_quantize"] = ops.low_rank_down
    monkeypatch.setattr(torch.ops, "masquant_cpu", SimpleNamespace(**brought))
    with pytest.raises(
        OSError, match="another version .* their smooth_quantize is not"
    ):
        cpu_lowering._check_schemas()


def test_kernels_have_names() -> None:
    """What the report says is decided where the kernels are."""

    def name(tokens: int, bits: int, act_bits: int = 8, groups: int = 1) -> str:
        return cpu_lowering.kernel_of(
            weight_bits=bits,
            act_bits=act_bits,
            tokens=tokens,
            in_features=1024,
            groups=groups,
        )

    assert name(1, 8) == "VNNI, int8 as stored"
    assert name(16, 4) == "VNNI, packed int4 as stored"
    assert name(1, 4, 16, 8) == "float32, packed int4 looked up as stored"
    assert name(64, 4, 16, 8).startswith("float32, ")
    assert ("bfloat16" in name(64, 4, 16, 8)) is multiplies_bfloat16()
    assert name(64, 8, 8, 8) == "VNNI, int8 unpacked by panels, group by group"
    assert "int8 unpacked by panels" in name(17, 8)
    assert cpu_lowering.report()["engine"] in ("vnni", "amx")
