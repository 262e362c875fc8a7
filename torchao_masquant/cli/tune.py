# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``tune``: the GPU kernels' tilings, measured for a model."""

import argparse
import sys

from torchao_masquant.cli.calibration_options import whole
from torchao_masquant.cli.models import (
    add_model_options,
    load_config,
    load_model,
    resolve_device,
)

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
Without a table, tilings are chosen by the number of tokens alone. What is measured here
goes to the table of the GPU's architecture in the user's cache, and every later process
reads it. Where a library's product is faster than every tiling, that is what runs.

examples:
  masquant tune ./Qwen2.5-VL-3B-w4a8
  masquant tune ./Qwen2.5-VL-3B-w4a8 --tokens 1 512 --again
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tuning."""
    parser.epilog = _EXAMPLES
    parser.add_argument("quantized", metavar="QUANTIZED", help="what quantize wrote")
    parser.add_argument(
        "--tokens",
        type=whole(1),
        nargs="+",
        default=[1, 16, 256, 2048],
        metavar="N",
        help="of a call; tables round them up to powers of two (default: %(default)s)",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure what the table knows already, too"
    )
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure, and say what wins.

    Returns:
        Exit code.
    """
    device = resolve_device(arguments.device)
    if device.type != "cuda":
        raise ValueError(
            f"tilings are measured on a GPU (CUDA or ROCm), and this would run on "
            f"{device}: there is nothing to tune."
        )
    from torchao_masquant.gpu_tuning import tune_kernels

    model = load_model(
        arguments.quantized,
        load_config(arguments.quantized, arguments.trust_remote_code),
        arguments,
    )
    table = tune_kernels(
        model,
        arguments.tokens,
        again=arguments.again,
        tell=lambda found: print(
            f"{found.question.kernel} {found.question.key}: {found.entry}",
            file=sys.stderr,
        ),
    )
    print(f"Wrote {table}")
    return 0
