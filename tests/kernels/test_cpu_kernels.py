# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The C++ kernels on both sides of every change of method, and what is theirs alone."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import Cpu, check
from operator_cases import (
    BF16,
    DOWN,
    FP16,
    FP32,
    FP64,
    INT8,
    PRODUCT,
    QUANTIZE,
    WEIGHT_ONLY,
    Case,
    Operands,
)

from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_build import library_path
from torchao_masquant.kernels.cpu_engine import CpuEngine, multiplies_bfloat16
from torchao_masquant.kernels.library import LOWERED_ON_CPU

CPU = Cpu()
if CPU.why_not():
    pytest.skip(CPU.why_not(), allow_module_level=True)

ops = torch.ops.masquant_cpu
NAMES = {
    CpuEngine.AMX: "VNNI",
    CpuEngine.VNNI: "VNNI",
    CpuEngine.AVX_VNNI: "AVX-VNNI",
    CpuEngine.AVX2: "AVX2",
    CpuEngine.NEON: "NEON dot products",
}


def sized(tokens: int, k: int, n: int, **changes: Any) -> Operands:
    sizes = dict(tokens=tokens, in_features=k, out_features=n)
    return Operands(Case("sized", "Any size.", **{**sizes, **changes}), seed=0)


# Few and many tokens, panels of 64 columns, K around multiples of 4, 64 and 128.
@pytest.mark.parametrize(
    "shape",
    [(1, 128, 64), (2, 127, 65), (5, 129, 3), (16, 256, 130), (17, 256, 64)]
    + [(17, 63, 1), (23, 130, 129), (97, 68, 70), (200, 131, 66)],
    ids=str,
)
def test_products_of_any_size(shape: tuple[int, int, int]) -> None:
    """To any type, with ranks within a panel of columns and beyond."""
    for bits in (8, 4):
        for dtype, pair in ((FP32, FP32), (BF16, BF16), (FP16, FP16), (FP64, INT8)):
            given = sized(*shape, weight_bits=bits, dtype=dtype, pair=pair)
            check(CPU, PRODUCT, given, ties=1.0)
    for pair, dtype in ((FP32, FP32), (INT8, FP32), (INT8, FP16), (INT8, BF16)):
        given = sized(*shape, ranks=(5, 70), pair=pair, dtype=dtype)
        check(CPU, DOWN, given, ties=1.0)
        check(CPU, PRODUCT, given, ties=1.0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 50])
def test_groups_of_any_width(tokens: int) -> None:
    """Groups of 96, 64, 6 and 3 channels, and of more than a panel's 128."""
    for bits, (k, groups) in itertools.product(
        (8, 4), ((192, 2), (192, 3), (192, 32), (192, 64), (600, 2))
    ):
        given = sized(tokens, k, 70, weight_bits=bits, groups=groups)
        check(CPU, PRODUCT, given, ties=1.0)


@pytest.mark.parametrize("tokens, k", [(1, 1), (3, 15), (9, 64), (40, 257)])
def test_tokens_of_any_size(tokens: int, k: int) -> None:
    for dtype, shift, ids in itertools.product(
        (FP32, BF16, FP16, FP64), (0.0, 1.0), ("none", "shuffled")
    ):
        for act_bits in (8, 4, 2):
            more = dict(dtype=dtype, shift=shift, ids=ids, act_bits=act_bits)
            check(CPU, QUANTIZE, sized(tokens, k, 1, **more), ties=1.0)


@pytest.mark.parametrize(
    "size, k", [(2, 2), (2, 50), (4, 36), (8, 24), (16, 48), (32, 96), (1024, 2048)]
)
def test_rotations_of_any_size(size: int, k: int) -> None:
    """Blocks inside of a vector, of one, and of many; all additions in one order."""
    for dtype in (FP32, BF16, FP16, FP64):
        given = sized(19, k, 1, dtype=dtype, shift=1.0, hadamard_size=size)
        check(CPU, QUANTIZE, given, ties=1.0)
    for tokens in (3, 33):
        given = sized(tokens, k, 7, weight_bits=4, hadamard_size=size)
        check(CPU, WEIGHT_ONLY, given, ties=1.0)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 500])
