# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Which kernels run on this machine, found by asking those who choose them."""

import importlib.metadata
import os
import platform
import subprocess
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torchao_masquant.cli.imports import NOT_INSTALLED, try_imports
from torchao_masquant.kernels import cpu_lowering
from torchao_masquant.kernels.cpu_build import (
    BuildError,
    cache_folder,
    find_compiler,
    library_path,
)
from torchao_masquant.kernels.cpu_engine import CpuEngine
from torchao_masquant.kernels.float_instructions import why_no_instruction
from torchao_masquant.kernels.gpu_lowering import why_reference
from torchao_masquant.options import SCHEMES, Scheme

__all__ = ["Diagnosis", "KernelRow", "diagnose"]

_LIBRARIES = ("torch", "torchao", "torchao_masquant", "transformers", "safetensors")
_OPTIONAL = {
    "PIL": "images",
    "torchvision": "the processors of some models, Qwen2.5-VL's among them",
    "soundfile": "sounds that are not PCM in a wav file",
    "soxr": "sounds at another rate than the model's",
    "av": "videos",
    "datasets": "saved datasets, parquet and Arrow files",
    "matplotlib": "figures",
    "jinja2": "the HTML report",
    "triton": "the GPU kernels",
}

# A linear that no kernel has reason to refuse.
_IN_FEATURES = 4096
_FEW, _MANY = 1, 256

# Of what has floats and no kernel.
_EMULATED = "reference: emulated in float32"


@dataclass(frozen=True)
class KernelRow:
    """What multiplies, for one scheme on one device.

    Attributes:
        device: such as "cpu".
        scheme: its name.
        few: at one token.
        many: at 256 tokens.
        reason: why it is this one.
    """

    device: str
    scheme: str
    few: str
    many: str
    reason: str


@dataclass
class Diagnosis:
    """
    Attributes:
        versions: of Python and of the libraries.
        devices: name to what it is.
        cpu: engine, reason, compiler and cache.
        kernels: by device and scheme.
        libraries: optional ones: "yes", "no" or "fails", and what each is for.
        problems: what stands in the way of the fastest kernels, and libraries that
            cannot be imported; one sentence each.
    """

    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, str] = field(default_factory=dict)
    kernels: list[KernelRow] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it, for scripts."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at the machine and the installation; compiles the CPU kernels if need be."""
    found = Diagnosis()
    found.versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _LIBRARIES
    }
    _look_at_cpu(found)
    _look_at_gpus(found)
    _look_at_libraries(found)
    return found


def _look_at_libraries(found: Diagnosis) -> None:
    for module, reason in try_imports(list(_OPTIONAL)).items():
        purpose = _OPTIONAL[module]
        answer = {"": "yes", NOT_INSTALLED: "no"}.get(reason, "fails")
        found.libraries[module] = f"{answer} ({purpose})"
        if answer == "fails":
            found.problems.append(
                f"{module}, for {purpose}, is installed but cannot be imported "
                f"({reason}): install a release of it that fits torch "
                f"{torch.__version__}, or uninstall it."
            )


def _look_at_cpu(found: Diagnosis) -> None:
    found.devices["cpu"] = (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    # Before anything is built: what the next process would have found.
    wanted = cpu_lowering.engine()
    compiled = wanted.engine is not CpuEngine.REFERENCE
    cached = compiled and library_path(wanted.engine).exists()
    with warnings.catch_warnings():
        # It is told below, as a problem.
        warnings.simplefilter("ignore")
        report = cpu_lowering.report()
    found.cpu = dict(report)
    if not compiled:
        found.cpu["cache"] = "not needed"
    else:
        state = "found in the cache" if cached else "compiled just now"
        runs = cpu_lowering.engine().engine is not CpuEngine.REFERENCE
        found.cpu["cache"] = state if runs else f"nothing in {cache_folder()}"
        if not runs:
            found.problems.append(
                f"the {wanted.engine.value} kernels of this processor cannot be built "
                f"({cpu_lowering.engine().reason}), so the slower reference runs."
            )
    found.cpu["compiler"] = _compiler()
    for scheme in SCHEMES.values():
        found.kernels.append(
            KernelRow(
                "cpu",
                scheme.name,
                _cpu_kernel(scheme, _FEW),
                _cpu_kernel(scheme, _MANY),
                report["reason"]
                if scheme.act_format is None
                else str(why_no_instruction(scheme.act_format, torch.device("cpu"))),
            )
        )


def _cpu_kernel(scheme: Scheme, tokens: int) -> str:
    if scheme.floats:
        return _EMULATED
    groups = 1 if scheme.group_size is None else _IN_FEATURES // scheme.group_size
    return cpu_lowering.kernel_of(
        weight_bits=scheme.weight_bits,
        act_bits=scheme.act_bits,
        tokens=tokens,
        in_features=_IN_FEATURES,
        groups=groups,
    )


def _look_at_gpus(found: Diagnosis) -> None:
    if not torch.cuda.is_available():
        found.devices["gpu"] = "none that this build of torch can use"
        return
    for index in range(torch.cuda.device_count()):
        found.devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    for scheme in SCHEMES.values():
        if scheme.act_format is not None:
            found.kernels.append(_gpu_floats(scheme.name, scheme.act_format))
            continue
        operator = "weight_only_linear" if scheme.weight_only else "int_linear"
        # What the dispatcher has for the device; without it, the reference runs.
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"masquant::{operator}", "CUDA"
        )
        kernel = f"masquant::{operator}" if has_kernel else "reference"
        reason = (
            "registered for the device"
            if has_kernel
            else "no kernel is registered for the device"
        )
        found.kernels.append(KernelRow("cuda", scheme.name, kernel, kernel, reason))
        if not has_kernel:
            found.problems.append(
                f"{scheme.name} has no kernel for the GPU, so the slower reference runs."
            )


def _gpu_floats(scheme: str, act_format: str) -> KernelRow:
    device = torch.device("cuda")
    missing = why_reference(device)
    if missing is not None:
        return KernelRow("cuda", scheme, _EMULATED, _EMULATED, missing)
    lacking = why_no_instruction(act_format, device)
    kernel, reason = "masquant::float_linear", "registered for the device"
    if lacking is not None:
        kernel, reason = f"{kernel}: decoded to bfloat16", lacking
    return KernelRow("cuda", scheme, kernel, kernel, reason)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _compiler() -> str:
    try:
        path = find_compiler()
    except BuildError as error:
        return f"none: {error}"
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}, which does not run: {error}"
    return f"{path} ({told.splitlines()[0] if told else 'of unknown version'})"
