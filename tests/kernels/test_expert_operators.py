# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators of experts, held to float64, matrix by matrix."""

import pytest
import torch

from torchao_masquant.kernels import pack_int4

E, N, K, RANKS = 3, 10, 16, (2, 1)

# Where each expert's rows end: an expert without rows (the first, one in the middle, the
# last), all rows of one expert, one row, none, and rows of experts that are elsewhere.
ENDS = {
    "even": ([3, 6, 9], 9),
    "first without": ([0, 4, 9], 9),
    "middle without": ([4, 4, 9], 9),
    "last without": ([4, 9, 9], 9),
    "one has all": ([0, 9, 9], 9),
    "one row": ([0, 0, 1], 1),
    "no rows": ([0, 0, 0], 0),
    "some elsewhere": ([2, 3, 5], 9),
    "all elsewhere": ([0, 0, 0], 4),
}


def parts(bits: int, groups: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    rank = sum(RANKS)
    made = {
        "integers": torch.randint(
            -limit, limit, (E, N, K), generator=generator, dtype=torch.int8
        ),
        "scale": torch.rand(E, N, groups, generator=generator) / limit + 1e-3,
        "l1": torch.randn(E, K, rank, generator=generator).bfloat16(),
        "l2": torch.randn(E, rank, N, generator=generator).bfloat16(),
        "modality_bias": torch.randn(E, 3, N, generator=generator),
        "bias": torch.randn(E, N, generator=generator),
    }
    made["qdata"] = pack_int4(made["integers"]) if bits <= 4 else made["integers"]
    return made


def owners(ends: list[int], rows: int) -> list[int]:
    """Which expert each row is of; E for one that is elsewhere."""
    return [next((e for e in range(E) if row < ends[e]), E) for row in range(rows)]


def expected(x, made, ids, experts, groups, zero_point=None):
    """(S, N) float64 of smoothed rows (S, K), with the bound of float32 sums."""
    y = torch.zeros(len(experts), N, dtype=torch.float64)
    for row, e in enumerate(experts):
        if e == E:
            continue
        values = made["integers"][e].double()
        if zero_point is not None:
            values = values - zero_point[e].double().repeat_interleave(K // groups, 1)
        matrix = values * made["scale"][e].double().repeat_interleave(K // groups, 1)
        m = 0 if ids is None else int(ids[row])
        y[row] = x[row] @ matrix.t() + made["modality_bias"][e, m] + made["bias"][e]
        if m:
            own = slice(sum(RANKS[: m - 1]), sum(RANKS[:m]))
            y[row] += (
                x[row] @ made["l1"][e][:, own].double() @ made["l2"][e][own].double()
            )
    return y


@pytest.mark.parametrize("bits, groups", [(8, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("case", ENDS)
def test_integers(case, mixed, bits, groups):
    ends, rows = ENDS[case]
    generator = torch.Generator().manual_seed(1)
    qx = torch.randint(-127, 128, (rows, K), generator=generator, dtype=torch.int8)
    sx = torch.rand(rows, 1, generator=generator) / 127
    ids = torch.randint(0, 3, (rows,), generator=generator) if mixed else None
    made = parts(bits, groups)
    y = torch.ops.masquant.expert_int_linear(
        qx,
        sx,
        torch.tensor(ends),
        made["qdata"],
        made["scale"],
        made["l1"] if mixed else None,
        made["l2"] if mixed else None,
        made["modality_bias"],
        ids,
        made["bias"],
        RANKS,
        bits,
        torch.float32,
    )
    x = qx.double() * sx.double()
    wanted = expected(x, made, ids, owners(ends, rows), groups)
    assert y.shape == (rows, N) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not y[ends[-1] :].any()


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("case", ENDS)
def test_weights_alone(case, mixed):
    ends, rows = ENDS[case]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, K, generator=generator)
    pre_scale = torch.rand(3, K, generator=generator) + 0.5
    ids = torch.randint(0, 3, (rows,), generator=generator) if mixed else None
    made = parts(4, 2)
    zero_point = torch.randint(-8, 8, (E, N, 2), generator=generator, dtype=torch.int8)
    y = torch.ops.masquant.expert_weight_only_linear(
        x,
        torch.tensor(ends),
        pre_scale,
        made["qdata"],
        made["scale"],
        zero_point,
        made["l1"] if mixed else None,
        made["l2"] if mixed else None,
        made["modality_bias"],
        ids,
        made["bias"],
        RANKS,
        4,
        torch.float32,
    )
    rows_scale = pre_scale[ids] if mixed else pre_scale[:1]
    smoothed = x.double() * rows_scale.double()
    wanted = expected(smoothed, made, ids, owners(ends, rows), 2, zero_point)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["expert_int_linear", "expert_weight_only_linear"])
def test_fakes_say_what_the_operators_give(operator):
    made = parts(4, 1)
    ids, ends = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 4])
    rest = (
        made["l1"],
        made["l2"],
        made["modality_bias"],
        ids,
        made["bias"],
        RANKS,
        4,
        torch.bfloat16,
    )
    if operator == "expert_int_linear":
        x = (torch.ones(4, K, dtype=torch.int8), torch.ones(4, 1), ends)
        args = (*x, made["qdata"], made["scale"], *rest)
    else:
        x = (torch.randn(4, K), ends, torch.ones(3, K))
        args = (*x, made["qdata"], made["scale"], None, *rest)
    torch.library.opcheck(getattr(torch.ops.masquant, operator).default, args)


def test_plain_weights_are_refused():
    x, weight, ends = torch.randn(4, K), torch.randn(E, N, K), torch.tensor([1, 2, 4])
    with pytest.raises(TypeError, match="use torch.nn.functional.grouped_mm for unqu"):
        torch.ops.masquant.expert_linear(x, weight, ends)