def test_weights_alone_of_any_size(tokens: int) -> None:
    """Tokens of 16 bits become integers; 500 take more than one chunk of tokens."""
    kinds = ((4, 2, 256), (4, 1, 301), (4, 8, 256), (4, 2, 320), (8, 2, 514))
    for (bits, groups, k), (dtype, zero_point) in itertools.product(
        kinds, ((FP32, True), (BF16, False), (FP16, True))
    ):
        parts = dict(weight_bits=bits, groups=groups, zero_point=zero_point)
        given = sized(tokens, k, 67, **parts, dtype=dtype, ranks=(4,))
        check(CPU, WEIGHT_ONLY, given, ties=1.0)


@pytest.mark.parametrize("tokens", [3, 20])
def test_sums_that_only_wrap_on_the_way(tokens: int) -> None:
    """With 128 added to the weights the sum passes 2 ** 31; the product does not."""
    k = 80_000
    q = torch.full((tokens, k), 127, dtype=INT8)
    weight, ones = torch.full((2, k), 127, dtype=INT8), torch.ones(tokens, 1)
    for _ in CPU.ways(PRODUCT):
        y = CPU.run(PRODUCT, q, ones, weight, ones[:2], *[None] * 5, 8, FP64)
        assert (y == float(127 * 127 * k)).all()


@pytest.mark.parametrize("tokens", [16, 17])
def test_where_bfloat16_is_rounded_to(tokens: int) -> None:
    """A smoothed 1 + 2 ** -9 is not one of its numbers: float32 tells it, it does not."""
    weight = sized(1, 64, 8).weight
    x = torch.ones(tokens, 64)
    pre_scale = torch.full((1, 64), 1 + 2.0**-9)
    terms = (pre_scale, weight, torch.ones(8, 1), *[None] * 6, [], 8, FP32)
    for way in CPU.ways(WEIGHT_ONLY):
        exact = ops.weight_only_linear(x, *terms)
        rounded = ops.weight_only_linear(x.to(BF16), *terms)
        amx = way.startswith("AMX")
        differ = tokens > 16 and (amx or multiplies_bfloat16())
        assert torch.equal(exact, rounded) is not differ
        if amx:
            continue
        ops.use_bfloat16(False)
        try:
            assert torch.equal(exact, ops.weight_only_linear(x.to(BF16), *terms))
        finally:
            ops.use_bfloat16(multiplies_bfloat16())


def test_operands_that_would_be_read_out_of_bounds_raise() -> None:
    given = sized(4, 8, 6, ranks=(1, 1))
    named = given.named(PRODUCT, low_rank_hidden=None, l2=None, modality_bias=None)
    named["modality_ids"] = None
    ops.int_linear(*named.values())
    ones = torch.ones(6, 1)
    stored = named["qdata"]
    for wrong in (
        dict(qdata=stored[:, :7]),
        dict(qdata=stored.to(torch.uint8)),
        dict(x_scale=ones[:3]),
        dict(scale=ones[:5]),
        dict(scale=torch.ones(6, 3)),
        dict(low_rank_hidden=torch.ones(4, 2)),
        dict(low_rank_hidden=torch.ones(3, 2), l2=torch.ones(2, 6)),
        dict(low_rank_hidden=torch.ones(4, 2), l2=torch.ones(2, 5)),
        dict(modality_bias=torch.ones(2, 5)),
        dict(modality_bias=torch.ones(2, 6), modality_ids=torch.zeros(3).long()),
        dict(modality_bias=torch.ones(2, 6), modality_ids=torch.tensor([0, 1, 2, 0])),
        dict(bias=torch.ones(5)),
    ):
        with pytest.raises((RuntimeError, IndexError), match="masquant: "):
            ops.int_linear(*{**named, **wrong}.values())


