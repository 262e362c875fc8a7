# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The packages that a machine with a GPU, and no network, may lack.

    python benchmarks/gpu_visit/wheels.py collect FOLDER
    python benchmarks/gpu_visit/wheels.py unpack FOLDER SITE

What has PyTorch for GPUs has Triton, numpy and transformers beside it; the rest of what
this package depends on is carried, in the releases that are installed where it is
collected. A wheel is for any Python from 3.10 on, or it is refused. Of those that are
carried the ones that are missing are unpacked, or older there: nothing is installed.
"""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

# The last two are what rich needs.
PACKAGES = (
    *("torchao", "safetensors", "shtab", "tqdm", "rich"),
    *("markdown-it-py", "mdurl", "pygments"),
)
# What may travel, with the checkout.
_MOST = 64 << 20


def collect(folder: Path) -> None:
    """Download the wheels.

    Raises:
        ValueError: one is not for every Python, or they are too large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    # The oldest tag: what runs on 3.10 of any Linux of x86 runs on all later ones.
    platforms = [f"manylinux_2_{glibc}_x86_64" for glibc in (28, 24, 17)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", "3.10"]
    command += ["--implementation", "cp", "--abi", "abi3", "--abi", "none"]
    for platform in (*platforms, "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, "--dest", str(folder), *wanted], check=True)
    wheels = sorted(folder.glob("*.whl"))
    check(wheels)
    carried = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {carried / 2**20:.1f} MiB, in {folder}")
    tree = _checkout_bytes(folder)
    if carried + tree > _MOST:
        raise ValueError(
            f"the checkout ({tree >> 20} MiB) and its wheels ({carried >> 20} MiB) are "
            f"more than {_MOST >> 20} MiB: what git does not ignore travels, too."
        )


def check(wheels: list[Path]) -> None:
    """Raise ValueError for wheels that are missing, or for one Python alone."""
    names = {wheel.name.partition("-")[0].replace("_", "-").lower() for wheel in wheels}
    missing = [name for name in PACKAGES if name not in names]
    if missing:
        raise ValueError(f"no wheel was found of {', '.join(missing)}.")
    for wheel in wheels:
        python, abi, _ = wheel.stem.rsplit("-", 2)[0], *wheel.stem.rsplit("-", 2)[1:]
        python = python.rsplit("-", 1)[-1]
        if not (abi == "abi3" or (abi == "none" and "py3" in python)):
            raise ValueError(f"{wheel.name} is for one Python alone: carry another.")


def unpack(folder: Path, site: Path) -> None:
    """Unpack what is missing here, and name it."""
    from packaging.version import Version

    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = ""
        if here and Version(here) >= Version(version):
            print(f"{name} {here} is here")
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        print(f"{name} {version} is unpacked, in place of {here or 'none'}")


def _checkout_bytes(folder: Path) -> int:
    root = Path(__file__).parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = (root / name for name in listed.split("\0") if name)
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    {"collect": collect, "unpack": unpack}[what](*map(Path, paths))
