# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Tilings of the Triton kernels: each is right, one is chosen for every size, and all
that there are is compiled ahead of time."""

import dataclasses
from typing import Any, Optional

import pytest

pytest.importorskip("triton")

import kernel_cases.float_linear
import kernel_cases.float_smooth_quantize
import kernel_cases.int_linear
import kernel_cases.low_rank_down
import kernel_cases.smooth
import kernel_cases.smooth_quantize
import kernel_cases.weight_only_linear
import torch
from backends import TILINGS, Triton, check_result, tiling
from kernel_cases.case import AotCase
from operator_cases import (
    BF16,
    DOWN,
    FP16,
    FP32,
    INT8,
    OPERATORS,
    PRODUCT,
    QUANTIZE,
    WEIGHT_ONLY,
    WEIGHTS,
    Case,
    Operands,
    operands,
)

from torchao_masquant.kernels import reference
from torchao_masquant.kernels.gpu import (
    int_linear_tilings,
    low_rank_down,
    smooth_quantize,
    weight_only_tilings,
)
from torchao_masquant.kernels.gpu.launching import TileConfig
from torchao_masquant.kernels.gpu.library_products import dense

CONFIGS = {
    QUANTIZE: smooth_quantize.CONFIGS,
    DOWN: low_rank_down.CONFIGS,
    PRODUCT: int_linear_tilings.CONFIGS,
    WEIGHT_ONLY: weight_only_tilings.CONFIGS,
}
CPU = torch.device("cpu")


def check(
    operator: str, config: Optional[TileConfig], given: Operands, **other: Any
) -> torch.Tensor:
    backend = Triton()
    backend.config = config
    args = given.args(operator, **other)
    found = backend.run(operator, *args)
    check_result(backend, operator, given, args, found, ties=1.0)
    return found


def large(**changes: Any) -> Operands:
    """More than a block of any size, and a rest."""
    whole = dict(tokens=19, in_features=140, out_features=37, ranks=(20, 30))
    return Operands(Case("large", "", **{**whole, **changes}), seed=0)


@pytest.mark.parametrize(
    "operator, config",
    [
        pytest.param(o, c, id=f"{o} {dict(c.blocks)} {c.num_warps}")
        for o in OPERATORS
        for c in CONFIGS[o]
    ],
)
def test_every_tiling(operator: str, config: TileConfig) -> None:
    if operator == QUANTIZE:
        check(operator, config, large(tokens=5, in_features=1100))
    elif operator == DOWN:
        for pair in (BF16, FP16, FP32, INT8):
            check(operator, config, large(in_features=300, pair=pair))
    else:
        # Each of both kinds of weight and of scales, in turns.
        turn = CONFIGS[operator].index(config) % 2 + 1
        for bits, groups in ((8, turn), (4, 3 - turn)):
            given = large(weight_bits=bits, groups=groups, dtype=BF16, ranks=(3,))
            nothing = {"low_rank_hidden": None} if operator == PRODUCT else {"l1": None}
            check(operator, config, given, l2=None, **nothing)


@pytest.mark.parametrize("operator", OPERATORS)
def test_own_choice_of_tiling(operator: str) -> None:
    for tokens in (0, 1, 17, 65, 257):
        for groups in (1, 2) if operator in WEIGHTS and tokens < 65 else (1,):
            case = Case("own choice", "", tokens=tokens, weight_bits=4, groups=groups)
            check(operator, None, Operands(case, seed=0))


def test_a_tiling_is_chosen_for_every_size() -> None:
    for tokens in (0, 1, 16, 40, 100, 500, 4096, 100000):
        for width in (1, 1024, 3584, 11008, 18944, 65536):
            config = smooth_quantize.choose(tokens, width, CPU)
            assert config in CONFIGS[QUANTIZE]
            # A row that any block holds is read once.
            if width <= max(c["BLOCK_K"] for c in CONFIGS[QUANTIZE]):
                assert width <= config["BLOCK_K"]
        for dtype in (BF16, FP16, FP32, INT8):
            for rank in (1, 32, 64, 512):
                config = low_rank_down.choose(tokens, rank, 3584, dtype, CPU)
                assert config in CONFIGS[DOWN]
        for dtype in (BF16, FP16, FP32):
            config = weight_only_tilings.fallback(
                tokens, weight_only_tilings.fitting(dtype)
            )
            assert config in CONFIGS[WEIGHT_ONLY]


@pytest.mark.parametrize("pair", [FP32, BF16, FP16, INT8], ids=str)
def test_a_pair_of_any_type_for_a_result_of_any(pair: torch.dtype) -> None:
    """It is cut into as many parts of 16 bits as the result can show, and no more."""
    for out_dtype, bits in ((FP32, 8), (BF16, 4), (FP16, 8)):
        case = Case("pair", "", weight_bits=bits, dtype=out_dtype)
        given = Operands(dataclasses.replace(case, pair=pair, ranks=(12, 9)), seed=0)
        # What adds up shares is the pass of a tile that is not transposed.
        for operator, way in (
            (PRODUCT, "one pass"),
            (PRODUCT, "transposed"),
            (WEIGHT_ONLY, "one pass"),
        ):
            check(operator, TILINGS[operator][way], given)


@pytest.mark.parametrize("split_k, weight_bits", [(2, 8), (3, 4), (8, 4)])
def test_split_k_equals_one_pass(split_k: int, weight_bits: int) -> None:
    """Bit by bit, of one scale a channel; 8 parts of 5 blocks leave some with none."""
    for groups in (1, 5):
        parts = dict(in_features=150, weight_bits=weight_bits, groups=groups)
        # Ranks that one block holds: of more the pair's sums are in another order.
        given = large(**parts, ranks=(4, 4))
        split, again, one_pass = (
            check(PRODUCT, tiling(16, 32, 32, count), given)
            for count in (split_k, split_k, 1)
        )
        assert torch.equal(split, again)
        if groups == 1:
            assert torch.equal(split, one_pass)


def test_more_features_than_int32_sums() -> None:
    q, one = torch.zeros(1, 132105, dtype=INT8), torch.ones(1, 1)
    with pytest.raises(ValueError, match="132105"):
        Triton().run(PRODUCT, q, one, q, one, *[None] * 5, 8, FP32)


def test_ranks_of_another_sum_raise() -> None:
    for ranks in ((2, 4), (), (7, 1)):
        with pytest.raises(ValueError, match="but l1 has 5 columns"):
            Triton().run(DOWN, *operands("plain").args(DOWN, ranks=ranks))


def test_a_rotation_takes_a_tile_that_holds_its_blocks() -> None:
    given = large(tokens=5, in_features=4096, hadamard_size=2048)
    check(QUANTIZE, TILINGS[QUANTIZE]["loop"], given)
    given = large(tokens=1, in_features=32768, hadamard_size=32768)
    with pytest.raises(
        ValueError,
        match=r"a rotation of 32768 neighbours does not fit .* hold 16384: quantize with",
    ):
        Triton().run(QUANTIZE, *given.args(QUANTIZE))


def test_what_is_called_in_place_of_a_kernel_rotates_too() -> None:
    args = operands("rotation-2").args(WEIGHT_ONLY, modality_ids=None)
    expected = reference.weight_only_linear(*args)
    torch.testing.assert_close(dense(*args), expected, rtol=1e-5, atol=1e-5)


def test_a_product_that_is_not_rounded_shows() -> None:
    """Else the case of a large shift would not tell a contracted product."""
    x, pre_scale, ids, _, shift, _ = operands("large-shift").args(QUANTIZE)
    contracted = (x.double() * pre_scale[ids] - shift[ids].double()).float()
    assert (contracted != x * pre_scale[ids] - shift[ids]).float().mean() > 0.5


FLOATS = ("float_smooth_quantize", "float_linear")


def aot_cases(architecture: Optional[str]) -> list[list[AotCase]]:
    return [
        kernel_cases.smooth_quantize.aot_cases(),
        kernel_cases.low_rank_down.aot_cases(),
        kernel_cases.int_linear.aot_cases(architecture),
        [
            *kernel_cases.smooth.aot_cases(),
            *kernel_cases.weight_only_linear.aot_cases(architecture),
        ],
        kernel_cases.float_smooth_quantize.aot_cases(),
        kernel_cases.float_linear.aot_cases(architecture),
    ]


@pytest.mark.parametrize("architecture", [None, "sm_80", "sm_90", "gfx942"])
def test_cases_to_compile_name_every_argument(architecture: Optional[str]) -> None:
    for operator, cases in zip((*OPERATORS, *FLOATS), aot_cases(architecture)):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            named = [*case.signature, *case.constexprs, *dict(case.config.blocks)]
            assert sorted(named) == sorted(case.kernel.arg_names), case.name
            assert set(case.divisible) <= set(case.signature)
            if operator == DOWN:
                numbers = case.signature.get("qdata") == "*i8"
                is_int8 = numbers and case.signature.get("l1") == "*i8"
                assert (case.multiplies == "int8") == is_int8
        found = {case.config for case in cases}
        if (operator, architecture) in ((PRODUCT, "sm_90"), (WEIGHT_ONLY, None)):
            assert set(CONFIGS[operator]) <= found
