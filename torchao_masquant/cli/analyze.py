# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``analyze``: how a model's modalities differ, before it is quantized."""

import argparse
import json
from pathlib import Path

from torchao_masquant.cli.calibration_options import add_option, add_patterns, number
from torchao_masquant.cli.fit import check_analysis
from torchao_masquant.cli.models import (
    add_model_options,
    load_config,
    load_model,
    model_folder,
    read_paths,
    resolve_device,
)
from torchao_masquant.cli.parser import add_output_options
from torchao_masquant.cli.samples import add_model_and_data, calibration_samples
from torchao_masquant.outputs import check_file

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
examples:
  masquant analyze ./Qwen2.5-VL-3B samples.jsonl --max-samples 16
  masquant analyze digits digits -o analysis.json
  masquant report analysis.json -o report.html
"""


def _share(text: str) -> float:
    value = float(number(text))
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in 0..1.")
    return value


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_share(part) for part in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the analysis."""
    add_model_and_data(parser, _EXAMPLES)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="also write analysis.json here, as 'masquant report' reads it",
    )
    add_output_options(parser)
    add_option(parser, "scheme", "whose bits to analyze for")
    parser.add_argument(
        "--alpha",
        type=_share,
        default=0.5,
        help="exponent of the activations in the smoothing factors, 0..1 (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--ranks",
        type=_shares,
        default=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
        metavar="SHARES",
        help="of the low-rank pairs, shares of min(N, K), such as 0,0.05,0.1",
    )
    add_option(
        parser,
        "modalities",
        "base first, 'text,vision', where it is not all that the model could meet",
    )
    add_option(parser, "max_statistics_bytes")
    add_patterns(parser)
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Analyze.

    Returns:
        Exit code.
    """
    if arguments.output is not None:
        check_file(
            arguments.output,
            "analysis",
            overwrite=arguments.overwrite,
            sources=read_paths(model_folder(arguments.model), arguments.data),
        )
    from torchao_masquant.data import PlacedSamples
    from torchao_masquant.evaluation import analyze

    options = {
        name: getattr(arguments, name)
        for name in (
            "scheme",
            "alpha",
            "ranks",
            "modalities",
            "include",
            "exclude",
            "max_statistics_bytes",
        )
    }
    resolve_device(arguments.device)
    config = load_config(arguments.model, arguments.trust_remote_code)
    check_analysis(config, arguments)
    samples = calibration_samples(arguments, config)
    model = load_model(arguments.model, config, arguments)
    analysis = analyze(model, PlacedSamples(samples, model), **options)
    # Before it is written, which may fail.
    print(json.dumps(analysis.to_json(), indent=2) if arguments.json else analysis)
    if arguments.output is not None:
        analysis.save(arguments.output)
    return 0
