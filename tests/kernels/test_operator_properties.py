# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What holds of every backend whatever the numbers: what stays alone, what is exact."""

import itertools

import numpy as np
import pytest
import torch
from backends import Backend, Cpu, Triton, every_backend, exact_down, tiling
from operator_cases import (
    BF16,
    DOWN,
    FP16,
    FP32,
    FP64,
    INT8,
    OPERATORS,
    PRODUCT,
    QUANTIZE,
    WEIGHT_ONLY,
    Case,
    Operands,
    operands,
)
from operator_oracle import TINY, UNIT, packed

from torchao_masquant.kernels import reference

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


def others(tokens: int, *broken: int) -> list[int]:
    return [t for t in range(tokens) if t not in broken]


@pytest.mark.parametrize("rotation", [1, 16])
@every_backend
def test_a_broken_token_shows_and_stays_alone(backend: Backend, rotation: int) -> None:
    given = Operands(Case("broken", "", hadamard_size=rotation))
    args = given.args(QUANTIZE)
    pre_scale, rest = args[1].clone(), others(len(args[0]), 3)
    assert given.ids is not None
    # The largest number is broken by its factor.
    pre_scale[given.ids[3], 5] = 4.0
    for _ in backend.ways(QUANTIZE):
        clean = backend.run(QUANTIZE, args[0], pre_scale, *args[2:])
        for value in (NAN, INF, -INF, 3e38):
            x = args[0].clone()
            x[3, 5] = value
            q, scale = backend.run(QUANTIZE, x, pre_scale, *args[2:])
            # The integers of a broken row mean nothing, so its scale is not finite.
            assert not torch.isfinite(scale[3]).any()
            assert not torch.isfinite(q[3].float() * scale[3]).any()
            if isinstance(backend, Triton):
                assert not q[3].any()
            assert torch.equal(q[rest], clean[0][rest])
            assert torch.equal(scale[rest], clean[1][rest])


@every_backend
def test_a_broken_token_stays_in_its_own_columns(backend: Backend) -> None:
    """A product with a 0/1 mask would turn other modalities' columns into nan."""
    given = operands("plain")
    q, scale, *rest = given.args(DOWN)
    broken = [int((given.ids == m).nonzero()[0]) for m in (0, 1, 2)]
    own, kept = torch.from_numpy(given.own()), others(len(q), *broken)
    for _ in backend.ways(DOWN):
        clean = backend.run(DOWN, q, scale, *rest)
        for value in (NAN, INF):
            bad = scale.clone()
            bad[broken] = value
            hidden = backend.run(DOWN, q, bad, *rest)
            assert (hidden[~own] == 0).all()
            for t in broken[1:]:
                assert not torch.isfinite(hidden[t][own[t]]).any()
            assert torch.equal(hidden[kept], clean[kept])


@every_backend
def test_a_broken_column_stays_with_its_modality(backend: Backend) -> None:
    for value in (NAN, INF):
        for case in ("plain", "fp16-pair", "fp32-pair"):
            given = operands(case)
            args = given.args(DOWN)
            l1 = args[2].clone()
            l1[3, 4] = value
            for _ in backend.ways(DOWN):
                clean = backend.run(DOWN, *args)
                hidden = backend.run(DOWN, *args[:2], l1, *args[3:])
                assert torch.equal(hidden[:, :4], clean[:, :4])
                assert not torch.isfinite(hidden[given.ids == 2, 4]).any()
                assert not hidden[given.ids != 2, 4].any()


@every_backend
def test_a_broken_token_of_a_product_stays_alone(backend: Backend) -> None:
    given = operands("plain")
    qx, x_scale, qdata, scale, hidden, *rest = given.args(PRODUCT)
    bad, wrong = x_scale.clone(), hidden.clone()
    bad[2] = wrong[2] = NAN
    kept = others(len(qx), 2)
    for _ in backend.ways(PRODUCT):
        clean = backend.run(PRODUCT, qx, x_scale, qdata, scale, hidden, *rest)
        y = backend.run(PRODUCT, qx, bad, qdata, scale, wrong, *rest)
        assert torch.isnan(y[2]).all()
        assert torch.equal(y[kept], clean[kept])


