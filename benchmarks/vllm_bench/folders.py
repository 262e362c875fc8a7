# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Folders of one random decoder, 2048 wide: dense, ours, and compressed-tensors.

Of what a calibrated folder has nothing is left out: a shift and a rotation for each linear,
two modalities and pairs where a row says so. The values are random: they cost the same.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import quantize_

from torchao_masquant import Recipe, masquant_config, save_quantized
from torchao_masquant.head_recipe import head_layers
from torchao_masquant.options import SolverOptions
from torchao_masquant.recipe import LayerRecipe, weight_fingerprint
from torchao_masquant.testing import model_folders

__all__ = ["CANDIDATES", "IMAGE_TOKENS", "OURS", "PEERS", "make", "token_bytes"]

RANK = 0.05
#: An image of 224 x 224 in patches of 14.
IMAGE_TOKENS = 256
_PAIRS: dict[str, Any] = {"rank": RANK}
_PAIRS_OF_8_BITS = {"rank": RANK, "low_rank_bits": 8}
_HEAD = {"head_bits": 8}
#: Name of a row to the scheme, whether it sees images, and other options.
OURS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "w8a8": ("w8a8", False, {}),
    "w8a8, head of 8 bits": ("w8a8", False, _HEAD),
    "w4a8": ("w4a8", False, {}),
    "w4a8, head of 8 bits": ("w4a8", False, _HEAD),
    "w4a16": ("w4a16", False, {}),
    "w4a8 that sees": ("w4a8", True, {}),
    "w4a8 that sees, pairs": ("w4a8", True, _PAIRS),
    "w4a8 that sees, pairs of 8 bits": ("w4a8", True, _PAIRS_OF_8_BITS),
    "w8a8 that sees": ("w8a8", True, {}),
    "w8a8 that sees, pairs": ("w8a8", True, _PAIRS),
    "w8a8 that sees, pairs of 8 bits": ("w8a8", True, _PAIRS_OF_8_BITS),
}
PEERS = {"int8": 8, "int4": 4}
CANDIDATES = ("bf16", *OURS, *PEERS)

_TEXT = {
    "vocab_size": 10240,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}


def make(candidate: str, folder: Path) -> Path:
    """The folder of a row; what is there already stays.

    Args:
        candidate: one of ``CANDIDATES``.
        folder: of all of them.
    """
    made = folder / candidate.replace(", ", "_").replace(" ", "_")
    if (made / "config.json").exists():
        return made
    sees = candidate in OURS and OURS[candidate][1]
    dense = folder / ("bf16_sees" if sees else "bf16")
    if not (dense / "config.json").exists():
        with (
            mock.patch.dict(model_folders._TEXT, _TEXT),
            mock.patch.multiple(model_folders, SIZE=224, PATCH=14),
        ):
            (model_folders.vision_model if sees else model_folders.text_model)(dense)
        _halve(dense)
    if candidate in OURS:
        _ours(dense, made, *OURS[candidate])
    elif candidate in PEERS:
        _compressed(dense, made, PEERS[candidate])
    return made


def token_bytes(folder: Path) -> int:
    """Bytes of the weights that every token is multiplied by: decoder and head."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if not any(
                    part in name for part in ("embed_tokens", "vision", "project")
                ):
                    total += tensors.get_tensor(name).nbytes
    return total


def _halve(folder: Path) -> None:
    """Weights in bfloat16."""
    for file in folder.glob("*.safetensors"):
        tensors = {n: t.bfloat16() for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))


def _ours(
    dense: Path, folder: Path, scheme: str, sees: bool, given: dict[str, Any]
) -> None:
    loader = (
        transformers.AutoModelForMultimodalLM
        if sees
        else transformers.AutoModelForCausalLM
    )
    model = loader.from_pretrained(dense, dtype=torch.bfloat16)
    modalities = ("text", "vision") if sees else ("text",)
    options = SolverOptions(scheme=scheme, **{"rank": 0.0, **given})
    torch.manual_seed(0)
    layers = {
        name: _layer(linear.weight, len(modalities), options)
        for name, linear in model.named_modules()
        if type(linear) is nn.Linear
        and "lm_head" not in name
        and "vision" not in name
        and "projector" not in name
    }
    layers |= head_layers(model, options, modalities)
    quantize_(model, masquant_config(Recipe(options, modalities, layers)))
    save_quantized(model, folder, beside=dense)


def _layer(
    weight: torch.Tensor, modalities: int, options: SolverOptions
) -> LayerRecipe:
    n, k = weight.shape
    rank = options.average_rank(n, k)
    parts: dict[str, Any] = {}
    if not options.number_format.weight_only:
        parts["act_shift"] = torch.randn(modalities, k) * 1e-2
        parts["modality_bias"] = torch.randn(modalities, n) * 1e-2
    if rank:
        parts |= {
            "ranks": (rank,),
            "l1": torch.randn(k, rank) * 1e-2,
            "l2": torch.randn(rank, n) * 1e-2,
        }
    return LayerRecipe(
        shape=(n, k),
        fingerprint=weight_fingerprint(weight),
        smoothing_factor=(torch.rand(k) + 0.5).repeat(modalities, 1),
        hadamard_size=SolverOptions().hadamard_size_of(k),
        **parts,
    )


def _compressed(dense: Path, folder: Path, bits: int) -> None:
    """Rounded to nearest: int8 by channels, or int4 in groups of 128 packed into int32."""
    group = 128 if bits == 4 else None
    largest = 2 ** (bits - 1) - 1
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        n, k = tensor.shape
        grouped = tensor.float().reshape(n, -1, group or k)
        scale = grouped.abs().amax(-1, keepdim=True) / largest
        rounded = (grouped / scale).round().reshape(n, k).to(torch.int8)
        tensors[f"{name}_scale"] = scale.reshape(n, -1).bfloat16()
        if bits == 8:
            tensors[name] = rounded
            continue
        nibbles = (rounded.int() + 8).reshape(n, -1, 8)
        packed = sum(nibbles[..., i] << (4 * i) for i in range(8))
        tensors[f"{name}_packed"] = packed.int()
        tensors[f"{name}_shape"] = torch.tensor([n, k])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((dense / "config.json").read_text())
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    of_linears = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if bits == 8 else None,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": of_linears},
    }
    (folder / "config.json").write_text(json.dumps(config))
