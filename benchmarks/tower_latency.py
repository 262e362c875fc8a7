# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Time to the first token of an image, with the vision tower in 8 bits and without.

    python benchmarks/tower_latency.py [--blocks 4] [--layers 2] [--patches 1024] [--json PATH]

The model is a Qwen2.5-VL of 7B's vision tower (1280 wide) and 3B's decoder, some blocks and
layers of each, random weights. Each block and the language model are compiled. Candidates take
turns, call by call; one thread runs, and what counts is the median of its CPU time, which
other processes lengthen less than a clock's.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
from cpu_linear import processor
from torch import nn
from torchao.quantization import quantize_
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from torchao_masquant import Recipe, masquant_config
from torchao_masquant.atomic_files import write_whole
from torchao_masquant.models.towers import tower_linears
from torchao_masquant.options import SolverOptions, largest_rotation
from torchao_masquant.recipe import (
    LayerRecipe,
    library_versions,
    weight_fingerprint,
)

#: name to type, scheme of the decoder, scheme of the tower
CANDIDATES: dict[str, tuple[torch.dtype, Optional[str], Optional[str]]] = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "bfloat16, tower w8a8": (torch.bfloat16, None, "w8a8"),
    "w4a8": (torch.bfloat16, "w4a8", None),
    "w4a8, tower w8a8": (torch.bfloat16, "w4a8", "w8a8"),
}
_IMAGE, _START, _END, _WORD = 3, 1, 2, 4
_TEXT_TOKENS = 32
#: Of Qwen2.5-VL 3B.
_ALL_BLOCKS, _ALL_LAYERS = 32, 36


def build(blocks: int, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model, with the same random weights each time, in bfloat16."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": blocks,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            # One in eight of the real one's sees the whole image.
            "fullatt_block_indexes": [blocks - 1],
            "out_hidden_size": 2048,
        },
        image_token_id=_IMAGE,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def recipe(model: nn.Module, decoder: Optional[str], towers: Optional[str]) -> Recipe:
    """Of the form that ``calibrate`` gives, with random values and no pairs."""
    of_towers = tower_linears(model)
    layers = {}
    for name, linear in model.named_modules():
        own = of_towers.get(name)
        if type(linear) is not nn.Linear or (own is None and "layers" not in name):
            continue
        if (decoder if own is None else towers) is None:
            continue
        n, k = linear.weight.shape
        count = 2 if own is None else 1
        layers[name] = LayerRecipe(
            shape=(n, k),
            fingerprint=weight_fingerprint(linear.weight),
            smoothing_factor=torch.rand(1, k).add(0.5).expand(count, k).clone(),
            modality_bias=torch.randn(count, n) * 1e-2,
            act_shift=torch.randn(count, k) * 1e-2,
            hadamard_size=largest_rotation(k),
            scheme=None if own is None else towers,
            modalities=None if own is None else (own,),
        )
    options = SolverOptions(scheme=decoder or "w4a8", towers=towers)
    return Recipe(options=options, modalities=("text", "vision"), layers=layers)


def prompt(patches: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An image of so many patches, and a little text."""
    side = 2 * round(patches**0.5 / 2)
    tokens = side * side // 4
    ids = torch.full((tokens + 2 + _TEXT_TOKENS,), _WORD)
    ids[0], ids[1 : 1 + tokens], ids[1 + tokens] = _START, _IMAGE, _END
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "mm_token_type_ids": (ids == _IMAGE).int()[None],
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, dtype=dtype),
    }


def candidate(model: nn.Module, name: str) -> nn.Module:
    """A compiled copy of the model."""
    dtype, decoder, towers = CANDIDATES[name]
    found: Any = copy.deepcopy(model)
    if decoder or towers:
        quantize_(found, masquant_config(recipe(found, decoder, towers)))
    found = found.to(dtype) if dtype != torch.bfloat16 else found
    for block in found.model.visual.blocks:
        block.compile()
    found.model.visual.merger.compile()
    found.get_decoder().compile(fullgraph=True, dynamic=True)
    return found


class _Clock:
    """CPU seconds of the tower's call inside of a model's."""

    def __init__(self, tower: nn.Module):
        self.seconds = 0.0
        tower.register_forward_pre_hook(self._before)
        tower.register_forward_hook(self._after)

    def _before(self, *_: Any) -> None:
        self.seconds -= time.process_time()

    def _after(self, *_: Any) -> None:
        self.seconds += time.process_time()


def run(
    names: Sequence[str], blocks: int, layers: int, patches: int, repeats: int
) -> dict[str, dict[str, float]]:
    """CPU seconds of a prefill, and of its tower, of each candidate; medians."""
    model = build(blocks, layers)
    models = {name: candidate(model, name) for name in names}
    clocks = {name: _Clock(m.model.visual) for name, m in models.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    # The first round compiles, the second warms up.
    for turn in range(repeats + 2):
        for name, one in models.items():
            inputs = prompt(patches, CANDIDATES[name][0])
            clocks[name].seconds, start = 0.0, time.process_time()
            one(**inputs, use_cache=False, logits_to_keep=1)
            seconds = time.process_time() - start
            print(f"{turn} {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
            if turn > 1:
                taken[name].append((seconds, clocks[name].seconds))
    found = {}
    for name, results in taken.items():
        whole, tower = map(statistics.median, zip(*results))
        # As it would be of all blocks and layers of the real model.
        long = tower * _ALL_BLOCKS / blocks
        other = (whole - tower) * _ALL_LAYERS / layers
        found[name] = {
            "first token s": whole,
            "tower s": tower,
            "spread s": max(r[0] for r in results) - min(r[0] for r in results),
            "whole model s": long + other,
            "tower share": long / (long + other),
        }
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--patches", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        found = run(
            given.candidates, given.blocks, given.layers, given.patches, given.repeats
        )
    content = {
        "versions": library_versions(),
        "processor": processor(),
        "threads": 1,
        "load": os.getloadavg()[0],
        **{n: getattr(given, n) for n in ("blocks", "layers", "patches", "repeats")},
        "candidates": found,
    }
    print(json.dumps(content, indent=1))
    if given.json:
        write_whole(given.json, json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
