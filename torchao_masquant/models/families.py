# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""What differs about a family of models where its config does not say it.

Most families need no entry: their config names the placeholder tokens, and
:mod:`torchao_masquant.models.parts` finds the decoder. docs/families.md lists those that are tested.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Optional

__all__ = ["FAMILIES", "TOWER_CONFIGS", "ModelFamily", "family_of"]

#: Modality to the sub-config of the tower that makes its tokens.
TOWER_CONFIGS: Mapping[str, str] = {"vision": "vision_config", "audio": "audio_config"}


@dataclass(frozen=True)
class ModelFamily:
    """What there is to know of the models of one ``config.model_type``.

    Attributes:
        high_precision: patterns (shell-style) of linears in the decoder to leave as
            they are unless they are included by name.
        refusal: why such a model cannot be quantized modality by modality, one
            sentence; None where it can.
    """

    high_precision: tuple[str, ...] = ()
    refusal: Optional[str] = None


_CROSS_ATTENTION = (
    "its images reach the decoder through cross-attention, so no token of a call is an "
    "image's and there are no modalities to tell apart; use torchao's own configs."
)

_GEMMA3N = ModelFamily(
    # Mixes the four copies of the hidden states: matrices of 4 columns or 4 rows, which
    # weigh nothing, and whose error every later layer inherits.
    high_precision=("*.altup.*",)
)

#: ``model_type`` of a config to what differs.
FAMILIES: Mapping[str, ModelFamily] = {
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "idefics": ModelFamily(refusal=_CROSS_ATTENTION),
    "mllama": ModelFamily(refusal=_CROSS_ATTENTION),
}

_ENCODER_DECODER = ModelFamily(
    refusal="its input_ids are the encoder's and its decoder reads them through "
    "cross-attention, so the modality of a call's tokens is not that of what the "
    "decoder's linears see; use torchao's own configs."
)

_ORDINARY = ModelFamily()


def family_of(config: Any) -> ModelFamily:
    """What differs about models with this config.

    Args:
        config: a transformers config, any object with the same attributes, or None.
    """
    if getattr(config, "is_encoder_decoder", False) and _has_tower(config):
        return _ENCODER_DECODER
    return FAMILIES.get(getattr(config, "model_type", ""), _ORDINARY)


def _has_tower(config: Any) -> bool:
    """Whether a config, or a part of it, is of a tower for images or sounds."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    towers = [getattr(config, name, None) for name in TOWER_CONFIGS.values()]
    return any(towers) or any(_has_tower(part) for part in parts)
