# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""``python -m torchao_masquant``, and the command ``masquant``."""

import argparse
import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import Optional, Sequence

from torchao_masquant.cli.ending import run
from torchao_masquant.cli.parser import CommandParser, LazyCommand, MainParser

bench = LazyCommand("torchao_masquant.cli.bench")
calibrate = LazyCommand("torchao_masquant.cli.calibrate")
doctor = LazyCommand("torchao_masquant.cli.doctor")
evaluate = LazyCommand("torchao_masquant.cli.evaluate")
export = LazyCommand("torchao_masquant.deploy.main")
inspect = LazyCommand("torchao_masquant.cli.inspect")
kernels = LazyCommand("torchao_masquant.kernels.aot_command")
plan = LazyCommand("torchao_masquant.planning.main")
quantize = LazyCommand("torchao_masquant.cli.quantize")
demo = LazyCommand("torchao_masquant.demo.main")
report = LazyCommand("torchao_masquant.report.main")
tune = LazyCommand("torchao_masquant.cli.tune")


def _version() -> str:
    return importlib.metadata.version("torchao_masquant")


def _parser() -> argparse.ArgumentParser:
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = MainParser(
        prog="python -m torchao_masquant" if as_module else "masquant",
        description="Modality-aware quantization of multimodal LLMs.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action="version", version=f"torchao_masquant {_version()}"
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        title="commands",
        parser_class=CommandParser,
    )
    command = commands.add_parser(
        "calibrate",
        help="from a model and data to a recipe: how to quantize it",
        description="Run data through a model, observe the inputs of its linears, and\n"
        "write a recipe: one file that says how to quantize them, by modality.",
    )
    calibrate.add_arguments(command)
    command.set_defaults(run=calibrate.main)
    command = commands.add_parser(
        "quantize",
        help="from a model and a recipe to a folder of packed integers",
        description="Quantize a model as a recipe says and save it: a folder that\n"
        "from_pretrained loads.",
    )
    quantize.add_arguments(command)
    command.set_defaults(run=quantize.main)
    command = commands.add_parser(
        "eval",
        help="score a model, quantized or not, on data",
        description="Score a model on labelled data, by task and by modality, and\n"
        "against the model before it was quantized.",
    )
    evaluate.add_arguments(command)
    command.set_defaults(run=evaluate.main)
    command = commands.add_parser(
        "inspect",
        help="what is in a quantized model or a recipe, without loading it",
        description="Print the linears of a quantized model or of a recipe: bits,\n"
        "modalities, ranks and bytes.",
    )
    inspect.add_arguments(command)
    command.set_defaults(run=inspect.main)
    command = commands.add_parser(
        "bench",
        help="time a quantized model against the original, on this machine",
        description="Time the decoder of a quantized model against that of the\n"
        "original, side by side: prefill and decode.",
    )
    bench.add_arguments(command)
    command.set_defaults(run=bench.main)
    command = commands.add_parser(
        "doctor",
        help="which kernels run here, and why; what is missing",
        description="Look at this machine and this installation: versions, devices,\n"
        "the kernel that each scheme runs with, and why; what is missing.",
    )
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.main)
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
        "export",
        help="a quantized decoder for a process that has torch alone",
        description="Compile the decoder of a quantized model with AOTInductor: a\n"
        "folder with the compiled programs, one copy of the weights, our kernels, and\n"
        "a file that runs them and imports torch alone.",
    )
    export.add_arguments(command)
    command.set_defaults(run=export.main)
    command = commands.add_parser(
        "report",
        help="one HTML page about how a model was quantized",
        description="Write one self-contained HTML page from a recipe, an analysis,\n"
        "evaluations and benchmark results, or from whatever there is of them.",
    )
    report.add_arguments(command)
    command.set_defaults(run=report.main)
    command = commands.add_parser(
        "plan",
        help="what quantizing a model, and running it, will take",
        description="Reckon memory, time and traffic of calibration, and of inference\n"
        "in each scheme, from a model's config alone.",
    )
    plan.add_arguments(command)
    command.set_defaults(run=plan.main)
    command = commands.add_parser(
        "kernels",
        help="what the GPU kernels compile to, with no GPU",
        description="Compile every Triton kernel in every tiling for several\n"
        "architectures ahead of time, and print registers, spills, shared memory and\n"
        "matrix instructions of each.",
    )
    kernels.add_arguments(command)
    command.set_defaults(run=kernels.main)
    command = commands.add_parser(
        "tune",
        help="measure the GPU kernels' tilings for a model",
        description="Measure every tiling of the Triton kernels for the linears of a\n"
        "quantized model, on this machine's GPU, and write down what wins.",
    )
    tune.add_arguments(command)
    command.set_defaults(run=tune.main)
    return parser


_EPILOG = """\
A model in three steps:
  masquant calibrate MODEL samples.jsonl -o recipe.safetensors
  masquant quantize MODEL --recipe recipe.safetensors -o QUANTIZED
  masquant eval QUANTIZED held-out.jsonl --reference MODEL

A model larger than memory, in one:
  masquant calibrate MODEL samples.jsonl --sequential --quantized QUANTIZED

Without data or network, on the small model that comes along:
  masquant calibrate digits digits -o recipe.safetensors

'masquant COMMAND --help' says more, with examples.

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
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run(parsed.run, parsed)


if __name__ == "__main__":
    sys.exit(main())
