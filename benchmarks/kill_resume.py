# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Calibrations that are killed at random moments, and go on.

    python benchmarks/kill_resume.py [--kills 20] [--processes 1] [--json PATH]

The small digits model is calibrated and written, with SIGKILL after a random time, and
again, until it ends by itself; and the whole anew, until there were as many kills as
asked for. Each result is compared byte for byte with that of a run that nobody disturbed.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.recipe import library_versions
from torchao_masquant.sequential import calibrate_sequential
from torchao_masquant.testing import digits

_RENDEZVOUS = datetime.timedelta(seconds=60)

_OPTIONS: dict[str, Any] = dict(alpha=0.5, separation=1.0, rank=8, progress=False)


def calibrate(
    folder: Path, rank: int, size: int, store: str, samples: int, options: dict
) -> None:
    """Calibrate into a folder, as one of some processes; CPU seconds beside the store."""
    torch.set_num_threads(1)
    if size > 1:
        # One that is killed before it has met the others lets them wait: torchrun would
        # end them.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=_RENDEZVOUS,
        )
    calibrate_sequential(
        digits.checkpoint_path("outliers"),
        digits.calibration_samples()[:samples],
        output=folder / "quantized",
        recipe=folder / "recipe.safetensors",
        **_OPTIONS,
        **options,
    )
    Path(f"{store}.{rank}").write_text(str(time.process_time()))


def run_once(
    folder: Path,
    size: int,
    kill_after: Optional[float] = None,
    victim: int = 0,
    samples: int = 4,
    **options: Any,
) -> list[float]:
    """CPU seconds of each process; none where the run did not end by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchao_masquant.sequential", __name__])
    with tempfile.TemporaryDirectory() as stores:
        processes = [
            context.Process(
                target=calibrate,
                args=(folder, rank, size, f"{stores}/store", samples, options),
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        processes[victim].join(kill_after)
        if processes[victim].is_alive():
            os.kill(processes[victim].pid or 0, signal.SIGKILL)
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if size == 1 and codes[0] not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the calibration ended with exit code {codes[0]}")
        if any(codes):
            return []
        return [float(Path(f"{stores}/store.{r}").read_text()) for r in range(size)]


def _files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "recipe.safetensors":
            # Its header is a dict without an order.
            with safe_open(path, "pt") as file:
                found["recipe header"] = json.dumps(
                    file.metadata(), sort_keys=True
                ).encode()
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name).contiguous().view(torch.uint8)
                    found[f"recipe {name}"] = tensor.numpy().tobytes()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _finished_blocks(folder: Path) -> int:
    partial = folder / "quantized.partial"
    return len([p for p in partial.glob("block-*.json")])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    generator = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        undisturbed = Path(work) / "undisturbed"
        undisturbed.mkdir()
        start = time.perf_counter()
        if not run_once(undisturbed, arguments.processes):
            raise RuntimeError("the run that nobody disturbed did not end")
        seconds = time.perf_counter() - start
        expected = _files(undisturbed)
        kills = 0
        while kills < arguments.kills:
            folder = Path(work) / "killed"
            folder.mkdir()
            moments: list[float] = []
            blocks: list[int] = []
            while True:
                wanted = kills < arguments.kills
                moment = generator.uniform(0, seconds) if wanted else None
                victim = generator.randrange(arguments.processes)
                if run_once(folder, arguments.processes, moment, victim):
                    break
                kills += 1
                moments.append(moment or 0.0)
                blocks.append(_finished_blocks(folder))
            rows.append(
                {
                    "kills": len(moments),
                    "killed_after_s": [round(m, 2) for m in moments],
                    "finished_blocks": blocks,
                    "identical": _files(folder) == expected,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    shown = Table("kills", "after s", "blocks finished by then", "bit-identical")
    for row in rows:
        shown.add_row(
            str(row["kills"]),
            " ".join(f"{m:.1f}" for m in row["killed_after_s"]),
            " ".join(map(str, row["finished_blocks"])),
            str(row["identical"]),
        )
    Console().print(shown)
    print(
        f"{kills} kills; {seconds:.1f} s without any; {len(expected)} files, tensors."
    )
    if arguments.json:
        result = {
            "processes": arguments.processes,
            "seed": arguments.seed,
            "undisturbed_s": seconds,
            "kills": kills,
            "versions": library_versions(),
            "rows": rows,
        }
        write_whole(arguments.json, json.dumps(result, indent=1))
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
