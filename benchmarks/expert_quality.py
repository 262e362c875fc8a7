# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What quantization leaves of a layer of experts, method by method.

    python benchmarks/expert_quality.py [--schemes w4a8 w4a4] [--json PATH]

The experts are of transformers' own class (Qwen3-VL-MoE's), with random weights. Their
tokens are correlated, of three modalities; on a few channels those of vision and sound
hold large constants, each modality's own, as in multimodal LLMs. Figures are centred SQNR
in dB of the layer's output on tokens that calibration has not seen: the error against what
varies from token to token.

"own statistics" solves for each expert by itself, from the tokens that it was given alone:
what pooling the statistics of all experts costs. Such weights have a smoothing factor for
each expert, so that they are no tensor of a layer; they are run one by one.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Optional, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchao.quantization import quantize_
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextExperts,
)

from torchao_masquant import calibrate, masquant_config, token_modalities
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.options import METHODS, SolverOptions
from torchao_masquant.recipe import library_versions
from torchao_masquant.solver.layers import solve_group
from torchao_masquant.statistics.input_statistics import InputStatistics

_NAMES = ("text", "vision", "audio")
_OUTLIERS = (0.0, 30.0, 60.0)
_OWN = "masquant, own statistics"


class _Layer(nn.Module):
    """A router and its experts."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__()
        generator = torch.Generator().manual_seed(arguments.seed)
        self.top_k = arguments.top_k
        config = SimpleNamespace(
            num_experts=arguments.experts,
            hidden_size=arguments.hidden,
            moe_intermediate_size=arguments.inner,
            hidden_act="silu",
            _experts_implementation="eager",
        )
        self.experts = Qwen3VLMoeTextExperts(config)
        self.gate = nn.Parameter(torch.empty(arguments.experts, arguments.hidden))
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.normal_(generator=generator).mul_(parameter.shape[-1] ** -0.5)

    def choices(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = (x @ self.gate.t()).softmax(-1).topk(self.top_k, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, *self.choices(x))


def _tokens(arguments: argparse.Namespace, seed: int, count: int) -> Any:
    """(T, H) tokens and (T,) modality ids."""
    shared = torch.Generator().manual_seed(1000 + arguments.seed)
    width = arguments.hidden
    own = torch.Generator().manual_seed(seed)
    ids = torch.arange(count) % len(_NAMES)
    x = torch.empty(count, width)
    for index, outlier in enumerate(_OUTLIERS):
        # Half of the directions hold most of what varies.
        spread = torch.randn(width, width, generator=shared) * width**-0.5
        spread[: width // 2] *= 0.1
        constants = torch.zeros(width)
        places = torch.randperm(width, generator=shared)[:4]
        constants[places] = outlier * torch.randn(4, generator=shared).sign()
        rows = ids == index
        latent = torch.randn(int(rows.sum()), width, generator=own)
        x[rows] = latent @ spread + constants
    return x, ids


def _sqnr(y: torch.Tensor, exact: torch.Tensor, ids: torch.Tensor) -> list[float]:
    found = []
    for index in range(len(_NAMES)):
        rows = ids == index
        signal, error = exact[rows].double(), (y - exact)[rows].double()
        varying = (signal - signal.mean(0)).square().sum()
        found.append((10 * torch.log10(varying / error.square().sum())).item())
    return found


def _by_expert(
    layer: _Layer,
    x: torch.Tensor,
    project: Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The layer's output, expert by expert; ``project`` is told which rows they are."""
    chosen, weights = layer.choices(x)
    y = torch.zeros_like(x)
    for e in range(layer.gate.shape[0]):
        rows, place = torch.where(chosen == e)
        inner = layer.experts._apply_gate(project("gate_up_proj", e, x[rows], rows))
        made = project("down_proj", e, inner, rows)
        y.index_add_(0, rows, made * weights[rows, place, None])
    return y


def _with_own_statistics(
    layer: _Layer, calibration: Any, held_out: Any, scheme: str
) -> torch.Tensor:
    options = SolverOptions(scheme)
    x, ids = calibration
    quantized: dict[tuple[str, int], Any] = {}

    def observe(name: str, e: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        weight = getattr(layer.experts, name)[e]
        statistics = InputStatistics(x.shape[1], _NAMES, x.device, True)
        statistics.update(name, x, ids[rows])
        found = solve_group({name: weight}, statistics, options)[name]
        quantized[name, e] = found.quantize(weight, options.number_format, _NAMES)
        return x @ weight.t()

    def run(name: str, e: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.masquant.linear(x, quantized[name, e], held_out[1][rows])

    _by_expert(layer, x, observe)
    return _by_expert(layer, held_out[0], run)


@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--schemes", nargs="+", default=["w8a8", "w4a8", "w4a6", "w4a4"]
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    layer = _Layer(arguments)
    calibration = _tokens(arguments, seed=1, count=arguments.tokens)
    held_out = _tokens(arguments, seed=2, count=arguments.tokens // 2)
    exact = layer(held_out[0])
    samples = [{"x": calibration[0], "modality_ids": calibration[1]}]
    rows: list[dict[str, Any]] = []
    for scheme in arguments.schemes:
        for method in (*METHODS, _OWN):
            if method == _OWN:
                y = _with_own_statistics(layer, calibration, held_out, scheme)
            else:
                recipe = calibrate(
                    layer,
                    samples,
                    scheme=scheme,
                    method=method,
                    modalities=_NAMES,
                    progress=False,
                )
                model = copy.deepcopy(layer)
                # quantize_ hands linears over: here there is none.
                quantize_(
                    model,
                    masquant_config(recipe),
                    filter_fn=lambda module, _: isinstance(
                        module, Qwen3VLMoeTextExperts
                    ),
                )
                with token_modalities(model, held_out[1]):
                    y = model(held_out[0])
            sqnr = dict(zip(_NAMES, _sqnr(y, exact, held_out[1])))
            rows.append({"scheme": scheme, "method": method, "sqnr_db": sqnr})
            print(rows[-1], file=sys.stderr, flush=True)
    shown = Table("scheme", "method", *(f"{name} dB" for name in _NAMES))
    for row in rows:
        values = (f"{v:.1f}" for v in row["sqnr_db"].values())
        shown.add_row(row["scheme"], row["method"], *values)
    Console().print(shown)
    if arguments.json:
        result = {
            "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
            "versions": library_versions(),
            "rows": rows,
        }
        write_whole(arguments.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
