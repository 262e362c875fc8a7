# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Graphs, breaks and recompilations of a quantized model under ``torch.compile``.

    python benchmarks/compile_counts.py [--scheme w4a8] [--json PATH]

Counts, for the dense and the quantized model side by side, what Dynamo makes of

- the language model's decoder layers, compiled one by one (``layer.compile``), and
- the language model as a whole (``fullgraph=True``),

over prompts of ten lengths, text alone and mixed with an image and a sound, and over
a ``generate()`` of 64 tokens with a static cache. Graphs are captured, not lowered: the
counts do not depend on a backend. What compiling takes, with caches and without, is
measured by ``cpu_model.py``.
"""

import argparse
import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.utils import (
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
)
from torchao.quantization import quantize_

from torchao_masquant import SCHEMES, calibrate, masquant_config
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.testing import digits

_LENGTHS = 10
_NEW_TOKENS = 64


@dataclass
class Counts:
    """What Dynamo did.

    Attributes:
        model: "dense" or the scheme.
        compiled: "layers" or "language model".
        calls: what ran.
        graphs: captured, recompiled ones among them.
        breaks: graph breaks.
        recompiles: graphs that were made because no earlier one fitted the call; of
            layers compiled one by one, the other layers' are among them.
    """

    model: str
    compiled: str
    calls: str
    graphs: int
    breaks: int
    recompiles: int


def _mixed_lengths() -> list[dict[str, torch.Tensor]]:
    """Prompts with an image, a sound or both, no two of one length."""
    both = digits.prompt("both")
    shapes = [digits.prompt("image"), digits.prompt("audio"), both]
    # Longer prompts: words after the sum's.
    for extra in range(3, 3 * (_LENGTHS - len(shapes) + 1), 3):
        longer = dict(both)
        for name in ("input_ids", "attention_mask"):
            tail = both[name][:, -1:].expand(-1, extra)
            longer[name] = torch.cat((both[name], tail), dim=1)
        shapes.append(longer)
    return shapes


def _text_lengths() -> list[dict[str, torch.Tensor]]:
    text = digits.prompt("text")
    return [
        {name: value.repeat(1, times) for name, value in text.items()}
        for times in range(1, _LENGTHS + 1)
    ]


def _run_all(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> None:
    for sample in inputs:
        model(**sample, use_cache=False)


def _generate(model: nn.Module) -> None:
    model.generate(
        **digits.prompt("both"),
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        cache_implementation="static",
    )


def _compile_layers(model: nn.Module) -> None:
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager", fullgraph=True, dynamic=True)


def _compile_language_model(model: nn.Module) -> None:
    model.get_decoder().compile(backend="eager", fullgraph=True, dynamic=True)


CALLS: dict[str, Callable[[nn.Module], None]] = {
    "ten lengths, text": lambda model: _run_all(model, _text_lengths()),
    "ten lengths, image and sound": lambda model: _run_all(model, _mixed_lengths()),
    "ten lengths, both kinds": lambda model: _run_all(
        model, _text_lengths() + _mixed_lengths()
    ),
    f"generate {_NEW_TOKENS} tokens, static cache": _generate,
}
COMPILED: dict[str, Callable[[nn.Module], None]] = {
    "layers": _compile_layers,
    "language model": _compile_language_model,
}


def count(model: nn.Module, name: str) -> list[Counts]:
    """Count graphs and breaks of one model.

    Args:
        model: stays as it is.
        name: of the model, for the table.
    """
    rows = []
    for compiled, compile_ in COMPILED.items():
        for calls, run in CALLS.items():
            torch._dynamo.reset()
            counters.clear()
            clear_compilation_metrics()
            fresh = copy.deepcopy(model)
            compile_(fresh)
            run(fresh)
            stats = counters["stats"]
            rows.append(
                Counts(
                    name,
                    compiled,
                    calls,
                    graphs=stats["unique_graphs"],
                    breaks=sum(counters["graph_break"].values()),
                    recompiles=sum(
                        metrics.recompile_reason is not None
                        for metrics in get_compilation_metrics()
                    ),
                )
            )
    return rows


@torch.no_grad()
def main(arguments: Optional[list[str]] = None) -> list[Counts]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=SCHEMES, default="w4a8")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args(arguments)

    model = digits.load_model("outliers")
    quantized = copy.deepcopy(model)
    # Nothing is chosen or searched: the counts do not depend on it.
    recipe = calibrate(
        model,
        digits.calibration_samples(16),
        scheme=options.scheme,
        alpha=0.5,
        separation=1.0,
        rounding="nearest",
        clip=False,
    )
    quantize_(quantized, masquant_config(recipe))
    rows = count(model, "dense") + count(quantized, options.scheme)

    table = Table(box=box.SIMPLE_HEAD)
    for field in dataclasses.fields(Counts):
        table.add_column(field.name)
    for row in rows:
        table.add_row(*(str(value) for value in dataclasses.astuple(row)))
    Console().print(table)
    if options.json is not None:
        report = [dataclasses.asdict(row) for row in rows]
        write_whole(options.json, json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