def test_kernels_of_another_version_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package exported by it may have brought them, with fewer arguments."""
    library = library_path(cpu_lowering.engine().engine)
    cpu_lowering._load(library)
    brought = {name: getattr(ops, name) for name in LOWERED_ON_CPU}
    fewer = {**brought, "smooth_quantize": ops.low_rank_down}
    none = {n: brought[n] for n in brought if n != "expert_int_linear"}
    for found, name in ((fewer, "smooth_quantize"), (none, "expert_int_linear")):
        monkeypatch.setattr(torch.ops, "masquant_cpu", SimpleNamespace(**found))
        with pytest.raises(OSError, match=f"another version .* their {name} is not"):
            cpu_lowering._load(library)


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

    chosen = cpu_lowering.engine().engine
    assert name(1, 8) == f"{NAMES[chosen]}, int8 as stored"
    assert name(1, 4).endswith(", packed int4 as stored")
    amx = chosen is CpuEngine.AMX
    place = "in tiles" if amx else "in columns"
    assert name(5, 4).endswith(", packed int4 in columns")
    assert name(8, 4).endswith(f", packed int4 {place}")
    assert name(3, 4, groups=8).endswith(", packed int4 in columns, group by group")
    assert name(1, 4, 16, 8).endswith(", planes of 8 bits, packed int4 as stored")
    assert name(3, 4, 16, 8).endswith(", planes of 8 bits, packed int4 in columns")
    assert name(64, 8, 16, 8).startswith("float32, ")
    assert ("bfloat16" in name(64, 4, 16, 8)) is (amx or multiplies_bfloat16())
    assert name(64, 8, 8, 8).endswith(f", int8 {place}, group by group")
    # Of channels that a step of a tile would take from two groups.
    assert name(64, 8, 8, 32).endswith(", int8 in columns, group by group")
    assert name(5, 8).startswith("AMX, " if amx else NAMES[chosen])
    assert cpu_lowering.report()["engine"] == chosen.value


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_few_tokens_of_long_rows(tokens: int) -> None:
    """Rows that outgrow the first-level cache are multiplied in turns of channels."""
    for bits, groups in ((8, 1), (4, 1), (4, 43)):
        given = sized(tokens, 5504, 67, weight_bits=bits, groups=groups)
        check(CPU, PRODUCT, given, ties=1.0)
    for dtype in (FP32, BF16):
        given = sized(tokens, 5504, 67, weight_bits=4, groups=43, dtype=dtype)
        check(CPU, WEIGHT_ONLY, given, ties=1.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Few tokens become integers, which hold no infinity: they are not used for it."""
    given = sized(2, 256, 64, weight_bits=4, groups=2)
    named = given.named(WEIGHT_ONLY)
    expected = CPU.run(WEIGHT_ONLY, *named.values())
    named["x"] = named["x"].clone()
    named["x"][1, 3] = value
    found = CPU.run(WEIGHT_ONLY, *named.values())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert not found[1].isfinite().any()


def test_channels_that_are_small_beside_a_loud_one() -> None:
    """A sink a thousand times as loud leaves the others' products as they are."""
    given = sized(1, 256, 64, weight_bits=4, groups=2, dtype=FP32)
    terms = dict.fromkeys(("l1", "l2", "modality_bias", "bias"))
    named = given.named(WEIGHT_ONLY, x=given.x.clone(), **terms)
    named["x"][0, 0] = 0.0
    quiet = CPU.run(WEIGHT_ONLY, *named.values()).double()
    named["x"][0, 0] = 1000.0
    loud = CPU.run(WEIGHT_ONLY, *named.values()).double()
    named["x"][0, 1:] = 0.0
    alone = CPU.run(WEIGHT_ONLY, *named.values()).double()
    lost = (loud - alone - quiet).abs().max() / loud.abs().max()
    assert lost < 2.0**-20
