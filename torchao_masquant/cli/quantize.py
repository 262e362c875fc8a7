# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``quantize``: a model, and data or a recipe, to a folder of integers."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from torchao_masquant.cli.calibrate import calibrate_model, read_inputs
from torchao_masquant.cli.calibration_options import (
    add_calibration_options,
    add_patterns,
    calibration_options,
    given_options,
)
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.fit import check_dense, check_quantization
from torchao_masquant.cli.models import (
    add_model_options,
    load_config,
    load_model,
    model_folder,
    read_paths,
    resolve_device,
)
from torchao_masquant.cli.parser import add_output_options
from torchao_masquant.cli.samples import add_model_and_data
from torchao_masquant.cli.sequential import (
    add_sequential_options,
    calibrate_from_disk,
    check_sequential_usage,
    is_first_process,
)
from torchao_masquant.hub import folder_of
from torchao_masquant.options import SCHEMES
from torchao_masquant.outputs import check_folder

__all__ = ["add_arguments", "main"]

# What rounding to nearest takes, too.
_WITHOUT_DATA = ("--head-bits", "--towers")

_EXAMPLES = """\
With DATA, the options are those of 'masquant calibrate', and the recipe that it would
write is used and not kept. With --recipe or --rtn each weight is quantized as it is
read: the model's full precision is never held as a whole. What else lies in the model's
folder, its tokenizer and processor, comes along; a README.md tells how it was made.

examples:
  masquant quantize ./Qwen2.5-VL-3B samples.jsonl -o ./Qwen2.5-VL-3B-w4a8
  masquant quantize ./Qwen2.5-VL-3B --recipe recipe.safetensors -o ./Qwen2.5-VL-3B-w4a8
  masquant quantize digits --rtn w8a8 -o ./digits-w8a8
  masquant quantize ./large samples.jsonl --sequential -o ./large-w4a8

then, in Python:
  import torchao_masquant
  model = AutoModelForImageTextToText.from_pretrained("./Qwen2.5-VL-3B-w4a8")
"""


def _size(text: str) -> str:
    if re.fullmatch(r"[0-9]*\.?[0-9]+ *[KMGT]B", text.strip(), re.I) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2GB or 500MB.")
    return text.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the quantization."""
    add_model_and_data(parser, _EXAMPLES, optional_data=True)
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="PATH",
        help="what calibrate wrote for this model, in place of DATA",
    )
    parser.add_argument(
        "--rtn",
        type=str.lower,
        choices=list(SCHEMES),
        metavar="SCHEME",
        help="round to nearest in this scheme, the only method without data: one of "
        f"{', '.join(SCHEMES)}",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="to write, whole or not at all",
    )
    add_output_options(parser)
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="of one file, such as 2GB; transformers' default where it is not given",
    )
    add_patterns(parser)
    add_calibration_options(parser)
    add_sequential_options(parser)
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Quantize and save.

    Returns:
        Exit code.
    """
    _check_usage(arguments)
    options = {} if arguments.data is None else calibration_options(arguments)
    check_folder(
        arguments.output,
        # A finished one is known again by --sequential, which is then done at once.
        overwrite=arguments.overwrite or arguments.sequential,
        sources=read_paths(
            model_folder(arguments.model), arguments.data, arguments.recipe
        ),
    )
    resolve_device(arguments.device)
    if arguments.data is None:
        _quantize_while_loading(arguments)
    else:
        _calibrate_and_quantize(arguments, options)
    if not is_first_process():
        return 0
    from torchao_masquant.cli.description import describe_checkpoint

    found = describe_checkpoint(arguments.output)
    if arguments.json:
        print(
            json.dumps({"folder": str(arguments.output), **found.summary()}, indent=2)
        )
    else:
        print(f"Wrote {arguments.output}: {found.headline()}")
    return 0


def _check_usage(arguments: argparse.Namespace) -> None:
    """Raise where options do not go together.

    Raises:
        UsageError: names them.
    """
    ways = {
        "DATA": arguments.data,
        "--recipe": arguments.recipe,
        "--rtn": arguments.rtn,
    }
    given = [name for name, value in ways.items() if value is not None]
    if not given:
        raise UsageError(
            "give DATA to calibrate with, --recipe PATH of an earlier calibration, or "
            "--rtn SCHEME for round-to-nearest, which needs neither."
        )
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other: give one.")
    if arguments.data is None:
        strays = given_options(arguments)
        if arguments.sequential:
            strays.append("--sequential")
        if arguments.rtn is not None:
            strays = [name for name in strays if name not in _WITHOUT_DATA]
        if strays:
            raise UsageError(f"{strays[0]} goes with DATA, not with {given[0]}.")
    if arguments.sequential and arguments.max_shard_size is not None:
        raise UsageError(
            "--sequential writes a file a block: leave --max-shard-size out."
        )
    check_sequential_usage(arguments)


def _quantize_while_loading(arguments: argparse.Namespace) -> None:
    from torchao_masquant.config import MASQuantConfig, masquant_config
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig

    patterns = {"include": arguments.include, "exclude": arguments.exclude}
    if arguments.recipe is not None:
        quantization = masquant_config(arguments.recipe, **patterns)
    else:
        quantization = MASQuantConfig(
            step="convert",
            scheme=arguments.rtn,
            method="rtn",
            head_bits=arguments.head_bits,
            towers=arguments.towers,
            **patterns,
        )
    config = load_config(arguments.model, arguments.trust_remote_code)
    check_dense(arguments.model, config)
    check_quantization(config, arguments, quantization)
    model = load_model(
        arguments.model,
        config,
        arguments,
        quantization_config=MASQuantHfConfig(config=quantization),
    )
    _save(model, arguments)


def _calibrate_and_quantize(
    arguments: argparse.Namespace, options: dict[str, Any]
) -> None:
    config, samples = read_inputs(arguments, options)
    if arguments.sequential:
        calibrate_from_disk(
            arguments, config, samples, options, quantized=arguments.output
        )
        return
    from torchao_masquant.quantize import apply_recipe

    model = load_model(arguments.model, config, arguments)
    recipe = calibrate_model(model, arguments, samples, options)
    apply_recipe(model, recipe)
    _save(model, arguments)


def _save(model: Any, arguments: argparse.Namespace) -> None:
    from torchao_masquant.integrations.save import save_quantized

    options: dict[str, Any] = {}
    if arguments.max_shard_size is not None:
        options["max_shard_size"] = arguments.max_shard_size
    # Where the files lie that go along with the weights.
    beside = folder_of(model_folder(arguments.model))
    save_quantized(model, arguments.output, beside=beside, **options)
