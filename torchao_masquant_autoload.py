# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What an installed torchao_masquant tells transformers before anyone imports it.

torch calls :func:`register` when it is imported (its entry points ``torch.backends``), so
that a plain ``from_pretrained`` finds the method of a quantized folder. This module lies
beside the package and not in it, and leaves stand-ins with transformers: the package,
which takes seconds to import, is imported by the first model that asks for it.
"""

import importlib
import importlib.abc
import sys
from typing import Any

__all__ = ["register"]

_REGISTRY = "transformers.quantizers.auto"
_METHOD = "masquant"


class _Config:
    """Stands in for MASQuantHfConfig, as far as transformers asks before it has one."""

    @staticmethod
    def from_dict(entry: dict[str, Any], **kwargs: Any) -> Any:
        return _package("hf_config").MASQuantHfConfig.from_dict(entry, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Stands in for MASQuantHfQuantizer."""
    return _package("hf_quantizer").MASQuantHfQuantizer(config, **kwargs)


def _package(module: str) -> Any:
    # Puts its own classes in the stand-ins' place.
    importlib.import_module("torchao_masquant")
    return importlib.import_module(f"torchao_masquant.integrations.{module}")


def _tell(registry: Any) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(_METHOD, _Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(_METHOD, _quantizer)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as other finders do; when it has run, transformers is told."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        # Whoever imports it next, finds it without us.
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = getattr(finder, "find_spec", lambda *_: None)(name, path, target)
            if spec is not None:
                run = spec.loader.exec_module

                def exec_module(module: Any) -> None:
                    run(module)
                    _tell(sys.modules[_REGISTRY])

                spec.loader.exec_module = exec_module
                return spec
        return None


def register() -> None:
    """Let transformers know the method "masquant", once it is imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    registry = sys.modules.get(_REGISTRY)
    if registry is None:
        sys.meta_path.insert(0, _Finder(_REGISTRY))
    elif hasattr(registry, "AUTO_QUANTIZER_MAPPING"):
        _tell(registry)
    else:
        # It is what imports torch. No model is loaded before this has run:
        sys.meta_path.insert(0, _Finder("transformers.modeling_utils"))
