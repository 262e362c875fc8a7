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
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, Mapping, Optional

import torch

__all__ = ["BuildError", "build_library", "cache_folder", "library_path"]

#: folder of the compiled library, in place of the user's cache
CACHE_VARIABLE = "MASQUANT_CACHE_DIR"

_FOLDER = Path(__file__).parent / "csrc"
# With the flags that each has beside those of all.
_SOURCES = {
    "cpu_kernels.cpp": (),
    "cpu_stored.cpp": (),
    "cpu_operators.cpp": (),
    "cpu_bfloat16.cpp": ("-mavx512bf16",),
}
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # A product and a sum are rounded one by one, as in the reference.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vnni",
    # GCC 12 warns of its own intrinsics.
    "-w",
)


class BuildError(RuntimeError):
    """The kernels cannot be compiled here."""


def cache_folder(environ: Optional[Mapping[str, str]] = None) -> Path:
    """Where compiled libraries are kept.

    ``MASQUANT_CACHE_DIR``, or ``torchao_masquant`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    environ = os.environ if environ is None else environ
    if environ.get(CACHE_VARIABLE):
        return Path(environ[CACHE_VARIABLE])
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torchao_masquant"


def library_path() -> Path:
    """Where the library of these sources and this PyTorch is, or will be."""
    digest = hashlib.sha256()
    for part in (torch.__version__, *_FLAGS, str(_SOURCES)):
        digest.update(part.encode() + b"\0")
    for source in sorted(_FOLDER.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.read_bytes() + b"\0")
    return cache_folder() / f"cpu-{digest.hexdigest()[:16]}" / "masquant_cpu.so"


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
        else "there is no C++ compiler (g++ or c++)"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which its holder's end gives back, however it ends."""
    import fcntl  # not on Windows, where nothing is built

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_library() -> Path:
    """Compile the kernels, unless they are there; about 15 seconds.

    Returns:
        The library.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    path = library_path()
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not path.exists():
                _compile(find_compiler(), path)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error})") from error
    return path


def _compile(compiler: str, path: Path) -> None:
    # It imports setuptools, which a library that is there does without.
    from torch.utils import cpp_extension

    include = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    link = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{source}.o" for source in _SOURCES]
        _run_all(
            [
                [compiler, *_FLAGS, *flags, abi, *include]
                + ["-c", str(_FOLDER / source), "-o", str(made)]
                for (source, flags), made in zip(_SOURCES.items(), objects)
            ]
        )
        made = Path(folder) / path.name
        _run_all(
            [
                [compiler, "-shared", "-fopenmp", *map(str, objects), *link]
                + ["-ltorch_cpu", "-lc10", "-o", str(made)]
            ]
        )
        # Whole or not at all.
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
            raise BuildError(
                f"'{' '.join(command)}' ended with {process.returncode}:\n"
                + "\n".join(output.splitlines()[-20:])
            )
