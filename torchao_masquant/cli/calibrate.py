# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``calibrate``: a model and data to a recipe."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchao_masquant.cli.calibration_options import (
    add_calibration_options,
    add_patterns,
    calibration_options,
)
from torchao_masquant.cli.ending import UsageError
from torchao_masquant.cli.fit import check_calibration
from torchao_masquant.cli.models import (
    add_model_options,
    load_config,
    load_model,
    model_folder,
    read_paths,
    resolve_device,
)
from torchao_masquant.cli.parser import add_output_options
from torchao_masquant.cli.samples import (
    add_model_and_data,
    calibration_samples,
    described,
)
from torchao_masquant.cli.sequential import (
    add_sequential_options,
    calibrate_from_disk,
    check_sequential_usage,
    is_first_process,
)
from torchao_masquant.option_values import MEASURE
from torchao_masquant.outputs import check_file, check_folder

if TYPE_CHECKING:
    from torchao_masquant.recipe import Recipe

__all__ = ["add_arguments", "calibrate_model", "main", "read_inputs"]

_EXAMPLES = """\
examples:
  masquant calibrate ./Qwen2.5-VL-3B samples.jsonl -o recipe.safetensors
  masquant calibrate ./model pictures/ -o recipe.safetensors --scheme w4a4 --rank 0.1
  masquant calibrate digits digits -o recipe.safetensors --max-samples 32
  masquant calibrate ./large samples.jsonl --sequential --quantized ./large-w4a8
  torchrun --nproc-per-node 2 -m torchao_masquant calibrate ./large samples.jsonl \\
      --sequential --quantized ./large-w4a8

then:
  masquant quantize MODEL --recipe recipe.safetensors -o OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the calibration."""
    add_model_and_data(parser, _EXAMPLES)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="RECIPE",
        help="the .safetensors file to write; needed unless --quantized is given",
    )
    add_output_options(parser)
    add_patterns(parser)
    add_calibration_options(parser)
    group = add_sequential_options(parser)
    group.add_argument(
        "--quantized",
        type=Path,
        metavar="FOLDER",
        help="write the quantized model, too, or in place of the recipe",
    )
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Calibrate.

    Returns:
        Exit code.
    """
    start = time.perf_counter()
    check_sequential_usage(arguments)
    if arguments.output is None and arguments.quantized is None:
        more = " or --quantized" if arguments.sequential else ""
        raise UsageError(f"the following arguments are required: -o/--output{more}.")
    options = calibration_options(arguments)
    _check_outputs(arguments)
    config, samples = read_inputs(arguments, options)
    if arguments.sequential:
        found = calibrate_from_disk(
            arguments,
            config,
            samples,
            options,
            recipe=arguments.output,
            quantized=arguments.quantized,
        )
        if is_first_process():
            seconds = time.perf_counter() - start
            _tell(arguments, found, len(samples), seconds)
        return 0
    model = load_model(arguments.model, config, arguments)
    recipe = calibrate_model(model, arguments, samples, options)
    recipe.save(arguments.output)
    seconds = time.perf_counter() - start
    if arguments.json:
        print(json.dumps(_as_json(arguments, recipe, len(samples), seconds), indent=2))
    else:
        print(
            f"Wrote {arguments.output}: {recipe.scheme}, {recipe.options.method}, "
            f"{len(recipe.layers)} linears, {', '.join(recipe.modalities)}, "
            f"{recipe.nbytes / 2**20:.1f} MiB, from {len(samples)} samples in "
            f"{seconds:.0f} s."
        )
    return 0


def read_inputs(
    arguments: argparse.Namespace, options: dict[str, Any]
) -> tuple[Any, Sequence[Mapping[str, Any]]]:
    """The model's config, and the samples; what is wrong with them, or with the options
    for this model, is told before minutes go into the model.

    Args:
        arguments: of a command that calibrates.
        options: from :func:`calibration_options`.
    """
    resolve_device(arguments.device)
    config = load_config(arguments.model, arguments.trust_remote_code)
    check_calibration(config, arguments, options)
    return config, calibration_samples(arguments, config)


def calibrate_model(
    model: Any,
    arguments: argparse.Namespace,
    samples: Sequence[Mapping[str, Any]],
    options: dict[str, Any],
) -> "Recipe":
    """The core of the command.

    Args:
        model: that is loaded.
        arguments: with ``model`` and ``data``, its name and that of the samples.
        samples: keyword inputs of the model, on the CPU.
        options: of :func:`torchao_masquant.calibrate`; its ``modality_weights`` may be
            "measure".
    """
    from torchao_masquant.calibrate_in_memory import calibrate
    from torchao_masquant.calibration.sensitivity import modality_sensitivity
    from torchao_masquant.data import PlacedSamples

    placed = PlacedSamples(samples, model)
    if options["modality_weights"] == MEASURE:
        patterns = {name: options[name] for name in ("include", "exclude")}
        options = {
            **options,
            "modality_weights": modality_sensitivity(model, placed, **patterns),
        }
    recipe = calibrate(model, placed, **options)
    recipe.description |= described(arguments)
    return recipe


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raise where results could not be written: now, and not after an hour."""
    sources = read_paths(model_folder(arguments.model), arguments.data)
    # A finished one is known again by --sequential, which is then done at once.
    overwrite = arguments.overwrite or arguments.sequential
    if arguments.output is not None:
        check_file(arguments.output, "recipe", overwrite=overwrite, sources=sources)
    if arguments.quantized is not None:
        check_folder(arguments.quantized, overwrite=overwrite, sources=sources)


def _as_json(
    arguments: argparse.Namespace, recipe: "Recipe", samples: int, seconds: float
) -> dict[str, Any]:
    return {
        "recipe": str(arguments.output),
        "scheme": recipe.scheme,
        "method": recipe.options.method,
        "modalities": list(recipe.modalities),
        "linears": len(recipe.layers),
        "bytes": recipe.nbytes,
        "samples": samples,
        "seconds": round(seconds, 1),
    }


def _tell(
    arguments: argparse.Namespace, found: Any, samples: int, seconds: float
) -> None:
    """Print what a sequential calibration wrote."""
    sizes = {
        str(path): _bytes(path)
        for path in (arguments.output, arguments.quantized)
        if path is not None
    }
    if arguments.json:
        entry = {
            "recipe": None if arguments.output is None else str(arguments.output),
            "quantized": None
            if arguments.quantized is None
            else str(arguments.quantized),
            "scheme": arguments.scheme,
            "method": arguments.method,
            "bytes": sum(sizes.values()),
            "blocks": found.blocks,
            "resumed": found.resumed,
            "samples": samples,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(entry, indent=2))
        return
    wrote = " and ".join(f"{p} ({n / 2**20:.1f} MiB)" for p, n in sizes.items())
    again = f" ({found.resumed} finished before)" if found.resumed else ""
    print(
        f"Wrote {wrote}: {arguments.scheme}, {arguments.method}, {found.blocks} blocks"
        f"{again}, from {samples} samples in {seconds:.0f} s."
    )


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)
