# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Operators for tokens in floats: bits of what is rounded, float64 for what is added."""

import contextlib
import math
from typing import Any, Iterator, Optional
from unittest import mock

import number_oracle as oracle
import pytest
import torch
from backends import Backend, Triton, down, rows, tiling

from torchao_masquant.kernels import float_reference
from torchao_masquant.kernels.float_instructions import Product, product_on
from torchao_masquant.kernels.hadamard import hadamard_rotate
from torchao_masquant.kernels.number_formats import FORMATS, INTEGERS

ops = torch.ops.masquant
QUANTIZE, DOWN, PRODUCT = (
    "float_smooth_quantize",
    "float_low_rank_down",
    "float_linear",
)
T, K, N, M, RANKS = 7, 256, 24, 3, (3, 2)
UNIT = 2.0**-24

every_format = pytest.mark.parametrize("name", FORMATS)


class Reference(Backend):
    def run(self, operator: str, *args: Any) -> Any:
        return getattr(float_reference, operator)(*args)


class Kernels(Triton):
    """The Triton kernels, in tilings that small tensors fill, by every product."""

    TILINGS = {
        QUANTIZE: {"loop": rows(4, 128), "one block": rows(4, 256)},
        DOWN: {"split": down(32, 3), "one pass": down(16, 1)},
        PRODUCT: {"transposed": tiling(16, 32, 64, 3), "one pass": tiling(128, 32, 64)},
    }
    product: Optional[Product] = None

    def ways(self, operator: str) -> Iterator[str]:
        try:
            for way, self.config in self.TILINGS[operator].items():
                for self.product in Product if operator == PRODUCT else (None,):
                    yield f"{way} {self.product!r}"
        finally:
            self.config = self.product = None

    def options(self) -> dict[str, Any]:
        product = {} if self.product is None else {"product": self.product}
        return {**super().options(), **product}

    def run(self, operator: str, *args: Any) -> Any:
        kept = self.config
        if kept is None:
            self.config = next(iter(self.TILINGS[operator].values()))
        try:
            with scales_of_e4m3():
                return super().run(operator, *args)
        finally:
            self.config = kept


def ways(backend: Backend, name: str) -> Iterator[str]:
    """Of the product, but those that are for other formats, which decode this one."""
    others = {Product.SCALED}
    if not name.startswith("e4m3"):
        others = {Product.E4M3, Product.FNUZ}
    for way in backend.ways(PRODUCT):
        if getattr(backend, "product", None) not in others:
            yield way


@contextlib.contextmanager
def scales_of_e4m3() -> Iterator[None]:
    """Triton's interpreter reads every scale of ``dot_scaled`` as e8m0; not so a GPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    read = interpreter._dot_scaled_scale_to_f32

    def scale(handle: Any, *rest: Any) -> Any:
        if handle.dtype.is_fp8():
            held = torch.from_numpy(handle.data.copy())
            return held.view(torch.float8_e4m3fn).float().numpy()
        return read(handle, *rest)

    with mock.patch.object(interpreter, "_dot_scaled_scale_to_f32", scale):
        yield


BACKENDS = (Reference(), Kernels())
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def tokens(spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, K, generator=generator)
    return x * torch.exp(spread * torch.randn(T, K, generator=generator))


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of powers of two, so that smoothing rounds nothing; shifts; and ids."""
    generator = torch.Generator().manual_seed(4)
    pre_scale = 2.0 ** torch.randint(-3, 4, (M, K), generator=generator)
    shift = torch.randn(M, K, generator=generator)
    return pre_scale, shift, torch.tensor([0, 1, 2, 0, 2, 1, 1])


def quantized(name: str, x: torch.Tensor) -> tuple[Any, Any, Optional[torch.Tensor]]:
    q, scale, of_token = ops.float_smooth_quantize(
        x, torch.ones(1, x.shape[1]), None, name
    )
    return q, scale, of_token if of_token.shape[1] else None


@every_format
@pytest.mark.parametrize("rotation", [1, 16])
@every_backend
def test_rounded_tokens_to_the_bit(backend: Backend, name: str, rotation: int) -> None:
    x, (pre_scale, shift, ids) = tokens(), factors()
    args = (x, pre_scale, ids, name, shift, rotation)
    for _ in backend.ways(QUANTIZE):
        check_codes(backend.run(QUANTIZE, *args), args)


