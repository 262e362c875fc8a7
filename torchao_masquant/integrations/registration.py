# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Telling other libraries of ours, once they are imported."""

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable, Mapping, Optional, Sequence

__all__ = ["register_integrations"]


def _register_with_transformers(registry: ModuleType) -> None:
    """The method "masquant", for ``from_pretrained``."""
    from torchao_masquant.integrations.checkpoint_format import QUANT_METHOD
    from torchao_masquant.integrations.hf_config import MASQuantHfConfig
    from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

    # In place of the stand-ins of torchao_masquant_autoload, too, which transformers'
    # own functions would take for a second registration.
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MASQuantHfConfig
    registry.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MASQuantHfQuantizer
    torchao = registry.AUTO_QUANTIZER_MAPPING["torchao"]
    if not isinstance(torchao, _OfTorchAoConfig):
        registry.AUTO_QUANTIZER_MAPPING["torchao"] = _OfTorchAoConfig(torchao)


class _OfTorchAoConfig:
    """The quantizer of a ``TorchAoConfig``; ours where it holds a MASQuantConfig.

    transformers' own hands each linear over by itself, without its name or model.
    """

    def __init__(self, others: Any):
        self.others = others

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        from torchao_masquant.config import MASQuantConfig
        from torchao_masquant.integrations.hf_config import MASQuantHfConfig
        from torchao_masquant.integrations.hf_quantizer import MASQuantHfQuantizer

        if not isinstance(config.quant_type, MASQuantConfig):
            return self.others(config, **kwargs)
        ours = MASQuantHfConfig(
            config=config.quant_type,
            modules_to_not_convert=config.modules_to_not_convert,
        )
        return MASQuantHfQuantizer(ours, **kwargs)


def _watch_models(modeling: ModuleType) -> None:
    """Models that are quantized, and ``save_pretrained`` where a part of one is."""
    from torchao_masquant.conversion.listeners import listen
    from torchao_masquant.integrations.attachment import (
        attach_to_transformers,
        resizing_dense,
        saving_whole,
    )

    listen(attach_to_transformers)
    kind = modeling.PreTrainedModel
    if kind not in _WATCHED:
        _WATCHED.append(kind)
        kind.save_pretrained = saving_whole(kind.save_pretrained)
        kind.resize_token_embeddings = resizing_dense(kind.resize_token_embeddings)


def _register_config(registry: ModuleType) -> None:
    """The module of our config, for ``config_from_dict``."""
    # A config is named in JSON by its class alone, looked up in the modules of this set;
    # one of its own, since torchao calls whatever has the name.
    registry.ALLOWED_AO_MODULES.add("torchao_masquant.integrations.torchao_config")


def _register_tensor(registry: ModuleType) -> None:
    """The tensor, for ``flatten_tensor_state_dict`` and its reverse."""
    from torchao_masquant.tensor_subclasses import MASQuantTensor

    name = MASQuantTensor.__name__
    registry.ALLOWED_CLASSES[name] = MASQuantTensor
    if name not in registry.ALLOWED_TENSORS_SUBCLASSES:
        registry.ALLOWED_TENSORS_SUBCLASSES.append(name)


# Classes whose methods are watched: once is enough.
_WATCHED: list[type] = []


def _register_with_torch(registry: ModuleType) -> None:
    """The tensor, for ``torch.load``, and its operators."""
    ours = f"{__name__.partition('.')[0]}."
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if name.startswith(ours) and getattr(spec, "_initializing", False):
            # A module of ours is importing torch, and will import what it needs.
            return
    importlib.import_module("torchao_masquant.tensor_subclasses")


# The modules that keep what a library knows.
_REGISTRIES: Mapping[str, Callable[[ModuleType], None]] = {
    "torch": _register_with_torch,
    "torchao.core.config": _register_config,
    "torchao.prototype.safetensors.safetensors_utils": _register_tensor,
    "transformers.modeling_utils": _watch_models,
    "transformers.quantizers.auto": _register_with_transformers,
}


def register_integrations() -> None:
    """Let transformers load quantized models of ours, and torch and torchao know them.

    Now, where their modules are imported; otherwise as soon as they are, since
    importing them takes seconds that only their users should spend.
    """
    for name, register in _REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name])
        elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, register))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module where the other finders do, and is told when it has run."""

    def __init__(self, name: str, register: Callable[[ModuleType], None]):
        self.name = name
        self.register = register

    def find_spec(
        self,
        fullname: str,
        path: Optional[Sequence[str]],
        target: Optional[ModuleType] = None,
    ) -> Optional[ModuleSpec]:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            # Old kinds of finders have no find_spec.
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader does, and registers with it."""

    def __init__(self, loader: Any, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # From here on it is an ordinary module.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.register(module)
