# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Triton's kernels compile for GPUs that are not here, and to what they should."""

import dataclasses
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import ahead_of_time
import pytest
from ahead_of_time import (
    TARGETS,
    CaseName,
    Compiled,
    case_names,
    compile_all,
    extremes,
)
from compile_kernels import main, table
from rich.console import Console

pytest.importorskip("triton")

# What each target multiplies int8 by, as seen in what Triton compiled, and something
# that it must not be taken for.
INSTRUCTIONS = {
    "sm_80": (
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ),
    "sm_90": (
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
        # What Triton falls back to where a tile does not suit wgmma.
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    ),
    "sm_100": (
        "tcgen05.mma.cta_group::1.kind::i8",
        "tcgen05.mma.cta_group::1.kind::f16",
    ),
    "gfx942": ("v_mfma_i32_32x32x16_i8", "v_mfma_f32_32x32x8_bf16"),
    "gfx950": ("v_mfma_i32_32x32x32_i8", "v_mfma_f32_32x32x16_bf16"),
}
INSTRUCTIONS["sm_89"] = INSTRUCTIONS["sm_80"]


# Of int8 and, in the last, of bfloat16.
PRODUCTS = (
    "int_linear w8",
    "int_linear w4 group 128",
    "low_rank_down i8",
    "weight_only_linear w4 group 128",
)
# Forms that are compiled for a target: for sm_90 every kernel and what most of it depends
# on, for the others what they multiply by. sm_89 has the tilings and the instructions of
# sm_80, and less shared memory. tools/compile_kernels.py compiles all there are.
FORMS = {
    "sm_80": PRODUCTS[:2],
    "sm_89": (*PRODUCTS[:1], "float_linear w4a8-fp8 by e4m3"),
    "sm_90": (
        *PRODUCTS,
        "int_linear w4",
        "int_linear reduce float32",
        "low_rank_down bf16",
        "low_rank_down reduce i32",
        "smooth_quantize a4 ids shift fp32",
        "smooth_quantize rotated a8 ids shift bf16",
        "weight_only_linear smooth fp16 ids",
        "weight_only_linear smooth rotated bf16 ids 4096 by 4096",
        "float_linear fp8 by e4m3",
        "float_linear nvfp4 by decoded",
        "float_smooth_quantize nvfp4 bf16",
        "float_low_rank_down nvfp4 bf16",
    ),
    "sm_100": (
        *PRODUCTS[:2],
        "float_linear fp8-block by e4m3",
        "float_linear nvfp4 by scaled",
        "float_linear mxfp4 by scaled",
        "float_linear mxfp8 by scaled",
    ),
    "gfx942": (*PRODUCTS[:2], "float_linear fp8 by fnuz"),
    "gfx950": ("float_linear fp8 by e4m3", "float_linear mxfp4 by scaled"),
}


def telling(names: list[CaseName]) -> list[CaseName]:
    """Of a form the largest tile, which is the first to spill, and of the integer
    products the smallest too, which may have no instruction."""
    largest: dict[tuple[str, str], CaseName] = {}
    chosen = []
    for n in sorted(extremes(names), key=lambda n: n.elements, reverse=True):
        if n.form not in FORMS[n.target]:
            continue
        if largest.setdefault((n.target, n.form), n) is n or "int_linear w" in n.form:
            chosen.append(n)
    return chosen


@pytest.mark.slow
def test_kernels_are_sound_on_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    # Processes of their own compile, whatever this one's kernels are made for.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = telling(case_names())
    before = set(Path(tempfile.gettempdir()).glob("masquant-aot-*"))
    found = list(compile_all(names))
    assert Counter((c.target, c.kernel) for c in found) == Counter(
        (n.target, n.case) for n in names
    )
    problems = {(c.target, c.kernel): c.problems() for c in found}
    assert not {case: problem for case, problem in problems.items() if problem}
    for compiled in found:
        assert compiled.registers > 0, compiled
        # A product has a shared tile on every target, and instructions to multiply it.
        if compiled.multiplies:
            assert compiled.shared_memory > 0 and compiled.matrix, compiled
    for compiled in found:
        if compiled.target == "sm_80":
            assert not dataclasses.replace(compiled, target="sm_89").problems()
    for target in TARGETS:
        assert {n.form for n in names if n.target == target} == set(FORMS[target])
    assert set(Path(tempfile.gettempdir()).glob("masquant-aot-*")) <= before


@pytest.mark.parametrize("target", TARGETS)
def test_the_int8_instruction_is_told_from_others(target: str) -> None:
    right, wrong = INSTRUCTIONS[target]
    assert ahead_of_time._MATRIX.findall(f"\t{right} {{%r1}}, x;\n\t{wrong} y;") == [
        right,
        wrong,
    ]
    sound = Compiled(target, "kernel", matrix=((right, 2),), multiplies="int8")
    assert sound.problems() == []
    other = Compiled(target, "kernel", matrix=((wrong, 2),), multiplies="int8")
    assert other.problems() == ["has no matrix instruction of int8"]
    assert Compiled(target, "kernel").problems() == []


