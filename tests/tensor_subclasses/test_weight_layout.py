# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The table of a weight's parts, against weights as they are made and the kernels' checks."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from torchao_masquant.kernels.gpu.checks import check_operands
from torchao_masquant.kernels.number_formats import INTEGERS, Grid
from torchao_masquant.options import SCHEMES
from torchao_masquant.recipe import LayerRecipe
from torchao_masquant.report.recipe_bytes import PART_NAMES
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.weight_layout import PARTS, WeightLayout

N, K, RANKS = 6, 32, (2, 1)
NAMES = ("text", "vision", "audio")


def make(
    scheme: str = "w4a8",
    *,
    group_size: "int | None" = None,
    low_rank_bits: int = 16,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
    seed: int = 0,
) -> MASQuantTensor:
    """A weight with all parts that its scheme has, or with none that it need not have."""
    generator = torch.Generator().manual_seed(seed)
    given = SCHEMES[scheme]
    parts: dict[str, Any] = {}
    if not bare:
        parts = dict(
            smoothing_factor=torch.ones(len(NAMES), K),
            ranks=RANKS,
            l1=torch.randn(K, sum(RANKS), generator=generator),
            l2=torch.randn(sum(RANKS), N, generator=generator),
            modality_bias=torch.randn(len(NAMES), N, generator=generator),
        )
        if not given.weight_only:
            parts["act_shift"] = torch.randn(len(NAMES), K, generator=generator)
    return MASQuantTensor.from_hp(
        torch.randn(N, K, generator=generator).to(dtype),
        weight_bits=given.weight_bits,
        act_bits=given.act_bits,
        group_size=group_size,
        symmetric=given.symmetric,
        modalities=NAMES,
        low_rank_bits=low_rank_bits,
        **parts,
    )


WEIGHTS = {
    "every part, packed, in groups": lambda: make("w4a8", group_size=8),
    "pairs of integers": lambda: make("w8a8", low_rank_bits=8),
    "zero points": lambda: make("w4a16", group_size=16),
    "pairs of float16": lambda: make("w3a3", dtype=torch.float16),
    "nothing but integers": lambda: make("w8a8", bare=True),
    "experts with a shift each": lambda: MASQuantTensor.stack([make(), make(seed=1)]),
    "experts with one shift": lambda: MASQuantTensor.stack([make(), make()]),
}


def kinds(weight: MASQuantTensor) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in weight.parts().items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_consists_of_what_its_layout_says(name: str) -> None:
    weight = WEIGHTS[name]()
    layout = weight.weight_layout
    assert layout.kinds() == kinds(weight)
    assert layout.nbytes == weight.nbytes_stored
    assert sum(layout.bytes_by_role().values()) == layout.nbytes
    layout.check_kinds(kinds(weight))
    neutral = layout.neutral(torch.device("meta"))
    assert kinds(weight.with_parts(neutral)) == kinds(weight)


@pytest.mark.parametrize("dim, pieces", [(0, 2), (0, 3), (1, 2)])
@pytest.mark.parametrize("name", [n for n in WEIGHTS if "experts" not in n])
def test_a_piece_is_as_large_as_the_layout_says(
    name: str, dim: int, pieces: int
) -> None:
    weight = WEIGHTS[name]()
    size = weight.shape[dim] // pieces
    for piece in weight.split(size, dim):
        assert kinds(piece) == weight.weight_layout.piece(dim, pieces).kinds()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": None}, "its scale is missing"),
        ({"l2": None}, "its l2 is missing"),
        (
            {"zero_point": (torch.int8, (N, 4))},
            "its zero_point should not be there",
        ),
        (
            {"qdata": (torch.uint8, (N, K))},
            "its qdata is torch.uint8 of shape (6, 32), it should be torch.uint8 of "
            "shape (6, 16)",
        ),
        (
            {"l1": (torch.float16, (K, 3))},
            "its l1 is torch.float16 of shape (32, 3), it should be torch.bfloat16 of "
            "shape (32, 3)",
        ),
    ],
)
def test_parts_of_another_weight_are_refused(
    change: dict[str, Any], message: str
) -> None:
    weight = make("w4a8", group_size=8)
    found = {**kinds(weight), **change}
    with pytest.raises(ValueError) as raised:
        weight.weight_layout.check_kinds({n: k for n, k in found.items() if k})
    assert str(raised.value) == message


def test_a_number_format_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGERS, 2, Grid(2, 1, torch.uint8, per_byte=4))  # type: ignore[arg-type]
    layout = WeightLayout((5, 34), weight_bits=2, groups=2)
    assert layout.kinds()["qdata"] == (torch.uint8, (5, 9))
    assert layout.nbytes == 5 * 9 + 4 * 5 * 2 + 4 * 34
    # Behind the first group, which ends within no byte of a longer row.
    assert WeightLayout((5, 48), 2, groups=3).column_spans(16, 48) == {
        "K": (16, 48),
        "B": (4, 12),
        "G": (1, 3),
    }


def test_the_tensor_takes_the_parts_of_the_table() -> None:
    arguments = list(inspect.signature(MASQuantTensor).parameters)
    assert [n for n in arguments if n in PARTS] == list(PARTS)
    fields = {field.name for field in dataclasses.fields(LayerRecipe)}
    # A recipe has factors in place of their reciprocals, and pairs as they were solved.
    assert set(PARTS) - fields == {"act_pre_scale", "low_rank_scale"}
    assert set(PART_NAMES) == {part.role for part in PARTS.values()}


@pytest.mark.parametrize("name", [n for n in WEIGHTS if "experts" not in n])
def test_kernels_read_what_weights_consist_of(name: str) -> None:
    weight = WEIGHTS[name]()
    parts = {n: getattr(weight, n) for n in PARTS}
    x, ids = torch.zeros(3, K, dtype=weight.dtype), torch.zeros(3, dtype=torch.int64)

    def of(*names: str) -> dict[str, Any]:
        return {n: parts[n] for n in names}

    integers = {**of("qdata", "scale"), "weight_bits": weight.weight_bits}
    rest = {**of("l2", "modality_bias"), "modality_ids": ids, "bias": None}
    if weight.weight_only:
        table = of("act_pre_scale", "zero_point", "l1", "low_rank_scale")
        given = {"x": x, **integers, **rest, **table, "out_dtype": x.dtype}
        check_operands("weight_only_linear", given)
        return
    table = of("act_pre_scale", "act_shift")
    check_operands(
        "smooth_quantize", {"x": x, "modality_ids": ids, "act_bits": 8, **table}
    )
    qx, x_scale = torch.zeros(3, K, dtype=torch.int8), torch.ones(3, 1)
    hidden = None
    if weight.l1 is not None:
        down = {"qdata": qx, "scale": x_scale, "modality_ids": ids}
        check_operands("low_rank_down", {**down, **of("l1", "low_rank_scale")})
        hidden = torch.zeros(3, sum(RANKS))
    tokens = {"qx": qx, "x_scale": x_scale, "low_rank_hidden": hidden}
    given = {**tokens, **integers, **rest, "out_dtype": x.dtype}
    check_operands("int_linear", given)
