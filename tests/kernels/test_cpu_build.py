# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Building the C++ kernels, finding them again, and doing without: in processes of
their own, as the choice is made at import."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchao_masquant.kernels import cpu_build
from torchao_masquant.kernels.cpu_engine import CpuEngine, choose_engine

_SCRIPT = """
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from torchao_masquant.kernels import cpu_lowering, reference
    before = cpu_lowering.engine().engine.value
    torch.manual_seed(0)
    equal = []
    for tokens in (1, 5, 40):
        x, p = torch.randn(tokens, 66), torch.rand(2, 66) + 0.5
        ids = torch.arange(tokens) % 2
        w = torch.randint(-127, 128, (35, 66), dtype=torch.int8)
        ones = torch.ones(35, 1)
        for impl in (torch.ops.masquant, reference):
            q, s = impl.smooth_quantize(x, p, ids, 8)
            rest = (None, None, None, None, None, 8, torch.float32)
            equal.append((q, s, impl.int_linear(q, s, w, ones, *rest)))
    same = all(
        torch.equal(a, b)
        for ours, theirs in zip(equal[::2], equal[1::2])
        for a, b in zip(ours, theirs)
    )
messages = [str(w.message) for w in caught if "masquant" in str(w.message)]
print(json.dumps({"before": before, "report": cpu_lowering.report(),
                  "same": same, "warnings": messages,
                  "setuptools": "setuptools" in sys.modules}))
"""

ENGINE = choose_engine({}).engine
needs_kernels = pytest.mark.skipif(
    ENGINE is CpuEngine.REFERENCE,
    reason=f"no C++ kernels here: {choose_engine({}).reason}",
)


def run(tmp_path: Path, **variables: str) -> dict[str, Any]:
    """What the script finds, from a cache of its own unless one is named."""
    environment = {**os.environ, "MASQUANT_CACHE_DIR": str(tmp_path), **variables}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


@needs_kernels
def test_built_at_the_first_call_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        compiler = cpu_build.find_compiler()
    except cpu_build.BuildError as error:
        pytest.xfail(str(error))
    # Optimizing takes longest, and the library of all other tests is optimized.
    quick = tmp_path / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
    quick.chmod(0o755)
    first = run(tmp_path, CXX=str(quick))
    assert first["same"] and not first["warnings"]
    library = Path(first["report"]["library"])
    assert library.is_file() and tmp_path in library.parents
    # Nothing half made is left beside it.
    assert {path.name for path in library.parent.iterdir()} == {".lock", library.name}
    # Found without any compiler, or what asks compilers for their flags.
    second = run(tmp_path, CXX="no-such-compiler")
    assert second["same"] and not second["warnings"] and not second["setuptools"]
    assert second["report"]["library"] == str(library)


@needs_kernels
def test_without_a_compiler_one_warning_and_the_reference(tmp_path: Path) -> None:
    found = run(tmp_path, CXX="no-such-compiler")
    assert found["before"] != "reference"
    assert found["report"]["engine"] == "reference"
    assert found["report"]["reason"] == "CXX=no-such-compiler is not there"
    assert found["same"] and len(found["warnings"]) == 1
    assert "Install a C++ compiler" in found["warnings"][0]


@needs_kernels
def test_a_compiler_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho 'internal error'\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MASQUANT_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(
        cpu_build.BuildError, match=r"ended with 3 \(internal error\):\n"
    ) as raised:
        cpu_build.build_library(ENGINE)
    # One line for the warning; the command and all that was said for the doctor.
    assert "\n" not in raised.value.reason and "-std=c++20" in str(raised.value)
    assert raised.value.remedy.startswith("Install a C++ compiler (GCC 11 or newer)")
    assert not cpu_build.library_path(ENGINE).exists()
    compiler.write_text(
        "#!/bin/sh\necho 'as: error: No space left on device'\nexit 1\n"
    )
    with pytest.raises(cpu_build.BuildError) as raised:
        cpu_build.build_library(ENGINE)
    assert raised.value.remedy.startswith("Make room")


