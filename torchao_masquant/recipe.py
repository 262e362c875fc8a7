# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration found: everything needed to quantize a model, but its weights."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import safetensors
import torch
from safetensors.torch import save_file

from torchao_masquant.replacing import replacing
from torchao_masquant.schemes import Scheme
from torchao_masquant.solver.methods import SolverOptions
from torchao_masquant.tensor_subclasses import MASQuantTensor

__all__ = ["LayerRecipe", "Recipe", "read_header", "weight_fingerprint"]

_FORMAT = "torchao_masquant.recipe"
_FORMAT_VERSION = 2
_TENSORS = (
    "smoothing_factor",
    "l1",
    "l2",
    "modality_bias",
    "act_shift",
    "qdata",
    "scale",
    "zero_point",
)


def weight_fingerprint(weight: torch.Tensor) -> str:
    """16 hex digits that tell a weight from a changed one.

    Of the values, not of the type: a float32 copy of a bfloat16 weight has the same.

    Args:
        weight: any floating point tensor.
    """
    values = weight.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass
class LayerRecipe:
    """Part of a recipe: one linear of shape (N, K), with M modalities.

    Attributes:
        shape: (N, K).
        fingerprint: of the weight that it was made for, see :func:`weight_fingerprint`.
        smoothing_factor: (M, K) float32, or (1, K) where all modalities share one.
        ranks: of the pairs of modality 1, 2, ..., or empty: no pairs.
        l1: (K, R) down-projections side by side, R the sum of ``ranks``.
        l2: (R, N) up-projections one below the other.
        modality_bias: (M, N) what each modality adds.
        act_shift: (M, K) float32, what is taken off the smoothed activations; its
            product with the weight is part of ``modality_bias``.
        qdata: (N, K) int8, unpacked integers of the weight where they are not those of
            round-to-nearest; None: the weight is rounded when it is converted.
        scale: (N, G) float32 of ``qdata``.
        zero_point: (N, G) of ``qdata`` where it is asymmetric.
    """

    shape: tuple[int, int]
    fingerprint: str
    smoothing_factor: torch.Tensor
    ranks: tuple[int, ...] = ()
    l1: Optional[torch.Tensor] = None
    l2: Optional[torch.Tensor] = None
    modality_bias: Optional[torch.Tensor] = None
    act_shift: Optional[torch.Tensor] = None
    qdata: Optional[torch.Tensor] = None
    scale: Optional[torch.Tensor] = None
    zero_point: Optional[torch.Tensor] = None

    def check(self, name: str, modalities: int) -> None:
        """Raise unless all parts fit each other.

        Args:
            name: of the linear, for the message.
            modalities: M.

        Raises:
            ValueError: a shape is wrong, or a part is missing.
        """
        n, k = self.shape
        rank = sum(self.ranks)
        shared = self.smoothing_factor.shape[:1] == (1,)
        expected: dict[str, Optional[tuple[int, ...]]] = {
            "smoothing_factor": (1 if shared else modalities, k),
            "l1": (k, rank) if rank else None,
            "l2": (rank, n) if rank else None,
        }
        if self.modality_bias is not None:
            expected["modality_bias"] = (modalities, n)
        if self.act_shift is not None:
            expected["act_shift"] = (modalities, k)
        integers = (self.qdata, self.scale, self.zero_point)
        if any(t is not None for t in integers):
            groups = 0 if self.scale is None else self.scale.shape[-1:].numel()
            expected["qdata"] = (n, k)
            expected["scale"] = (n, groups)
            if self.zero_point is not None:
                expected["zero_point"] = (n, groups)
        if rank and len(self.ranks) != modalities - 1:
            raise ValueError(
                f"{name} has {len(self.ranks)} ranks for {modalities} modalities"
            )
        for key, shape in expected.items():
            tensor = getattr(self, key)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(
                    f"{key} of {name} is of shape {found}, it should be {shape}"
                )

    def quantize(
        self,
        weight: torch.Tensor,
        scheme: Scheme,
        modalities: Sequence[str],
        low_rank_bits: int = 16,
    ) -> MASQuantTensor:
        """The quantized weight.

        Args:
            weight: (N, K) floating point, the one that this part was made for.
            scheme: integer formats.
            modalities: names, base first.
            low_rank_bits: 16 or 8, of the low-rank pairs.

        Raises:
            ValueError: the weight does not fit the scheme or this part.
        """
        parts: dict[str, Any] = dict(
            weight_bits=scheme.weight_bits,
            act_bits=scheme.act_bits,
            modalities=modalities,
            smoothing_factor=self.smoothing_factor,
            ranks=self.ranks,
            l1=self.l1,
            l2=self.l2,
            modality_bias=self.modality_bias,
            act_shift=self.act_shift,
            low_rank_bits=low_rank_bits,
        )
        if self.qdata is None:
            return MASQuantTensor.from_hp(
                weight,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                **parts,
            )
        if self.scale is None:
            raise ValueError("its recipe has integers without a scale.")
        return MASQuantTensor.from_integers(
            self.qdata.to(weight.device),
            self.scale,
            zero_point=self.zero_point,
            dtype=weight.dtype,
            **parts,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: t for name, t in found.items() if t is not None}


