# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``quantize``: a model and a recipe to a folder of integers."""

import argparse
import json
from pathlib import Path
from typing import Any

from torchao_masquant.cli.models import (
    MODEL_HELP,
    add_model_options,
    load_config,
    load_model,
    model_folder,
)
from torchao_masquant.schemes import SCHEMES

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
Each weight is quantized as it is read: the model's full precision is never held as a
whole. What else lies in the model's folder, its tokenizer and processor, comes along.

examples:
  masquant quantize ./Qwen2.5-VL-3B --recipe recipe.safetensors -o ./Qwen2.5-VL-3B-w4a8
  masquant quantize digits --rtn w8a8 -o ./digits-w8a8

then, in Python:
  import torchao_masquant
  model = AutoModelForImageTextToText.from_pretrained("./Qwen2.5-VL-3B-w4a8")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the quantization."""
    parser.epilog = _EXAMPLES
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--recipe",
        type=Path,
        metavar="PATH",
        help="what calibrate wrote for this model",
    )
    how.add_argument(
        "--rtn",
        type=str.lower,
        choices=list(SCHEMES),
        metavar="SCHEME",
        help="round to nearest in this scheme, the only method without a recipe: one "
        f"of {', '.join(SCHEMES)}",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="to write; a checkpoint that is there is replaced whole, or not at all",
    )
    for option in ("include", "exclude"):
        parser.add_argument(
            f"--{option}",
            action="append",
            metavar="PATTERN",
            help=f"names of linears to {option}; may be given again",
        )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of one file, such as 2GB; transformers' default where it is not given",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON"
    )
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Quantize and save.

    Returns:
        Exit code.
    """
    from torchao_masquant.cli.description import describe_checkpoint
    from torchao_masquant.config import MASQuantConfig, masquant_config
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.save import save_quantized

    patterns = {"include": arguments.include, "exclude": arguments.exclude}
    if arguments.recipe is not None:
        quantization = masquant_config(arguments.recipe, **patterns)
    else:
        quantization = MASQuantConfig(
            step="convert", scheme=arguments.rtn, method="rtn", **patterns
        )
    config = load_config(arguments.model, arguments.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{arguments.model!r} is quantized already: give the original model."
        )
    model = load_model(
        arguments.model,
        config,
        arguments,
        quantization_config=MASQuantHfConfig(config=quantization),
    )
    options: dict[str, Any] = {}
    if arguments.max_shard_size is not None:
        options["max_shard_size"] = arguments.max_shard_size
    save_quantized(
        model, arguments.output, beside=_folder_of(arguments.model), **options
    )
    found = describe_checkpoint(arguments.output)
    if arguments.json:
        print(
            json.dumps({"folder": str(arguments.output), **found.summary()}, indent=2)
        )
    else:
        print(f"Wrote {arguments.output}: {found.headline()}")
    return 0


def _folder_of(model: str) -> Path:
    """Where the files lie that go along with the weights."""
    folder = model_folder(model)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    from torchao_masquant.integrations.other_files import NOT_NEEDED

    return Path(snapshot_download(folder, ignore_patterns=list(NOT_NEEDED)))
