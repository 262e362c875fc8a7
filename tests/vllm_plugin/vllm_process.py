# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""vLLM in a process of its own, which ends with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["told"]

_HERE = Path(__file__).parent


def told(script: str, *arguments: object, output: Path, **environment: str) -> Any:
    """What a script of this folder writes to ``output``, in JSON.

    Args:
        script: name of the file.
        arguments: of its command line.
        output: one of them.
        environment: in place of what else is there.
    """
    run = subprocess.run(
        [sys.executable, _HERE / script, *map(str, arguments)],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(output.read_text())