def check_codes(found: tuple[torch.Tensor, ...], args: tuple[Any, ...]) -> None:
    q, scale, of_token = found
    x, pre_scale, ids, name, shift, rotation = args
    seen = hadamard_rotate(x * pre_scale[ids] - shift[ids], rotation)
    codes, _ = oracle.FORMATS[name].rounded(seen)
    scales, rows = oracle.FORMATS[name].scales(seen)
    assert torch.equal(scale.float(), scales)
    assert of_token.shape == (T, 0 if rows is None else 1)
    if rows is not None:
        assert torch.equal(of_token, rows)
    held = q.view(torch.uint8)
    if FORMATS[name].grid.per_byte == 2:
        held = torch.stack([held & 0xF, held >> 4], -1).flatten(1)
    assert torch.equal(held.long(), codes)


@every_format
@pytest.mark.parametrize("integers", [False, True], ids=["own", "int4"])
@every_backend
def test_product_is_as_exact_as_its_sums(
    backend: Backend, name: str, integers: bool
) -> None:
    loud = torch.tensor([1.0, 1e12, 1e-12, 1.0, 1e12, 1e-12, 1.0])
    x, weight = tokens() * loud[:, None], tokens(0.5).repeat(4, 1)[:N].roll(5, 1)
    x_exact = oracle.FORMATS[name].rounded(x)[1]
    row_scale, weight_format = None, None
    if integers:
        grid = INTEGERS[4]
        codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
        qdata, scale = grid.pack(codes), torch.rand(N, 4) + 0.1
        w_exact = codes.double() * scale.double().repeat_interleave(K // 4, 1)
    else:
        qdata, scale, of_row = quantized(name, weight)
        row_scale, weight_format = None if of_row is None else of_row[:, 0], name
        w_exact = oracle.FORMATS[name].rounded(weight)[1]
    hidden, l2 = torch.randn(T, 5), torch.randn(5, N)
    bias, own, ids = torch.randn(N), torch.randn(M, N), factors()[2]
    # As a pair's first half leaves tokens of the base.
    hidden = hidden * (ids > 0)[:, None]
    args = (
        *quantized(name, x),
        qdata,
        scale,
        row_scale,
        hidden,
        l2,
        own,
        ids,
        bias,
        name,
        weight_format,
        4 if integers else FORMATS[name].grid.bits,
        torch.float32,
    )
    more = hidden.double() @ l2.double() + own[ids].double() + bias.double()
    size = x_exact.abs() @ w_exact.abs().t()
    of_pair = hidden.abs() @ l2.abs()
    size = size * (K + 6) + 8 * (of_pair + own[ids].abs() + bias.abs())
    if isinstance(backend, Kernels):
        # Sums of a block, and a pair in six products of parts of 7 bits.
        size = size + 8 * x_exact.abs() @ w_exact.abs().t() + 70 * of_pair
    for way in ways(backend, name):
        y = backend.run(PRODUCT, *args)
        error = (y.double() - (x_exact @ w_exact.t() + more)).abs()
        assert (error <= 1.01 * UNIT * (size + y.abs())).all(), way


@every_format
@pytest.mark.parametrize("pair", [torch.float32, torch.float16, torch.int8], ids=str)
@every_backend
def test_pairs_read_rounded_tokens(
    backend: Backend, name: str, pair: torch.dtype
) -> None:
    x, ids = tokens(), factors()[2]
    l1 = torch.randn(K, sum(RANKS))
    low_rank_scale = None
    if pair == torch.int8:
        l1, low_rank_scale = l1 * 30, torch.rand(sum(RANKS))
    l1 = l1.to(pair)
    args = (*quantized(name, x), l1, ids, RANKS, name, low_rank_scale)
    exact = oracle.FORMATS[name].rounded(x)[1]
    factor = 1.0 if low_rank_scale is None else low_rank_scale.double()
    expected = exact @ l1.double() * factor
    size = exact.abs() @ l1.double().abs() * factor
    owner = torch.tensor([1, 1, 1, 2, 2])
    own = ids[:, None] == owner
    # A kernel adds a product for each of up to three parts of the pair.
    parts = 3 if isinstance(backend, Kernels) and pair == torch.float32 else 1
    for way in backend.ways(DOWN):
        hidden = backend.run(DOWN, *args)
        assert (hidden[~own] == 0).all(), way
        error = (hidden - expected).abs()
        assert (error <= (parts * K + 10) * UNIT * size)[own].all(), way


def product(
    backend: Backend, name: str, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Of tokens that the backend rounds, with nothing added to it."""
    q, scale, of_token = backend.run(
        QUANTIZE, x, torch.ones(1, x.shape[1]), None, name, None, 1
    )
    qdata, w_scale, of_row = quantized(name, weight)
    return backend.run(
        PRODUCT,
        q,
        scale,
        of_token if of_token.shape[1] else None,
        qdata,
        w_scale,
        None if of_row is None else of_row[:, 0],
        *[None] * 5,
        name,
        name,
        FORMATS[name].grid.bits,
        torch.float32,
    )


@every_format
@every_backend
def test_broken_tokens_show_and_stay_alone(backend: Backend, name: str) -> None:
    x, weight = tokens(), tokens()
    clean = product(backend, name, x, weight)
    x[3:6, 5] = torch.tensor([math.inf, -math.inf, math.nan])
    y = product(backend, name, x, weight)
    assert y[3:6].isnan().all()
    rest = [0, 1, 2, 6]
    assert torch.equal(y[rest], clean[rest])


@every_format
@every_backend
def test_tokens_of_any_size_keep_their_precision(backend: Backend, name: str) -> None:
    """A row of 1e-30, one beyond e4m3 by far, and one of zeros."""
    x, weight = tokens(), tokens()
    sizes = torch.tensor([1.0, 1e-30, 1e30, 0.0, 1e6, 1e-6, 1.0])
    sized = x[:1] * sizes[:, None]
    y = product(backend, name, sized, weight)
    expected = sized.double() @ weight.double().t()
    assert (y[3] == 0).all()
    off = (y - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-40)
    assert off.max() < 2 * off[0] < 0.5


@every_format
def test_kernels_round_as_the_reference_does(name: str) -> None:
    """All that lies halfway between two values, and what is beyond; 16 bits; a modality
    that is not there, and broken tokens, whose scales show it."""
    kernels, (pre_scale, shift, ids) = Kernels(), factors()
    halves = torch.arange(-3 * K // 2, 3 * K // 2).view(3, K) / 8
    halves[:, 0] = 896
    broken = tokens()[:3].clone()
    broken[1, 40], broken[2, 7] = math.inf, math.nan
    for x in (halves, halves.half(), tokens().bfloat16(), broken):
        args = (x, pre_scale, ids[: len(x)], name, shift, 1)
        found, same = kernels.run(QUANTIZE, *args), Reference().run(QUANTIZE, *args)
        # What stands in for nan may be any code.
        whole = [t for t in range(len(x)) if x[t].isfinite().all()]
        for rows_of, a, b in zip((whole, slice(None), slice(None)), found, same):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(
                a.view(torch.uint8)[rows_of], b.view(torch.uint8)[rows_of]
            )
    unknown = torch.tensor([0, M, -1])
    _, scale, of_token = kernels.run(
        QUANTIZE, tokens()[:3], pre_scale, unknown, name, shift, 1
    )
    assert scale.float().isnan().all(1).tolist() == [False, True, True]
    assert not of_token.shape[1] or of_token.isnan()[:, 0].tolist() == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "name, weight_bits, width, groups",
    [
        ("e4m3", 4, 100, 1),
        ("e4m3", 4, 99, 3),
        ("e4m3", 8, 100, 2),
        ("e4m3-128", 4, 128, 4),
        ("mxfp8", 4, 160, 1),
        ("nvfp4", 4, 48, 3),
        ("nvfp4", None, 80, 5),
        ("mxfp8", None, 96, 3),
        ("e4m3", None, 100, 1),
    ],
)
def test_a_rest_of_k(
    name: str, weight_bits: Optional[int], width: int, groups: int
) -> None:
    """Blocks that do not cover K or a group, and weights of integers of any width."""
    x = tokens()[:3, :width]
    token = quantized(name, x)
    if weight_bits is None:
        qdata, scale, of_row = quantized(name, tokens()[:, :width])
        weight: Any = (qdata, scale, None if of_row is None else of_row[:, 0])
        bits, weight_format = FORMATS[name].grid.bits, name
    else:
        most = 2 ** (weight_bits - 1)
        codes = torch.randint(-most, most, (T, width)).to(torch.int8)
        weight = (INTEGERS[weight_bits].pack(codes), torch.rand(T, groups), None)
        bits, weight_format = weight_bits, None
    args = (*token, *weight, *[None] * 5, name, weight_format, bits, torch.float32)
    expected = Reference().run(PRODUCT, *args)
    kernels = Kernels()
    for way in ways(kernels, name):
        found = kernels.run(PRODUCT, *args)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, msg=way)


def test_own_choice_of_tiling() -> None:
    for count, groups in ((0, 1), (1, 2), (20, 1)):
        x = tokens().repeat(3, 1)[:count, :64]
        token = quantized("e4m3", x)
        codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
        weight = (INTEGERS[4].pack(codes), torch.rand(5, groups), None)
        args = (*token, *weight, *[None] * 5, "e4m3", None, 4, torch.bfloat16)
        kernels = Triton()
        expected = Reference().run(PRODUCT, *args)
        found = kernels.run(PRODUCT, *args)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
        rounded = kernels.run(QUANTIZE, x, torch.ones(1, 64), None, "e4m3", None, 1)
        assert torch.equal(rounded[0].view(torch.uint8), token[0].view(torch.uint8))


def test_groups_that_do_not_nest_are_refused() -> None:
    token = quantized("mxfp8", tokens())
    codes = torch.zeros(T, K, dtype=torch.int8)
    weight = (INTEGERS[4].pack(codes), torch.ones(T, 16), None)
    with pytest.raises(
        ValueError, match="groups of 16 .* not made of whole groups of 32"
    ):
        Kernels().run(
            PRODUCT, *token, *weight, *[None] * 5, "mxfp8", None, 4, torch.float32
        )


def test_what_kernels_do_not_read_is_refused() -> None:
    kernels = Kernels()
    q, scale, of_token = quantized("nvfp4", tokens())
    rest = (*[None] * 5, "nvfp4", "nvfp4", 4, torch.float32)
    weight = (q, scale, of_token[:, 0])
    for args, message in (
        ((scale, scale, of_token, *weight), "qx is torch.float8_e4m3fn"),
        ((q, scale.view(torch.uint8), of_token, *weight), "x_scale is torch.uint8"),
        ((q, scale[:, :8], of_token, *weight), r"x_scale has shape \(7, 8\)"),
        ((q, scale, of_token, q, of_token, None), "scale is torch.float32"),
        ((q[:, :30], scale, of_token, *weight), "groups of 16 do not divide 60"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            kernels.run(PRODUCT, *args, *rest)


def test_what_multiplies_on_each_gpu() -> None:
    table = {
        "sm_80": "0 0 0 0 0",
        "sm_89": "1 1 0 0 0",
        "sm_90": "1 1 0 0 0",
        "sm_100": "1 1 3 3 3",
        "sm_120": "1 1 3 3 3",
        "gfx90a": "0 0 0 0 0",
        "gfx942": "2 2 0 0 0",
        # Its scales are powers of two.
        "gfx950": "1 1 0 3 3",
    }
    for architecture, products in table.items():
        found = [str(int(product_on(architecture, name))) for name in FORMATS]
        assert " ".join(found) == products, architecture


@every_format
def test_what_is_promised_to_tracers(name: str) -> None:
    x, (pre_scale, shift, ids) = tokens(), factors()
    token = quantized(name, x)
    of_row = None if token[2] is None else token[2][:, 0]
    rest = (torch.randn(T, 5), torch.randn(5, T), torch.randn(M, T), ids, None)
    bits = FORMATS[name].grid.bits
    for operator, args in (
        (ops.float_smooth_quantize, (x, pre_scale, ids, name, shift, 16)),
        (ops.float_low_rank_down, (*token, torch.randn(K, 5), ids, RANKS, name)),
        (
            ops.float_linear,
            (*token, *token[:2], of_row, *rest, name, name, bits, torch.bfloat16),
        ),
    ):
        # Its other checks compare by arithmetic, of which torch has none for e4m3.
        checks = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.default, args, test_utils=checks)
    empty = ops.float_smooth_quantize(x[:0], pre_scale, ids[:0], name)
    assert [len(t) for t in empty] == [0, 0, 0]