@every_backend
def test_a_broken_token_of_weights_alone_stays_alone(backend: Backend) -> None:
    for case in (Case("broken", "", pair=INT8), Case("broken", "", dtype=FP16)):
        given = Operands(case)
        args = given.args(WEIGHT_ONLY)
        for way in backend.ways(WEIGHT_ONLY):
            clean = backend.run(WEIGHT_ONLY, *args)
            # One of each modality, in one call.
            broken = [int((given.ids == m).nonzero()[0]) for m in range(3)]
            for value in (NAN, INF):
                x = args[0].clone()
                x[broken, 7] = value
                y = backend.run(WEIGHT_ONLY, x, *args[1:])
                assert not torch.isfinite(y[broken]).any(), way
                kept = others(len(x), *broken)
                assert torch.equal(y[kept], clean[kept]), way


@every_backend
def test_a_base_call_of_weights_alone_leaves_the_pair_alone(backend: Backend) -> None:
    given = operands("plain")
    bare = given.args(WEIGHT_ONLY, modality_ids=None, l1=None, l2=None)
    broken = torch.full_like(given.l1, NAN)
    args = given.args(WEIGHT_ONLY, modality_ids=None, l1=broken)
    for _ in backend.ways(WEIGHT_ONLY):
        y = backend.run(WEIGHT_ONLY, *args)
        assert torch.equal(y, backend.run(WEIGHT_ONLY, *bare))


@every_backend
def test_base_tokens_of_a_mixed_call_are_those_of_a_base_call(
    backend: Backend,
) -> None:
    """Nothing that they could read of the pair, or of another modality's bias, shows."""
    given = Operands(Case("base", "", tokens=70, ids="spans", weight_bits=4))
    args = given.args(PRODUCT)
    nothing = dict(low_rank_hidden=None, l2=None, modality_ids=None)
    bare, is_base = given.args(PRODUCT, **nothing), given.ids == 0
    for _ in backend.ways(PRODUCT):
        y, base = backend.run(PRODUCT, *args), backend.run(PRODUCT, *bare)
        assert torch.equal(y[is_base], base[is_base])
        assert (y[~is_base] != base[~is_base]).any(1).all()


def test_tiles_of_base_tokens_read_no_pair() -> None:
    """Of Triton's: where there is no low-rank part, neither of its sides is read."""
    backend, given = Triton(), Operands(Case("base", "", tokens=70, ranks=(32, 32)))
    if backend.why_not():
        pytest.skip(backend.why_not())
    ids = torch.tensor([0] * 35 + [1] * 35)
    hidden, l2 = torch.full((70, 64), NAN), torch.full((64, 13), NAN)
    rest = dict(modality_bias=None, bias=None)
    bare = given.args(PRODUCT, low_rank_hidden=None, l2=None, modality_ids=None, **rest)
    for way in backend.ways(PRODUCT):
        expected = backend.run(PRODUCT, *bare)
        none = dict(low_rank_hidden=hidden, l2=l2, modality_ids=0 * ids, **rest)
        y = backend.run(PRODUCT, *given.args(PRODUCT, **none))
        assert torch.equal(y, expected), way
        # The second of two modalities has no token, the first columns of its own.
        some, up = hidden.clone(), l2.clone()
        some[35:, :32], some[35:, 32:], up[:32] = 1.0, 0.0, 1.0
        part = dict(low_rank_hidden=some, l2=up, modality_ids=ids, **rest)
        y = backend.run(PRODUCT, *given.args(PRODUCT, **part))
        assert torch.equal(y[:35], expected[:35]) and torch.isfinite(y).all(), way
        assert (y[35:] != expected[35:]).any(1).all(), way
    # So it is in the way down, of tokens that have no columns there.
    given = Operands(Case("down", "", tokens=64, ranks=(16, 16)))
    ids = torch.zeros(64, dtype=torch.int64)
    ids[32:] = 2
    q, scale, l1, *_ = given.args(DOWN)
    bad_l1, bad = l1.clone(), scale.clone()
    bad_l1[:, :16], bad[:32] = NAN, NAN
    for way in backend.ways(DOWN):
        clean = backend.run(DOWN, q, scale, l1, ids, (16, 16), None)
        assert clean[32:, 16:].all()
        y = backend.run(DOWN, q, bad, bad_l1, ids, (16, 16), None)
        assert torch.equal(y, clean), way


