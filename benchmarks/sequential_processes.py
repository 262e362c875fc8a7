# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Time of a sequential calibration by one process and by two, alternating.

    python benchmarks/sequential_processes.py [--repeats 3] [--json PATH]
    python benchmarks/sequential_processes.py --epochs 2 --batch-size 4 --samples 16

The small digits model, one thread a process. A core for each process is assumed: on a
busy machine the ratio of times says more about its load. CPU seconds of the busiest
process say less about that, and nothing about waiting for others.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional, Sequence

from kill_resume import run_once
from rich.console import Console
from rich.table import Table

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.recipe import library_versions


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=0, help="of learning")
    parser.add_argument("--batch-size", type=int, default=1, help="of its steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    options = {
        name: getattr(arguments, name) for name in ("samples", "epochs", "batch_size")
    }
    seconds: dict[int, list[float]] = {size: [] for size in arguments.processes}
    busiest: dict[int, list[float]] = {size: [] for size in arguments.processes}
    for _ in range(arguments.repeats):
        for size in arguments.processes:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                cpu = run_once(Path(folder), size, **options)
                if not cpu:
                    raise RuntimeError(f"a calibration by {size} processes failed")
                seconds[size].append(time.perf_counter() - start)
                busiest[size].append(max(cpu))
            print(size, f"{seconds[size][-1]:.1f} s", file=sys.stderr, flush=True)
    first = statistics.median(seconds[arguments.processes[0]])
    shown = Table("processes", "median s", "least s", "speed-up", "busiest's CPU s")
    rows: list[dict[str, Any]] = []
    for size, found in seconds.items():
        middle = statistics.median(found)
        rows.append(
            {
                "processes": size,
                "seconds": found,
                "speedup": first / middle,
                "busiest_cpu_s": busiest[size],
            }
        )
        shown.add_row(
            str(size),
            f"{middle:.1f}",
            f"{min(found):.1f}",
            f"{first / middle:.2f}",
            f"{statistics.median(busiest[size]):.1f}",
        )
    Console().print(shown)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        result = {
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "options": options,
            "versions": library_versions(),
            "rows": rows,
        }
        write_whole(arguments.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
