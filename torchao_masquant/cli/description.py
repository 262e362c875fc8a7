# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What is in a quantized checkpoint or a recipe, from the headers of its files."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from torchao_masquant.hub import read_config, weight_files
from torchao_masquant.integrations.checkpoint_format import (
    QUANT_METHOD,
    CheckpointFormat,
    stored_part,
)
from torchao_masquant.integrations.stored_tensors import stored_tensors
from torchao_masquant.models.families import TOWER_CONFIGS
from torchao_masquant.options import SolverOptions, get_scheme, scheme_of_numbers
from torchao_masquant.recipe import described, read_header
from torchao_masquant.tensor_subclasses.weight_layout import TensorKind

__all__ = [
    "Description",
    "LinearLine",
    "describe",
    "describe_checkpoint",
    "pattern_of",
]


@dataclass(frozen=True)
class LinearLine:
    """One quantized linear.

    Attributes:
        name: in the model.
        shape: of its original weight.
        scheme: such as "w4a8".
        group_size: None for one scale per output channel.
        modalities: that it tells apart, base first; one name where it does not.
        ranks: modality to the rank of its pair.
        method: that it was quantized by; None where that is not known.
        nbytes: in the file, all that belongs to its weight.
        hadamard_size: neighbouring channels that are rotated together; None: none are.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    group_size: Optional[int]
    modalities: tuple[str, ...]
    ranks: Mapping[str, int]
    method: Optional[str]
    nbytes: int
    hadamard_size: Optional[int] = None


@dataclass(frozen=True)
class Description:
    """
    Attributes:
        kind: "checkpoint" or "recipe".
        path: as it was given.
        format_version: of it.
        linears: in the model's order.
        other_bytes: of tensors that are not quantized.
        file_bytes: of the safetensors files, headers and all.
        dtype: of what is not quantized; None for a recipe.
        versions: of the libraries that made it, where they are known.
        description: of the calibration, see :class:`~torchao_masquant.Recipe`.
    """

    kind: str
    path: str
    format_version: int
    linears: tuple[LinearLine, ...]
    other_bytes: int
    file_bytes: int
    dtype: Optional[str] = None
    versions: Optional[Mapping[str, str]] = None
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized_bytes(self) -> int:
        return sum(line.nbytes for line in self.linears)

    @property
    def dense_bytes(self) -> int:
        """Of the quantized weights, had they stayed bfloat16."""
        return sum(2 * math.prod(line.shape) for line in self.linears)

    def summary(self) -> dict[str, Any]:
        """Totals, for scripts."""
        decoder_first = sorted(
            self.linears, key=lambda line: line.modalities[0] in TOWER_CONFIGS
        )
        return {
            "kind": self.kind,
            "format_version": self.format_version,
            "dtype": self.dtype,
            "quantized_linears": len(self.linears),
            "schemes": sorted({line.scheme for line in self.linears}),
            "methods": sorted({line.method or "unknown" for line in self.linears}),
            "modalities": list(
                dict.fromkeys(m for line in decoder_first for m in line.modalities)
            ),
            "quantized_bytes": self.quantized_bytes,
            "quantized_bytes_as_bfloat16": self.dense_bytes,
            "other_bytes": self.other_bytes,
            "file_bytes": self.file_bytes,
            "versions": self.versions,
            "description": self.description,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for scripts."""
        return {
            "path": self.path,
            **self.summary(),
            "linears": [asdict(line) for line in self.linears],
        }

    def headline(self) -> str:
        """One line for people."""
        found = self.summary()
        line = (
            f"{', '.join(found['schemes'])} ({', '.join(found['methods'])}), "
            f"{len(self.linears)} linears, {', '.join(found['modalities'])}; "
            f"{self.quantized_bytes / 2**20:.2f} MiB, "
            f"{100 * self.quantized_bytes / self.dense_bytes:.1f} % of bfloat16"
        )
        if self.kind == "checkpoint":
            line += f"; {self.other_bytes / 2**20:.2f} MiB that are not quantized"
        return f"{line}."


def describe(path: Path) -> Description:
    """Look at a folder with a checkpoint, or at a file with a recipe.

    No tensor is read.

    Raises:
        OSError: it is not there.
        ValueError: it is neither, or damaged.
    """
    if path.is_dir():
        return describe_checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {str(path)!r}: give the folder of a quantized model, or a "
            "recipe."
        )
    return _describe_recipe(path)