@pytest.mark.parametrize("wide", [False, True], ids=["", "of more than 32 bits"])
@pytest.mark.parametrize("operator", [QUANTIZE, WEIGHT_ONLY])
@every_backend
def test_an_id_that_names_no_modality(
    request: pytest.FixtureRequest, backend: Backend, operator: str, wide: bool
) -> None:
    """It raises, or where a kernel can't it shows as nan; it is never taken for another."""
    if isinstance(backend, Cpu) and wide:
        reason = "the C++ kernels take the lower 32 bits of an id"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    given = operands("plain")
    pair = {} if operator == QUANTIZE else {"l1": None, "l2": None}
    args = given.args(operator, **pair)
    for wrong, _ in itertools.product(
        (2**32, 2**40) if wide else (3, -1), backend.ways(operator)
    ):
        ids = given.ids.clone()
        ids[4] = wrong
        bad = given.args(operator, modality_ids=ids, **pair)
        if backend.raises:
            with pytest.raises(IndexError):
                backend.run(operator, *bad)
            continue
        clean, y = backend.run(operator, *args), backend.run(operator, *bad)
        if operator == QUANTIZE:
            assert not y[0][4].any()
            clean, y = torch.cat(clean, 1), torch.cat(y, 1)
        assert y[4, -1].isnan()
        kept = others(len(y), 4)
        assert torch.equal(y[kept], clean[kept])


@every_backend
def test_halves_round_to_even(backend: Backend) -> None:
    """A row whose maximum is quant_max has scale 1: its halves are exact ties."""
    for bits in (8, 6, 4, 2):
        quant_max = 2 ** (bits - 1) - 1
        halves = [h + 0.5 for h in range(-quant_max, quant_max)]
        x = torch.tensor([[float(quant_max), *halves]])
        args = (x, torch.ones_like(x), None, bits, None, 1)
        for _ in backend.ways(QUANTIZE):
            q, scale = backend.run(QUANTIZE, *args)
            assert scale.item() == 1.0
            # Python's round() rounds halves to even.
            assert q.tolist() == [[round(v) for v in x[0].tolist()]]


@every_backend
def test_rounding_next_to_halves(backend: Backend) -> None:
    """Where a product with the reciprocal would round otherwise than the quotient."""
    steps = (torch.arange(-126, 126) + 0.5) * 3
    above = torch.nextafter(steps, torch.tensor(1e9))
    near = torch.stack([steps, above, steps * 1.0000001])
    for factor in (1.0, 1 / 3, 0.7, 1e-20, 1e20):
        x = torch.cat((near * factor, torch.full((3, 1), 381.0 * factor)), 1)
        args = (x, torch.ones(1, x.shape[1]), None, 8, None, 1)
        expected = reference.smooth_quantize(*args)
        for _ in backend.ways(QUANTIZE):
            for ours, theirs in zip(backend.run(QUANTIZE, *args), expected):
                assert torch.equal(ours, theirs)


@every_backend
def test_rows_that_leave_nothing(backend: Backend) -> None:
    """Zeros, subnormals, and a token that the shift takes whole: never nan."""
    shift = torch.randn(1, 70)
    x = torch.cat((torch.zeros(1, 70), torch.full((1, 70), 1e-40), shift))
    ones = torch.ones(1, 70)
    for _ in backend.ways(QUANTIZE):
        q, scale = backend.run(QUANTIZE, x[:2], ones, None, 8, None, 1)
        assert (scale == TINY).all() and not q.any()
        q, scale = backend.run(QUANTIZE, x[2:], ones, None, 8, shift, 1)
        assert not q.any() and (scale == TINY).all()


@every_backend
def test_what_changes_nothing(backend: Backend) -> None:
    """A shift of zeros, ids of zero, x of another type with the same values."""
    given = operands("bfloat16")
    args = given.args(QUANTIZE, modality_ids=None)
    zeros = torch.zeros(args[0].shape[0], dtype=torch.int64)
    for _ in backend.ways(QUANTIZE):
        expected = backend.run(QUANTIZE, *args)
        for other in (
            dict(act_shift=torch.zeros_like(given.pre_scale), modality_ids=None),
            dict(modality_ids=zeros),
            dict(x=given.x.float(), modality_ids=None),
        ):
            found = backend.run(QUANTIZE, *given.args(QUANTIZE, **other))
            assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("weight_bits", [8, 3])
