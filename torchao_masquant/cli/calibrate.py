# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``calibrate``: a model and data to a recipe."""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchao_masquant.cli.models import (
    MODEL_HELP,
    add_model_options,
    auto_class,
    load_config,
    load_model,
)
from torchao_masquant.cli.samples import (
    DATA_FORMS,
    add_data_argument,
    calibration_samples,
)
from torchao_masquant.cli.sequential import (
    add_sequential_options,
    calibrate_from_disk,
    is_first_process,
    processes,
    stray_option,
)
from torchao_masquant.recipe import Recipe
from torchao_masquant.schemes import SCHEMES
from torchao_masquant.solver.methods import AUTO, METHODS

__all__ = ["add_arguments", "calibrate_model", "main"]

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

_MEASURE = "measure"


def _number(text: str) -> "int | float":
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number.") from None


def _number_or_auto(text: str) -> "int | float | str":
    return AUTO if text == AUTO else _number(text)


def _modality_weights(text: str) -> "str | dict[str, float]":
    if text == _MEASURE:
        return _MEASURE
    try:
        pairs = [entry.split("=") for entry in text.split(",")]
        return {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {_MEASURE!r} nor such as 'vision=0.2,audio=0.5'."
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the calibration."""
    parser.epilog = f"{DATA_FORMS}\n{_EXAMPLES}"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_data_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="RECIPE",
        help="the .safetensors file to write; needed unless --quantized is given",
    )
    parser.add_argument(
        "--scheme",
        type=str.lower,
        choices=list(SCHEMES),
        default="w4a8",
        help="bits of weights and activations (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default="masquant",
        help="masquant; masquant-paper, as published; smoothquant, one factor for all "
        "tokens; rtn, round-to-nearest (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_number_or_auto,
        default=0.05,
        help="of each modality's low-rank pair: a share of min(N, K) such as 0.05, a "
        "whole number, 0 for none, or auto (default: %(default)s)",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="names of the linears to quantize, '*.mlp.*' or 're:...', in place of all "
        "of the decoder; may be given again",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="names to leave out; may be given again",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON"
    )
    _add_tuning(parser)
    add_sequential_options(parser)
    add_model_options(parser)
    parser.set_defaults(refuse=parser.error)


def _add_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tuning the method")
    group.add_argument(
        "--alpha",
        type=_number_or_auto,
        help="exponent of the activations in the smoothing factor, 0..1, or auto, which "
        "judges three on sampled tokens; masquant: auto, others: 0.5",
    )
    group.add_argument(
        "--separation",
        type=_number_or_auto,
        help="how far a modality's factor goes from that of all tokens, 0..1, or auto, "
        "as above; masquant: auto, others: 1",
    )
    group.add_argument(
        "--group-size",
        type=int,
        help="weights that share a scale, in place of the scheme's",
    )
    for name, purpose in (
        ("shift", "each modality's mean is taken off before rounding"),
        ("clip", "the part of the weight's range that scales are made for is searched"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"{purpose}; as the method does where it is not given",
        )
    group.add_argument(
        "--rounding",
        choices=("gptq", "nearest"),
        help="of the shared weight; as the method does where it is not given",
    )
    group.add_argument(
        "--low-rank-bits", type=int, choices=(8, 16), default=16, help="of the pairs"
    )
    group.add_argument(
        "--modality-weights",
        type=_modality_weights,
        metavar="WEIGHTS",
        help="what an error in each modality weighs, 'vision=0.2,audio=0.5', or "
        "'measure' to find it on the data",
    )
    group.add_argument(
        "--modalities",
        type=lambda text: tuple(text.split(",")),
        metavar="NAMES",
        help="that the model will meet, 'text,vision', where it is not all it could",
    )
    group.add_argument(
        "--base-modality",
        default="text",
        help="the one that costs nothing extra at run time (default: %(default)s)",
    )
    group.add_argument(
        "--epochs", type=int, default=0, help="of learning after the closed form"
    )
    group.add_argument(
        "--lr",
        type=float,
        help="learning rate (default: 3e-4, and 0.05 for masquant-paper)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="SAMPLES",
        help="of one step of learning; with several processes, as many or a multiple "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-statistics-bytes",
        type=int,
        default=4 << 30,
        metavar="BYTES",
        help="of covariances; the data runs several times where they do not fit "
        "(default: %(default)s)",
    )


_OPTIONS = (
    "scheme",
    "method",
    "rank",
    "include",
    "exclude",
    "alpha",
    "separation",
    "group_size",
    "shift",
    "rounding",
    "clip",
    "low_rank_bits",
    "modality_weights",
    "modalities",
    "base_modality",
    "epochs",
    "lr",
    "batch_size",
    "max_statistics_bytes",
)


def main(arguments: argparse.Namespace) -> int:
    """Calibrate.

    Returns:
        Exit code.
    """
    from torchao_masquant.calibration.request import check_config

    start = time.perf_counter()
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    _check_usage(arguments)
    if arguments.output is not None:
        _check_output(arguments.output)
    # What is wrong with the data is told before minutes go into the model.
    config = load_config(arguments.model, arguments.trust_remote_code)
    check_config(
        config,
        auto_class(config),
        options | {"modality_weights": None}
        if options["modality_weights"] == _MEASURE
        else options,
        trust_remote_code=arguments.trust_remote_code,
    )
    samples = calibration_samples(arguments, config)
    if arguments.sequential:
        found = calibrate_from_disk(arguments, config, samples, options)
        if is_first_process():
            seconds = time.perf_counter() - start
            _tell(arguments, found, len(samples), seconds)
        return 0
    recipe = calibrate_model(arguments, config, samples, options)
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


def calibrate_model(
    arguments: argparse.Namespace,
    config: Any,
    samples: Sequence[Mapping[str, Any]],
    options: dict[str, Any],
) -> Recipe:
    """The command's core: a model that is not loaded yet, and samples, to a recipe.

    Args:
        arguments: with ``model``, ``dtype``, ``device`` and ``trust_remote_code``.
        config: of the model.
        samples: keyword inputs of the model, on the CPU.
        options: of :func:`torchao_masquant.calibrate`; its ``modality_weights`` may be
            "measure".
    """
    from torchao_masquant.calibration import calibrate, modality_sensitivity
    from torchao_masquant.data import PlacedSamples

    model = load_model(arguments.model, config, arguments)
    placed = PlacedSamples(samples, model)
    if options["modality_weights"] == _MEASURE:
        patterns = {name: options[name] for name in ("include", "exclude")}
        options = {
            **options,
            "modality_weights": modality_sensitivity(model, placed, **patterns),
        }
    return calibrate(model, placed, **options)


def _check_usage(arguments: argparse.Namespace) -> None:
    """End with the usage where options do not go together."""
    stray = stray_option(arguments)
    if not arguments.sequential and stray is not None:
        arguments.refuse(f"{stray} goes with --sequential")
    if not arguments.sequential and processes() > 1:
        arguments.refuse(
            "several processes share a calibration with --sequential alone"
        )
    if arguments.output is None and arguments.quantized is None:
        more = " or --quantized" if arguments.sequential else ""
        arguments.refuse(f"the following arguments are required: -o/--output{more}")


def _check_output(path: Path) -> None:
    """Raise where the recipe could not be written: now, and not after an hour."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write {str(path)!r}: there is no folder {str(folder)!r}."
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"cannot write {str(path)!r}: it is a folder; give the name of a file."
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"cannot write {str(path)!r}: the folder {str(folder)!r} is read-only."
        )


def _as_json(
    arguments: argparse.Namespace, recipe: Recipe, samples: int, seconds: float
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
