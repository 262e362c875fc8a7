# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``bench``: a quantized model against the original, on this machine."""

import argparse
import json
from typing import Any

from torchao_masquant.cli.calibration_options import whole
from torchao_masquant.cli.models import (
    MODEL_HELP,
    add_model_options,
    load_config,
    load_model,
    resolve_device,
)

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
Both decoders are compiled and called in turns, one call of each, on random embeddings
of text tokens (base), or of half text and half another modality (mixed); medians count.
Towers and lm_head, which are not quantized, are left out, so a whole model gains less.
Trust the ratio before the times: those depend on what else the machine does.

examples:
  masquant bench ./Qwen2.5-VL-3B ./Qwen2.5-VL-3B-w4a8 --dtype bfloat16
  masquant bench digits ./digits-w8a8 --tokens 64 --rounds 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.epilog = _EXAMPLES
    parser.add_argument("dense", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("quantized", metavar="QUANTIZED", help="what quantize wrote")
    parser.add_argument(
        "--tokens",
        type=whole(2),
        default=256,
        help="of the prompt, and in the cache of a decode step (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=20,
        help="calls of each that are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--eager", action="store_true", help="do not compile: nothing to wait for"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_model_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Time both.

    Returns:
        Exit code.
    """
    import torch

    from torchao_masquant.cli.timing import compare_decoders
    from torchao_masquant.evaluation.evaluate import check_reference
    from torchao_masquant.evaluation.weights import quantized_linears

    device = resolve_device(arguments.device)
    names = arguments.dense, arguments.quantized
    configs = [load_config(name, arguments.trust_remote_code) for name in names]
    kinds = [config.model_type for config in configs]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{names[0]!r} is a {kinds[0]!r} model and {names[1]!r} a {kinds[1]!r} one: "
            "give a model, and the same model quantized."
        )
    models = []
    for name, config, wanted in zip(names, configs, (False, True)):
        model = load_model(name, config, arguments)
        if bool(quantized_linears(model)) != wanted:
            raise ValueError(
                f"{name!r} is {'not ' if wanted else ''}quantized: "
                "give the original model first, then the quantized one."
            )
        models.append(model)
    check_reference(models[1], models[0])
    rows = compare_decoders(
        *models,
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        compiled=not arguments.eager,
    )
    setting = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(models[0].dtype).removeprefix("torch."),
        "compiled": not arguments.eager,
        "rounds": arguments.rounds,
    }
    if arguments.json:
        print(
            json.dumps({**setting, "rows": [_as_json(row) for row in rows]}, indent=2)
        )
    else:
        print(_text(rows, setting))
    return 0


def _as_json(row: Any) -> dict[str, Any]:
    return {**vars(row), "ratio": row.ratio}


def _text(rows: Any, setting: dict[str, Any]) -> str:
    from torchao_masquant.evaluation.tables import new_table, to_text

    table = new_table(
        "Decoder, " + ", ".join(f"{k} {v}" for k, v in setting.items()),
        ["call"],
        ["tokens", "original\nms", "quantized\nms", "times as fast"],
    )
    for row in rows:
        table.add_row(
            row.call,
            str(row.tokens),
            _milliseconds(row.dense_ms),
            _milliseconds(row.quantized_ms),
            f"{row.ratio:.2f}",
        )
    return to_text(table)


def _milliseconds(value: float) -> str:
    """So many digits that their ratio is the one beside them."""
    return f"{value:.1f}" if value >= 100 else f"{value:.4g}"
