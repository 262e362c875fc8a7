# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``eval``: scores of a model on data."""

import argparse
import json
from pathlib import Path

from torchao_masquant.cli.ending import UsageError
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
    described,
    evaluation_tasks,
)
from torchao_masquant.outputs import check_file, kind_of

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
What is scored is all that the assistant says; where it says nothing, all of the text. A
line's "task" names the task that it counts for.

examples:
  masquant eval ./Qwen2.5-VL-3B-w4a8 held-out.jsonl --reference ./Qwen2.5-VL-3B
  masquant eval ./digits-w8a8 digits --reference digits --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the evaluation."""
    add_model_and_data(parser, _EXAMPLES)
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the model before it was quantized: adds the divergence of the logits and "
        "each linear's signal-to-noise ratio; both are held in memory",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="also write evaluation.json here, as 'masquant report' reads it",
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help="also put the scores into the README.md of MODEL, which quantize wrote",
    )
    add_output_options(parser)
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Evaluate.

    Returns:
        Exit code.
    """
    models = [
        model_folder(name)
        for name in (arguments.model, arguments.reference)
        if name is not None
    ]
    if arguments.output is not None:
        check_file(
            arguments.output,
            "evaluation",
            overwrite=arguments.overwrite,
            sources=read_paths(*models, arguments.data),
        )
    if arguments.card and kind_of(models[0]) != "model":
        raise UsageError("--card is for the folder of a quantized model.")
    from torchao_masquant.data import PlacedSamples
    from torchao_masquant.evaluation import evaluate
    from torchao_masquant.integrations.model_card import add_scores

    resolve_device(arguments.device)
    config = load_config(arguments.model, arguments.trust_remote_code)
    tasks = evaluation_tasks(arguments, config)
    other = None
    if arguments.reference is not None:
        other = load_config(arguments.reference, arguments.trust_remote_code)
    model = load_model(arguments.model, config, arguments)
    reference = None
    if arguments.reference is not None:
        reference = load_model(arguments.reference, other, arguments)
    evaluation = evaluate(
        model,
        {name: PlacedSamples(samples, model) for name, samples in tasks.items()},
        reference,
    )
    # Before they are written, which may fail.
    print(json.dumps(evaluation.to_json(), indent=2) if arguments.json else evaluation)
    if arguments.output is not None:
        evaluation.save(arguments.output)
    if arguments.card:
        scores = f"On {described(arguments)['data']}:\n\n{evaluation}"
        add_scores(Path(arguments.model), scores)
    return 0
