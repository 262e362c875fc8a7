# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What calibration found: everything needed to quantize a model, but its weights."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import safetensors
import torch
from safetensors.torch import save_file

from torchao_masquant.atomic_files import replacing
from torchao_masquant.kernels.hadamard import check_hadamard_size
from torchao_masquant.options import Scheme, SolverOptions, get_scheme
from torchao_masquant.outputs import RECIPE_FORMAT, check_file
from torchao_masquant.tensor_subclasses import MASQuantTensor
from torchao_masquant.tensor_subclasses.low_rank_pair import copy_components
from torchao_masquant.tensor_subclasses.weight_layout import (
    PARTS,
    Part,
    WeightLayout,
    group_count,
)

__all__ = [
    "LARGEST_DIMENSION",
    "LayerRecipe",
    "Recipe",
    "described",
    "join_recipes",
    "library_versions",
    "read_header",
    "weight_fingerprint",
]

# Each has something that readers of the one before do not know.
_PLAIN, _EXPERTS, _ROTATED, _SCHEMES, _TOWERS = _FORMAT_VERSIONS = (2, 3, 4, 5, 6)
_TENSORS = (
    "smoothing_factor",
    "l1",
    "l2",
    "modality_bias",
    "act_shift",
    "qdata",
    "scale",
    "zero_point",
    "row_scale",
)

_INTEGERS = ("qdata", "zero_point")

# Of a layer, what is no tensor; those that a file has where they are not None.
_UNSAID = ("hadamard_size", "scheme", "modalities")
_PLAIN_FIELDS = ("shape", "fingerprint", "ranks", *_UNSAID)

#: No dimension of a weight in a file may be larger: it is beyond any model's, and small
#: enough for sizes to be multiplied before anything is allocated.
LARGEST_DIMENSION = 2**24

# Of a weight, that are rounded: an output head has some hundred thousand rows.
_VALUES_AT_ONCE = 2**26


def weight_fingerprint(weight: torch.Tensor) -> str:
    """16 hex digits that tell a weight from a changed one.

    Of the values, not of the type: a float32 copy of a bfloat16 weight has the same.

    Args:
        weight: any floating point tensor.
    """
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    # Expert by expert: a whole layer's are large.
    for part in weight if weight.dim() == 3 else (weight,):
        values = part.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(eq=False)
