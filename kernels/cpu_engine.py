# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which kernels a CPU runs, and why."""

import enum
import os
import platform
import re
import sys
from pathlib import Path
from typing import Mapping, NamedTuple, Optional

import torch

__all__ = ["CpuEngine", "EngineChoice", "choose_engine", "multiplies_bfloat16"]

#: names an engine, in place of the choice made here
ENGINE_VARIABLE = "MASQUANT_CPU_ENGINE"

# oneDNN's levels, least first; users lower them to find faults. ``ALL`` and ``DEFAULT``
# limit nothing.
_BELOW_AVX2 = ("SSE41", "AVX")
_WITHOUT_AVX_VNNI = (*_BELOW_AVX2, "AVX2", "AVX512_CORE")
_BELOW_VNNI = (*_WITHOUT_AVX_VNNI, "AVX2_VNNI", "AVX2_VNNI_2")
_BELOW_BF16 = (*_BELOW_VNNI, "AVX512_CORE_VNNI")
_BELOW_AMX = ("AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


class CpuEngine(enum.Enum):
    """Kernels of the ``masquant::`` operators on a CPU, the fastest first."""

    #: products of more than a few tokens by AMX, all else as in VNNI
    AMX = "amx"
    #: our AVX512-VNNI kernels
    VNNI = "vnni"
    #: our portable kernels, with AVX2 and AVX-VNNI
    AVX_VNNI = "avx_vnni"
    #: the same, with AVX2 alone
    AVX2 = "avx2"
    #: the same on ARM, with NEON's dot products
    NEON = "neon"
    #: ``reference.py``: plain PyTorch, products by ``torch._int_mm``
    REFERENCE = "reference"


# What each needs.
_INSTRUCTIONS = {
    CpuEngine.AMX: "AMX",
    CpuEngine.VNNI: "AVX512-VNNI",
    CpuEngine.AVX_VNNI: "AVX-VNNI",
    CpuEngine.AVX2: "AVX2",
    CpuEngine.NEON: "NEON dot products",
}
_OF_X86 = (CpuEngine.AMX, CpuEngine.VNNI, CpuEngine.AVX_VNNI, CpuEngine.AVX2)
_OF_MACHINE = {
    "x86_64": _OF_X86,
    "amd64": _OF_X86,
    "aarch64": (CpuEngine.NEON,),
    "arm64": (CpuEngine.NEON,),
}


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


def _is_granted_amx() -> bool:
    """Whether Linux lets this process have the tiles' state.

    Not where a thread's stack for signals is too small to hold it.
    """
    return torch.cpu._init_amx()


def _has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _is_intel() -> bool:
    return "GenuineIntel" in _cpuinfo()


def _has_flag(flag: str) -> bool:
    """Whether Linux names it of every processor."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return bool(lines) and all(flag in line.split() for line in lines)


def _has_avx_vnni() -> bool:
    return _has_avx2() and _has_flag("avx_vnni")


def _has_avx2() -> bool:
    return torch.cpu._is_avx2_supported()


def _has_neon_dot() -> bool:
    return _has_flag("asimddp")


def multiplies_bfloat16(environ: Optional[Mapping[str, str]] = None) -> bool:
    """Whether AVX512-BF16 multiplies bfloat16 activations that are not quantized.

    It multiplies twice as many numbers in the time that float32 takes on AMD's
    processors, and half as many on Intel's, which are made to do that by AMX.

    Args:
        environ: environment variables; None for the process's.
    """
    environ = os.environ if environ is None else environ
    if not _has_bfloat16() or _onednn_limit(environ) in _BELOW_BF16:
        return False
    fits = choose_engine(environ).engine in (CpuEngine.AMX, CpuEngine.VNNI)
    return fits and not _is_intel()


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
    wanted = environ.get(ENGINE_VARIABLE)
    if not wanted:
        return _best_engine(environ)
    names = [engine.value for engine in CpuEngine]
    if wanted not in names:
        raise ValueError(
            f"{ENGINE_VARIABLE}={wanted!r} names no engine: choose one of "
            f"{', '.join(names)}, or leave it unset."
        )
    engine = CpuEngine(wanted)
    reason = _why_not(engine, environ)
    if reason:
        raise ValueError(
            f"{ENGINE_VARIABLE}={wanted!r} cannot run here ({reason}): leave it unset."
        )
    return EngineChoice(engine, f"{ENGINE_VARIABLE} says so")


def _onednn_limit(environ: Mapping[str, str]) -> str:
    limit = environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper()


def _best_engine(environ: Mapping[str, str]) -> EngineChoice:
    reason = ""
    for engine in _OF_MACHINE.get(platform.machine().lower(), ()):
        before, reason = reason, _why_not(engine, environ)
        if not reason:
            found = _INSTRUCTIONS[engine]
            return EngineChoice(engine, f"{found}; {before}" if before else found)
    if not reason:
        reason = f"the kernels are for x86 and ARM, this is {platform.machine()}"
    return EngineChoice(CpuEngine.REFERENCE, reason)


def _why_not(engine: CpuEngine, environ: Mapping[str, str]) -> str:
    """What is in an engine's way, in a few words; nothing if it can run."""
    if engine is CpuEngine.REFERENCE:
        return ""
    if not sys.platform.startswith("linux"):
        return f"the kernels are built on Linux only, this is {sys.platform}"
    if engine not in _OF_MACHINE.get(platform.machine().lower(), ()):
        return f"this is {platform.machine()}"
    has = {
        CpuEngine.AMX: _has_amx,
        CpuEngine.VNNI: _has_vnni,
        CpuEngine.AVX_VNNI: _has_avx_vnni,
        CpuEngine.AVX2: _has_avx2,
        CpuEngine.NEON: _has_neon_dot,
    }[engine]
    if not has():
        return f"the processor has no {_INSTRUCTIONS[engine]}"
    if engine is CpuEngine.AMX and not _is_granted_amx():
        return "Linux does not grant this process AMX"
    if engine is CpuEngine.NEON:
        # The variables' levels are those of x86.
        return ""
    level = environ.get("ATEN_CPU_CAPABILITY", "avx512").lower()
    portable = engine in (CpuEngine.AVX_VNNI, CpuEngine.AVX2)
    if level != "avx512" and not (portable and level == "avx2"):
        return f"ATEN_CPU_CAPABILITY={level}"
    limit = _onednn_limit(environ)
    below = {
        CpuEngine.AMX: (*_BELOW_VNNI, *_BELOW_AMX),
        CpuEngine.VNNI: _BELOW_VNNI,
        CpuEngine.AVX_VNNI: _WITHOUT_AVX_VNNI,
        CpuEngine.AVX2: _BELOW_AVX2,
    }[engine]
    return f"ONEDNN_MAX_CPU_ISA={limit}" if limit in below else ""
