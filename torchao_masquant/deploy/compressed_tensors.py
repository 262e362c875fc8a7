# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""From a quantized folder to one that engines without this package serve.

Format compressed-tensors: integers and scales, and nothing that depends on a token's
modality. Smoothing factors go into the weights of what comes before the linears.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch
from safetensors import safe_open
from torch import nn

from torchao_masquant.atomic_files import replacing_folder
from torchao_masquant.conversion.quantized_modules import quantized_modules
from torchao_masquant.deploy.package import new_folder
from torchao_masquant.expert_modules import MASQuantExperts
from torchao_masquant.hub import class_of, folder_of, load_config, weight_files
from torchao_masquant.integrations.checkpoint_format import stored_part
from torchao_masquant.integrations.other_files import copy_other_files
from torchao_masquant.integrations.torchao_tensors import is_torchao
from torchao_masquant.integrations.unloaded import (
    add_unloaded,
    tell_of_unloaded,
    unloaded_tensors,
)
from torchao_masquant.linear import MASQuantLinear
from torchao_masquant.modality import modality_token_ids
from torchao_masquant.models.folding import Fold, find_folds, folded_norm
from torchao_masquant.options import STOCK
from torchao_masquant.reclassing import change_class
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["export_compressed_tensors"]

_ADVICE = f"calibrate with target={STOCK!r}"

# Tokens of the call that shows who reads what.
_TOKENS = 8


@torch.no_grad()
def export_compressed_tensors(
    quantized: Union[str, os.PathLike], folder: Union[str, os.PathLike]
) -> Path:
    """Write a quantized model for engines that know neither it nor modalities.

    For whatever reads compressed-tensors, vLLM and transformers among others. What was
    calibrated with ``target="compressed-tensors"`` can be written so, and what was
    rounded without factors (``method="rtn"``). The numbers are those of the quantized
    model, but for the rounding of norms' weights to the type that they are stored in.

    Args:
        quantized: folder that ``save_quantized`` or ``masquant quantize`` wrote.
        folder: is made here, whole or not at all; not there yet, or empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError: there is no such model.
        ValueError: it is not quantized by this package, or in a way that the format has
            no place for.
    """
    target = new_folder(folder)
    source = folder_of(quantized)
    model = class_of(
        load_config(source), "load it with the transformers that saved it"
    ).from_pretrained(source)
    model.eval()
    linears = _linears(model)
    numbers = _number_format(linears)
    _fold_factors(model, linears)
    left = {
        name: file
        for name, file in unloaded_tensors(model, source).items()
        if stored_part(name) is None
    }
    names = set(linears)
    for linear in linears.values():
        _hold_plain_parts(linear)
    model.config.quantization_config = numbers.config([])
    # Or transformers would ask the quantizer that has loaded it.
    model.hf_quantizer, model.is_quantized = None, False
    with replacing_folder(target) as new:
        model.save_pretrained(new)
        copy_other_files(source, new)
        tell_of_unloaded(list(left), model, kept=True)
        add_unloaded(new, left)
        ignored = _ignored(model, names, new)
        model.config.quantization_config = numbers.config(ignored)
        model.config.save_pretrained(new)
        # Writing takes a while, in which somebody may have put something there.
        new_folder(target)
    return target


@dataclass(frozen=True)
class _NumberFormat:
    """Of the integers of all linears."""

    weight_bits: int
    act_bits: int
    group_size: Optional[int]
    symmetric: bool

    @classmethod
    def of(cls, weight: MASQuantTensor) -> "_NumberFormat":
        grouped = weight.scale.shape[-1] > 1
        return cls(
            weight.weight_bits,
            weight.act_bits,
            weight.group_size if grouped else None,
            weight.symmetric,
        )

    @property
    def is_known(self) -> bool:
        """Whether it is one of those that are exported."""
        bits = self.weight_bits, self.act_bits
        return bits == (4, 16) or (
            bits == (8, 8) and self.group_size is None and self.symmetric
        )

    def config(self, ignored: list[str]) -> dict[str, Any]:
        """``quantization_config`` of a config.json.

        Args:
            ignored: patterns of modules that are not quantized.
        """
        packed = self.weight_bits < 8
        weights: dict[str, Any] = {
            "num_bits": self.weight_bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        kind = "pack-quantized" if packed else "int-quantized"
        return {
            "quant_method": STOCK,
            "quantization_status": "compressed",
            "format": kind,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None if packed else activations,
                    "output_activations": None,
                    "format": kind,
                }
            },
            "ignore": ignored,
        }


