# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``plan``."""

import argparse
import dataclasses
import json
import re
import sys
from typing import TYPE_CHECKING, Any, Optional

from torchao_masquant.cli.calibration_options import add_option, whole
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.models import model_folder
from torchao_masquant.options import SCHEMES, SolverOptions
from torchao_masquant.wording import byte_size

if TYPE_CHECKING:
    from torchao_masquant.planning.estimate import CalibrationPlan, InferencePlan
    from torchao_masquant.planning.skeleton import Skeleton

__all__ = ["add_arguments", "main"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _memory(text: str) -> int:
    """Bytes, of "80GiB", "24G" and the like; units are powers of 1024."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.I)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the plan."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a config.json, or a name on the Hugging Face hub; no weights "
        "are read",
    )
    parser.add_argument("--devices", type=whole(1), default=1, metavar="N")
    parser.add_argument(
        "--memory", type=_memory, metavar="SIZE", help="of one device, such as 80GiB"
    )
    # What it was for, seconds, is predicted no more; scripts that give it go on.
    parser.add_argument("--machine", help=argparse.SUPPRESS)
    parser.add_argument(
        "--samples", type=whole(1), default=128, help="of calibration (default: 128)"
    )
    parser.add_argument(
        "--tokens", type=whole(1), default=2048, help="of a sample (default: 2048)"
    )
    parser.add_argument(
        "--context",
        type=whole(1),
        default=4096,
        help="tokens of a call (default: 4096)",
    )
    parser.add_argument(
        "--batch", type=whole(1), default=1, help="calls at a time (default: 1)"
    )
    add_option(parser, "rank")
    add_option(parser, "low_rank_bits")
    parser.add_argument(
        "--json", action="store_true", help="print the plan as JSON, for scripts"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print a plan.

    Returns:
        Exit code: 0; 1 where calibration, or every scheme, does not fit the memory or
        the number of devices.

    Raises:
        UsageError: a rank is out of range.
        ValueError, OSError: the model can't be read.
    """
    from torchao_masquant.planning.estimate import plan_calibration, plan_inference
    from torchao_masquant.planning.skeleton import read_skeleton
    from torchao_masquant.weight_bytes import Compensation

    if arguments.machine is not None:
        print("--machine has no effect: a plan tells no seconds.", file=sys.stderr)
    try:
        options = SolverOptions(
            rank=arguments.rank, low_rank_bits=arguments.low_rank_bits
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    skeleton = read_skeleton(model_folder(arguments.model))
    compensation = Compensation.of(options, len(skeleton.modalities))
    calibration = plan_calibration(
        skeleton,
        SCHEMES["w4a8"],
        compensation,
        samples=arguments.samples,
        tokens=arguments.tokens,
        devices=arguments.devices,
        options=options,
    )
    rows = [
        plan_inference(
            skeleton,
            scheme,
            compensation,
            context=arguments.context,
            batch=arguments.batch,
            devices=arguments.devices,
        )
        for scheme in (None, *SCHEMES.values())
    ]
    memory = arguments.memory
    if arguments.json:
        print(json.dumps(_as_json(skeleton, calibration, rows), indent=2))
    else:
        _print(arguments, skeleton, calibration, rows)
    fits = [r for r in rows[1:] if _why_not(r, memory) is None]
    if not fits or (memory is not None and calibration.device_bytes > memory):
        return 1
    return 0


def _why_not(row: "InferencePlan", memory: Optional[int]) -> Optional[str]:
    if row.reason is not None:
        return row.reason
    if memory is not None and row.device_bytes > memory:
        return f"{byte_size(row.device_bytes - memory)} too much"
    return None


def _as_json(
    skeleton: "Skeleton",
    calibration: "CalibrationPlan",
    rows: "list[InferencePlan]",
) -> dict[str, Any]:
    return {
        "model": skeleton.source,
        "class": skeleton.model_class,
        "modalities": skeleton.modalities,
        "weights": skeleton.values,
        "calibration": dataclasses.asdict(calibration),
        "inference": [dataclasses.asdict(row) for row in rows],
    }


def _print(
    arguments: argparse.Namespace,
    skeleton: "Skeleton",
    calibration: "CalibrationPlan",
    rows: "list[InferencePlan]",
) -> None:
    from torchao_masquant.evaluation.tables import new_table, to_text

    devices, memory = arguments.devices, arguments.memory
    print(
        f"{skeleton.model_class}: {skeleton.values / 1e6:,.0f} million weights, "
        f"{len(skeleton.linears)} linears to quantize, for "
        f"{', '.join(skeleton.modalities)}; {devices} device{'s' * (devices > 1)}.\n"
    )
    c = calibration
    verdict = ""
    if memory is not None:
        over = c.device_bytes - memory
        verdict = f"; {byte_size(over)} too much" if over > 0 else "; fits"
    print(
        f"Calibration, block by block: {arguments.samples} samples of "
        f"{arguments.tokens} tokens{verdict}"
    )
    table = new_table("", [""], ["memory or traffic"])
    for what, size in (
        ("in front of the decoder", c.front_bytes),
        ("one block", c.block_bytes),
        ("its statistics", c.statistics_bytes),
        ("the solver", c.workspace_bytes),
        ("a device, at most", c.device_bytes),
        ("activations, CPU or disk", c.activation_bytes),
        ("read", c.read_bytes),
        ("written (w4a8)", c.written_bytes),
        ("sent by each device", c.reduced_bytes),
    ):
        table.add_row(what, byte_size(size))
    print(to_text(table))
    print(
        f"Inference: {arguments.batch} x {arguments.context} tokens, whose cache is "
        f"{byte_size(rows[0].cache_bytes)} of a device"
    )
    table = new_table("", ["scheme"], ["weights", "a device", "sent a token", ""])
    for row in rows:
        table.add_row(
            row.scheme,
            byte_size(row.weight_bytes),
            byte_size(row.device_bytes),
            byte_size(row.sent_bytes),
            _why_not(row, memory) or ("" if memory is None else "fits"),
        )
    print(to_text(table))
