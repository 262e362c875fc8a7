# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchao_masquant``, and the command ``masquant``."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

import torchao_masquant.demo.main as demo
import torchao_masquant.report.main as report
import torchao_masquant.sequential.main as sequential


def _parser() -> argparse.ArgumentParser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = argparse.ArgumentParser(
        prog="python -m torchao_masquant" if as_module else None,
        description="Modality-aware quantization of multimodal LLMs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "demo",
        help="quantize a small model that sees, hears and reads, and compare",
        description="Quantize a small trained model that sees, hears and reads, in "
        "each scheme by each method; print one table; save the w4a8 model, load it "
        "in a new process and compile it.",
    )
    demo.add_arguments(command)
    command.set_defaults(run=demo.main)
    command = commands.add_parser(
        "report",
        help="one HTML page about how a model was quantized",
        description="Write one self-contained HTML page from a recipe, an analysis, "
        "evaluations and benchmark results, or from whatever there is of them.",
    )
    report.add_arguments(command)
    command.set_defaults(run=report.main)
    command = commands.add_parser(
        "calibrate-sequential",
        help="quantize a model that does not fit in memory, block by block",
        description="Calibrate and quantize a model one block at a time, from disk to "
        "disk, alone or on several processes under torchrun. An interrupted run goes on "
        "from the last finished block when it is started again.",
    )
    sequential.add_arguments(command)
    command.set_defaults(run=sequential.main)
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the process's own.

    Returns:
        Exit code.
    """
    parsed = _parser().parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
