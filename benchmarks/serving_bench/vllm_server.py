# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``vllm serve`` in processes of its own, for as long as it is asked."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

__all__ = ["Server"]

#: Seconds: where other processes have the cores, a start takes a few minutes.
_START = 900


class Server:
    """A server of a folder, ready within the ``with``.

    Args:
        folder: to be served.
        log: file of what it prints.
        *options: of ``vllm serve``.
    """

    def __init__(self, folder: str | Path, log: Path, *options: str):
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
        self._command += [str(folder), "--host", "127.0.0.1", "--port", str(port)]
        self._command += options

    @property
    def resident(self) -> int:
        """Bytes of the resident sets of all its processes (Linux)."""
        pages = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(process.name)) == self.process.pid:
                    pages += int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> "Server":
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
                # Its own processes end with it.
                start_new_session=True,
            )
        end = time.monotonic() + _START
        while not self._is_ready():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > end:
                self.__exit__()
                last = self._log.read_text()[-3000:]
                raise RuntimeError(f"vllm serve did not become ready:\n{last}")
            time.sleep(1)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def _is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health").status == 200
        except (urllib.error.URLError, ConnectionError):
            return False


def _free_port() -> int:
    """One that no client is given for its end of a connection until the server has it."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
