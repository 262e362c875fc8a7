# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which kernels a CPU runs, and why."""

import enum
import os
import platform
import sys
from pathlib import Path
from typing import Mapping, NamedTuple, Optional

import torch

__all__ = ["CpuEngine", "EngineChoice", "choose_engine", "multiplies_bfloat16"]

#: names an engine, in place of the choice made here
ENGINE_VARIABLE = "MASQUANT_CPU_ENGINE"

# oneDNN's levels, least first; users lower them to find faults. ``ALL`` and ``DEFAULT``
# limit nothing.
_BELOW_VNNI = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE")
_BELOW_BF16 = (*_BELOW_VNNI, "AVX512_CORE_VNNI")
_BELOW_AMX = ("AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


class CpuEngine(enum.Enum):
    """Kernels of the ``masquant::`` operators on a CPU."""

    #: products by oneDNN's block kernel (AMX), all else as in VNNI
    AMX = "amx"
    #: our AVX512-VNNI kernels
    VNNI = "vnni"
    #: ``reference.py``: plain PyTorch, products by ``torch._int_mm``
    REFERENCE = "reference"


class EngineChoice(NamedTuple):
    """
    Attributes:
        engine: what is to run.
        reason: in a few words.
    """

    engine: CpuEngine
    reason: str


def _has_vnni() -> bool:
    return torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def multiplies_bfloat16(environ: Optional[Mapping[str, str]] = None) -> bool:
    """Whether bfloat16 activations that are not quantized are multiplied as such.

    AVX512-BF16 multiplies twice as many numbers in the time that float32 takes on AMD's
    processors, and half as many on Intel's, which are made to do that by AMX.

    Args:
        environ: environment variables; None for the process's.
    """
    environ = os.environ if environ is None else environ
    if not _has_bfloat16() or _onednn_limit(environ) in _BELOW_BF16:
        return False
    return not _is_intel() or choose_engine(environ).engine is CpuEngine.AMX


def choose_engine(environ: Optional[Mapping[str, str]] = None) -> EngineChoice:
    """The fastest engine that this machine and its environment variables allow.

    ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA``, which lower what PyTorch and
    oneDNN use of the processor, lower this choice too. ``MASQUANT_CPU_ENGINE`` names an
    engine outright.

    Args:
        environ: environment variables; None for the process's.

    Raises:
        ValueError: ``MASQUANT_CPU_ENGINE`` names no engine, or one that this machine
            cannot run.
    """
    environ = os.environ if environ is None else environ
    best = _best_engine(environ)
    wanted = environ.get(ENGINE_VARIABLE)
    if wanted is None:
        return best
    names = [engine.value for engine in CpuEngine]
    if wanted not in names:
        raise ValueError(
            f"{ENGINE_VARIABLE}={wanted!r} names no engine: choose one of "
            f"{', '.join(names)}, or leave it unset."
        )
    engine = CpuEngine(wanted)
    # oneDNN's block kernel runs on VNNI too, so AMX can be tried without AMX.
    if engine is not CpuEngine.REFERENCE and best.engine is CpuEngine.REFERENCE:
        raise ValueError(
            f"{ENGINE_VARIABLE}={wanted!r} cannot run here ({best.reason}): leave it "
            "unset."
        )
    return EngineChoice(engine, f"{ENGINE_VARIABLE} says so")


def _onednn_limit(environ: Mapping[str, str]) -> str:
    limit = environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper()


def _best_engine(environ: Mapping[str, str]) -> EngineChoice:
    def reference(reason: str) -> EngineChoice:
        return EngineChoice(CpuEngine.REFERENCE, reason)

    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return reference(f"the kernels are for x86, this is {machine}")
    if not sys.platform.startswith("linux"):
        return reference(f"the kernels are built on Linux only, this is {sys.platform}")
    if not _has_vnni():
        return reference("the processor has no AVX512-VNNI")
    level = environ.get("ATEN_CPU_CAPABILITY", "avx512").lower()
    if level != "avx512":
        return reference(f"ATEN_CPU_CAPABILITY={level}")
    limit = _onednn_limit(environ)
    if limit in _BELOW_VNNI:
        return reference(f"ONEDNN_MAX_CPU_ISA={limit}")
    if not _has_amx():
        return EngineChoice(CpuEngine.VNNI, "AVX512-VNNI, no AMX")
    if limit in _BELOW_AMX:
        return EngineChoice(CpuEngine.VNNI, f"ONEDNN_MAX_CPU_ISA={limit}")
    return EngineChoice(CpuEngine.AMX, "AMX")
