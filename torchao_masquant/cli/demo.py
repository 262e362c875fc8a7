# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The demonstration, from the loaded model to the reloaded one."""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.cli.models import DIGITS
from torchao_masquant.options import SolverOptions
from torchao_masquant.outputs import check_file, check_folder

if TYPE_CHECKING:
    from torchao_masquant.demo.compare import Row

__all__ = ["add_arguments", "main"]

_SAVED = ("w4a8", "masquant")


def _rank(text: str) -> "int | float":
    try:
        rank = float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rank: give a share of min(N, K) such as 0.05, or a whole "
            "number."
        ) from None
    try:
        SolverOptions(rank=rank)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return rank


def _output(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"cannot write {text!r}: there is no folder {str(path.parent)!r}."
        )
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demonstration."""
    parser.add_argument(
        "--variant",
        choices=sorted(DIGITS.values()),
        default="outliers",
        help="the model with trained-in outliers of image and sound tokens, as large "
        "multimodal LLMs have them, or the plain one (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        default=0.05,
        help="rank of each modality's low-rank pair: a share of min(N, K), or a whole "
        "number (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=_output,
        metavar="PATH",
        help="also write the results to this file",
    )
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="keep the saved w4a8 model here"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write over an earlier demonstration's"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the demonstration.

    Returns:
        Exit code: 0, or 1 where the reloaded model is not the saved one.
    """
    if arguments.json is not None:
        check_file(arguments.json, "demo", overwrite=arguments.overwrite)
    if arguments.save is not None:
        check_folder(arguments.save, "demo", overwrite=arguments.overwrite)
    from transformers.utils import logging as transformers_logging

    from torchao_masquant.demo.checkpoint import save
    from torchao_masquant.demo.compare import (
        METHODS,
        SCHEMES,
        compare_methods,
        dense_row,
    )
    from torchao_masquant.demo.table import render
    from torchao_masquant.evaluation.tables import to_text
    from torchao_masquant.progress import progress_bar
    from torchao_masquant.testing import digits

    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    model = digits.load_model(arguments.variant)
    trained_in = (
        ", with outliers of image and sound tokens trained in on purpose"
        if arguments.variant == "outliers"
        else ", without trained-in outliers"
    )
    print(
        "A Qwen2.5-Omni thinker of four million parameters, trained on handwritten "
        f"digits, spoken digits and sums{trained_in}."
    )
    rows = [dense_row(model)]
    accuracy = ", ".join(f"{t} {100 * a:.1f} %" for t, a in rows[0].accuracy.items())
    print(f"Dense accuracy: {accuracy}.")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.save or Path(temporary)
        saved_bytes = 0
        with progress_bar(total=len(SCHEMES) * len(METHODS), desc="Quantizing") as bar:
            for row, quantized, _ in compare_methods(
                model, arguments.rank, progress=True
            ):
                rows.append(row)
                bar.update()
                if (row.scheme, row.method) == _SAVED:
                    saved_bytes = save(quantized, row.scheme, folder)
        title = f"Held-out digits, model variant {arguments.variant!r}{trained_in}"
        print(to_text(render(rows, title)))
        print("Loading the saved w4a8 model in a new process, compiling it ...")
        reloaded = _reload(folder)
    same = bool(reloaded["bit_identical"]) and reloaded["compiled_same_answers"] == 1
    print(
        f"Saved {saved_bytes} bytes. Reloaded logits bit-identical: "
        f"{reloaded['bit_identical']}. Compiled answers equal to the eager ones: "
        f"{100 * reloaded['compiled_same_answers']:.0f} % "
        f"({reloaded['graphs']} graphs, {reloaded['graph_breaks']} breaks, "
        f"{reloaded['compile_seconds']} s)."
    )
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} seconds in all, peak memory {_peak_bytes() / 2**20:.0f} MiB.")
    if arguments.json is not None:
        _write_json(arguments, rows, reloaded, saved_bytes, seconds)
    return 0 if same else 1


def _reload(folder: Path) -> dict[str, Any]:
    """Check the saved model in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torchao_masquant.demo.reload", folder],
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the saved model did not load:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def _peak_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes everywhere but on macOS.
    return peak if sys.platform == "darwin" else 1024 * peak


def _write_json(
    arguments: argparse.Namespace,
    rows: "list[Row]",
    reloaded: dict[str, Any],
    saved_bytes: int,
    seconds: float,
) -> None:
    report = {
        "format": "torchao_masquant.demo.1",
        "variant": arguments.variant,
        "outliers_trained_in": arguments.variant == "outliers",
        "rank": arguments.rank,
        "rows": [dataclasses.asdict(row) for row in rows],
        "saved_bytes": saved_bytes,
        "peak_bytes": _peak_bytes(),
        "reloaded": reloaded,
        "seconds": round(seconds, 1),
    }
    write_whole(arguments.json, json.dumps(report, indent=2) + "\n")