def _linears(model: nn.Module) -> dict[str, MASQuantLinear]:
    """Those that are quantized, where the format has a place for all of them.

    Raises:
        ValueError: names what it has no place for.
    """
    found: dict[str, MASQuantLinear] = {}
    for name, module in quantized_modules(model).items():
        if isinstance(module, MASQuantExperts):
            raise ValueError(
                f"{name} is of experts, which are not exported to other engines: "
                "calibrate with exclude='*.experts.*'."
            )
        weight = module.weight.data
        has = {
            "a rotation": weight.hadamard_size is not None,
            "factors of modalities' own": (
                weight.act_pre_scale != weight.act_pre_scale[:1]
            ).any(),
            "low-rank pairs": weight.l1 is not None,
            "a shift": weight.act_shift is not None,
            "biases of modalities": weight.modality_bias is not None,
        }
        more = [what for what, there in has.items() if there]
        if more:
            raise ValueError(
                f"{name} has {' and '.join(more)}, which other engines do not know: "
                f"{_ADVICE}."
            )
        found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear that this package quantized: "
            "quantize it first."
        )
    for name, tensor in model.state_dict().items():
        if is_torchao(tensor):
            raise ValueError(
                f"{name} is quantized by a config of torchao's own, which is not "
                "exported: quantize without it."
            )
    return found


def _number_format(linears: dict[str, MASQuantLinear]) -> _NumberFormat:
    """Of all linears.

    Raises:
        ValueError: they have several, or one that is not exported.
    """
    first, *others = {
        _NumberFormat.of(linear.weight.data): name for name, linear in linears.items()
    }.items()
    if others:
        raise ValueError(
            f"{first[1]} and {others[0][1]} are quantized to different numbers, of which "
            "one is exported: calibrate all of them with one scheme."
        )
    form = linears[first[1]].weight.data.act_format
    if form is not None:
        raise ValueError(
            f"{first[1]} is for activations in {form!r}, which are not exported to other "
            f"engines: {_ADVICE} and scheme 'w8a8' or 'w4a16'."
        )
    if not first[0].is_known:
        raise ValueError(
            f"{first[1]} has weights of {first[0].weight_bits} bits in groups of "
            f"{first[0].group_size} and activations of {first[0].act_bits}, of which other "
            f"engines have no kernel: {_ADVICE} and scheme 'w8a8' or 'w4a16'."
        )
    return first[0]


def _fold_factors(model: Any, linears: dict[str, MASQuantLinear]) -> None:
    """Put the linears' smoothing factors into what comes before them.

    Raises:
        ValueError: one has no place there.
    """
    smoothed = {
        name for name, m in linears.items() if (m.weight.data.act_pre_scale != 1).any()
    }
    if not smoothed:
        return
    device = next(iter(linears.values())).weight.device
    placeholders = {t for ts in modality_token_ids(model.config).values() for t in ts}
    count = model.config.get_text_config().vocab_size
    tokens = [t for t in range(count) if t not in placeholders][:_TOKENS]
    ids = torch.tensor([tokens], device=device)
    folds = [
        fold
        for fold in find_folds(model, linears, lambda: model(input_ids=ids))
        if smoothed.intersection(fold.readers)
    ]
    left = smoothed.difference(*(fold.readers for fold in folds))
    for fold in folds:
        factor = _shared_factor(fold, linears)
        if factor is None:
            left.update(fold.readers)
        else:
            _divide(model, fold, factor, linears)
    if left:
        first = min(left, key=list(linears).index)
        raise ValueError(
            f"{first} has a smoothing factor that nothing before it can take: {_ADVICE}."
        )


def _shared_factor(
    fold: Fold, linears: dict[str, MASQuantLinear]
) -> Optional[torch.Tensor]:
    """Of each channel of the source; None where its readers want different ones."""
    given = [
        linears[name].weight.data.act_pre_scale[0].double().reciprocal()
        for name in fold.readers
    ]
    factor = torch.ones_like(given[0])[: int(fold.channels.max()) + 1]
    factor[fold.channels] = given[0]
    same = all(torch.equal(factor[fold.channels], own) for own in given)
    return factor if same else None


