# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The commands, and the parser of all of them."""

import argparse
import sys
from pathlib import Path

import torchao_masquant
from torchao_masquant.cli.parser import CommandParser, MainParser

__all__ = ["main_parser", "with_all_arguments"]


# Name to a few words, for the list of commands, and a description, for its own help. Each
# is a module of this folder.
_COMMANDS = {
    "calibrate": (
        "from a model and data to a recipe: how to quantize it",
        "Run data through a model, observe the inputs of its linears, and\n"
        "write a recipe: one file that says how to quantize them, by modality.",
    ),
    "quantize": (
        "from a model, and data or a recipe, to a folder of packed integers",
        "Quantize a model and save it: a folder that from_pretrained loads.\n"
        "With data it is calibrated first; a recipe is what 'masquant calibrate' found.",
    ),
    "eval": (
        "score a model, quantized or not, on data",
        "Score a model on labelled data, by task and by modality, and\n"
        "against the model before it was quantized.",
    ),
    "analyze": (
        "how the modalities of a model differ, and what that costs",
        "Run data through a model that is not quantized, and tell how its\n"
        "modalities differ at each linear, and what that means for quantizing it.",
    ),
    "inspect": (
        "what is in a quantized model or a recipe, without loading it",
        "Print the linears of a quantized model or of a recipe: bits,\n"
        "modalities, ranks and bytes.",
    ),
    "bench": (
        "time a quantized model against the original, on this machine",
        "Time the decoder of a quantized model against that of the\n"
        "original, side by side: prefill and decode.",
    ),
    "doctor": (
        "which kernels run here, and why; what is missing",
        "Look at this machine and this installation: versions, devices,\n"
        "the kernel that each scheme runs with, and why; what is missing.",
    ),
    "demo": (
        "quantize a small model that sees, hears and reads, and compare",
        "Quantize a small trained model that sees, hears and reads, in\n"
        "each scheme by each method; print one table; save the w4a8 model, load it\n"
        "in a new process and compile it.",
    ),
    "export": (
        "a quantized model for processes without this package",
        "Compile the decoder of a quantized model with AOTInductor: a\n"
        "folder with the compiled programs, one copy of the weights, our kernels, and\n"
        "a file that runs them and imports torch alone. Or write a model that was\n"
        "calibrated with --target compressed-tensors for vLLM and others, in that format.",
    ),
    "report": (
        "one HTML page about how a model was quantized",
        "Write one self-contained HTML page from a recipe, an analysis,\n"
        "evaluations and benchmark results, or from whatever there is of them.",
    ),
    "plan": (
        "what quantizing a model, and running it, will take",
        "Reckon memory and traffic of calibration, and of inference\n"
        "in each scheme, from a model's config alone.",
    ),
    "tune": (
        "measure the GPU kernels' tilings for a model",
        "Measure every tiling of the Triton kernels for the linears of a\n"
        "quantized model, on this machine's GPU, and write down what wins.",
    ),
    "completion": (
        "let the shell complete commands and options",
        "Print a script that lets a shell complete the commands, their\n"
        "options and the names of files.",
    ),
}


_EPILOG = """\
A model in three steps:
  masquant analyze MODEL samples.jsonl
  masquant quantize MODEL samples.jsonl -o QUANTIZED
  masquant eval QUANTIZED held-out.jsonl --reference MODEL

A model larger than memory, in one:
  masquant calibrate MODEL samples.jsonl --sequential --quantized QUANTIZED

Without data or network, on the small model that comes along:
  masquant calibrate digits digits -o recipe.safetensors

'masquant COMMAND --help' says more, with examples.

exit codes: 0 done, 1 failed (one sentence on standard error says why), 2 wrong
arguments, 130 interrupted.
"""


def main_parser() -> MainParser:
    """The parser of the command line; each command's arguments wait until it is called."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = MainParser(
        prog="python -m torchao_masquant" if as_module else "masquant",
        description="Modality-aware quantization of multimodal LLMs.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"torchao_masquant {torchao_masquant.__version__}",
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        title="commands",
        parser_class=CommandParser,
    )
    for name, (words, description) in _COMMANDS.items():
        command = commands.add_parser(name, help=words, description=description)
        command.module = f"{__package__}.{name}"
        command.set_defaults(run=command.run, default_of=command.get_default)
    return parser


def with_all_arguments(parser: MainParser) -> MainParser:
    """The same parser, with the arguments of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                command.complete()
    return parser
