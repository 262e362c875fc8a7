# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``calibrate --sequential``: block by block from disk, on one process or several."""

import argparse
import datetime
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from torchao_masquant.cli.calibration_options import number
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.models import model_folder, resolve_device
from torchao_masquant.cli.samples import described
from torchao_masquant.hub import auto_class
from torchao_masquant.option_values import MEASURE

if TYPE_CHECKING:
    from torchao_masquant.sequential import SequentialResult

__all__ = [
    "add_sequential_options",
    "calibrate_from_disk",
    "check_sequential_usage",
    "is_first_process",
]

_GIB = 1 << 30


def add_sequential_options(parser: argparse.ArgumentParser) -> Any:
    """Options of a calibration that does not load the model as a whole; their group."""
    group = parser.add_argument_group(
        "a model larger than memory",
        "Weights are read, observed, quantized and written one block at a time. An\n"
        "interrupted run goes on from the last finished block when it is started again.\n"
        "Under torchrun, the processes share the samples and the solving.",
    )
    group.add_argument(
        "--sequential", action="store_true", help="calibrate block by block from disk"
    )
    group.add_argument(
        "--activations",
        choices=("memory", "disk"),
        help="where samples' hidden states are kept between blocks; memory where it is "
        "not given",
    )
    group.add_argument(
        "--max-memory-gib",
        type=_positive,
        metavar="GIB",
        help="that a process may take; what is free where it is not given",
    )
    group.add_argument(
        "--max-hours",
        type=_positive,
        metavar="HOURS",
        help="refuse to begin what would take longer",
    )
    group.add_argument(
        "--timeout-minutes",
        type=_positive,
        metavar="MINUTES",
        help="how long a process waits for the others; 120 where it is not given",
    )
    return group


def _positive(text: str) -> float:
    value = float(number(text))
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero.")
    return value


_OPTIONS = (
    "quantized",
    "activations",
    "max_memory_gib",
    "max_hours",
    "timeout_minutes",
)


def _processes() -> int:
    """How many processes torchrun has started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_sequential_usage(arguments: argparse.Namespace) -> None:
    """Raise where options need ``--sequential``, or do not go with it.

    Raises:
        UsageError: names the option.
    """
    if not arguments.sequential:
        for name in _OPTIONS:
            if getattr(arguments, name, None) is not None:
                raise UsageError(f"--{name.replace('_', '-')} goes with --sequential.")
        if _processes() > 1:
            raise UsageError(
                "several processes share a calibration with --sequential alone."
            )
        return
    if arguments.modality_weights == MEASURE:
        raise UsageError(
            "--modality-weights measure takes gradients through the whole model, which "
            "--sequential never holds: give numbers, such as 'vision=0.2,audio=0.5'."
        )
    if arguments.trust_remote_code:
        raise UsageError(
            "--sequential runs transformers' own classes alone: leave "
            "--trust-remote-code out, or --sequential."
        )


def is_first_process() -> bool:
    """Whether this is the process that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def calibrate_from_disk(
    arguments: argparse.Namespace,
    config: Any,
    samples: Sequence[Mapping[str, Any]],
    options: dict[str, Any],
    *,
    recipe: Optional[Path] = None,
    quantized: Optional[Path] = None,
) -> "SequentialResult":
    """Calibrate a model that is not loaded as a whole.

    Args:
        arguments: of the command.
        config: of the model.
        samples: keyword inputs of the model, on the CPU.
        options: of :func:`torchao_masquant.sequential.calibrate_sequential`.
        recipe: file to write; None for none.
        quantized: folder to write; None for none.
    """
    import torch
    import torch.distributed as dist

    from torchao_masquant.data import PlacedSamples
    from torchao_masquant.sequential import calibrate_sequential
    from torchao_masquant.sequential.disk_model import checkpoint_dtype

    # The time that it will take.
    logging.getLogger("torchao_masquant.sequential").setLevel(logging.INFO)
    device = resolve_device(arguments.device)
    minutes = 120.0 if arguments.timeout_minutes is None else arguments.timeout_minutes
    if _processes() > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            timeout=datetime.timedelta(minutes=minutes),
        )
    folder = model_folder(arguments.model)
    dtype = (
        checkpoint_dtype(folder)
        if arguments.dtype == "auto"
        else getattr(torch, arguments.dtype)
    )
    result = calibrate_sequential(
        folder,
        PlacedSamples.of_type(samples, dtype),
        output=quantized,
        recipe=recipe,
        dtype=dtype,
        device=device,
        activations=arguments.activations or "memory",
        # The class that from_pretrained of the other commands takes.
        model_class=auto_class(config)._model_mapping[type(config)],
        max_memory_bytes=_times(arguments.max_memory_gib, _GIB),
        max_seconds=_times(arguments.max_hours, 3600),
        timeout=60 * minutes,
        overwrite=arguments.overwrite,
        description=described(arguments),
        **options,
    )
    if _processes() > 1:
        dist.destroy_process_group()
    return result


def _times(number: Optional[float], unit: int) -> Optional[int]:
    return None if number is None else int(number * unit)
