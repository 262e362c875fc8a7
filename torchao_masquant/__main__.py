# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchao_masquant``."""

import argparse
import sys

from torchao_masquant.demo.main import add_arguments, main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchao_masquant",
        description="Modality-aware quantization of multimodal LLMs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(
        commands.add_parser(
            "demo",
            help="quantize a small model that sees, hears and reads, and compare",
            description="Quantize a small trained model that sees, hears and reads, in "
            "each scheme by each method; print one table; save the w4a8 model, load it "
            "in a new process and compile it.",
        )
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(_parser().parse_args()))
