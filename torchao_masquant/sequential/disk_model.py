# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""A transformers model whose weights stay on disk until a part of it is to run."""

import collections
import contextlib
import os
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Union

import safetensors
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from torchao_masquant.hub import class_of, folder_of, load_config, weight_files
from torchao_masquant.integrations.stored_names import stored_to_model_names
from torchao_masquant.integrations.stored_tensors import stored_tensors
from torchao_masquant.integrations.unloaded import is_of_same_model
from torchao_masquant.tensor_subclasses.weight_layout import TensorKind

__all__ = ["DiskModel", "checkpoint_dtype"]


class DiskModel:
    """A model on the meta device, and the files that its parts are loaded from.

    Buffers that no file holds (rotary frequencies) are there from the start. Weights
    are mapped, not read: on the CPU, in the type that they are stored in, a loaded part
    is pages of the file, which the system may drop and read again.

    Args:
        model: folder of a transformers checkpoint in safetensors files, or its name on
            the hub.
        dtype: of the weights; None for what the checkpoint's config says.
        device: that parts are loaded to.
        model_class: of transformers; None for the one that the config names.

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors file in it.
        ValueError: the checkpoint is quantized, incomplete, or of an unknown class.
    """

    def __init__(
        self,
        model: Union[str, os.PathLike],
        dtype: Optional[torch.dtype] = None,
        device: Union[str, torch.device] = "cpu",
        model_class: Optional[type] = None,
    ):
        self.folder = folder_of(model)
        self.device = torch.device(device)
        self._file_of: dict[str, Path] = {}
        self.stored: dict[str, TensorKind] = {}
        self.files = weight_files(self.folder)
        for file in self.files:
            tensors = stored_tensors([str(file)])
            self.stored |= tensors
            self._file_of |= dict.fromkeys(tensors, file)
        config = load_config(self.folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{os.fspath(model)!r} is quantized already: calibrate the original."
            )
        if dtype is None:
            dtype = _dtype(config, self.files)
        self.dtype: torch.dtype = dtype
        kind = model_class or class_of(config, "give model_class=")
        self.model: Any = self._skeleton(kind, config)
        #: name in a file to the names in the model that it becomes
        self.names: dict[str, list[str]] = stored_to_model_names(
            self.model, list(self.stored)
        )
        #: name of a weight to the one that it shares its values with
        self.tied: dict[str, str] = dict(
            getattr(self.model, "all_tied_weights_keys", None) or {}
        )
        self._check_complete()

    def _skeleton(self, kind: Any, config: Any) -> Any:
        with torch.device("meta"):
            meta = kind._from_config(config, dtype=self.dtype)
        # One number each, shown in the weight's shape: from_pretrained finds nothing
        # missing to initialize, and makes the buffers that no file holds.
        state = {
            name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            for name, tensor in meta.state_dict().items()
        }
        del meta
        with _quiet():
            # Not a class's own one, which may look for more files than weights.
            model = transformers.PreTrainedModel.from_pretrained.__func__(
                kind, None, config=config, state_dict=state, dtype=self.dtype
            )
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                self.folder
            )
        self._non_persistent = {
            name for name, _ in model.named_non_persistent_buffers()
        }
        _to_meta(model, list(state))
        for name, buffer in model.named_buffers():
            if name in self._non_persistent:
                _set(model, name, buffer.to(self.device))
        return model.eval()

    def _check_complete(self) -> None:
        state = self.model.state_dict()
        covered = {name for names in self.names.values() for name in names}
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        for name in state:
            partners = {self.tied.get(name)} | {
                k for k, v in self.tied.items() if v == name
            }
            if name not in covered | ignored and not partners & covered:
                raise ValueError(
                    f"the checkpoint in {os.fspath(self.folder)!r} has no {name}, which "
                    f"{type(self.model).__name__} needs: download it again, or give the "
                    "model_class that it was saved from."
                )

    @property
    def unloaded(self) -> dict[str, Path]:
        """Names of tensors that are none of the model's, and the files that hold them."""
        return {n: file for n, file in self._file_of.items() if n not in self.names}

    @property
    def is_whole(self) -> bool:
        """Whether the class is of all that the files hold, and not of a part of it."""
        return is_of_same_model(self.model, self.folder)

    @property
    def unloaded_bytes(self) -> int:
        """Bytes of what :attr:`unloaded` names."""
        kinds = [self.stored[name] for name in self.unloaded]
        return sum(torch.Size(s).numel() * dtype.itemsize for dtype, s in kinds)

    @property
    def names_in_files(self) -> list[str]:
        """Names in the model of the weights and buffers that files hold."""
        covered = {name for names in self.names.values() for name in names}
        return [name for name in self.model.state_dict() if name in covered]

    def names_under(self, prefix: str) -> list[str]:
        """Those of one module."""
        return [n for n in self.names_in_files if n.startswith(f"{prefix}.")]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of some weights, once they are loaded."""
        state = self.model.state_dict()
        return sum(state[name].numel() * state[name].element_size() for name in names)

    def bytes_of_conversion(self, names: Iterable[str]) -> int:
        """Bytes that loading some weights takes, for a moment, beyond what they are.

        A weight that is made from several tensors of the files (transformers stacks
        those of experts) is there twice: in parts, and as a whole.
        """
        counts = collections.Counter(n for to in self.names.values() for n in to)
        made = [self.bytes_of([name]) for name in names if counts[name] > 1]
        return max(made, default=0)

    def load(self, names: Iterable[str]) -> None:
        """Load some weights, with those that come out of the same tensors.

        Args:
            names: in the model.

        Raises:
            ValueError: a weight does not fit the model.
        """
        state = self.model.state_dict()
        # The source of a tied weight brings it along.
        wanted = {self.tied.get(n, n) if state[n].is_meta else n for n in names}
        wanted = {name for name in wanted if state[name].is_meta}
        keys = [key for key, to in self.names.items() if wanted & set(to)]
        if keys:
            self._load(keys)
        for name in wanted:
            _get(self.model, name).requires_grad_(False)
        tied = {t: s for t, s in self.tied.items() if s in wanted}
        for target, source in tied.items():
            _set(self.model, target, _get(self.model, source))

    def _load(self, keys: list[str]) -> None:
        with contextlib.ExitStack() as stack, _quiet():
            files = {
                path: stack.enter_context(safetensors.safe_open(path, framework="pt"))
                for path in sorted({self._file_of[key] for key in keys})
            }
            slices = {key: files[self._file_of[key]].get_slice(key) for key in keys}
            conversions = self.model._weight_conversions
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                slices,
                LoadStateDictConfig(
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    device_map={"": self.device},
                    weight_mapping=get_model_conversion_mapping(self.model),
                ),
            )
            # Those that this part used are not all that the model's files need.
            self.model._weight_conversions = conversions
        wrong = [*info.error_msgs, *info.conversion_errors.values()]
        wrong += [str(key) for key in info.mismatched_keys]
        if wrong:
            raise ValueError(
                f"weights in {os.fspath(self.folder)!r} do not fit "
                f"{type(self.model).__name__}: {wrong[0]}."
            )

    def free(self, names: Iterable[str]) -> None:
        """Forget some loaded weights."""
        _to_meta(self.model, list(names))

    @contextlib.contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Some weights, inside; those that were there before stay."""
        before = self.model.state_dict()
        try:
            self.load(name for name in names if before[name].is_meta)
            yield
        finally:
            # What shares its values with another has come with it.
            now = self.model.state_dict()
            self.free(n for n, v in before.items() if v.is_meta and not now[n].is_meta)

    def in_files(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a part of the model as transformers would save them.

        Args:
            state: name in the model to tensor.
        """
        return revert_weight_conversion(self.model, state)


def checkpoint_dtype(model: Union[str, os.PathLike]) -> torch.dtype:
    """What a checkpoint's config says its weights are, or else its first weights are.

    Args:
        model: its folder, or its name on the hub.

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors file in it.
    """
    folder = folder_of(model)
    return _dtype(load_config(folder), weight_files(folder))


def _dtype(config: Any, files: Iterable[Path]) -> torch.dtype:
    return getattr(config, "dtype", None) or next(
        dtype
        for file in files
        for dtype, _ in stored_tensors([str(file)]).values()
        if dtype.is_floating_point
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars, one for each part."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _get(model: nn.Module, name: str) -> Any:
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if child in module._parameters:
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        module._parameters[child] = value
    else:
        module._buffers[child] = value


def _to_meta(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        value = _get(model, name)
        if not value.is_meta:
            _set(model, name, torch.empty_like(value, device="meta"))