@needs_kernels
def test_a_library_without_its_end_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading it would end the process with SIGBUS."""
    whole = cpu_build.library_path(ENGINE)
    if not cpu_build.is_built(whole):
        pytest.skip("no C++ kernels were built")
    content = whole.read_bytes()
    monkeypatch.setenv("MASQUANT_CACHE_DIR", str(tmp_path))
    path = cpu_build.library_path(ENGINE)
    path.parent.mkdir(parents=True)
    for length in (0, 40, 4096, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not cpu_build.is_built(path)
    # Whoever was killed while it was building left a folder behind.
    (path.parent / "building-before").mkdir()

    def compiled(compiler: str, engine: CpuEngine, path: Path) -> None:
        path.write_bytes(content)

    monkeypatch.setattr(cpu_build, "_compile", compiled)
    assert cpu_build.is_built(cpu_build.build_library(ENGINE))
    assert {p.name for p in path.parent.iterdir()} == {".lock", path.name}


@needs_kernels
def test_a_library_that_does_not_load_says_which(tmp_path: Path) -> None:
    # Sections of an ELF file, and nothing in them.
    path = tmp_path / cpu_build.library_path(ENGINE).parent.name / "masquant_cpu.so"
    path.parent.mkdir()
    header = bytearray(128)
    header[:6], header[40], header[58:61:2] = b"\x7fELF\x02\x01", 64, b"\x40\x01"
    path.write_bytes(header)
    assert cpu_build.is_built(path)
    found = run(tmp_path)
    assert found["same"] and len(found["warnings"]) == 1
    assert f"Delete {path}, so that it is built again" in found["warnings"][0]


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASQUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(cpu_build.BuildError, match="cannot be written"):
        cpu_build.build_library(ENGINE)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, {"vnni", "reference"}),
        ({"MASQUANT_CPU_ENGINE": "reference"}, {"reference"}),
    ],
    ids=["oneDNN VNNI", "by name"],
)
def test_lower_levels_are_correct(
    variables: dict[str, str], expected: set[str]
) -> None:
    """From the user's own cache, where most runs find the kernels built."""
    environment = {k: v for k, v in os.environ.items() if k != "MASQUANT_CPU_ENGINE"}
    cache = cpu_build.cache_folder(environment)
    found = run(cache, **variables)
    assert found["same"] and not found["warnings"]
    assert found["report"]["engine"] in expected


def test_portable_kernels_pass_the_operators_cases() -> None:
    """As on a processor with AVX2 alone, whose library has no greater one's code."""
    environment = {**os.environ, "MASQUANT_CPU_ENGINE": "avx2"}
    try:
        choose_engine(environment)
        cpu_build.find_compiler()
    except (ValueError, cpu_build.BuildError) as error:
        pytest.skip(str(error))
    library = cpu_build.build_library(CpuEngine.AVX2)
    environment.pop("PYTEST_ADDOPTS", None)
    cases = Path(__file__).with_name("test_operators.py")
    quietly = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", f"{cases}::test_case", "-k", "cpu", *quietly],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout
    if shutil.which("objdump") is None:
        return
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "vpmaddubsw" in code
    assert not re.search(r"%zmm|%k[0-7]\b|mm(1[6-9]|2\d|3[01])\b|vpdpbusd", code)


def test_kernels_of_arm_under_an_emulator(tmp_path: Path) -> None:
    """Without PyTorch, of which there is none for it here."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("g++-aarch64-linux-gnu and qemu-user are not installed")
    check = Path(__file__).with_name("portable_kernels_check.cpp")
    folder = Path(cpu_build.__file__).parent / "csrc"
    flags = [*cpu_build.flags_of(CpuEngine.NEON), f"-I{folder}", "-static"]
    sources = [str(folder / "portable_kernels.cpp"), str(check)]
    made = str(tmp_path / "check")
    subprocess.run([compiler, *flags, *sources, "-o", made], check=True)
    result = subprocess.run(
        [emulator, "-cpu", "max", made], capture_output=True, text=True
    )
    assert result.stdout == "NEON dot products: 0 failures\n"


def test_places_of_the_cache() -> None:
    assert cpu_build.cache_folder({"MASQUANT_CACHE_DIR": "/a"}) == Path("/a")
    assert cpu_build.cache_folder({"XDG_CACHE_HOME": "/b"}) == Path(
        "/b/torchao_masquant"
    )
    assert cpu_build.cache_folder({}) == Path.home() / ".cache/torchao_masquant"
