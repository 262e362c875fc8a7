# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows of the benchmark, each written as soon as it is there."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

from baselines.fingerprint import code_fingerprint
from baselines.quantizing import Quantizing, weight_bytes

from real.examples import calibration_samples, heldout_samples
from real.methods import quantize
from real.scoring import Reference
from real.thinker import load_model
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.demo.compare import collect_statistics
from torchao_masquant.recipe import library_versions

__all__ = ["Results", "Size", "run"]


@dataclass(frozen=True)
class Size:
    """How much of the benchmark runs.

    Attributes:
        examples: held out, of each task.
        pieces: of prose, held out.
        layers: of the language model; None for all.
    """

    examples: int
    pieces: int
    layers: Optional[int] = None


class Results:
    """Rows in a file, which is whole at any moment; those of today's code are kept.

    Args:
        path: of the JSON file, which need not be there; None for rows in memory.
    """

    def __init__(self, path: Optional[Path]):
        self.path = path
        self.code = code_fingerprint(Path(__file__).parent)
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            self.rows = json.loads(path.read_text())["rows"]

    def key(self, seed: int, scheme: str, method: str, size: Size) -> dict[str, Any]:
        """What tells a row from all others."""
        return {"seed": seed, "scheme": scheme, "method": method, **asdict(size)}

    def check(self, size: Size) -> None:
        """Raise where the file has rows that say something else than these will."""
        for row in self.rows:
            found = Size(*(row[name] for name in asdict(size)))
            if found != size:
                raise ValueError(
                    f"{self.path} holds rows of {found}, not of {size}: give another "
                    "file, or the same size."
                )

    def has(self, key: dict[str, Any]) -> bool:
        """Whether today's code has made that row."""
        return any(
            (key | {"code": self.code}).items() <= row.items() for row in self.rows
        )

    def add(self, key: dict[str, Any], scores: dict[str, Any]) -> None:
        """Put a row in the place of the one that other code has made."""
        self.rows = [row for row in self.rows if not key.items() <= row.items()]
        self.rows.append({**key, **scores, "code": self.code})
        if self.path is not None:
            content = {"versions": library_versions(), "rows": self.rows}
            write_whole(self.path, json.dumps(content, indent=1))


def run(
    results: Results,
    seeds: Sequence[int],
    schemes: Sequence[str],
    methods: Sequence[str],
    size: Size,
) -> Iterator[str]:
    """Make all rows that are not there yet: by seed, then method, then scheme.

    Yields:
        A line about each row that was made.
    """
    reference: Optional[Reference] = None
    model: Any = None
    for seed in seeds:
        subject: Optional[Quantizing] = None
        for method in methods:
            for scheme in schemes:
                key = results.key(seed, scheme, method, size)
                if results.has(key):
                    continue
                if reference is None:
                    model = load_model(size.layers)
                    tasks = heldout_samples(size.examples, size.pieces)
                    reference = Reference(model, tasks)
                if subject is None:
                    samples = calibration_samples(seed)
                    session = collect_statistics(model, samples, progress=False)
                    subject = Quantizing(model, session, samples)
                start = time.process_time()
                quantized = quantize(subject, scheme, method)
                seconds = time.process_time() - start
                scores = reference.score(quantized)
                total = sum(
                    weight_bytes(quantized.get_submodule(name))
                    for name in subject.session.linears
                )
                results.add(
                    key,
                    {"tasks": scores, "bytes": total, "solving_cpu_seconds": seconds},
                )
                kl = " / ".join(f"{task['kl']:.4f}" for task in scores.values())
                yield f"seed {seed} {scheme} {method}: KL {kl}, {seconds:.0f} s of CPU"