class LayerRecipe:
    """Part of a recipe: one linear of shape (N, K), with M modalities.

    Or one projection of the E experts of a mixture, of shape (E, N, K). Those share the
    smoothing factor, and may share the shift; all other tensors have a leading dimension
    E.

    Attributes:
        shape: (N, K) or (E, N, K).
        fingerprint: of the weight that it was made for, see :func:`weight_fingerprint`.
        smoothing_factor: (M, K) float32, or (1, K) where all modalities share one.
        ranks: of the pairs of modality 1, 2, ..., or empty: no pairs.
        l1: (K, R) down-projections side by side, R the sum of ``ranks``.
        l2: (R, N) up-projections one below the other.
        modality_bias: (M, N) what each modality adds.
        act_shift: (M, K) float32, what is taken off the smoothed activations; its
            product with the weight is part of ``modality_bias``.
        qdata: (N, K) int8, unpacked integers of the weight, or codes of its number
            format, where they are not those of round-to-nearest; None: the weight is
            rounded when it is converted.
        scale: (N, G) float32 of ``qdata``.
        zero_point: (N, G) of ``qdata`` where it is asymmetric.
        hadamard_size: of the rotation of the smoothed weight and its input, see
            :mod:`torchao_masquant.kernels.hadamard`; ``l1`` and ``qdata`` are of rotated
            channels. None: there is no rotation.
        scheme: name of its own, which ``qdata`` is or will be of; None: that of the recipe.
        row_scale: (N,) float32, which ``scale`` is to be multiplied by in a number
            format of two levels.
        modalities: that a tower's linear meets, one; None: those of the recipe.
    """

    shape: tuple[int, ...]
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
    hadamard_size: Optional[int] = None
    row_scale: Optional[torch.Tensor] = None
    scheme: Optional[str] = None
    modalities: Optional[tuple[str, ...]] = None

    def modalities_of(self, of_recipe: Sequence[str]) -> tuple[str, ...]:
        """Names of those that its tokens may be of, base first.

        Args:
            of_recipe: those of the recipe.
        """
        return tuple(of_recipe if self.modalities is None else self.modalities)

    def number_format(self, of_recipe: Scheme) -> Scheme:
        """Its integer formats.

        Args:
            of_recipe: those of the recipe; ready integers have their own groups.
        """
        if self.scheme is None:
            return of_recipe
        own = get_scheme(self.scheme)
        if own.has_own_groups:
            return own
        if self.scale is None:
            return own
        groups = self.scale.shape[-1]
        return dataclasses.replace(
            own,
            group_size=None if groups == 1 else self.shape[-1] // groups,
        )

    def _count(self, of_recipe: int) -> int:
        """M, given that of the recipe."""
        return of_recipe if self.modalities is None else len(self.modalities)

    def check(self, name: str, modalities: int) -> None:
        """Raise unless all parts fit each other.

        Args:
            name: of the linear, for the message.
            modalities: M of the recipe.

        Raises:
            ValueError: a shape is wrong, or a part is missing.
        """
        modalities = self._count(modalities)
        if len(self.shape) not in (2, 3):
            raise ValueError(
                f"{name} is of shape {self.shape}: a weight has 2 or 3 sizes"
            )
        if self.hadamard_size is not None:
            try:
                check_hadamard_size(self.hadamard_size, self.shape[-1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if self.scheme is not None:
            get_scheme(self.scheme)
        rank = sum(self.ranks)
        if rank and len(self.ranks) != modalities - 1:
            raise ValueError(
                f"{name} has {len(self.ranks)} ranks for {modalities} modalities"
            )
        ready = any(t is not None for t in (self.qdata, self.scale, self.zero_point))
        layout = self._layout(
            modalities,
            # A byte each: they are not packed.
            weight_bits=8,
            groups=0 if self.scale is None else self.scale.shape[-1:].numel(),
            symmetric=self.zero_point is None,
            pair_dtype=torch.bfloat16,
        )
        expected = {part.name: layout.shape_of(part) for part in layout.parts()}
        if ready and self.row_scale is not None:
            expected["row_scale"] = layout.shape_of(PARTS["row_scale"])
        for key in _TENSORS:
            tensor, shape = getattr(self, key), expected.get(_part(key).name)
            if key in ("qdata", "scale") and not ready:
                shape = None
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(
                    f"{key} of {name} is of shape {found}, it should be {shape}"
                )

    def layout(
        self, scheme: Scheme, modalities: int, low_rank_bits: int = 16
    ) -> WeightLayout:
        """Of the weight that :meth:`quantize` gives.

        Args:
            scheme: integer formats; ready integers have their own groups.
            modalities: M of the recipe.
            low_rank_bits: 16 or 8, of the low-rank pairs.
        """
        scale, scheme = self.scale, self.number_format(scheme)
        return self._layout(
            self._count(modalities),
            weight_bits=scheme.weight_bits,
            groups=group_count(scheme.group_size, self.shape[-1])
            if scale is None
            else scale.shape[-1],
            symmetric=scheme.symmetric if scale is None else self.zero_point is None,
            pair_dtype=torch.int8 if low_rank_bits == 8 else torch.bfloat16,
            weight_format=scheme.weight_format,
        )

    def _layout(self, modalities: int, **integers: Any) -> WeightLayout:
        return WeightLayout(
            shape=self.shape,
            modalities=modalities,
            factors=1 if self.smoothing_factor.shape[:1] == (1,) else modalities,
            rank=sum(self.ranks),
            bias=self.modality_bias is not None,
            shift=self.act_shift is not None,
            own_shift=self.act_shift is not None and self.act_shift.dim() == 3,
            **integers,
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
            weight: floating point, the one that this part was made for.
            scheme: integer formats.
            modalities: of the recipe, names, base first.
            low_rank_bits: 16 or 8, of the low-rank pairs.

        Raises:
            ValueError: the weight does not fit the scheme or this part.
        """
        if len(self.shape) == 3:
            return MASQuantTensor.stack(
                [
                    self.expert(e).quantize(
                        of_expert, scheme, modalities, low_rank_bits
                    )
                    for e, of_expert in enumerate(weight)
                ]
            )
        scheme = self.number_format(scheme)
        parts: dict[str, Any] = dict(
            weight_bits=scheme.weight_bits,
            act_bits=scheme.act_bits,
            modalities=self.modalities_of(modalities),
            smoothing_factor=self.smoothing_factor,
            ranks=self.ranks,
            l1=self.l1,
            l2=self.l2,
            modality_bias=self.modality_bias,
            act_shift=self.act_shift,
            low_rank_bits=low_rank_bits,
            hadamard_size=self.hadamard_size,
            weight_format=scheme.weight_format,
            act_format=scheme.act_format,
        )
        if self.qdata is None:
            rows = len(weight)
            if not self.ranks and self.modality_bias is None:
                rows = max(1, _VALUES_AT_ONCE // weight.shape[-1])
            pieces: list[torch.Tensor] = [
                MASQuantTensor.from_hp(
                    piece,
                    group_size=scheme.group_size,
                    symmetric=scheme.symmetric,
                    **parts,
                )
                for piece in weight.split(rows)
            ]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            assert isinstance(whole, MASQuantTensor)
            return whole
        if self.scale is None:
            raise ValueError("its recipe has integers without a scale.")
        return MASQuantTensor.from_integers(
            self.qdata.to(weight.device),
            self.scale,
            zero_point=self.zero_point,
            row_scale=self.row_scale,
            dtype=weight.dtype,
            **parts,
        )

    def made(
        self,
        weight: object,
        scheme: Scheme,
        modalities: Sequence[str],
        low_rank_bits: int = 16,
    ) -> bool:
        """Whether something is what :meth:`quantize` gives with these arguments.

        As far as that can be told without the weight that it was made of: integers that
        are not this part's own are not looked at.
        """
        if not isinstance(weight, MASQuantTensor) or weight.is_meta:
            return False
        scheme = self.number_format(scheme)
        group_size = None if weight.scale.shape[-1] == 1 else weight.group_size
        alike = (
            tuple(weight.shape) == tuple(self.shape)
            and (weight.weight_bits, weight.act_bits, weight.symmetric)
            == (scheme.weight_bits, scheme.act_bits, scheme.symmetric)
            and (weight.weight_format, weight.act_format)
            == (scheme.weight_format, scheme.act_format)
            and group_size in (scheme.group_size, None)
            and weight.hadamard_size == self.hadamard_size
            and weight.modalities == self.modalities_of(modalities)
            and tuple(weight.ranks) == tuple(self.ranks)
            and (self.l1 is None or weight.low_rank_bits == low_rank_bits)
        )
        return alike and all(
            _equal(ours, theirs)
            for ours, theirs in (
                (self.smoothing_factor.float().reciprocal(), weight.act_pre_scale),
                (self.act_shift, weight.act_shift),
                (self.modality_bias, weight.modality_bias),
                (self.qdata, None if self.qdata is None else weight.int_data()),
            )
        )

    @classmethod
    def rounded(
        cls,
        shape: Sequence[int],
        *,
        scheme: Optional[str] = None,
        hadamard_size: Optional[int] = None,
        modalities: Optional[tuple[str, ...]] = None,
    ) -> "LayerRecipe":
        """The part that needs no data: neither smoothed nor compensated.

        Args:
            shape: (N, K) or (E, N, K) of a weight.
            scheme: name of its own; None for that of the recipe.
            hadamard_size: of the rotation of its channels; None for none.
            modalities: see the class.
        """
        return cls(
            shape=tuple(shape),
            fingerprint="",
            # transformers makes models under a default device and dtype of its own.
            smoothing_factor=torch.ones(
                1, shape[-1], device="cpu", dtype=torch.float32
            ),
            scheme=scheme,
            hadamard_size=hadamard_size,
            modalities=modalities,
        )

    def expert(self, index: int) -> "LayerRecipe":
        """The part of one expert, where this is that of E of them."""
        own: dict[str, Any] = {
            name: tensor[index]
            for name, tensor in self.tensors().items()
            if _part(name).is_of_each_expert(tensor)
        }
        return dataclasses.replace(self, shape=self.shape[1:], **own)

    @classmethod
    def stack(cls, parts: "Sequence[LayerRecipe]", fingerprint: str) -> "LayerRecipe":
        """One part for all experts of a mixture.

        Args:
            parts: of each expert, with the same smoothing factor and rotation. Where
                pairs differ in rank, smaller ones are filled up with zeros.
            fingerprint: of the weights of all.

        Raises:
            ValueError: they are rotated in different ways.
        """
        first = parts[0]
        if any(part.hadamard_size != first.hadamard_size for part in parts):
            sizes = sorted({str(part.hadamard_size) for part in parts})
            raise ValueError(
                "the experts of a mixture share one rotation: got hadamard_size of "
                f"{' and '.join(sizes)}."
            )
        ranks = tuple(max(r) for r in zip(*(p.ranks for p in parts if p.ranks)))
        padded = [_padded(part, ranks) for part in parts]
        stacked: dict[str, Any] = {
            name: _part(name).stacked([getattr(part, name) for part in padded])
            for name in padded[0].tensors()
        }
        return cls(
            shape=(len(parts), *first.shape),
            fingerprint=fingerprint,
            ranks=ranks,
            hadamard_size=first.hadamard_size,
            **stacked,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: t for name, t in found.items() if t is not None}

    def __eq__(self, other: object) -> bool:
        # A dataclass's own comparison asks tensors for one truth value.
        if not isinstance(other, LayerRecipe):
            return NotImplemented
        ours, theirs = self.tensors(), other.tensors()
        return (
            all(getattr(self, name) == getattr(other, name) for name in _PLAIN_FIELDS)
            and ours.keys() == theirs.keys()
            and all(torch.equal(ours[name], theirs[name]) for name in ours)
        )


def _equal(a: Optional[torch.Tensor], b: Optional[torch.Tensor]) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.to(b.device, b.dtype), b)


def _padded(part: LayerRecipe, ranks: tuple[int, ...]) -> LayerRecipe:
    """The same part of a linear, with components of zeros up to these ranks."""
    if part.ranks == ranks:
        return part
    layout = WeightLayout(part.shape, weight_bits=8, rank=sum(ranks))
    sides: dict[str, Any] = {}
    for name in ("l1", "l2"):
        own = getattr(part, name)
        dtype = torch.float32 if own is None else own.dtype
        sides[name] = torch.zeros(layout.shape_of(PARTS[name]), dtype=dtype)
        if own is not None:
            components = PARTS[name].dims.index("R")
            copy_components(sides[name], ranks, own, part.ranks, components)
    return dataclasses.replace(part, ranks=ranks, **sides)


def _part(name: str) -> Part:
    """The part of a weight that one of a recipe's tensors becomes."""
    return PARTS["act_pre_scale" if name == "smoothing_factor" else name]


@dataclass
class Recipe:
    """How to quantize one model: made by ``calibrate``, used by ``masquant_config``.

    Attributes:
        options: scheme, method, alpha and rank that it was solved for.
        modalities: names, base first; modality ids index them.
        layers: name of a linear in the model, or of a parameter that holds the weights
            of experts, to its part.
        versions: of the libraries that made it.
        description: what it was made from, for people: "samples", how many; "tokens",
            modality to how many; and, where the command line made it, "model" and
            "data", their names. JSON.
    """

    options: SolverOptions
    modalities: tuple[str, ...]
    layers: dict[str, LayerRecipe]
    versions: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)

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

    @property
    def provenance(self) -> dict[str, Any]:
        """What a checkpoint tells of the calibration, and of the libraries."""
        return {"versions": self.versions, **self.description}

    @property
    def _fields(self) -> tuple[str, ...]:
        # torchao's JSON encoder asks each object for it, and lets a TypeError through.
        raise TypeError(
            "a recipe cannot be written into the JSON of a config: save it, and give "
            "the config its path, as in masquant_config('recipe.safetensors')."
        )

    def __repr__(self) -> str:
        options = self.options
        return (
            f"Recipe({options.method}, {options.scheme}, alpha={options.alpha}, "
            f"rank={options.rank}, modalities={self.modalities}, "
            f"{len(self.layers)} linears, {self.nbytes} bytes)"
        )

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write one safetensors file; a recipe of that name is replaced whole.

        Raises:
            FileNotFoundError: the folder of ``path`` does not exist.
            ValueError: a file that is no recipe is there, such as a model's weights.
        """
        path = Path(path)
        check_file(path, "recipe")
        header = {
            "options": self.options.stored(),
            "modalities": self.modalities,
            "versions": self.versions,
            "description": self.description,
            "layers": {
                name: {
                    "shape": layer.shape,
                    "fingerprint": layer.fingerprint,
                    "ranks": layer.ranks,
                    # Earlier readers do not know them.
                    **{
                        key: value
                        for key in _UNSAID
                        if (value := getattr(layer, key)) is not None
                    },
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
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=_metadata(header))

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
                _check_names(set(file.keys()), header["layers"])
                return cls(
                    options=SolverOptions(**header["options"]),
                    modalities=_modalities(header["modalities"]),
                    layers={
                        name: _load_layer(file, name, entry)
                        for name, entry in header["layers"].items()
                    },
                    versions=header["versions"],
                    description=described(header),
                )
        except _UnreadableError:
            raise
        except (
            safetensors.SafetensorError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # What a file says may have lines of its own.
            cause = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"{os.fspath(path)!r} is no recipe, or a damaged one: {cause}."
            ) from error


def join_recipes(
    parts: Sequence[Path],
    path: Path,
    metadata: Mapping[str, str],
    description: Mapping[str, Any],
) -> None:
    """Write one recipe's file from those of its parts, without holding them in memory.

    Linears come first, and experts behind them, as :func:`calibrate` has them.

    Args:
        parts: files of recipes of one calibration, for different linears.
        path: a file of that name is replaced whole.
        metadata: more for the file's header.
        description: of the whole, see :class:`Recipe`.

    Raises:
        ValueError: a part is no recipe.
    """
    tensors: dict[str, torch.Tensor] = {}
    whole: dict[str, Any] = {}
    for part in parts:
        # Mapped: pages of the parts' files, which go straight to the new one.
        with safetensors.safe_open(part, framework="pt") as file:
            header = _header(part, file.metadata() or {})
            whole = {
                **header,
                "layers": {**whole.get("layers", {}), **header["layers"]},
            }
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    whole["description"] = dict(description)
    layers = whole.get("layers", {})
    whole["layers"] = dict(sorted(layers.items(), key=lambda n: len(n[1]["shape"])))
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, **_metadata(whole)})


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    layers = header["layers"].values()
    version = _PLAIN
    if any(len(layer["shape"]) == 3 for layer in layers):
        version = _EXPERTS
    if any("hadamard_size" in layer for layer in layers):
        version = _ROTATED
    floats = get_scheme(header["options"]["scheme"]).floats
    if floats or any("scheme" in layer for layer in layers):
        version = _SCHEMES
    if any("modalities" in layer for layer in layers):
        version = _TOWERS
    return {
        "format": RECIPE_FORMAT,
        "format_version": str(version),
        "recipe": json.dumps(header),
    }


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
    if metadata.get("format") != RECIPE_FORMAT:
        raise _UnreadableError(
            f"{os.fspath(path)!r} is a safetensors file, but no MASQuant recipe."
        )
    version = int(metadata["format_version"])
    if version not in _FORMAT_VERSIONS:
        newer = version > max(_FORMAT_VERSIONS)
        advice = "upgrade it" if newer else "calibrate again"
        known = f"{_FORMAT_VERSIONS[0]} to {_FORMAT_VERSIONS[-1]}"
        raise _UnreadableError(
            f"{os.fspath(path)!r} is of recipe format {version}, this version of "
            f"torchao_masquant reads {known}: {advice}."
        )
    header = json.loads(metadata["recipe"])
    for key in ("options", "layers", "versions"):
        if not isinstance(header[key], dict):
            raise ValueError(f"{key} is a dict, got {type(header[key]).__name__}")
    return header


def described(header: Mapping[str, Any]) -> dict[str, Any]:
    """The description in a header, of which older ones have none."""
    found = header.get("description", {})
    if not isinstance(found, dict):
        raise ValueError(f"description is a dict, got {type(found).__name__}")
    return found


def _modalities(names: Any) -> tuple[str, ...]:
    is_list = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not is_list or not names or len(set(names)) != len(names):
        raise ValueError(f"modalities is a list of different names, got {names!r}")
    return tuple(names)


def _check_names(stored: set[str], layers: Mapping[str, Any]) -> None:
    """Raise unless every tensor of a file is a layer's."""
    for name in layers:
        if not name.isprintable():
            raise ValueError(f"{name!r} is no name of a linear")
    left = stored - {f"{name}.{key}" for name in layers for key in _TENSORS}
    if left:
        raise ValueError(f"no layer has a tensor {sorted(left)[0]!r}")


def _load_layer(file: Any, name: str, entry: Mapping[str, Any]) -> LayerRecipe:
    shape = _sizes(entry["shape"], "shape", 1)
    ranks = _sizes(entry["ranks"], "ranks", 0)
    if not isinstance(entry["fingerprint"], str):
        raise ValueError(f"the fingerprint of {name} is no string")
    keys = set(file.keys())
    tensors = {}
    for key in _TENSORS:
        if f"{name}.{key}" not in keys:
            continue
        tensor = file.get_tensor(f"{name}.{key}")
        if key in _INTEGERS:
            fits = tensor.dtype == torch.int8
        else:
            fits = tensor.is_floating_point()
        if not fits:
            raise ValueError(f"{key} of {name} is of type {tensor.dtype}")
        tensors[key] = tensor
    return LayerRecipe(
        shape=shape,
        fingerprint=entry["fingerprint"],
        ranks=ranks,
        hadamard_size=entry.get("hadamard_size"),
        scheme=entry.get("scheme"),
        modalities=_modalities(entry["modalities"]) if "modalities" in entry else None,
        **tensors,
    )


def _sizes(values: Any, name: str, least: int) -> tuple[int, ...]:
    # bool is an int to isinstance.
    if not isinstance(values, list) or any(
        type(v) is not int or not least <= v <= LARGEST_DIMENSION for v in values
    ):
        raise ValueError(
            f"{name} is a list of integers in {least}..{LARGEST_DIMENSION}, got {values!r}"
        )
    return tuple(values)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a recipe's numbers depend on."""
    return {
        name: version(name)
        for name in ("torch", "torchao", "torchao_masquant", "transformers")
    }