@every_backend
def test_integers_are_summed_exactly(backend: Backend, weight_bits: int) -> None:
    """Scales of one: K * 127 * 128 stays below 2 ** 24, where float32 is exact."""
    for id in ("odd-sizes", "seventeen-tokens"):
        case = Case("exact", "", **_sizes(id), weight_bits=weight_bits)
        given = Operands(case)
        qx, x_scale, qdata, scale, *_ = given.args(PRODUCT)
        exact = qx.numpy().astype(np.int64) @ given.weight.numpy().astype(np.int64).T
        ones = (torch.ones_like(x_scale), qdata, torch.ones_like(scale))
        for way in backend.ways(PRODUCT):
            y = backend.run(PRODUCT, qx, *ones, *[None] * 5, weight_bits, FP32)
            assert np.array_equal(y.numpy().astype(np.int64), exact), way


def _sizes(id: str) -> dict[str, int]:
    case = operands(id).case
    names = ("tokens", "in_features", "out_features")
    return {name: getattr(case, name) for name in names}


@pytest.mark.parametrize("groups", [1, 32])
@every_backend
def test_extremes_neither_saturate_nor_overflow(backend: Backend, groups: int) -> None:
    """vpmaddubsw would: 2 * 255 * 127 is over 2 ** 15; 4096 products pass 2 ** 24."""
    on_gpu = isinstance(backend, Triton)
    for x, w, bits in itertools.product((127, -127, -128), (127, -128, 7, -8), (8, 4)):
        if not -(2 ** (bits - 1)) <= w < 2 ** (bits - 1):
            continue
        for tokens in (1,) if on_gpu else (1, 17):
            q = torch.full((tokens, 4096), x, dtype=INT8)
            weight = packed(np.full((3, 4096), w, dtype=np.int8), bits)
            ones = (torch.ones(tokens, 1), weight, torch.ones(3, groups))
            # Seven significant bits, or few more: exact in float32.
            exact = torch.tensor(float(x * w * 4096)).double()
            for way in ["blocks of 256"] if on_gpu else backend.ways(PRODUCT):
                if isinstance(backend, Triton):
                    # The interpreter takes long over small blocks.
                    backend.config = tiling(16, 16, 256, 4)
                y = backend.run(PRODUCT, q, *ones, *[None] * 5, bits, FP32)
                error = (y.double() - exact).abs().max()
                assert error <= (groups - 1) * UNIT * abs(exact), (x, w, way)
    if isinstance(backend, Triton):
        backend.config = None


@every_backend
def test_sums_of_a_pair_of_8_bits_are_exact(backend: Backend) -> None:
    """The largest integers there are, of one sign, past 16 bits."""
    given = Operands(Case("exact", "", in_features=300, ranks=(1, 16), pair=INT8))
    q, scale, l1, *rest = given.args(DOWN, low_rank_scale=None)
    args = (0 * q + 127, torch.ones_like(scale), 0 * l1 - 127, *rest)
    for _ in backend.ways(DOWN):
        hidden = backend.run(DOWN, *args)
        assert np.array_equal(hidden.numpy(), exact_down(args, given.own()))


@every_backend
def test_float32_is_not_rounded_to_fewer_bits(backend: Backend) -> None:
    """A single product shows every bit: TF32 would keep eleven of them."""
    l1 = torch.randn(16, 16)
    q, one = torch.eye(8, 16, dtype=INT8), torch.ones(8, 1)
    x, weight = torch.randn(16, 16), torch.eye(16, dtype=INT8)
    ones = (torch.ones(1, 16), weight, torch.ones(16, 1), *[None] * 6, [], 8, FP32)
    for _ in backend.ways(DOWN):
        hidden = backend.run(DOWN, q, one, l1, torch.ones(8).long(), (16,), None)
        assert torch.equal(hidden, l1[:8])
    for _ in backend.ways(WEIGHT_ONLY):
        assert torch.equal(backend.run(WEIGHT_ONLY, x, *ones, None, 1), x)


