# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Bytes and operations on paper, counted here by hand."""

import re

import pytest
from ahead_of_time import TARGETS
from kernels_page import PAGE, page, roofline

H100 = next(device for device in roofline.DEVICES if device.name == "H100")


def test_work_is_bound_by_the_slower_of_memory_and_products() -> None:
    # 3.35 MB are a microsecond of an H100, 1978.9 Mop of int8 are, and 989.4 of bf16.
    assert roofline.Work("w", 3.35e6).seconds(H100) == pytest.approx(1e-6)
    assert roofline.Work("w", 3.35e6).bound(H100) == "memory"
    both = roofline.Work("w", 3.35e6, int8=1978.9e6, bf16=989.4e6)
    # One kind of tensor core does both, one after the other.
    assert both.seconds(H100) == pytest.approx(2e-6)
    assert roofline.Work("w", 1, int8=2e9, bf16=0.5e9).bound(H100) == "int8"
    assert roofline.Work("w", 1, int8=1e9, bf16=2e9).bound(H100) == "bf16"


def test_a_base_only_call_moves_each_operand_once() -> None:
    m, k, n = 16, 2048, 11008
    quantize, product = roofline.linear(roofline.LinearCall(m, k, n, 8, 8))
    assert quantize.name == "smooth_quantize" and quantize.int8 == quantize.bf16 == 0
    # x, its integers and scales, one smoothing vector.
    assert quantize.moved == 2 * m * k + m * k + 4 * m + 4 * k
    assert product.name == "int_linear" and product.bf16 == 0
    assert product.moved == m * k + 4 * m + n * k + 4 * n + 2 * m * n
    assert product.int8 == 2 * m * k * n
    packed = roofline.linear(roofline.LinearCall(m, k, n, 4, 8))[1]
    assert product.moved - packed.moved == n * k / 2
    grouped = roofline.linear(roofline.LinearCall(m, k, n, 4, 8, group_size=128))[1]
    assert grouped.moved - packed.moved == 4 * n * (k / 128 - 1)


def test_a_mixed_call_adds_low_rank_work_for_its_members_alone() -> None:
    m, k, n, r = 2048, 3584, 18944, 179
    base = roofline.linear(roofline.LinearCall(m, k, n, 8, 8))
    none = roofline.linear(roofline.LinearCall(m, k, n, 8, 8, share=0.0, rank=r))
    assert [w.name for w in none] == ["smooth_quantize", "int_linear"]
    assert none[1].bf16 == 0 and none[1].moved == base[1].moved + 8 * m
    half = roofline.linear(roofline.LinearCall(m, k, n, 8, 8, share=0.5, rank=r))
    assert [w.name for w in half] == ["smooth_quantize", "low_rank_down", "int_linear"]
    down, product = half[1:]
    assert down.bf16 == 2 * (m / 2) * k * r
    assert down.moved == m / 2 * k + 2 * k * r + 4 * m * r + 4 * m + 8 * m
    assert product.bf16 == 2 * (m / 2) * r * n
    assert product.int8 == base[1].int8
    assert product.moved == none[1].moved + 4 * (m / 2) * r + 2 * r * n
    parts = roofline.LinearCall(m, k, n, 8, 8, share=0.5, rank=r, hidden_parts=3)
    assert roofline.linear(parts)[2].bf16 == 3 * product.bf16


def test_few_tokens_of_unquantized_activations_are_one_kernel() -> None:
    m, k, n, r = 16, 3584, 512, 26
    (dense,) = roofline.linear(roofline.LinearCall(m, k, n))
    assert dense.moved == 2 * (m * k + n * k + m * n) and dense.bf16 == 2 * m * k * n
    (packed,) = roofline.linear(roofline.LinearCall(m, k, n, 4, 16, group_size=128))
    scales = 5 * n * (k / 128)
    assert packed.moved == 2 * m * (k + n) + n * k / 2 + scales + 4 * k
    (base,) = roofline.linear(
        roofline.LinearCall(m, k, n, 4, 16, 128, share=0.0, rank=r)
    )
    assert base.moved == packed.moved + 8 * m + 4 * k and base.bf16 == packed.bf16
    # A pair reads the smoothed tokens too.
    smooth, mixed = roofline.linear(
        roofline.LinearCall(m, k, n, 4, 16, 128, share=1.0, rank=r)
    )
    assert smooth.moved == 4 * m * k + 8 * k + 8 * m
    assert mixed.moved == packed.moved - 4 * k + 8 * m + 2 * r * (k + n)
    assert mixed.bf16 == packed.bf16 + 2 * m * r * (k + n)


