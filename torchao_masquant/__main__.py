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

from torchao_masquant.cli.ending import run
from torchao_masquant.cli.parser import CommandParser, LazyCommand

demo = LazyCommand("torchao_masquant.demo.main")
report = LazyCommand("torchao_masquant.report.main")


def _parser() -> argparse.ArgumentParser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = CommandParser(
        prog="python -m torchao_masquant" if as_module else "masquant",
        description="Modality-aware quantization of multimodal LLMs.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    command = commands.add_parser(
        "demo",
        help="quantize a small model that sees, hears and reads, and compare",
        description="Quantize a small trained model that sees, hears and reads, in\n"
        "each scheme by each method; print one table; save the w4a8 model, load it\n"
        "in a new process and compile it.",
    )
    demo.add_arguments(command)
    command.set_defaults(run=demo.main)
    command = commands.add_parser(
        "report",
        help="one HTML page about how a model was quantized",
        description="Write one self-contained HTML page from a recipe, an analysis,\n"
        "evaluations and benchmark results, or from whatever there is of them.",
    )
    report.add_arguments(command)
    command.set_defaults(run=report.main)
    for command in commands.choices.values():
        command.add_argument(
            "--debug",
            action="store_true",
            help="show where an error comes from (MASQUANT_DEBUG=1 does, too)",
        )
    return parser


_EPILOG = """\
exit codes: 0 done, 1 failed (one sentence on standard error says why), 2 wrong
arguments, 130 interrupted.
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None for the process's own.

    Returns:
        Exit code.
    """
    parsed = _parser().parse_args(arguments)
    return run(parsed.run, parsed)


if __name__ == "__main__":
    sys.exit(main())
