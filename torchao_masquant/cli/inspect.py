# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The command ``inspect``: what is in a quantized checkpoint, or in a recipe."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchao_masquant.cli.description import Description, LinearLine

__all__ = ["add_arguments", "main"]

_EXAMPLES = """\
Only headers are read, so it takes no time and no memory. Sizes are compared with what
config.json says: a checkpoint that is cut off or mixed up is told.

examples:
  masquant inspect ./Qwen2.5-VL-3B-w4a8
  masquant inspect recipe.safetensors --layers
  masquant inspect ./Qwen2.5-VL-3B-w4a8 --json | jq .quantized_bytes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the inspection."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "path",
        type=Path,
        metavar="FOLDER|RECIPE",
        help="the folder of a quantized model, or a recipe",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="a row for each linear, in place of one for all those alike",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Inspect.

    Returns:
        Exit code.
    """
    from torchao_masquant.cli.description import describe

    found = describe(arguments.path)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    print(_text(found, arguments.layers))
    return 0


def _text(found: "Description", layers: bool) -> str:
    from torchao_masquant.cli.description import pattern_of
    from torchao_masquant.evaluation.tables import new_table, short_names, to_text

    names = [x.name if layers else pattern_of(x.name) for x in found.linears]
    path, short = short_names(names)
    where = f", under {path}" if path else ""
    table = new_table(
        f"{found.path}: a {found.kind}, format {found.format_version}{where}",
        ["linears"],
        [
            "",
            "shape",
            "scheme",
            "group",
            "modalities",
            "ranks",
            "KiB",
            "% of\nbfloat16",
        ],
    )
    rows: "dict[Any, list[LinearLine]]" = {}
    for name, line in zip(short, found.linears):
        scheme = line.scheme
        if line.hadamard_size is not None:
            scheme += f", rotated by {line.hadamard_size}"
        key = name, line.shape, scheme, line.group_size, line.modalities
        rows.setdefault(key, []).append(line)
    for (name, shape, scheme, group_size, modalities), lines in rows.items():
        size = sum(line.nbytes for line in lines)
        dense = sum(2 * math.prod(line.shape) for line in lines)
        table.add_row(
            name,
            "" if layers else f"{len(lines)} x",
            " x ".join(map(str, shape)),
            scheme,
            "" if group_size is None else str(group_size),
            " ".join(modalities),
            _ranks(lines),
            f"{size / 1024:.1f}",
            f"{100 * size / dense:.1f}",
        )
    lines_of_text = [to_text(table), found.headline()]
    if found.description:
        lines_of_text.append(_made_from(found.description))
    if found.versions:
        versions = ", ".join(f"{k} {v}" for k, v in found.versions.items())
        lines_of_text.append(f"Made with {versions}.")
    return "\n".join(lines_of_text)


def _made_from(about: "Mapping[str, Any]") -> str:
    """What it was calibrated with, as far as that is known."""
    parts = []
    if "model" in about:
        parts.append(f"for {about['model']}")
    if "data" in about:
        parts.append(f"with {about['data']}")
    if "samples" in about:
        tokens = about.get("tokens")
        counts = tokens.items() if isinstance(tokens, dict) else ()
        of = ", ".join(f"{count} {modality}" for modality, count in counts)
        parts.append(f"{about['samples']} samples{f' ({of} tokens)' if of else ''}")
    text = f"Calibrated {', '.join(parts)}."
    # A file may be anybody's.
    return "".join(c for c in text if c.isprintable())


def _ranks(lines: "Sequence[LinearLine]") -> str:
    """The ranks of each modality's pairs: one number, or the least and the most."""
    cells = []
    for modality in dict.fromkeys(m for line in lines for m in line.ranks):
        ranks = [line.ranks.get(modality, 0) for line in lines]
        least, most = min(ranks), max(ranks)
        cells.append(str(least) if least == most else f"{least}-{most}")
    return " / ".join(cells)
