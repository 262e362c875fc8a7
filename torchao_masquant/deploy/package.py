# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A folder with compiled programs, the weights that they share, and their kernels."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Mapping, Optional, Union

import torch
from torch._inductor import aot_compile
from torch._inductor.package import load_package, package_aoti
from torch.export import ExportedProgram

from torchao_masquant.atomic_files import replacing_folder
from torchao_masquant.deploy.lowering import choose_kernels, lower
from torchao_masquant.deploy.torch_only import masquant_decoder as names
from torchao_masquant.kernels import cpu_lowering

__all__ = ["new_folder", "write_package"]

_OPTIONS = {
    "aot_inductor.package": True,
    # In one file beside it, which all programs share.
    "aot_inductor.package_constants_in_so": False,
    # As many threads as torch has where it runs, not as it had here.
    "cpp.dynamic_threads": True,
}


def write_package(
    programs: Mapping[str, ExportedProgram],
    folder: Union[str, os.PathLike],
    *,
    kernels: str = "auto",
    facts: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Compile exported programs with AOTInductor, for a process with torch alone.

    The folder holds

    - ``decoder.pt2``, the compiled programs, without weights;
    - ``weights.pt``, the weights of all of them, each once: a dict of plain tensors,
      which ``torch.load(mmap=True, weights_only=True)`` maps into memory;
    - ``masquant_cpu.so``, where the programs call our C++ kernels;
    - ``decoder.json``, what it was made for and with;
    - ``masquant_decoder.py``, which loads all this and imports nothing but torch.

    Args:
        programs: name to program, on one device; weights of one name are one.
        folder: is made here; not there yet, or empty.
        kernels: "cpu", "triton", "aten" (see :func:`~torchao_masquant.deploy.lower`),
            or "auto": ours where they run here.
        facts: goes to ``decoder.json`` too.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: there are no programs, or no such kernels here.
    """
    target = new_folder(folder)
    if not programs:
        raise ValueError("write_package needs a program to compile.")
    device = _device(programs)
    kernels = choose_kernels(kernels, device)
    with replacing_folder(target) as new:
        _write(programs, new, kernels, device, dict(facts or {}))
        # Compiling takes a while, in which somebody may have put something there.
        new_folder(target)
    return target


def new_folder(folder: Union[str, os.PathLike]) -> Path:
    """The folder, if it can be made or is empty; else it raises FileExistsError."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{os.fspath(folder)!r} is there already: give the folder of a package that "
            "is to be made."
        )
    return target


def _device(programs: Mapping[str, ExportedProgram]) -> torch.device:
    devices = {
        t.device for program in programs.values() for t in program.state_dict.values()
    }
    if len(devices) > 1:
        raise ValueError(
            f"the programs' weights are on {sorted(map(str, devices))}: move the model "
            "to one device first."
        )
    return devices.pop() if devices else torch.device("cpu")


def _write(
    programs: Mapping[str, ExportedProgram],
    folder: Path,
    kernels: str,
    device: torch.device,
    facts: dict[str, Any],
) -> None:
    files: dict[str, Any] = {}
    constants: dict[str, torch.Tensor] = {}
    for name, program in programs.items():
        lowered = lower(program, kernels)
        constants |= _constants(lowered)
        example, keywords = lowered.example_inputs
        with torch.no_grad():
            files[name] = aot_compile(
                lowered.module(), example, keywords, options=dict(_OPTIONS)
            )
    package = folder / names.PACKAGE
    package_aoti(str(package), files)
    needed = {
        fqn
        for name in programs
        for fqn in load_package(str(package), name).get_constant_fqns()
    }
    torch.save({fqn: constants[fqn] for fqn in sorted(needed)}, folder / names.WEIGHTS)
    if kernels == "cpu":
        engine = cpu_lowering.engine().engine
        shutil.copyfile(cpu_lowering.library_path(engine), folder / names.LIBRARY)
        facts = {"engine": engine.value, **facts}
    shutil.copyfile(names.__file__, folder / Path(names.__file__).name)
    facts = {
        "format": names.FORMAT,
        "torch": torch.__version__,
        "device": device.type,
        "kernels": kernels,
        "programs": sorted(programs),
        **facts,
    }
    (folder / names.FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    found = {**program.constants, **program.state_dict}
    return {k: v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)}