# Of floats, likewise: what Triton compiled, and what it compiles to where it decodes, or
# to another format's.
FLOATS = [
    ("sm_89", "e4m3", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
    ("sm_90", "e4m3", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
    ("sm_90", "bfloat16", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
    ("sm_100", "e4m3", "tcgen05.mma.cta_group::1.kind::f8f6f4"),
    ("sm_100", "mxfp8", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32"),
    ("sm_100", "mxfp4", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"),
    ("sm_100", "nvfp4", "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"),
    ("gfx942", "e4m3", "v_mfma_f32_32x32x16_fp8_fp8"),
    ("gfx950", "e4m3", "v_mfma_f32_32x32x64_f8f6f4"),
    ("gfx950", "mxfp4", "v_mfma_scale_f32_32x32x64_f8f6f4"),
]


@pytest.mark.parametrize("target, numbers, right", FLOATS)
def test_instructions_of_floats_are_told_from_each_other(
    target: str, numbers: str, right: str
) -> None:
    assert ahead_of_time._MATRIX.findall(f"\t{right} x;") == [right]
    for other in (found for at, _, found in FLOATS if at == target):
        matrix = ((other, 1),)
        compiled = Compiled(target, "kernel", matrix=matrix, multiplies=numbers)
        missing = [f"has no matrix instruction of {numbers}"]
        assert compiled.problems() == ([] if other == right else missing)


def test_problems_name_what_is_wrong() -> None:
    most = 64 * 1024
    assert Compiled("gfx942", "kernel", shared_memory=most).problems() == []
    assert Compiled("gfx942", "kernel", 40, 3, most + 16).problems() == [
        "spills 3 registers",
        "takes 65552 bytes of shared memory, and there are 65536",
    ]
    assert Compiled("sm_100", "kernel", tensor_memory=1024).problems() == [
        "takes 1024 columns of tensor memory, and there are 512"
    ]
    assert Compiled("sm_80", "kernel", error="PTXASError: no").problems() == [
        "does not compile: PTXASError: no"
    ]


def test_registers_of_hip_are_read_from_its_assembly() -> None:
    assembly = "    .private_segment_fixed_size: {}\n    .sgpr_spill_count: 9\n"
    assembly += "    .vgpr_count:     180\n    .vgpr_spill_count: {}\n"
    assert ahead_of_time._hip_registers(assembly.format(0, 0)) == (180, 0)
    assert ahead_of_time._hip_registers(assembly.format(12, 2)) == (180, 3)
    with pytest.raises(ValueError):
        ahead_of_time._hip_registers("nothing")


def test_extremes_are_the_largest_and_the_smallest_of_a_form() -> None:
    def named(target: str, case: str, elements: float) -> CaseName:
        return CaseName(target, "int_linear", case, elements)

    names = [
        named("sm_80", "int_linear w8 16x64x128 split 4 full", 8),
        named("sm_80", "int_linear w8 64x64x128 split 4 full", 32),
        named("sm_80", "int_linear w8 128x128x64 split 1 full", 64),
        named("sm_80", "int_linear w8 128x128x64 split 1 bare", 64),
        named("sm_80", "int_linear reduce int32 split 4 full", 8),
        named("sm_80", "int_linear reduce int32 split 4 bare", 8),
        named("sm_90", "int_linear w8 16x64x128 split 4 full", 8),
    ]
    assert {(n.target, n.case) for n in extremes(names)} == {
        (names[i].target, names[i].case) for i in (0, 2, 4, 6)
    }


def test_every_case_has_a_name_of_its_own_on_every_target() -> None:
    names = case_names()
    assert {n.target for n in names} == set(TARGETS)
    assert len({(n.target, n.case) for n in names}) == len(names)
    assert all(n.elements > 0 for n in names)
    only = case_names(["sm_90"], ["int_linear w4"])
    assert only == [
        n for n in names if n.target == "sm_90" and "int_linear w4" in n.case
    ]


def test_a_kernel_that_does_not_compile_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")

    def broken(case: object, target: object) -> None:
        raise RuntimeError("first line\nptxas fatal: no such thing\n")

    monkeypatch.setattr(ahead_of_time, "_compiled", broken)
    (name, *_) = case_names(["sm_90"], ["int_linear w8"])
    compiled = ahead_of_time._compile(name)
    assert compiled.error == "RuntimeError: ptxas fatal: no such thing"
    assert compiled.multiplies and len(compiled.problems()) == 1


def test_command_prints_what_it_found_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(names: list[CaseName], jobs: int) -> list[Compiled]:
        assert jobs == 3
        # They come in any order, and are shown in that of the names.
        return [
            Compiled(
                n.target, n.case, 40 + i, i, 0, 0, ((INSTRUCTIONS["sm_90"][0], 1),)
            )
            for i, n in reversed(list(enumerate(names)))
        ]

    monkeypatch.setattr("compile_kernels.compile_all", found)
    options = ["--target", "sm_90", "--kernel", "low_rank_down reduce fp32"]
    assert main([*options, "--jobs", "3", "--json"]) == 1
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["triton"].count(".") >= 1
    assert [row["registers"] for row in shown["kernels"]] == [40, 41, 42]
    assert shown["kernels"][0]["matrix"] == {INSTRUCTIONS["sm_90"][0]: 1}
    assert "reduce fp32 split 8 spills 1 registers" in err
    assert "split 4 spills" not in err

    assert main([*options[:-1], "reduce fp32 split 4", "--jobs", "3"]) == 0
    out, _ = capsys.readouterr()
    assert "low_rank_down reduce fp32 split 4" in out and "wgmma" in out


def test_command_says_what_to_choose_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no kernel's name has 'no such kernel' in it"):
        main(["--kernel", "no such kernel"])
    with pytest.raises(SystemExit):
        main(["--target", "sm_70"])
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no target 'sm_70'"):
        case_names(["sm_70"])


def test_table_shows_errors_where_instructions_would_be() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(
        table([Compiled("gfx942", "k", error="no"), Compiled("sm_80", "other", 32)])
    )
    text = console.file.getvalue()
    assert "gfx942" in text and " no " in text and "none" in text
