# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""First token and decoding in vLLM on a CPU: ours beside vLLM's own formats and bf16.

    python benchmarks/vllm_latency.py [--threads 1] [--rounds 7] [--other NAME=PYTHON]
        [--only ROW ...] [--json PATH]

What ``vllm bench latency`` measures, of engines that take turns, call by call: each has a
process of its own, and medians count. GB/s are the bytes of the weights that a token is
multiplied by over what it takes. A first token is that of a prompt of 512; what a
token takes later is of 32 more. Rows that see have one more prompt, of which half is an
image: the tower, which is tiny, and the image's preprocessing are part of its time.

``--other zentorch=PATH`` runs vLLM's own formats a second time by another Python, whose
environment has kernels that vLLM prefers where it finds them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm_bench.folders import CANDIDATES, IMAGE_TOKENS, OURS, PEERS, make, token_bytes

from torchao_masquant.atomic_files import write_whole

PROMPT, GENERATED = 512, 32


class Engine:
    """A process that serves one folder.

    Args:
        python: that runs it.
        folder: of the model.
        threads: of the process.
        log: file that takes what it prints.
    """

    def __init__(self, python: str, folder: Path, threads: int, log: Path):
        address = tempfile.mktemp(prefix="engine", dir=log.parent)
        script = Path(__file__).parent / "vllm_bench" / "engine.py"
        listener = Listener(address)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [python, script, folder, str(threads), address],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        listener._listener._socket.settimeout(5)  # type: ignore[attr-defined]
        while not hasattr(self, "connection"):
            try:
                self.connection: Connection = listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"{folder}: vLLM ended, see {log}.") from None
        self.connection.recv()

    def call(self, text: int, image: bool, generated: int) -> tuple[float, float]:
        """Seconds, and CPU seconds, of one request.

        Args:
            text: tokens.
            image: whether there is one, too.
            generated: tokens of the answer.
        """
        self.connection.send((text, image, generated))
        took, length = self.connection.recv()
        assert length == text + (IMAGE_TOKENS if image else 0), length
        return took

    def close(self) -> None:
        self.connection.send(None)
        self.process.wait()


def main() -> None:
    """Measure, print the table, and write it down if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--other", default="")
    parser.add_argument("--only", nargs="*", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        rows = {name: (sys.executable, name) for name in args.only}
        if args.other:
            other, python = args.other.split("=", 1)
            rows |= {f"{n}, {other}": (python, n) for n in args.only if n in PEERS}
        # All of them at once would need more than 20 GB.
        for seeing in (False, True):
            group = {row: of for row, of in rows.items() if sees(of[1]) == seeing}
            results |= take_turns(group, folder, args.threads, args.rounds)
        for row, (_, name) in rows.items():
            took = results[row]["a token, ms"]
            read = token_bytes(make(name, folder))
            results[row]["GB/s"] = round(read / took / 1e6, 1)
    facts = {
        "threads": args.threads,
        "rounds": args.rounds,
        "load": os.getloadavg(),
        "rows": results,
    }
    show(results)
    if args.json:
        write_whole(args.json, json.dumps(facts, indent=1))


def sees(candidate: str) -> bool:
    """Whether a row's model takes images."""
    return candidate in OURS and OURS[candidate][1]


def take_turns(
    rows: dict[str, tuple[str, str]], folder: Path, threads: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Start an engine for each row, and measure them."""
    engines = {}
    try:
        for row, (python, name) in rows.items():
            log = folder / f"{row}.log"
            engines[row] = Engine(python, make(name, folder), threads, log)
            print(row, "is ready", flush=True)
        return measure(engines, rounds)
    finally:
        for engine in engines.values():
            engine.close()


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each row, medians of rounds; the first round is not counted."""
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for index in range(rounds + 1):
        for row, engine in engines.items():
            calls = {"first": (PROMPT, False, 1), "all": (PROMPT, False, 1 + GENERATED)}
            if sees(row):
                calls["first, image"] = (PROMPT - IMAGE_TOKENS, True, 1)
            for what, call in calls.items():
                took = engine.call(*call)
                if index:
                    times.setdefault(row, {}).setdefault(what, []).append(took)
    found: dict[str, dict[str, Any]] = {}
    for row, of_row in times.items():
        for clock, index in (("ms", 0), ("CPU ms", 1)):
            first = [t[index] * 1e3 for t in of_row["first"]]
            later = [
                (whole[index] * 1e3 - f) / GENERATED
                for whole, f in zip(of_row["all"], first)
            ]
            known = found.setdefault(row, {})
            known[f"first token, {clock}"] = round(statistics.median(first), 1)
            known[f"a token, {clock}"] = round(statistics.median(later), 2)
            if "first, image" in of_row:
                image = [t[index] * 1e3 for t in of_row["first, image"]]
                known[f"first token, half an image, {clock}"] = round(
                    statistics.median(image), 1
                )
    return found


def show(results: dict[str, dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(c for row in results.values() for c in row))
    table = Table("", *columns)
    for name, row in results.items():
        table.add_row(name, *(str(row.get(c, "")) for c in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
