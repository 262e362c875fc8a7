# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The Triton kernels compiled ahead of time, for GPUs that are not there.

Triton compiles a kernel to machine code for a named target without its driver. What
comes out tells before any run whether a tiling is sound: whether the matrix instruction
of its numbers was taken, whether registers were spilled to memory, and whether the shared
memory fits. :func:`compile_all` does so for every case of ``aot_cases()`` of every
module of ``kernel_cases``, each in one of a few processes of its own: a kernel is made for
Triton's interpreter or for its compiler when it is defined, and which of the two this
process chose does not matter.
"""

import concurrent.futures
import contextlib
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "TARGETS",
    "CaseName",
    "Compiled",
    "Target",
    "case_names",
    "compile_all",
    "extremes",
]

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """An architecture to compile for.

    Attributes:
        backend: "cuda" or "hip".
        arch: as Triton names it: compute capability times 10, or "gfx942".
        warp_size: threads.
        shared_memory: most bytes of a program.
        products: regular expression of its matrix instruction for each of the numbers
            that it multiplies as they are, and for bfloat16.
    """

    backend: str
    arch: Any
    warp_size: int
    shared_memory: int
    products: Mapping[str, str]


_AMPERE = {
    "int8": r"mma\.sync\S*\.s32\.s8\.s8\.s32",
    "bfloat16": r"mma\.sync\S*\.f32\.bf16\.bf16\.f32",
}
_ADA = {**_AMPERE, "e4m3": r"mma\.sync\S*\.f32\.e4m3\.e4m3\.f32"}
_HOPPER = {
    "int8": r"wgmma\.mma_async\S*\.s32\.s8\.s8",
    "bfloat16": r"wgmma\.mma_async\S*\.f32\.bf16\.bf16",
    "e4m3": r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3",
}
_BLACKWELL = {
    "int8": r"tcgen05\.mma\S*kind::i8",
    "bfloat16": r"tcgen05\.mma\S*kind::f16",
    "e4m3": r"tcgen05\.mma\S*kind::f8f6f4",
    "mxfp8": r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
    "mxfp4": r"tcgen05\.mma\S*kind::mxf4\.block_scale",
    "nvfp4": r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale",
}
_CDNA3 = {
    "int8": r"v_mfma_i32_\S*_i8",
    "bfloat16": r"v_mfma_f32_\S*_bf16",
    "e4m3": r"v_mfma_f32_\S*_fp8_fp8",
}
# Operands of the one instruction say which of the formats it multiplies.
_CDNA4 = {
    **_CDNA3,
    "e4m3": r"v_mfma_f32_\S*_f8f6f4",
    "mxfp8": r"v_mfma_scale_f32_\S*_f8f6f4",
    "mxfp4": r"v_mfma_scale_f32_\S*_f8f6f4",
}
# CUDA C++ programming guide, "Technical specifications per compute capability"; CDNA 3
# and CDNA 4 instruction set architectures, "Local data share".
TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * _KIB, _AMPERE),
    "sm_89": Target("cuda", 89, 32, 99 * _KIB, _ADA),
    "sm_90": Target("cuda", 90, 32, 227 * _KIB, _HOPPER),
    "sm_100": Target("cuda", 100, 32, 227 * _KIB, _BLACKWELL),
    "gfx942": Target("hip", "gfx942", 64, 64 * _KIB, _CDNA3),
    "gfx950": Target("hip", "gfx950", 64, 160 * _KIB, _CDNA4),
}
# Columns of Blackwell's tensor memory.
_TENSOR_MEMORY = 512
_MATRIX = re.compile(
    r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+|\bv_mfma_\w+"
)


@dataclass(frozen=True)
class CaseName:
    """A case for a target.

    Attributes:
        target: of :data:`TARGETS`.
        module: of ``kernel_cases``.
        case: name of one of its :class:`AotCase`.
        elements: of the tile, a thread.
    """

    target: str
    module: str
    case: str
    elements: float

    @property
    def form(self) -> str:
        """The case without its tile: "int_linear w8" of "int_linear w8 64x64x128 ..."."""
        return re.split(r" \d+x\d+| split ", self.case)[0]


@dataclass(frozen=True)
class Compiled:
    """What came of a case.

    Attributes:
        target: of :data:`TARGETS`.
        kernel: name of the case.
        registers: of a thread.
        spills: registers of a thread that went to memory.
        shared_memory: bytes of a program.
        tensor_memory: columns, on Blackwell.
        matrix: matrix instructions and how often each stands in the code.
        multiplies: which of them is asked for.
        error: why it did not compile, else empty.
    """

    target: str
    kernel: str
    registers: int = 0
    spills: int = 0
    shared_memory: int = 0
    tensor_memory: int = 0
    matrix: tuple[tuple[str, int], ...] = ()
    multiplies: str = ""
    error: str = ""

    def problems(self) -> list[str]:
        """What makes the tiling unsound; empty where nothing does."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        target = TARGETS[self.target]
        if self.multiplies and not any(
            re.search(target.products[self.multiplies], name) for name, _ in self.matrix
        ):
            found.append(f"has no matrix instruction of {self.multiplies}")
        if self.spills:
            found.append(f"spills {self.spills} registers")
        if self.shared_memory > target.shared_memory:
            found.append(
                f"takes {self.shared_memory} bytes of shared memory, and there are "
                f"{target.shared_memory}"
            )
        if self.tensor_memory > _TENSOR_MEMORY:
            found.append(
                f"takes {self.tensor_memory} columns of tensor memory, and there are "
                f"{_TENSOR_MEMORY}"
            )
        return found


