# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The towers of a model, which make tokens of images and sounds, and what lies behind them.

A linear of a tower sees patches of images or frames of sounds: tokens of one modality,
which are not the call's.
"""

from typing import Any, Iterator, Optional

from torch import nn

from torchao_masquant.models.families import TOWER_CONFIGS
from torchao_masquant.models.parts import find_decoder, heads_of, token_reader

__all__ = ["tower_linears"]

# What a part between a tower and the decoder may be called where a model both sees and hears.
_CALLED = {
    "vision": ("vision", "visual", "image"),
    "audio": ("audio", "sound", "speech"),
}


def tower_linears(model: nn.Module) -> dict[str, str]:
    """Name of each linear of a tower, or of what lies behind one, to its modality.

    Args:
        model: of transformers; its config says which part is a tower of what. A module
            without a config has none.

    Returns:
        In the model's order. Linears whose modality cannot be told are left out.
    """
    config = getattr(model, "config", None)
    decoder = find_decoder(model) if config is not None else None
    if decoder is None:
        return {}
    reader = token_reader(model)
    ours = decoder.possible() | {id(m) for h in heads_of(model) for m in h.modules()}
    prefix = next(n for n, m in model.named_modules() if m is reader)
    kinds = dict(_tower_configs(getattr(reader, "config", None)))
    met = sorted(set(kinds.values()))
    found: dict[str, str] = {}

    def visit(module: nn.Module, name: str, modality: Optional[str]) -> None:
        modality = modality or kinds.get(type(getattr(module, "config", None)))
        if isinstance(module, nn.Linear) and id(module) not in ours:
            known = modality or _by_name(name, met)
            if known is not None:
                found[name] = known
        for own, child in module.named_children():
            visit(child, f"{name}.{own}" if name else own, modality)

    visit(reader, prefix, None)
    return found


def _tower_configs(config: Any) -> Iterator[tuple[type, str]]:
    """Type of a tower's config to its modality, of one config and those in it."""
    for name in ("thinker_config", "text_config"):
        nested = getattr(config, name, None)
        if nested is not None and nested is not config:
            yield from _tower_configs(nested)
    for modality, name in TOWER_CONFIGS.items():
        tower = getattr(config, name, None)
        if tower is not None:
            yield type(tower), modality


def _by_name(name: str, met: list[str]) -> Optional[str]:
    """Of a part that is neither in a tower nor in the decoder."""
    if len(met) == 1:
        return met[0]
    called = [
        m for m in met if any(word in name.lower() for word in _CALLED.get(m, ()))
    ]
    return called[0] if len(called) == 1 else None