def test_more_tokens_of_unquantized_activations_are_smoothed_first() -> None:
    m, k, n = 17, 3584, 512
    smooth, product = roofline.linear(
        roofline.LinearCall(m, k, n, 4, 16, group_size=128)
    )
    assert (smooth.name, product.name) == ("smooth", "weight_only_linear")
    assert smooth.moved == 4 * m * k + 4 * k and smooth.bf16 == smooth.int8 == 0
    assert product.moved == 2 * m * (k + n) + n * k / 2 + 5 * n * (k / 128)
    assert len(roofline.linear(roofline.LinearCall(m, k, n))) == 1


def test_linears_together_quantize_once() -> None:
    q, k = (
        roofline.LinearCall(2048, 3584, 3584, 8, 8),
        roofline.LinearCall(2048, 3584, 512, 8, 8),
    )
    once = 1e6 * roofline.smooth_quantize(q).seconds(H100)
    apart = roofline.microseconds(q, H100) + 2 * roofline.microseconds(k, H100)
    assert roofline.microseconds_together([q, k, k], H100) == pytest.approx(
        apart - 2 * once
    )
    assert roofline.microseconds_together([q], H100) == roofline.microseconds(q, H100)
    q, k = (roofline.LinearCall(2048, 3584, n, 4, 16, 128) for n in (3584, 512))
    once = 1e6 * roofline.smooth(q).seconds(H100)
    apart = roofline.microseconds(q, H100) + 2 * roofline.microseconds(k, H100)
    assert roofline.microseconds_together([q, k, k], H100) == pytest.approx(
        apart - 2 * once
    )


def test_the_argument_for_the_down_projection_has_these_numbers() -> None:
    call = roofline.LinearCall(2048, 3584, 18944, 8, 8, share=1.0, rank=179)
    numbers = roofline.down_projection_places(call, H100)
    text = " ".join(roofline.__doc__.split())
    for name, shown in (
        ("integer product us", "140.5 us"),
        ("own kernel: multiplying us", "2.7 us"),
        ("own kernel: memory us", "3.0 us"),
        ("own kernel: MB", "10.1 MB"),
        ("own kernel: integers MB", "7.3 MB"),
        ("extra rows: multiplying us", "1.3 us"),
        ("quantize pass: integers saved us", "2.2 us"),
        ("quantize pass: memory us", "6.6 us"),
        ("quantize pass: L1 from L2 MB", "164 MB"),
        ("up-projection, one part us", "14.0 us"),
    ):
        assert shown in text, name
        number = shown.split()[0]
        digits = len(number.partition(".")[2])
        assert f"{numbers[name]:.{digits}f}" == number, (name, numbers[name])
    assert numbers["quantize pass: L1 from L2 MB"] > 7 * numbers["quantize pass: MB"]
    base = numbers["base-only us"]
    shares = {
        "2.1 %": numbers["own kernel: memory us"] / base,
        "9.5 %": numbers["up-projection, one part us"] / base,
        "11.6 %": roofline.microseconds(call, H100) / base - 1,
        "21.1 %": roofline.microseconds(
            roofline.LinearCall(
                2048, 3584, 18944, 8, 8, None, 1.0, 179, hidden_parts=2
            ),
            H100,
        )
        / base
        - 1,
        "6.1 %": roofline.microseconds(
            roofline.LinearCall(2048, 3584, 18944, 8, 8, share=0.5, rank=179), H100
        )
        / base
        - 1,
    }
    for shown, share in shares.items():
        assert shown in text and f"{share:.1%}" == shown.replace(" ", "")


def test_devices_are_those_that_kernels_are_compiled_for() -> None:
    # MI350's kernels of floats are compiled, of which there is no roofline.
    known = {device.architecture for device in roofline.DEVICES}
    assert known == set(TARGETS) - {"gfx950"}
    for device in roofline.DEVICES:
        assert device.bf16 < device.int8 and device.source
        # Terabytes and hundreds of teraflops: nobody left out a power of ten.
        assert 0.5e12 < device.bandwidth < 1e13 and 1e14 < device.bf16 < 1e16


def test_page_is_made_by_the_code() -> None:
    text = PAGE.read_text()
    assert text == page(text), "run python tests/kernels/kernels_page.py"


def test_every_file_of_the_page_exists() -> None:
    root = PAGE.parents[1]
    named = re.findall(
        r"`((?:kernels|benchmarks)/[\w/]+\.(?:py|json))`", PAGE.read_text()
    )
    assert named
    for name in named:
        assert (root / name).exists(), name