def _modules() -> dict[str, Callable[..., list[Any]]]:
    """Of each module of kernel_cases the function that lists its cases."""
    import kernel_cases

    found = {}
    for info in sorted(
        pkgutil.iter_modules(kernel_cases.__path__), key=lambda info: info.name
    ):
        module = importlib.import_module(f"{kernel_cases.__name__}.{info.name}")
        if hasattr(module, "aot_cases"):
            found[info.name] = module.aot_cases
    return found


def _cases(aot_cases: Callable[..., list[Any]], target: str) -> dict[str, Any]:
    takes_target = bool(inspect.signature(aot_cases).parameters)
    cases: dict[str, Any] = {}
    for case in aot_cases(target) if takes_target else aot_cases():
        # Some tilings are listed once for their own sake and once for a variant.
        if cases.setdefault(case.name, case) != case:
            raise ValueError(f"two cases are named {case.name!r}: name them apart.")
    return cases


def case_names(
    targets: Sequence[str] = tuple(TARGETS), kernels: Sequence[str] = ()
) -> list[CaseName]:
    """Every case of every target.

    Args:
        targets: of :data:`TARGETS`.
        kernels: only cases whose name has one of these in it; none for all.

    Raises:
        ValueError: there is no such target, or no such case, or Triton is missing.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(
                f"there is no target {target!r}: choose of {', '.join(TARGETS)}."
            )
    try:
        modules = _modules()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            "compiling kernels takes Triton, which is not installed: install "
            "'torchao_masquant[triton]'."
        ) from error
    found = [
        CaseName(target, module, name, _elements(case))
        for target in targets
        for module, aot_cases in modules.items()
        for name, case in _cases(aot_cases, target).items()
        if not kernels or any(kernel in name for kernel in kernels)
    ]
    if not found:
        raise ValueError(
            f"no kernel's name has {' or '.join(map(repr, kernels))} in it: leave the "
            "filter out to see all."
        )
    return found


def _elements(case: Any) -> float:
    blocks = dict(case.config.blocks)
    columns = blocks.get("BLOCK_N", blocks.get("BLOCK_R", blocks.get("BLOCK_K", 1)))
    return blocks.get("BLOCK_M", 1) * columns / case.config.num_warps


def extremes(names: Iterable[CaseName]) -> list[CaseName]:
    """Of each form and target the cases with the largest and the smallest tile.

    By the part of it that a thread holds; of several, the first.
    """
    forms: dict[tuple[str, str], list[CaseName]] = {}
    for name in names:
        forms.setdefault((name.target, name.form), []).append(name)
    chosen = {}
    for cases in forms.values():
        for most in (max, min):
            case = most(cases, key=lambda name: name.elements)
            chosen[case.target, case.case] = case
    return list(chosen.values())


def compile_all(names: Sequence[CaseName], jobs: int = 0) -> Iterable[Compiled]:
    """Compile cases, and tell of each as it is ready.

    Nothing is left in Triton's cache.

    Args:
        names: from :func:`case_names`.
        jobs: processes; 0 for one a core.
    """
    with (
        tempfile.TemporaryDirectory(prefix="masquant-aot-") as folder,
        concurrent.futures.ProcessPoolExecutor(
            max_workers=max(1, min(jobs or _cores(), len(names))),
            # A fork would inherit kernels made for the interpreter.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(folder,),
        ) as pool,
    ):
        # Processes begin where work is handed in, and import Triton first of all.
        with _no_interpreter():
            futures = [pool.submit(_compile, name) for name in names]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _no_interpreter() -> Iterator[None]:
    kept = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["TRITON_INTERPRET"] = kept


def _begin(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, str(os.getpid()))
    # What Triton says at import and at the first compilation, once a process.
    warnings.simplefilter("ignore")


def _compile(name: CaseName) -> Compiled:
    case = _cases(_modules()[name.module], name.target)[name.case]
    try:
        return _inspected(name, case, _compiled(case, TARGETS[name.target]))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[-1] if lines else ''}"
        return Compiled(
            name.target, name.case, multiplies=case.multiplies, error=reason
        )
    finally:
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)


def _compiled(case: Any, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    constexprs = {**case.constexprs, **dict(case.config.blocks)}
    return triton.compile(
        ASTSource(
            case.kernel,
            {name: case.signature.get(name, "constexpr") for name in arguments},
            constexprs,
            {
                (arguments.index(name),): [["tt.divisibility", 16]]
                for name in case.divisible
            },
        ),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={
            "num_warps": case.config.num_warps,
            "num_stages": case.config.num_stages,
        },
    )


def _inspected(name: CaseName, case: Any, kernel: Any) -> Compiled:
    if "cubin" in kernel.asm:
        assembly = kernel.asm["ptx"]
        registers, spills = _cuda_registers(kernel.asm["cubin"])
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spills = _hip_registers(assembly)
    matrix = Counter(_MATRIX.findall(assembly))
    return Compiled(
        name.target,
        name.case,
        registers,
        spills,
        kernel.metadata.shared,
        getattr(kernel.metadata, "tmem_size", None) or 0,
        tuple(sorted(matrix.items())),
        case.multiplies,
    )


def _cuda_registers(cubin: bytes) -> tuple[int, int]:
    """Registers and those spilled, as the machine code has them.

    A stack of a kernel, which calls no function and has no array of its own, is what
    was spilled: Triton's driver counts spills in the same way.
    """
    from triton import knobs

    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cubin)
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    registers, stack, local = (
        int(_only(rf"\b{part}:(\d+)", usage)) for part in ("REG", "STACK", "LOCAL")
    )
    return registers, (stack + local) // 4


def _hip_registers(amdgcn: str) -> tuple[int, int]:
    """Vector registers, accumulation registers among them, and those spilled."""
    registers, spills, scratch = (
        int(_only(rf"\.{part}:\s+(\d+)", amdgcn))
        for part in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, max(spills, scratch // 4)


def _only(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text)
    return found