@pytest.mark.parametrize("weight_bits, groups", [(8, 1), (4, 1), (4, 20)])
@every_backend
def test_no_weight_is_rounded(backend: Backend, weight_bits: int, groups: int) -> None:
    """One feature at a time shows each weight: all bits of it, whatever x's type."""
    case = Case("eye", "", in_features=60, weight_bits=weight_bits, groups=groups)
    given, width = Operands(case), 60 // groups
    levels = given.weight.float() - given.zero_point.float().repeat_interleave(width, 1)
    exact = (levels * given.scale.repeat_interleave(width, 1)).t()
    # The C++ kernels take what is looked up apart from its zero point.
    widest = given.weight.float().abs() + given.zero_point.float().abs().amax()
    most = 4 * UNIT * widest.t() * given.scale.amax() * isinstance(backend, Cpu)
    nothing = dict.fromkeys(("l1", "l2", "modality_bias", "modality_ids", "bias"))
    ones = dict(act_pre_scale=torch.ones(1, 60), out_dtype=FP32)
    for dtype in (FP32, BF16, FP16):
        # More than 16 tokens of bfloat16 may be multiplied in it on a CPU.
        few = 16 if dtype == BF16 and not isinstance(backend, Triton) else 60
        x = torch.eye(60)[:few].to(dtype)
        args = given.args(WEIGHT_ONLY, x=x, **ones, **nothing)
        for way in backend.ways(WEIGHT_ONLY):
            y = backend.run(WEIGHT_ONLY, *args)
            assert ((y - exact[:few]).abs() <= most[:few]).all(), (dtype, way)


@every_backend
def test_zero_points_are_subtracted_exactly(backend: Backend) -> None:
    """Products of small integers: float32 is exact, and int8 would have wrapped."""
    x = torch.randint(-8, 9, (5, 16)).float()
    weight = torch.full((3, 16), -128, dtype=INT8)
    zero_point = torch.tensor([[127], [-128], [0]], dtype=INT8)
    ones = (torch.ones(1, 16), weight, torch.ones(3, 1), zero_point)
    expected = x.sum(1, keepdim=True) * torch.tensor([[-255.0, 0.0, -128.0]])
    for _ in backend.ways(WEIGHT_ONLY):
        y = backend.run(WEIGHT_ONLY, x, *ones, *[None] * 5, [], 8, FP32, None, 1)
        assert torch.equal(y, expected)


@every_backend
def test_a_base_call_adds_the_bias_of_the_base(backend: Backend) -> None:
    given = operands("plain")
    bias = torch.tensor([[0.0], [1e6], [2e6]]).expand(3, 13)
    nothing = dict(low_rank_hidden=None, l2=None, bias=None)
    ids = dict(modality_ids=given.ids)
    for _ in backend.ways(PRODUCT):
        bare, base, mixed = (
            backend.run(PRODUCT, *given.args(PRODUCT, **nothing, **others))
            for others in (
                dict(modality_bias=None, modality_ids=None),
                dict(modality_bias=bias, modality_ids=None),
                dict(modality_bias=bias, **ids),
            )
        )
        assert torch.equal(bare, base)
        assert torch.equal(mixed[given.ids == 0], bare[given.ids == 0])
        for m in (1, 2):
            assert ((mixed[given.ids == m] / 1e6 - m).abs() < 0.1).all()


@every_backend
def test_default_dtype_has_no_say(backend: Backend) -> None:
    """transformers loads models under another default type: sums stay in float32."""
    for operator, default in itertools.product(OPERATORS, (FP16, BF16, FP64)):
        args = operands("groups" if operator == PRODUCT else "plain").args(operator)
        expected = backend.run(operator, *args)
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            found = backend.run(operator, *args)
        finally:
            torch.set_default_dtype(before)
        expected, found = (
            y if isinstance(y, tuple) else (y,) for y in (expected, found)
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@every_backend
def test_rotations_that_do_not_fit_are_refused(backend: Backend) -> None:
    for operator, size in itertools.product((QUANTIZE, WEIGHT_ONLY), (0, 3, -8, 32)):
        args = operands("plain").args(operator, hadamard_size=size)
        with pytest.raises(
            (ValueError, RuntimeError), match=f"hadamard_size must .* got .*{size}"
        ):
            backend.run(operator, *args)