def describe_checkpoint(folder: Path) -> Description:
    """Look at a folder that a quantized model was saved to; raises as ``describe``."""
    entry = read_config(folder).get("quantization_config")
    if not isinstance(entry, dict):
        raise ValueError(
            f"{str(folder)!r} is not quantized: its config.json has no "
            "quantization_config; 'masquant quantize' makes a quantized copy."
        )
    if entry.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{str(folder)!r} is quantized by {entry.get('quant_method')!r}, not by "
            "MASQuant."
        )
    checkpoint = CheckpointFormat.from_json(entry)
    files = weight_files(folder)
    stored = stored_tensors([str(file) for file in files])
    _check_parts(checkpoint, stored)
    linears = tuple(
        LinearLine(
            name=name,
            shape=tuple(layer.shape),
            scheme=scheme_of_numbers(
                layer.weight_bits, layer.act_bits, layer.weight_format, layer.act_format
            ),
            group_size=layer.group_size,
            modalities=layer.modalities if layer.routed else layer.modalities[:1],
            ranks={m: r for m, r in zip(layer.modalities[1:], layer.ranks) if r},
            method=checkpoint.options.get(name, {}).get("method"),
            nbytes=layer.layout.nbytes,
            hadamard_size=layer.hadamard_size,
        )
        for name, layer in checkpoint.layers.items()
    )
    total = sum(map(_nbytes, stored.values()))
    return Description(
        kind="checkpoint",
        path=str(folder),
        format_version=int(entry["format_version"]),
        linears=linears,
        other_bytes=total - sum(line.nbytes for line in linears),
        file_bytes=sum(file.stat().st_size for file in files),
        dtype=checkpoint.dtype,
        versions=checkpoint.description.get("versions"),
        description={
            k: v for k, v in checkpoint.description.items() if k != "versions"
        },
    )


def _check_parts(
    checkpoint: CheckpointFormat, stored: Mapping[str, TensorKind]
) -> None:
    """Raise unless what the config says and what the files hold are the same."""
    found: dict[str, dict[str, TensorKind]] = {}
    for name, kind in stored.items():
        part = stored_part(name)
        if part is not None:
            found.setdefault(part[0], {})[part[1]] = kind
    # transformers saves some models under other names than its modules have.
    if set(found) >= set(checkpoint.layers):
        for name, layer in checkpoint.layers.items():
            try:
                layer.layout.check_kinds(found[name])
            except ValueError as error:
                raise ValueError(
                    f"the checkpoint is damaged, {name}: {error}."
                ) from error
    held = sum(_nbytes(kind) for parts in found.values() for kind in parts.values())
    said = sum(layer.layout.nbytes for layer in checkpoint.layers.values())
    # Of what torchao's weights hold, the config tells the names alone.
    others = len(checkpoint.torchao)
    fits = held >= said if others else held == said
    if not fits or len(found) != len(checkpoint.layers) + others:
        raise ValueError(
            f"the checkpoint is damaged: its files hold {len(found)} quantized linears "
            f"of {held} bytes, its config.json tells of {len(checkpoint.layers)} of "
            f"{said} bytes; download or save it again."
        )


def _describe_recipe(path: Path) -> Description:
    version, header = read_header(path)
    kinds = stored_tensors([str(path)])
    try:
        options = SolverOptions(**header["options"])
        modalities = tuple(header["modalities"])
        linears = tuple(
            _recipe_line(name, entry, options, modalities, kinds)
            for name, entry in header["layers"].items()
        )
        versions = dict(header["versions"])
        description = described(header)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is a damaged recipe: {error}.") from error
    if not linears:
        raise ValueError(f"{str(path)!r} is a damaged recipe: it has no layers.")
    return Description(
        kind="recipe",
        path=str(path),
        format_version=version,
        linears=linears,
        other_bytes=0,
        file_bytes=path.stat().st_size,
        versions=versions,
        description=description,
    )


def _recipe_line(
    name: str,
    entry: Mapping[str, Any],
    options: SolverOptions,
    modalities: tuple[str, ...],
    kinds: Mapping[str, TensorKind],
) -> LinearLine:
    own = {k: v for k, v in kinds.items() if k.rpartition(".")[0] == name}
    routed = own[f"{name}.smoothing_factor"][1][0] > 1
    scheme, group_size = options.scheme, options.number_format.group_size
    if "scheme" in entry:
        # Its integers tell its groups; where there are none yet it has no groups.
        scheme = get_scheme(entry["scheme"]).name
        scale = own.get(f"{name}.scale")
        groups = 1 if scale is None else scale[1][-1]
        group_size = None if groups == 1 else int(entry["shape"][-1]) // groups
    modalities = tuple(entry.get("modalities", modalities))
    return LinearLine(
        name=name,
        shape=tuple(int(size) for size in entry["shape"]),
        scheme=scheme,
        group_size=group_size,
        modalities=modalities if routed else modalities[:1],
        ranks={m: int(r) for m, r in zip(modalities[1:], entry["ranks"]) if r},
        method=options.method,
        nbytes=sum(map(_nbytes, own.values())),
        hadamard_size=entry.get("hadamard_size"),
    )


def _nbytes(kind: TensorKind) -> int:
    dtype, shape = kind
    return dtype.itemsize * math.prod(shape)


def pattern_of(name: str) -> str:
    """The name of a linear, with a star for the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
