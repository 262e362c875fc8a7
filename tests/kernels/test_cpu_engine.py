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

    def become(vnni: bool = True, amx: bool = True, name: str = "x86_64") -> None:
        monkeypatch.setattr(platform, "machine", lambda: name)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(cpu_engine, "_has_vnni", lambda: vnni)
        monkeypatch.setattr(cpu_engine, "_has_amx", lambda: amx)

    return become


def test_the_best_that_the_processor_has(machine) -> None:
    machine()
    assert choose_engine({}).engine is CpuEngine.AMX
    machine(amx=False)
    assert choose_engine({}).engine is CpuEngine.VNNI
    machine(vnni=False, amx=False)
    assert choose_engine({}) == (
        CpuEngine.REFERENCE,
        "the processor has no AVX512-VNNI",
    )


def test_another_architecture_runs_the_reference(machine) -> None:
    for name in ("aarch64", "arm64", "riscv64"):
        machine(name=name)
        choice = choose_engine({})
        assert choice.engine is CpuEngine.REFERENCE
        assert choice.reason == f"the kernels are for x86, this is {name}"


def test_variables_lower_the_choice(machine) -> None:
    machine()
    for variable, value, engine in (
        ("ATEN_CPU_CAPABILITY", "default", CpuEngine.REFERENCE),
        ("ATEN_CPU_CAPABILITY", "avx2", CpuEngine.REFERENCE),
        ("ATEN_CPU_CAPABILITY", "avx512", CpuEngine.AMX),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", CpuEngine.REFERENCE),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", CpuEngine.REFERENCE),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", CpuEngine.VNNI),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16", CpuEngine.VNNI),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", CpuEngine.AMX),
        ("ONEDNN_MAX_CPU_ISA", "ALL", CpuEngine.AMX),
        ("MASQUANT_CPU_ENGINE", "reference", CpuEngine.REFERENCE),
        ("MASQUANT_CPU_ENGINE", "vnni", CpuEngine.VNNI),
    ):
        assert choose_engine({variable: value}).engine is engine, (variable, value)


def test_where_bfloat16_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_intels_processors_multiply_bfloat16_by_amx_alone(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_engine, "_is_intel", lambda: True)
    for amx in (False, True):
        machine(vnni=True, amx=amx)
        assert multiplies_bfloat16({}) is amx


def test_an_engine_that_cannot_be_raises(machine) -> None:
    machine(vnni=False, amx=False)
    with pytest.raises(ValueError, match="cannot run here .*no AVX512-VNNI"):
        choose_engine({"MASQUANT_CPU_ENGINE": "vnni"})
    with pytest.raises(ValueError, match="choose one of amx, vnni, reference"):
        choose_engine({"MASQUANT_CPU_ENGINE": "AVX"})


def test_this_machine_is_asked_right() -> None:
    """Against what the kernel of Linux says of the processor."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        pytest.skip("/proc/cpuinfo has flags on x86 Linux only")
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    assert cpu_engine._has_vnni() == ("avx512_vnni" in flags)
    assert cpu_engine._has_bfloat16() == ("avx512_bf16" in flags)
    assert torch.cpu._is_amx_tile_supported() <= ("amx_tile" in flags)
