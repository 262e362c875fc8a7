# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Compiles the C++ kernels, once for each release of PyTorch.

``torch.utils.cpp_extension.load`` would do, but it needs ninja, and a compiler and its
version at every start: here a finished library is found by the hash of what it was made
from, with no compiler at all.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple, Optional

import torch

from torchao_masquant.kernels.cpu_engine import CpuEngine

__all__ = ["BuildError", "build_library", "cache_folder", "is_built", "library_path"]

#: folder of the compiled library, in place of the user's cache
CACHE_VARIABLE = "MASQUANT_CACHE_DIR"

_FOLDER = Path(__file__).parent / "csrc"


class _Kernels(NamedTuple):
    """What a library is made of.

    Attributes:
        sources: with the flags that each has beside those of all.
        flags: of the processor. No library has code of a greater one than it is for, in
            templates and inline functions neither: that is why there are several.
    """

    sources: dict[str, tuple[str, ...]]
    flags: tuple[str, ...]


_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_PORTABLE: dict[str, tuple[str, ...]] = {
    "portable_kernels.cpp": (),
    "cpu_operators.cpp": (),
}
_VNNI = _Kernels(
    {
        "cpu_columns.cpp": (),
        "cpu_kernels.cpp": (),
        "cpu_stored.cpp": (),
        "cpu_operators.cpp": (),
        "cpu_bfloat16.cpp": ("-mavx512bf16",),
        "cpu_tiles.cpp": ("-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    },
    (*_AVX2_FLAGS, *_AVX512_FLAGS),
)
_KERNELS = {
    CpuEngine.AMX: _VNNI,
    CpuEngine.VNNI: _VNNI,
    CpuEngine.AVX_VNNI: _Kernels(_PORTABLE, (*_AVX2_FLAGS, "-mavxvnni")),
    CpuEngine.AVX2: _Kernels(_PORTABLE, _AVX2_FLAGS),
    CpuEngine.NEON: _Kernels(_PORTABLE, ("-march=armv8.2-a+dotprod",)),
}
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # A product and a sum are rounded one by one, as in the reference.
    "-ffp-contract=off",
    "-fno-math-errno",
    # GCC 12 warns of its own intrinsics.
    "-w",
)


# How the names of folders begin that hold what is being built.
_UNFINISHED = "building-"
_OTHER_COMPILER = "Install a C++ compiler (GCC 11 or newer), or name one with CXX"


class BuildError(RuntimeError):
    """The kernels cannot be compiled here.

    Args:
        reason: in one line.
        remedy: what a user can do about it.
        output: the compiler's, if it is that which failed.
    """

    def __init__(self, reason: str, remedy: str, output: str = ""):
        super().__init__(f"{reason}:\n{output}" if output else reason)
        self.reason = reason
        self.remedy = remedy


def cache_folder(environ: Optional[Mapping[str, str]] = None) -> Path:
    """Where compiled libraries are kept.

    ``MASQUANT_CACHE_DIR``, or ``torchao_masquant`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    environ = os.environ if environ is None else environ
    if environ.get(CACHE_VARIABLE):
        return Path(environ[CACHE_VARIABLE])
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torchao_masquant"


def flags_of(engine: CpuEngine) -> tuple[str, ...]:
    """The compiler's flags for all sources of an engine that has kernels."""
    return (*_FLAGS, *_KERNELS[engine].flags)


def library_path(engine: CpuEngine) -> Path:
    """Where an engine's library of these sources and this PyTorch is, or will be.

    Args:
        engine: one that has kernels: any but the reference.
    """
    kernels = _KERNELS[engine]
    digest = hashlib.sha256()
    for part in (torch.__version__, *_FLAGS, str(kernels)):
        digest.update(part.encode() + b"\0")
    for source in sorted(_FOLDER.iterdir()):
        if source.suffix == ".h" or source.name in kernels.sources:
            digest.update(source.read_bytes() + b"\0")
    return cache_folder() / f"cpu-{digest.hexdigest()[:16]}" / "masquant_cpu.so"


def is_built(path: Path) -> bool:
    """Whether a library is there, and no part of its end is missing.

    A crash or a full disk may leave a shorter file; loading it would end the process with
    SIGBUS. The table of sections is the last part of what linkers write.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    return size >= offset + entry * count > 64


def find_compiler() -> str:
    """The C++ compiler: ``CXX``, or the first of g++ and c++.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(
        f"CXX={named} is not there"
        if named
        else "there is no C++ compiler (g++ or c++)",
        _OTHER_COMPILER,
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which its holder's end gives back, however it ends.

    Where a file system has no locks, several processes may build: each its own library,
    of which the last one stays.
    """
    import fcntl  # not on Windows, where nothing is built

    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        # What builders left that were killed.
        for left in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def build_library(engine: CpuEngine) -> Path:
    """Compile an engine's kernels, unless they are there; about 15 seconds.

    Args:
        engine: one that has kernels.

    Returns:
        The library.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    path = library_path(engine)
    if is_built(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not is_built(path):
                _compile(find_compiler(), engine, path)
    except OSError as error:
        raise BuildError(
            f"{path.parent} cannot be written ({error})",
            f"Name a folder that can with {CACHE_VARIABLE}",
        ) from error
    return path


def _compile(compiler: str, engine: CpuEngine, path: Path) -> None:
    sources = _KERNELS[engine].sources
    # It imports setuptools, which a library that is there does without.
    from torch.utils import cpp_extension

    include = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    link = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_UNFINISHED) as folder:
        objects = [Path(folder) / f"{source}.o" for source in sources]
        _run_all(
            [
                [compiler, *flags_of(engine), *flags, abi, *include]
                + ["-c", str(_FOLDER / source), "-o", str(made)]
                for (source, flags), made in zip(sources.items(), objects)
            ]
        )
        made = Path(folder) / path.name
        _run_all(
            [
                [compiler, "-shared", "-fopenmp", *map(str, objects), *link]
                + ["-ltorch_cpu", "-lc10", "-o", str(made)]
            ]
        )
        # Whole or not at all, also after a loss of power.
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)


def _run_all(commands: list[list[str]]) -> None:
    """Run commands side by side."""
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for command in commands
    ]
    ends = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, ends):
        if process.returncode != 0:
            lines = output.splitlines()
            said = next((line for line in lines if "error" in line), "")
            raise BuildError(
                f"{command[0]} ended with {process.returncode}"
                + (f" ({said.strip()})" if said else ""),
                _remedy(output),
                "\n".join([" ".join(command), *lines[-20:]]),
            )


def _remedy(output: str) -> str:
    if os.strerror(errno.ENOSPC) in output:
        return f"Make room, or name another folder with {CACHE_VARIABLE}"
    return _OTHER_COMPILER
