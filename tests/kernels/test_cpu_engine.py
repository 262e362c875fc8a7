# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which engine is chosen, and that every machine gets one."""

import platform
import sys

import pytest
import torch

from torchao_masquant.kernels import cpu_engine
from torchao_masquant.kernels.cpu_engine import (
    CpuEngine,
    choose_engine,
    multiplies_bfloat16,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets what the machine is and has."""

    def become(*has: str, name: str = "x86_64") -> None:
        monkeypatch.setattr(platform, "machine", lambda: name)
        monkeypatch.setattr(sys, "platform", "linux")
        for instructions in ("amx", "vnni", "avx_vnni", "avx2", "neon_dot"):
            found = instructions in has
            monkeypatch.setattr(cpu_engine, f"_has_{instructions}", lambda f=found: f)
        monkeypatch.setattr(cpu_engine, "_is_granted_amx", lambda: True)

    return become


ALL = ("amx", "vnni", "avx_vnni", "avx2")


def test_the_best_that_the_processor_has(machine) -> None:
    machine(*ALL)
    assert choose_engine({}) == (CpuEngine.AMX, "AMX")
    machine(*ALL[1:])
    assert choose_engine({}).engine is CpuEngine.VNNI
    machine(*ALL[2:])
    assert choose_engine({}).engine is CpuEngine.AVX_VNNI
    machine("avx2")
    reason = "AVX2; the processor has no AVX-VNNI"
    assert choose_engine({}) == (CpuEngine.AVX2, reason)
    machine()
    assert choose_engine({}) == (CpuEngine.REFERENCE, "the processor has no AVX2")


def test_other_architectures(machine) -> None:
    for name in ("aarch64", "arm64"):
        machine("neon_dot", name=name)
        assert (
            choose_engine({"ATEN_CPU_CAPABILITY": "default"}).engine is CpuEngine.NEON
        )
        machine(name=name)
        reason = "the processor has no NEON dot products"
        assert choose_engine({}) == (CpuEngine.REFERENCE, reason)
    machine(*ALL, name="riscv64")
    reason = "the kernels are for x86 and ARM, this is riscv64"
    assert choose_engine({}) == (CpuEngine.REFERENCE, reason)


def test_variables_lower_the_choice(machine) -> None:
    machine(*ALL)
    for variable, value, engine in (
        ("ATEN_CPU_CAPABILITY", "default", CpuEngine.REFERENCE),
        ("ATEN_CPU_CAPABILITY", "avx2", CpuEngine.AVX_VNNI),
        ("ATEN_CPU_CAPABILITY", "avx512", CpuEngine.AMX),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", CpuEngine.REFERENCE),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", CpuEngine.AVX2),
        ("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI", CpuEngine.AVX_VNNI),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", CpuEngine.AVX2),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", CpuEngine.VNNI),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16", CpuEngine.VNNI),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", CpuEngine.AMX),
        ("ONEDNN_MAX_CPU_ISA", "ALL", CpuEngine.AMX),
        ("MASQUANT_CPU_ENGINE", "reference", CpuEngine.REFERENCE),
        ("MASQUANT_CPU_ENGINE", "vnni", CpuEngine.VNNI),
        ("MASQUANT_CPU_ENGINE", "avx2", CpuEngine.AVX2),
        ("MASQUANT_CPU_ENGINE", "", CpuEngine.AMX),
    ):
        assert choose_engine({variable: value}).engine is engine, (variable, value)


def test_where_bfloat16_is_multiplied(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(*ALL)
    for limit, expected in (
        ("", True),
        ("AVX512_CORE", False),
        ("avx512_core_vnni", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
    ):
        monkeypatch.setattr(cpu_engine, "_has_bfloat16", lambda: True)
        monkeypatch.setattr(cpu_engine, "_is_intel", lambda: False)
        assert multiplies_bfloat16({"ONEDNN_MAX_CPU_ISA": limit}) is expected
        monkeypatch.setattr(cpu_engine, "_has_bfloat16", lambda: False)
        assert not multiplies_bfloat16({"ONEDNN_MAX_CPU_ISA": limit})
    machine("avx2")
    monkeypatch.setattr(cpu_engine, "_has_bfloat16", lambda: True)
    assert not multiplies_bfloat16({})


def test_intels_processors_have_slow_bfloat16_but_in_amx(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_engine, "_is_intel", lambda: True)
    for amx in (False, True):
        machine(*ALL[0 if amx else 1 :])
        assert not multiplies_bfloat16({})


def test_an_engine_that_cannot_be_raises(machine) -> None:
    machine("avx2")
    with pytest.raises(ValueError, match="cannot run here .*no AVX512-VNNI"):
        choose_engine({"MASQUANT_CPU_ENGINE": "vnni"})
    with pytest.raises(ValueError, match="cannot run here .*no AMX"):
        choose_engine({"MASQUANT_CPU_ENGINE": "amx"})
    with pytest.raises(ValueError, match="choose one of amx, vnni, avx_vnni, avx2"):
        choose_engine({"MASQUANT_CPU_ENGINE": "AVX"})


def test_this_machine_is_asked_right() -> None:
    """Against what the kernel of Linux says of the processor."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("/proc/cpuinfo has flags on x86 Linux only")
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    assert cpu_engine._has_vnni() == ("avx512_vnni" in flags)
    assert cpu_engine._has_avx2() == ("avx2" in flags)
    assert cpu_engine._has_avx_vnni() == ("avx_vnni" in flags)
    assert cpu_engine._has_bfloat16() == ("avx512_bf16" in flags)
    assert torch.cpu._is_amx_tile_supported() <= ("amx_tile" in flags)