def _divide(
    model: nn.Module,
    fold: Fold,
    factor: torch.Tensor,
    linears: dict[str, MASQuantLinear],
) -> None:
    """Divide the output of a fold's source by a factor, which its readers expect."""
    source = model.get_submodule(fold.source)
    if not isinstance(source, nn.Linear):
        folded = folded_norm(source, factor)
        assert folded is not None
        parameters, besides = folded
        for name, value in parameters.items():
            source.get_parameter(name).copy_(value)
        for name in fold.readers:
            linears[name].weight.data.scale.mul_(besides)
        return
    if isinstance(source, MASQuantLinear):
        scale = source.weight.data.scale
        scale.copy_(scale.double() / factor[:, None].to(scale.device))
    else:
        weight = source.weight
        weight.copy_(weight.double() / factor[:, None].to(weight.device))
    if source.bias is not None:
        source.bias.copy_(source.bias.double() / factor.to(source.bias.device))


def _hold_plain_parts(linear: MASQuantLinear) -> None:
    """Make a plain module of a linear, whose parameters are the tensors of the format."""
    weight = linear.weight.data
    integers, scale = weight.int_data(), weight.scale
    change_class(linear, nn.Linear)
    del linear.weight
    parts: dict[str, torch.Tensor]
    if weight.weight_bits == 8:
        parts = {"weight": integers, "weight_scale": scale.float()}
    else:
        parts = {
            "weight_packed": _packed(integers),
            "weight_scale": scale.to(weight.dtype),
            "weight_shape": torch.tensor(list(weight.shape)),
        }
        if weight.zero_point is not None:
            # Eight rows to a number, not eight columns.
            parts["weight_zero_point"] = _packed(weight.zero_point.t()).t()
    for name, part in parts.items():
        own = nn.Parameter(part.cpu().contiguous(), requires_grad=False)
        linear.register_parameter(name, own)


def _packed(integers: torch.Tensor) -> torch.Tensor:
    """Of (R, C) integers from -8 to 7 (R, C / 8) int32, the first in the lowest bits."""
    missing = -integers.shape[1] % 8
    columns = nn.functional.pad(integers.to(torch.int64) + 8, (0, missing))
    shifts = torch.arange(0, 32, 4, device=integers.device)
    numbers = (columns.unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(numbers < 2**31, numbers, numbers - 2**32).to(torch.int32)


def _ignored(model: nn.Module, linears: set[str], folder: Path) -> list[str]:
    """Patterns of the modules with matrices that are not quantized.

    By the end of their names, which engines nest and call differently: whatever is
    below ``visual``, say. And by the names that they have in the files, which not all
    engines share with transformers, and of what it has not loaded.

    Args:
        model: that has been saved.
        linears: names of those in it that are quantized.
        folder: that it was saved to.
    """
    embeddings = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tables = {name.rpartition(".")[2] for name in embeddings}
    stored = dict(_shapes(folder))
    scaled = {n.removesuffix("_scale") for n in stored if n.endswith(".weight_scale")}
    quantized = linears | {name.rpartition(".")[0] for name in scaled}
    # Heads that share the embeddings' matrix, too.
    parameters = model.named_parameters(remove_duplicate=False)
    of_model = [n for n, p in parameters if p.dim() > 1]
    of_files = [n for n, shape in stored.items() if len(shape) > 1]

    def is_above(name: str) -> bool:
        return any(f"{own}.".startswith(f"{name}.") for own in quantized)

    patterns: dict[str, None] = {}
    for matrix in (*of_model, *of_files):
        parts = matrix.split(".")[:-1]
        ends = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        highest = next((name for name in ends if not is_above(name)), None)
        if highest is not None and parts[-1] not in tables:
            patterns[_end_of(highest, quantized)] = None
    return list(patterns)


def _end_of(name: str, others: set[str]) -> str:
    """The pattern of the shortest end of a name that none of others has."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        end = re.escape(".".join(parts[-count:]))
        pattern = rf"(.*\.)?{end}(\..*)?$"
        if not any(re.match(pattern, own) for own in others):
            break
    return f"re:{pattern}"


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each tensor in a folder that was just saved."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_slice(name).get_shape()
