# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Time and memory of a calibration, for a decoder of Qwen2.5-VL-3B's width.

    python benchmarks/calibration_cost.py [--layers 1] [--tokens 4096] [--json PATH]

The decoder is transformers' own, with random weights; its samples are random embeddings,
half of them vision. Every layer costs the same, so that the whole model's cost can be
read off: observing is proportional to tokens and layers, solving to layers.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from torchao_masquant.atomic_files import write_whole
from torchao_masquant.calibration.session import CalibrationSession
from torchao_masquant.conductor.conductor import solve
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import library_versions
from torchao_masquant.routing import Router
from torchao_masquant.samples import run_samples
from torchao_masquant.selection import select_linears

_SAMPLE = 512
_GIB = 2**30


def _model(arguments: argparse.Namespace) -> Qwen2_5_VLTextModel:
    config = Qwen2_5_VLTextConfig(
        vocab_size=128,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 896),
    )
    torch.manual_seed(0)
    return Qwen2_5_VLTextModel(config).to(torch.bfloat16).eval()


def _samples(arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    samples = []
    for seed in range(arguments.tokens // _SAMPLE):
        generator = torch.Generator().manual_seed(seed)
        shape = (1, _SAMPLE, arguments.hidden)
        embeddings = torch.randn(shape, generator=generator)
        ids = torch.arange(_SAMPLE)[None] // 64 % 2
        # A few channels of vision tokens hold large constants.
        embeddings[..., :4] += 30.0 * ids[..., None]
        samples.append({"inputs_embeds": embeddings.bfloat16(), "modality_ids": ids})
    return samples


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=4096, help="in samples of 512")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--effort", default="full", choices=("full", "fast"))
    parser.add_argument("--rank", help="of pairs; what the effort has by default")
    parser.add_argument("--auto", action="store_true", help="choose alpha, separation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.tokens < _SAMPLE:
        parser.error(f"--tokens must be at least {_SAMPLE}, got {arguments.tokens}.")
    model, samples = _model(arguments), _samples(arguments)
    before = _peak()
    router = Router(("text", "vision"))
    linears = select_linears(model, "layers.*", None)
    # A part of the linears at a time, as calibrate does where they do not fit: here a
    # layer.
    rows: list[dict[str, Any]] = []
    chosen = "auto" if arguments.auto else None
    rank = None if arguments.rank is None else float(arguments.rank)
    options = SolverOptions(
        arguments.scheme,
        alpha=chosen,
        separation=chosen,
        effort=arguments.effort,
        rank=rank,
    )
    for layer in range(arguments.layers):
        for part in ("self_attn", "mlp.gate_proj|mlp.up_proj", "mlp.down_proj"):
            names = {
                name: linear
                for name, linear in linears.items()
                if name.startswith(f"layers.{layer}.")
                and any(piece in name for piece in part.split("|"))
            }
            session = CalibrationSession(names, router, second_moments=True)
            start, cpu = time.perf_counter(), time.process_time()
            with session.observing(model):
                run_samples(model, samples, router, progress=False, description="")
            middle = time.perf_counter()
            solve(session, options)
            rows.append(
                {
                    "layer": layer,
                    "linears": part.replace("|", ", "),
                    "observe_s": middle - start,
                    "solve_s": time.perf_counter() - middle,
                    "cpu_s": time.process_time() - cpu,
                    "statistics_gib": sum(
                        t.nbytes
                        for s in session.statistics.values()
                        for m in s.moments
                        for t in (m.outer, m.sample)
                        if t is not None
                    )
                    / _GIB,
                    "peak_rss_gib": _peak(),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    shown = Table(
        *("layer", "linears", "observe s", "solve s", "CPU s"),
        *("statistics GiB", "peak GiB"),
        box=box.SIMPLE,
    )
    shown.columns[1].no_wrap = True
    for row in rows:
        values = list(row.values())
        shown.add_row(str(values[0]), values[1], *(f"{v:.2f}" for v in values[2:]))
    Console().print(shown)
    print(f"model in memory {before:.2f} GiB, {torch.get_num_threads()} threads")
    if arguments.json:
        result = {
            "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
            "threads": torch.get_num_threads(),
            "model_gib": before,
            "versions": library_versions(),
            "rows": rows,
        }
        write_whole(arguments.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