@dataclass
class Recipe:
    """How to quantize one model: made by ``calibrate``, used by ``masquant_config``.

    Attributes:
        options: scheme, method, alpha and rank that it was solved for.
        modalities: names, base first; modality ids index them.
        layers: name of a linear in the model to its part.
        versions: of the libraries that made it.
    """

    options: SolverOptions
    modalities: tuple[str, ...]
    layers: dict[str, LayerRecipe]
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            layer.check(name, len(self.modalities))

    @property
    def scheme(self) -> str:
        return self.options.scheme

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            t.nbytes for layer in self.layers.values() for t in layer.tensors().values()
        )

    def __repr__(self) -> str:
        options = self.options
        return (
            f"Recipe({options.method}, {options.scheme}, alpha={options.alpha}, "
            f"rank={options.rank}, modalities={self.modalities}, "
            f"{len(self.layers)} linears, {self.nbytes} bytes)"
        )

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write one safetensors file; a file of that name is replaced whole.

        Raises:
            FileNotFoundError: the folder of ``path`` does not exist.
        """
        path = Path(path)
        header = {
            "options": vars(self.options),
            "modalities": self.modalities,
            "versions": self.versions,
            "layers": {
                name: {
                    "shape": layer.shape,
                    "fingerprint": layer.fingerprint,
                    "ranks": layer.ranks,
                }
                for name, layer in self.layers.items()
            },
        }
        tensors: dict[str, torch.Tensor] = {}
        storages = set()
        for name, layer in self.layers.items():
            for key, tensor in layer.tensors().items():
                tensor = tensor.contiguous()
                # safetensors refuses tensors that share memory.
                if tensor.untyped_storage().data_ptr() in storages:
                    tensor = tensor.clone()
                storages.add(tensor.untyped_storage().data_ptr())
                tensors[f"{name}.{key}"] = tensor
        metadata = {
            "format": _FORMAT,
            "format_version": str(_FORMAT_VERSION),
            "recipe": json.dumps(header),
        }
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {os.fspath(path)!r}: there is no folder "
                f"{os.fspath(path.parent)!r}."
            )
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> "Recipe":
        """Read a recipe that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no recipe, is damaged, or is of a newer format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no recipe file {os.fspath(path)!r}.")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = _header(path, file.metadata() or {})
                return cls(
                    options=SolverOptions(**header["options"]),
                    modalities=tuple(header["modalities"]),
                    layers={
                        name: _load_layer(file, name, entry)
                        for name, entry in header["layers"].items()
                    },
                    versions=header["versions"],
                )
        except _UnreadableError:
            raise
        except (
            safetensors.SafetensorError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no recipe, or a damaged one: {error}."
            ) from error


class _UnreadableError(ValueError):
    """A file that is whole, but not for this version to read."""


def read_header(path: Union[str, os.PathLike]) -> tuple[int, dict[str, Any]]:
    """All of a recipe but its tensors, which are not read.

    Returns:
        The format version; and options, modalities, versions and layers, as in the file.

    Raises:
        ValueError: the file is no recipe, is damaged, or is of another format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return int(metadata.get("format_version", "0")), _header(path, metadata)
    except _UnreadableError:
        raise
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no recipe, or a damaged one: {error}."
        ) from error


def _header(
    path: Union[str, os.PathLike], metadata: Mapping[str, str]
) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        raise _UnreadableError(
            f"{os.fspath(path)!r} is a safetensors file, but no MASQuant recipe."
        )
    version = int(metadata["format_version"])
    if version != _FORMAT_VERSION:
        advice = "upgrade it" if version > _FORMAT_VERSION else "calibrate again"
        raise _UnreadableError(
            f"{os.fspath(path)!r} is of recipe format {version}, this version of "
            f"torchao_masquant reads {_FORMAT_VERSION}: {advice}."
        )
    return json.loads(metadata["recipe"])


def _load_layer(file: Any, name: str, entry: Mapping[str, Any]) -> LayerRecipe:
    keys = set(file.keys())
    tensors = {
        key: file.get_tensor(f"{name}.{key}")
        for key in _TENSORS
        if f"{name}.{key}" in keys
    }
    n, k = entry["shape"]
    return LayerRecipe(
        shape=(n, k),
        fingerprint=entry["fingerprint"],
        ranks=tuple(entry["ranks"]),
        **tensors,
    )
