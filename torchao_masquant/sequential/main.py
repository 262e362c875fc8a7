# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``calibrate-sequential``."""

import argparse
import datetime
import logging
import os
import sys
from pathlib import Path
from typing import Union

import torch
import torch.distributed as dist

from torchao_masquant.schemes import SCHEMES
from torchao_masquant.sequential.calibrate_sequential import calibrate_sequential
from torchao_masquant.sequential.saved_samples import SavedSamples
from torchao_masquant.sequential.team import TeamError
from torchao_masquant.solver.methods import METHODS

__all__ = ["add_arguments", "main"]

_GIB = 1 << 30


def _number(text: str) -> Union[int, float, str]:
    """A whole number, a share, or "auto"; what is out of range is refused later."""
    if text == "auto":
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor 'auto'."
        ) from None


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form modality=number."
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", help="folder of a checkpoint, or its name on the hub")
    parser.add_argument(
        "--samples",
        required=True,
        metavar="PATH",
        help="a file that torch.save wrote of a list of dicts of the model's keyword "
        "inputs, or a folder of .pt files with one dict each",
    )
    parser.add_argument("--output", metavar="FOLDER", help="quantized checkpoint")
    parser.add_argument("--recipe", metavar="FILE", help="recipe")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="w4a8")
    parser.add_argument("--method", choices=sorted(METHODS), default="masquant")
    parser.add_argument("--alpha", type=_number, default=None)
    parser.add_argument("--separation", type=_number, default=None)
    parser.add_argument("--rank", type=_number, default=0.05)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--low-rank-bits", type=int, choices=(8, 16), default=16)
    parser.add_argument(
        "--modality-weight",
        type=_weight,
        action="append",
        metavar="MODALITY=NUMBER",
        help="what a modality's error weighs; may be repeated",
    )
    parser.add_argument("--base-modality", default="text")
    parser.add_argument("--modalities", nargs="+", default=None, metavar="MODALITY")
    parser.add_argument(
        "--include", action="append", metavar="PATTERN", help="of linears' names"
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN")
    parser.add_argument("--max-statistics-gib", type=float, default=4.0, metavar="GIB")
    parser.add_argument("--max-memory-gib", type=float, default=None, metavar="GIB")
    parser.add_argument("--max-hours", type=float, default=None, metavar="HOURS")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default=None
    )
    parser.add_argument("--device", default=None, help="cpu or cuda")
    parser.add_argument(
        "--activations",
        choices=("memory", "disk"),
        default="memory",
        help="where samples' hidden states are kept between blocks",
    )
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=120.0,
        help="how long a process waits for the others (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Calibrate a model, alone or as one of the processes that torchrun starts.

    Returns:
        Exit code: 0, or 1 where something is wrong, which a sentence on standard error
        says.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("torchao_masquant").setLevel(logging.INFO)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            timeout=datetime.timedelta(minutes=arguments.timeout_minutes),
        )
    try:
        result = calibrate_sequential(
            arguments.model,
            SavedSamples(arguments.samples),
            output=arguments.output,
            recipe=arguments.recipe,
            scheme=arguments.scheme,
            method=arguments.method,
            alpha=arguments.alpha,
            separation=arguments.separation,
            rank=arguments.rank,
            group_size=arguments.group_size,
            low_rank_bits=arguments.low_rank_bits,
            modality_weights=dict(arguments.modality_weight or ()) or None,
            base_modality=arguments.base_modality,
            modalities=arguments.modalities,
            include=arguments.include,
            exclude=arguments.exclude,
            max_statistics_bytes=int(arguments.max_statistics_gib * _GIB),
            max_memory_bytes=_bytes(arguments.max_memory_gib),
            max_seconds=None
            if arguments.max_hours is None
            else 3600 * arguments.max_hours,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            device=device,
            activations=arguments.activations,
            timeout=60 * arguments.timeout_minutes,
        )
    except (ValueError, TypeError, OSError, TeamError) as error:
        print(f"calibrate-sequential: {error}", file=sys.stderr)
        return 1
    if processes == 1 or dist.get_rank() == 0:
        again = f", {result.resumed} finished before" if result.resumed else ""
        print(f"{result.blocks} blocks{again}.")
        for path in (result.checkpoint, result.recipe):
            if path is not None:
                print(f"{_size(path) / _GIB:.3f} GiB in {path}")
    if processes > 1:
        dist.destroy_process_group()
    return 0


def _bytes(gib: Union[float, None]) -> Union[int, None]:
    return None if gib is None else int(gib * _GIB)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m torchao_masquant.sequential.main")
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
